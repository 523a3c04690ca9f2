package ratls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"tdx-agent/measure"
)

// Life is how long a certificate of a [Renewer] lives.
const Life = time.Hour

const (
	backdated  = 5 * time.Minute  // notBefore lies so far back: clocks differ
	issueLimit = 80 * time.Second // an agent waits 70 s for a quote
	firstRetry = 5 * time.Second
	lastRetry  = time.Minute
	// settle keeps an application that records event after event from having as many
	// quotes made.
	settle    = time.Second
	lookEvery = time.Minute // at the clock, which may jump
)

// Attester makes evidence for the keys of certificates.
type Attester interface {
	// Evidence returns evidence whose report data is [ReportData] of a DER
	// SubjectPublicKeyInfo.
	Evidence(ctx context.Context, spki []byte) (*measure.Evidence, error)
	// Changed returns nil once RTMR3 or the vm_config is no longer as ev has it. An error
	// says that nobody knows.
	Changed(ctx context.Context, ev *measure.Evidence) error
}

// RenewerConfig says what certificates a [Renewer] makes.
type RenewerConfig struct {
	Attester Attester // required
	// OmitLegacyOIDs leaves out the extensions .1 and .2 (legacy_oids = false).
	OmitLegacyOIDs bool
	Server, Client bool // extended key usages
	// Jitter returns a duration from 0 to most. Nil: random.
	Jitter func(most time.Duration) time.Duration
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: none
}

// Renewer keeps a TLS certificate of this TD current: a key of its own and evidence
// for it, self-signed, for an hour. It is replaced at two thirds of its life, and at
// once when RTMR3 is extended or the vm_config changes, always with a new key. If that
// fails it stays in use until its end, and after that there is none: a stale
// certificate is never shown. For many goroutines.
type Renewer struct {
	cfg RenewerConfig

	mu      sync.Mutex // guards what follows
	current *tls.Certificate
	last    error         // why the last attempt failed
	settled chan struct{} // closed after the first attempt
}

// NewRenewer returns a Renewer without a certificate yet: [Renewer.Run] makes them.
func NewRenewer(cfg RenewerConfig) (*Renewer, error) {
	if cfg.Attester == nil {
		return nil, errors.New("RA-TLS: a certificate needs an Attester")
	}
	if cfg.Jitter == nil {
		cfg.Jitter = func(most time.Duration) time.Duration { return mathrand.N(most + 1) }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Renewer{cfg: cfg, settled: make(chan struct{})}, nil
}

// Certificate returns the current certificate. Before the first attempt to make one has
// ended it waits for that, or for ctx. The error says why there is none.
func (r *Renewer) Certificate(ctx context.Context) (*tls.Certificate, error) {
	select {
	case <-r.settled:
	case <-ctx.Done():
		return nil, fmt.Errorf("RA-TLS: no certificate yet: %w", ctx.Err())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.current == nil:
		return nil, fmt.Errorf("RA-TLS: no certificate: %w", r.last)
	case !r.cfg.Now().Before(r.current.Leaf.NotAfter):
		why := r.last
		if why == nil {
			why = errors.New("the clock has jumped")
		}
		return nil, fmt.Errorf("RA-TLS: the last certificate ended at %s, and there is no newer one: %w", r.current.Leaf.NotAfter.UTC().Format(time.RFC3339), why)
	}
	return r.current, nil
}

// Until is when the current certificate ends; zero: there is none.
func (r *Renewer) Until() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil {
		return time.Time{}
	}
	return r.current.Leaf.NotAfter
}

// Run makes certificates until ctx ends. It is called once.
func (r *Renewer) Run(ctx context.Context) error {
	retry := firstRetry
	for ctx.Err() == nil {
		ev, err := r.issue(ctx)
		if err != nil {
			wait := retry + r.cfg.Jitter(retry/4)
			r.cfg.Logger.Warn("no new RA-TLS certificate; the last one stays in use until its end", "error", err, "again_in", wait)
			retry = min(2*retry, lastRetry)
			r.wait(ctx, r.cfg.Now().Add(wait), ev)
			continue
		}
		retry = firstRetry
		r.wait(ctx, r.current.Leaf.NotAfter.Add(-Life/3-r.cfg.Jitter(Life/10)), ev) // only this goroutine writes current
	}
	return nil
}

// wait returns when the next certificate is due: at a time by the clock, which may jump,
// or once RTMR3 was extended, and not before a moment has passed. ev is that of the last
// one, nil if that could not be made.
func (r *Renewer) wait(ctx context.Context, at time.Time, ev *measure.Evidence) {
	pause(ctx, settle)
	for retry := firstRetry; ctx.Err() == nil; {
		left := at.Sub(r.cfg.Now())
		if left <= 0 {
			return
		}
		isDue, err := r.changed(ctx, min(left, lookEvery), ev)
		if isDue {
			return
		}
		if err == nil {
			retry = firstRetry
			continue
		}
		r.cfg.Logger.Warn("whether RTMR3 was extended is not known", "error", err, "again_in", retry)
		pause(ctx, min(retry, left))
		retry = min(2*retry, lastRetry)
	}
}

// changed waits for a change, at most for limit. An error comes before that.
func (r *Renewer) changed(ctx context.Context, limit time.Duration, ev *measure.Evidence) (is bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if ev != nil {
		err = r.cfg.Attester.Changed(ctx, ev)
		if err == nil || ctx.Err() == nil {
			return err == nil, err
		}
	}
	<-ctx.Done()
	return false, nil
}

func pause(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}

// issue makes a certificate, and keeps why it could not.
func (r *Renewer) issue(ctx context.Context) (*measure.Evidence, error) {
	ctx, cancel := context.WithTimeout(ctx, issueLimit)
	defer cancel()
	cert, ev, err := r.certificate(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.current = cert
		r.cfg.Logger.Info("new RA-TLS certificate", "until", cert.Leaf.NotAfter)
	}
	r.last = err
	select {
	case <-r.settled:
	default:
		close(r.settled)
	}
	return ev, err
}

func (r *Renewer) certificate(ctx context.Context) (*tls.Certificate, *measure.Evidence, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	ev, err := r.cfg.Attester.Evidence(ctx, spki)
	if err != nil {
		return nil, nil, err
	}
	template, err := r.template()
	if err != nil {
		return nil, nil, err
	}
	if template.ExtraExtensions, err = Extensions(ev, spki); err != nil {
		return nil, nil, err
	}
	if r.cfg.OmitLegacyOIDs {
		template.ExtraExtensions = WithoutLegacy(template.ExtraExtensions)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, nil, fmt.Errorf("RA-TLS: certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, ev, err
}

func (r *Renewer) template() (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := r.cfg.Now()
	t := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "tdx-agent RA-TLS"}, NotBefore: now.Add(-backdated), NotAfter: now.Add(Life),
		KeyUsage: x509.KeyUsageDigitalSignature}
	if r.cfg.Server {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if r.cfg.Client {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	return t, nil
}
