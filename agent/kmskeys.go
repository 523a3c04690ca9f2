package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
	"tdx-agent/remote/forward"
)

// KeysConfig says where an application's keys come from when it asks for a provider.
type KeysConfig struct {
	KMS   KMSConfig   `toml:"kms"`
	Local LocalConfig `toml:"local"`
}

func newKeysConfig() KeysConfig {
	return KeysConfig{
		KMS:   KMSConfig{URLs: []string{}, Collateral: []string{}, PCCS: []string{}, Timeout: time.Minute},
		Local: LocalConfig{TCBStatus: []string{string(dcap.UpToDate)}, Timeout: time.Minute},
	}
}

func (c *KeysConfig) check() error {
	if err := c.KMS.check(); err != nil {
		return err
	}
	return c.Local.check()
}

// loosened adds what loosens a default.
func (c *KeysConfig) loosened(m map[string]any) {
	if c.Local.URL != "" && !slices.Equal(c.Local.TCBStatus, newKeysConfig().Local.TCBStatus) {
		m["keys.local.tcb_status"] = c.Local.TCBStatus
	}
}

// KMSConfig says which key management services there are, and whom to take for one.
type KMSConfig struct {
	URLs       []string      `toml:"urls"`
	Policy     string        `toml:"policy"`
	Collateral []string      `toml:"collateral"`
	PCCS       []string      `toml:"pccs"`
	Timeout    time.Duration `toml:"timeout"`
}

const maxKMSURLs = 8

func (c *KMSConfig) check() error {
	if len(c.URLs) == 0 {
		if c.Policy != "" {
			return errors.New("keys.kms.policy is given, but keys.kms.urls is empty")
		}
		return nil
	}
	if len(c.URLs) > maxKMSURLs {
		return fmt.Errorf("keys.kms.urls has %d elements, want at most %d", len(c.URLs), maxKMSURLs)
	}
	for _, text := range c.URLs {
		if _, err := keys.CheckKMSURL(text); err != nil {
			return fmt.Errorf("keys.kms.urls: %w", err)
		}
	}
	if !filepath.IsAbs(c.Policy) {
		return fmt.Errorf("keys.kms.policy is %q, want the absolute path of a policy file: without one no KMS is accepted", c.Policy)
	}
	for _, path := range c.Collateral {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("keys.kms.collateral: %q is not an absolute path", path)
		}
	}
	return checkKeyTimeout("keys.kms.timeout", c.Timeout)
}

// newKMS makes the client of the KMS that is configured; nil if none is. It connects to
// nobody yet.
func (d *daemon) newKMS(ctx context.Context) (*keys.KMS, error) {
	c := &d.cfg.Keys.KMS
	if len(c.URLs) == 0 || d.files == nil {
		return nil, nil
	}
	policy, err := readPolicy(ctx, c.Policy)
	if err != nil {
		return nil, err
	}
	roots, err := policy.Roots()
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	store, err := collateral.New(collateral.Config{Roots: roots, Files: c.Collateral, PCCS: c.PCCS, Dial: d.dial, Logger: d.log, Dir: d.dir.kmsCollateral(),
		IntelPCS: len(c.Collateral) == 0 && len(c.PCCS) == 0 && slices.Contains(roots.Pins(), dcap.IntelRoot())})
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	v, err := remote.NewVerifier(remote.Config{Policy: policy, Collateral: store, RealHardware: !d.backend.simulated})
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	kms, err := keys.NewKMS(keys.KMSConfig{URLs: c.URLs, Measured: d.measuredIdentity, Verifier: v, Dial: d.dial, VMConfig: d.files.SysConfig.VMConfig, Timeout: c.Timeout,
		Attest: func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
			return d.Evidence(ctx, rd, guestapi.Caller{})
		}})
	return kms, withExit(exitConfig, err)
}

// dial connects by way of egress, since this process has no network.
func (d *daemon) dial(ctx context.Context, network, address string) (net.Conn, error) {
	return forward.Through(d.dir.egressSocket())(ctx, network, address)
}

// keepKeys gets the keys that come over the network, until they are here. Nobody waits
// for it: callers are told how far it is.
func (d *daemon) keepKeys(ctx context.Context) {
	if !d.keys.remote {
		return
	}
	told := ""
	for wait := firstKeyWait; ; wait = min(2*wait, maxKeyWait) {
		err := d.fetchKeys(ctx, wait)
		if err == nil {
			d.log.Info("the application's keys are here", "provider", d.files.Compose.KeyProvider)
			return
		}
		if now := err.Error(); now != told && ctx.Err() == nil {
			d.log.Warn("no keys for the application yet; they will be asked for again", "error", now)
			told = now
		}
		if !errors.As(err, new(*keys.KMSError)) && !errors.As(err, new(*keys.LocalError)) {
			wait = firstKeyWait // nobody was asked: it is this machine that is not ready
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// How long to wait before keys are asked for again.
const (
	firstKeyWait = time.Second
	maxKeyWait   = time.Minute
)

// fetchKeys tries once. After a failure it leaves for callers what it was, and when there
// is another try.
func (d *daemon) fetchKeys(ctx context.Context, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d.keys.patience)
	defer cancel()
	app, err := d.keys.provider.App(ctx)
	if err == nil {
		if err = d.checkProvider(ctx, app.Provider()); err != nil {
			app.Zero()
		}
	}
	d.keys.mu.Lock()
	defer d.keys.mu.Unlock()
	if err != nil {
		d.keys.pending = &pendingKeys{err: err, next: time.Now().Add(wait)}
		return err
	}
	if d.keys.dropped {
		app.Zero()
		return nil
	}
	d.keys.app, d.keys.pending = app, nil
	close(d.keys.here)
	return nil
}

// pendingKeys is the answer to whoever asks for keys before they are here.
type pendingKeys struct {
	err  error // of the last try; nil before the first has ended
	next time.Time
}

func (p *pendingKeys) Error() string {
	if p.err == nil {
		return "the application's keys are not here yet: their provider is being asked"
	}
	return fmt.Sprintf("the application's keys are not here yet: %v", p.err)
}

// Unwrap returns what was in the way the last time.
func (p *pendingKeys) Unwrap() error { return p.err }

// RetryAfter is when it may be worth while to ask again.
func (p *pendingKeys) RetryAfter() time.Duration { return max(time.Until(p.next), firstKeyWait) }

// ExitCode is the program's exit status for this error.
func (p *pendingKeys) ExitCode() int {
	if p.err == nil {
		return exitThrottled
	}
	return exitCode(p.err)
}
