package keys

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
	"unicode/utf8"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// The bounds of a certificate request, in bytes and in names.
const (
	MaxSubject  = 256
	MaxAltNames = 128
	MaxAltName  = 253
)

// CertificateRequest is what a certificate is to say.
type CertificateRequest struct {
	Subject  string   // common name; may be empty
	AltNames []string // IP addresses and DNS names
	RATLS    bool     // carry evidence for the key
	Server   bool     // extended key usages
	Client   bool
	AppInfo  bool // carry the application info that the evidence gives
	// NotBefore and NotAfter are seconds since 1970; nil is 1975 and ten years from
	// now.
	NotBefore, NotAfter *uint64
	Now                 time.Time // the moment of issue; zero is the clock's
}

// TLSKey is a P-256 key with its certificate.
type TLSKey struct {
	redacts
	key *box[[]byte]
	// Chain has the key's certificate first.
	Chain []Certificate
}

// ChainPEM returns the chain in PEM, each ending in a newline.
func (k *TLSKey) ChainPEM() []string {
	list := make([]string, len(k.Chain))
	for i := range k.Chain {
		list[i] = k.Chain[i].PEM()
	}
	return list
}

// KeyPEM returns the private key in PEM (PKCS #8). The bytes are the TLSKey's own.
func (k *TLSKey) KeyPEM() []byte { return *k.key.v }

// Zero overwrites the private key.
func (k *TLSKey) Zero() { clear(*k.key.v) }

// IssueRandom makes a new key and its certificate.
func (a *App) IssueRandom(ctx context.Context, r CertificateRequest, attest Attest) (*TLSKey, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	scalar, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	return a.issue(ctx, key, newSecret(scalar), r, attest)
}

// IssueDerived makes the certificate of the key of a path, which is the same every
// time and not the one that [App.Derive] returns.
func (a *App) IssueDerived(ctx context.Context, path string, r CertificateRequest, attest Attest) (*TLSKey, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	secret, err := a.deriveSecret(path)
	if err != nil {
		return nil, err
	}
	key, err := secret.p256()
	if err != nil {
		secret.Zero()
		return nil, err
	}
	return a.issue(ctx, key, secret, r, attest)
}

func (a *App) deriveSecret(path string) (*Secret, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.key == nil {
		return nil, errDropped
	}
	return derive(a.key.bytes(), path)
}

// errNoAuthority is for keys that a KMS provides: its applications' certificates are
// signed by it.
var errNoAuthority = errors.New("the application's certificates are issued by its KMS, and this agent knows of none to ask: write its urls under [keys.kms] in agent.toml")

// issue takes over secret, the scalar of key.
func (a *App) issue(ctx context.Context, key *ecdsa.PrivateKey, secret *Secret, r CertificateRequest, attest Attest) (*TLSKey, error) {
	defer secret.Zero()
	a.mu.RLock()
	ca, kms, dropped, omitLegacy := a.authority, a.kms, a.key == nil, a.omitLegacy
	a.mu.RUnlock()
	if dropped {
		return nil, errDropped
	}
	var chain []Certificate
	var err error
	switch {
	case ca != nil:
		chain, err = ca.certify(ctx, key, &r, attest, omitLegacy)
	case kms != nil:
		chain, err = kms.certify(ctx, key, &r, attest)
	default:
		err = errNoAuthority
	}
	if err != nil {
		return nil, err
	}
	pkcs8, err := secret.pkcs8(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	defer clear(pkcs8)
	keyPEM := appendPEM("PRIVATE KEY", pkcs8)
	return &TLSKey{key: &box[[]byte]{&keyPEM}, Chain: chain}, nil
}

// check finds what cannot be put into a certificate.
func (r *CertificateRequest) check() error {
	if len(r.Subject) > MaxSubject || !utf8.ValidString(r.Subject) {
		return &RequestError{fmt.Sprintf("subject: want at most %d bytes of UTF-8", MaxSubject)}
	}
	if len(r.AltNames) > MaxAltNames {
		return &RequestError{fmt.Sprintf("alt_names: %d names, want at most %d", len(r.AltNames), MaxAltNames)}
	}
	for _, name := range r.AltNames {
		if err := checkAltName(name); err != nil {
			return err
		}
	}
	const year10000 = 253402300800
	for _, t := range []*uint64{r.NotBefore, r.NotAfter} {
		if t != nil && *t >= year10000 {
			return &RequestError{fmt.Sprintf("not_before or not_after is %d seconds, want a time before the year 10000", *t)}
		}
	}
	if from, to := r.dates(); !from.Before(to) {
		return &RequestError{"not_before must be earlier than not_after"}
	}
	return nil
}

func checkAltName(name string) error {
	if name == "" || len(name) > MaxAltName {
		return &RequestError{fmt.Sprintf("alt_names: a name has %d bytes, want 1 to %d", len(name), MaxAltName)}
	}
	for i := range len(name) {
		if name[i] <= ' ' || name[i] >= 0x7f {
			return &RequestError{fmt.Sprintf("alt_names: %q: want ASCII without spaces; write an international name in its xn-- form", name)}
		}
	}
	return nil
}

func (r *CertificateRequest) now() time.Time {
	if r.Now.IsZero() {
		return time.Now()
	}
	return r.Now
}

func (r *CertificateRequest) dates() (from, to time.Time) {
	from, to = firstDay, r.now().Add(lifetime)
	if r.NotBefore != nil {
		from = time.Unix(int64(*r.NotBefore), 0)
	}
	if r.NotAfter != nil {
		to = time.Unix(int64(*r.NotAfter), 0)
	}
	return from.UTC(), to.UTC()
}

func (r *CertificateRequest) template() *x509.Certificate {
	t := &x509.Certificate{Subject: pkix.Name{CommonName: r.Subject}, KeyUsage: x509.KeyUsageDigitalSignature}
	t.NotBefore, t.NotAfter = r.dates()
	for _, name := range r.AltNames {
		if ip := net.ParseIP(name); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, name)
		}
	}
	if r.Server {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if r.Client {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	return t
}

// extensions makes dstack's extensions for a key. There is a quote only where it ends
// up in the certificate, or where what it says does.
func (c *authority) extensions(ctx context.Context, r *CertificateRequest, key *ecdsa.PublicKey, attest Attest, omitLegacy bool) ([]pkix.Extension, error) {
	list := []pkix.Extension{ratls.UsageExtension(ratls.UsageApp)}
	if !r.RATLS && !r.AppInfo {
		return list, nil
	}
	ev, err := attestKey(ctx, key, attest)
	if err != nil {
		return nil, err
	}
	if r.RATLS {
		evidence, err := c.evidence(ev, omitLegacy)
		if err != nil {
			return nil, err
		}
		list = append(list, evidence...)
	}
	if r.AppInfo {
		info, err := ratls.AppInfoOf(ev.Evidence, osImageHash(ev.Evidence))
		if err != nil {
			return nil, fmt.Errorf("application info: %w", err)
		}
		list = append(list, info.Extension())
	}
	return list, nil
}

// osImageHash is what the host claims, as everywhere in dstack.
func osImageHash(ev *measure.Evidence) []byte {
	var config struct {
		Hash string `json:"os_image_hash"`
	}
	if json.Unmarshal([]byte(ev.VMConfig), &config) != nil {
		return nil
	}
	h, err := hex.DecodeString(config.Hash)
	if err != nil || len(h) != 32 {
		return nil
	}
	return h
}
