package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
	"tdx-agent/measure"
)

// appKeys are the application's keys, loaded when they are first needed: before the
// boot step has finished nobody knows whose they are.
type appKeys struct {
	provider keys.Provider
	absent   error         // why there is no provider
	remote   bool          // not on this machine: only the background asks the provider
	patience time.Duration // with a remote provider, for one try
	here     chan struct{} // closed when a remote provider has given app; nil for others

	mu      sync.Mutex // guards what follows
	app     *keys.App
	pending *pendingKeys // of a remote provider, until app is here
	dropped bool
}

// newAppKeys chooses where the keys come from: .appkeys.json where there is one, else
// the remote provider that is configured, both of which may be nil, else a fresh seed for
// an application that asks for no provider.
func newAppKeys(cfg *Config, hostShared string, dir runtimeDir, files *measure.GuestFiles, kms *keys.KMS, local *keys.Local) *appKeys {
	switch {
	case files == nil:
		return &appKeys{absent: exitf(exitConfig, "no keys: the application's files could not be read when the agent started")}
	case files.AppKeys != nil:
		path := cfg.Boot.AppKeys
		if path == "" && hostShared == "" {
			hostShared = cfg.Boot.HostShared
		}
		if path == "" {
			path = filepath.Join(hostShared, ".appkeys.json")
		}
		return &appKeys{provider: keys.File{Path: path, KMS: kms}}
	case files.Compose.KeyProvider == measure.KeyProviderKMS && kms != nil:
		patience := time.Duration(len(cfg.Keys.KMS.URLs)) * (2*cfg.Keys.KMS.Timeout + quoteWait)
		return &appKeys{provider: kms, remote: true, patience: patience, here: make(chan struct{}), pending: &pendingKeys{}}
	case files.Compose.KeyProvider == measure.KeyProviderLocal && local != nil:
		return &appKeys{provider: local, remote: true, patience: cfg.Keys.Local.Timeout + quoteWait, here: make(chan struct{}), pending: &pendingKeys{}}
	case files.Compose.KeyProvider != measure.KeyProviderNone:
		return &appKeys{absent: exitf(exitConfig, "no keys: app-compose.json asks for key provider %q, and there is no .appkeys.json with its keys and no [keys] table that says where to get them", files.Compose.KeyProvider)}
	}
	return &appKeys{provider: keys.Ephemeral{Path: dir.appSeed()}}
}

// load returns the keys. check judges who provides them, once.
func (k *appKeys) load(ctx context.Context, check func(measure.KeyProvider) error) (*keys.App, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.app != nil || k.absent != nil:
		return k.app, k.absent
	case k.remote:
		return nil, k.pending
	}
	app, err := k.provider.App(ctx)
	if err != nil {
		return nil, fmt.Errorf("the application's keys: %w", err)
	}
	if err := check(app.Provider()); err != nil {
		app.Zero()
		return nil, err
	}
	k.app = app
	return app, nil
}

// missing says why keys that come over the network are not here; nil if they are, or if
// there are none to wait for.
func (k *appKeys) missing() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.remote || k.app != nil {
		return nil
	}
	return k.pending
}

func (k *appKeys) drop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropped = true
	if k.app != nil {
		k.app.Zero()
	}
}

// appKeys returns the application's keys.
func (d *daemon) appKeys(ctx context.Context) (*keys.App, error) { return d.measuredKeys(ctx, d.keys) }

// measuredKeys loads keys, if RTMR3 speaks of their provider. They are this application's
// and no other's, so they are given on the same terms as quotes: not while something has
// been measured that nobody can explain.
func (d *daemon) measuredKeys(ctx context.Context, k *appKeys) (*keys.App, error) {
	if err := d.explained(ctx); err != nil {
		return nil, fmt.Errorf("no keys: %w", err)
	}
	app, err := k.load(ctx, func(p measure.KeyProvider) error { return d.checkProvider(ctx, p) })
	if err == nil && !d.cfg.RATLS.LegacyOIDs {
		app.OmitLegacyOIDs()
	}
	return app, err
}

// explained returns the divergence for which quotes are refused, if there is one.
func (d *daemon) explained(ctx context.Context) error {
	regs, err := d.ledger.Check(ctx)
	if err == nil {
		err = d.attester.CheckBoot(regs)
	}
	if err == nil {
		return nil
	}
	if err := d.report(err); err != nil {
		return err
	}
	if d.cfg.OnForeignExtend == "serve" {
		return nil
	}
	return err
}

// checkProvider tells whether RTMR3 speaks of this provider.
func (d *daemon) checkProvider(ctx context.Context, p measure.KeyProvider) error {
	id, err := d.measuredIdentity(ctx)
	if err != nil {
		return err
	}
	if got := string(p.Payload()); id.KeyProvider != "" && id.KeyProvider != got {
		return exitf(exitConfig, "the application's keys are of provider %s, but this boot has measured %s", got, id.KeyProvider)
	}
	return nil
}

// measuredIdentity returns what the boot step has measured, once it has finished.
func (d *daemon) measuredIdentity(ctx context.Context) (*measure.Identity, error) {
	s, err := d.ledger.Snapshot(ctx)
	if err := d.report(err); err != nil {
		return nil, err
	}
	if err != nil && d.cfg.OnForeignExtend != "serve" {
		return nil, err
	}
	events := s.Events()
	if !d.measured(events) {
		return nil, exitf(exitDenied, "no keys yet: the boot step has not finished; run tdx-agent measure first")
	}
	id, err := measure.IdentityOf(events)
	if err != nil {
		return nil, err
	}
	return &id, nil
}

// certify makes the application's certificate that Info shows. Its key is dropped:
// the certificate says who this is, and lets nobody in.
func (d *daemon) certify(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*quoteWait)
	defer cancel()
	app, err := d.appKeys(ctx)
	if err != nil {
		return err
	}
	key, err := app.IssueRandom(ctx, keys.CertificateRequest{Subject: "demo-cert", Client: true, RATLS: true}, func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		return d.Evidence(ctx, rd, guestapi.Caller{})
	})
	if err != nil {
		return err
	}
	defer key.Zero()
	chain := strings.Join(key.ChainPEM(), "\n")
	d.mu.Lock()
	defer d.mu.Unlock()
	d.appCert = chain
	return nil
}

// keepCertified tries for the certificate until there is one, and logs what is in the
// way when that changes.
func (d *daemon) keepCertified(ctx context.Context) {
	d.mu.Lock()
	done := d.appCert != ""
	d.mu.Unlock()
	if done {
		return
	}
	now := ""
	if err := d.certify(ctx); err != nil {
		now = err.Error()
	}
	if now != "" && now != d.uncertified && ctx.Err() == nil {
		d.log.Warn("no application certificate yet; Info lacks app_cert", "error", now)
	}
	d.uncertified = now
}
