package keys

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
)

// KMSConfig says which key management services to ask and when to believe them. All but
// Timeout and Now are required.
type KMSConfig struct {
	// URLs of the services, https, asked in this order. All have the same root key.
	URLs []string
	// Measured returns what this boot has measured, or why nothing may be asked for yet.
	// The root key of the KMS is the id in its key-provider event, the application the
	// one in app-id, and what mr-kms and os-image-hash say must be what the KMS shows.
	Measured func(ctx context.Context) (*measure.Identity, error)
	// Verifier appraises the service's evidence, by the policy for key management
	// services.
	Verifier *remote.Verifier
	// Dial connects to host:port. TLS ends here.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Attest makes the evidence that the KMS judges us by.
	Attest Attest
	// VMConfig is the host's description of this VM, to the byte: the KMS calculates the
	// registers from it.
	VMConfig string
	// Timeout bounds one exchange, connecting and appraisal included; default 60 s.
	Timeout time.Duration
	Now     func() time.Time // nil: time.Now
}

// KMS is dstack's key management service. It implements [Provider], and issues the
// certificates of applications whose keys it provides.
//
// Nothing is sent to a server before it has proven to be a KMS: its certificate is
// signed by the root key that this boot has measured, is for the use "kms:rpc", and
// carries evidence for its key that the policy accepts. The KMS in turn judges us by a
// certificate with our evidence, signed by the temporary authority whose private key it
// hands to everybody (dstack's protocol). There are no sessions that could be resumed.
type KMS struct {
	cfg   KMSConfig
	bases []*url.URL
}

// NewKMS checks cfg and connects to nobody.
func NewKMS(cfg KMSConfig) (*KMS, error) {
	if cfg.Measured == nil || cfg.Verifier == nil || cfg.Dial == nil || cfg.Attest == nil || len(cfg.URLs) == 0 {
		return nil, errors.New("kms: URLs, Measured, Verifier, Dial and Attest are required")
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 60 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	k := &KMS{cfg: cfg}
	for _, text := range cfg.URLs {
		base, err := CheckKMSURL(text)
		if err != nil {
			return nil, err
		}
		k.bases = append(k.bases, base)
	}
	return k, nil
}

// CheckKMSURL parses the URL of a KMS: https, a host, perhaps a port and a path, below
// which is /prpc.
func CheckKMSURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("kms: %q is no URL", text)
	}
	if u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return nil, fmt.Errorf("kms: URL %q, want https://host[:port][/path] and no more", text)
	}
	return u, nil
}

// The reasons of a [KMSError].
const (
	KMSUnreachable = "unreachable" // no connection, no answer in time, or a broken one
	KMSRootKey     = "root_key"    // its certificate is not the measured KMS's
	KMSCertificate = "certificate" // its certificate is out of date, of another name or use
	KMSAttestation = "attestation" // its certificate carries no evidence for its key
	KMSPolicy      = "policy"      // its evidence is not accepted
	KMSMeasurement = "measurement" // it is not the one that this boot's events speak of
	KMSDenied      = "denied"      // it has refused us
	KMSAnswer      = "answer"      // its answer is not one
)

// KMSError says why one KMS gave no keys.
type KMSError struct {
	URL    string
	Reason string // KMSUnreachable and so on
	Err    error
}

func (e *KMSError) Error() string { return fmt.Sprintf("KMS %s: %s: %v", e.URL, e.Reason, e.Err) }

// Unwrap returns Err.
func (e *KMSError) Unwrap() error { return e.Err }

// ExitCode is the program's exit status for this error: a KMS that does not answer is
// worth another try, one that was refused is not.
func (e *KMSError) ExitCode() int {
	switch e.Reason {
	case KMSUnreachable:
		return 10
	case KMSDenied:
		return 8
	case KMSAnswer:
		return 1
	}
	return 5
}

// kmsTarget is who is to be asked, and for whom.
type kmsTarget struct {
	provider measure.KeyProvider
	root     *ecdsa.PublicKey // of the id of provider
	identity *measure.Identity
}

func (k *KMS) target(ctx context.Context) (*kmsTarget, error) {
	id, err := k.cfg.Measured(ctx)
	if err != nil {
		return nil, err
	}
	p, err := measure.ParseKeyProvider([]byte(id.KeyProvider))
	if err != nil {
		return nil, err
	}
	if p.Kind != measure.KeyProviderKMS {
		return nil, fmt.Errorf("kms: this boot has measured key provider %q", p.Kind)
	}
	public, err := x509.ParsePKIXPublicKey(p.ID)
	if err != nil {
		return nil, errors.New("kms: the measured id of the key provider is no public key; want the DER SubjectPublicKeyInfo of the KMS root certificate")
	}
	root, ok := public.(*ecdsa.PublicKey)
	if !ok || root.Curve != elliptic.P256() {
		return nil, errors.New("kms: the measured id of the key provider is not a P-256 key")
	}
	return &kmsTarget{provider: p, root: root, identity: id}, nil
}

// each asks one service after the other until one has answered.
func each[T any](ctx context.Context, k *KMS, ask func(p *kmsPeer) (T, error)) (T, error) {
	var none T
	target, err := k.target(ctx)
	if err != nil {
		return none, err
	}
	var problem error
	for _, base := range k.bases {
		answer, err := ask(&kmsPeer{kms: k, base: base, target: target})
		switch {
		case err == nil:
			return answer, nil
		case problem == nil:
			problem = err
		default:
			problem = fmt.Errorf("%w; %w", problem, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return none, problem
}

// App implements [Provider]. Its errors are of type [*KMSError], one for each URL, or
// say why none was asked.
func (k *KMS) App(ctx context.Context) (*App, error) {
	return each(ctx, k, func(p *kmsPeer) (*App, error) { return p.app(ctx) })
}
