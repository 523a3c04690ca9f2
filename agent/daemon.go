package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/status"
	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

const (
	// quoteWait bounds a quote: a silent host takes 31 s, and another process of the
	// guest may hold it as long before us.
	quoteWait = 70 * time.Second
	// checkEvery is how often the log is held against the register when nobody asks.
	checkEvery = 30 * time.Second
)

// daemon is the running agent: what the sockets serve from.
type daemon struct {
	cfg      *Config
	dir      runtimeDir
	log      *slog.Logger
	started  time.Time
	backend  *backend
	ledger   *measure.Ledger
	attester *measure.Attester
	files    *measure.GuestFiles // nil: no application files
	keys     *appKeys
	audit    *audit.Log        // nil: it is not or could not be opened
	cheap    *guestapi.Limiter // of lines in it
	access   []status.Access
	cloud    [2]string // DMI vendor and product
	channel  *atls.Key // nil: this boot has no agent key
	extended bell      // rings when RTMR3 may have been extended
	metrics  *agentMetrics

	mu        sync.Mutex // guards what follows
	info      guestapi.Info
	infoOf    infoKey    // what info was made from
	diverged  string     // the last problem reported, so that each is logged once
	auditHead audit.Head // the last reported
	appCert   string     // PEM chain, "" while there is none

	uncertified string // why there is no appCert; the background's alone
}

// infoKey is all that Info depends on and that changes while the agent runs.
type infoKey struct {
	regs    measure.Registers
	records int
}

// newDaemon takes the folder that files came from, "" for the configured one.
func newDaemon(ctx context.Context, cfg *Config, dir runtimeDir, b *backend, l *measure.Ledger, hostShared string, files *measure.GuestFiles, log *slog.Logger) (*daemon, error) {
	s, err := l.Snapshot(ctx)
	cfg = provableConfig(cfg, b, s, err)
	d := &daemon{cfg: cfg, dir: dir, log: log, started: time.Now().UTC(), backend: b, ledger: l, files: files,
		cloud: [2]string{dmi("sys_vendor"), dmi("product_name")}}
	d.metrics = newAgentMetrics(d)
	quoter := b.quoter
	if quoter != nil {
		quoter = timedQuoter{quoter, d.metrics.took}
	}
	ac := measure.AttesterConfig{Quoter: quoter, Ledger: l, Boot: b.boot, ServeDiverged: cfg.OnForeignExtend == "serve"}
	if files != nil {
		ac.VMConfig = files.SysConfig.VMConfig
	}
	d.attester = measure.NewAttester(ac)
	kms, faulty := d.newKMS(ctx)
	if faulty != nil {
		return nil, faulty
	}
	local, faulty := d.newLocal()
	if faulty != nil {
		return nil, faulty
	}
	d.keys = newAppKeys(cfg, hostShared, dir, files, kms, local)
	if err := d.loadChannelKey(); err != nil {
		return nil, err
	}
	if err == nil {
		err = d.checkBoot()
	}
	if err := d.report(err); err != nil {
		return nil, err
	}
	if err := d.checkMeasured(s); err != nil {
		return nil, err
	}
	return d, nil
}

// provableConfig turns loosened settings off when the log is damaged or lost, so that
// it cannot show whether they were measured. The agent must start all the same: one
// that does not cannot say what is wrong.
func provableConfig(cfg *Config, b *backend, s measure.Snapshot, err error) *Config {
	if !errors.As(err, new(*measure.DivergenceError)) || checkLoosened(cfg, s.Events()) == nil {
		return cfg
	}
	b.notes = append(b.notes, fmt.Sprintf("settings that loosen defaults are off: the log cannot show that this boot has measured them: %s", cfg.agentConfig()))
	tight := *cfg
	tight.tighten()
	return &tight
}

// checkBoot holds the boot event log against the registers. Where those cannot be
// read, only a quote can tell.
func (d *daemon) checkBoot() error {
	regs, err := d.registers()
	if errors.As(err, new(*measure.UnsupportedError)) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.attester.CheckBoot(regs)
}

// checkMeasured refuses to serve an application or settings that are not the ones
// RTMR3 speaks of.
func (d *daemon) checkMeasured(s measure.Snapshot) error {
	events := s.Events()
	if err := checkLoosened(d.cfg, events); err != nil {
		return err
	}
	id, err := measure.IdentityOf(events)
	if err != nil {
		d.log.Warn("identity events are not in order", "error", err)
	}
	if d.files == nil || id.ComposeHash == nil {
		return nil
	}
	if h := measure.ComposeHash(d.files.AppCompose); string(h[:]) != string(id.ComposeHash) {
		return exitf(exitConfig, "app-compose.json hashes to %x, but this boot has measured %x; it was changed after the boot step", h, id.ComposeHash)
	}
	return nil
}

// report logs a divergence when it is new, and passes any other error on.
func (d *daemon) report(err error) error {
	var div *measure.DivergenceError
	if err != nil && !errors.As(err, &div) {
		return err
	}
	now := ""
	if div != nil {
		now = div.Error()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if now != "" && now != d.diverged {
		d.metrics.foreign.Inc()
		d.log.Error("registers and log disagree", "error", now, "on_foreign_extend", d.cfg.OnForeignExtend)
	}
	d.diverged = now
	return nil
}

// Evidence implements guestapi.Guest.
func (d *daemon) Evidence(ctx context.Context, rd measure.ReportData, c guestapi.Caller) (*measure.Evidence, error) {
	ctx, cancel := context.WithTimeout(ctx, quoteWait)
	defer cancel()
	ev, err := d.attester.Evidence(ctx, rd, c.Account())
	d.metrics.quoted("local", err)
	if err != nil {
		if d.report(err) != nil {
			d.log.Warn("no quote", "error", err)
		}
		return nil, err
	}
	return ev, nil
}

// emit records an application's event, which only ever follows the boot step's: an
// earlier one would stand among the events that verifiers take the identity from.
func (d *daemon) emit(ctx context.Context, e measure.Entry) (measure.Record, error) {
	s, err := d.ledger.Snapshot(ctx)
	if err != nil {
		d.report(err)
		return measure.Record{}, err
	}
	if !d.measured(s.Events()) {
		return measure.Record{}, exitf(exitDenied, "event %q: the boot step has not finished; run tdx-agent measure first", e.Name)
	}
	r, err := d.ledger.Record(ctx, e)
	if err != nil {
		d.report(err)
		return measure.Record{}, err
	}
	d.extended.ring()
	d.log.Info("event extended into RTMR3", "event", r.Name, "seq", r.Seq, "rtmr3", r.Next, "caller", r.Caller)
	return r, nil
}

// measured tells whether the boot step has finished.
func (d *daemon) measured(events []measure.Event) bool {
	id, err := measure.IdentityOf(events)
	if d.cfg.Boot.Era == string(measure.Era03) {
		return err == nil && id.InstanceID != nil
	}
	return id.Ready
}

// GPU implements guestapi.Guest.
func (d *daemon) GPU() string {
	b, err := readCapped(d.cfg.Compat.GPUInfo, 1<<20)
	if err != nil {
		return ""
	}
	return string(b)
}

// registers reads the registers, or takes those of the last quote where the kernel
// offers no other way.
func (d *daemon) registers() (measure.Registers, error) {
	regs, err := d.backend.registers.Registers()
	if errors.As(err, new(*measure.UnsupportedError)) {
		if q := d.attester.LastQuote(); q != nil {
			return q.Body.Registers, nil
		}
	}
	return regs, err
}

// background keeps the promise of readiness: a quote when the agent starts, until
// one has worked, and the log held against the register from then on.
func (d *daemon) background(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	here := d.keys.here
	for {
		if d.attester.LastQuote() == nil && d.backend.quoter != nil {
			if _, err := d.Evidence(ctx, measure.ReportData{}, guestapi.Caller{}); err != nil && ctx.Err() == nil {
				d.log.Warn("background quote failed; it will be tried again", "error", err)
			}
		}
		if d.attester.LastQuote() != nil {
			d.keepCertified(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-here: // now there can be a certificate
			here = nil
		case <-tick.C:
		}
		if err := d.alive(ctx); err != nil && ctx.Err() == nil {
			d.log.Error("the RTMR3 log could not be checked", "error", err)
		}
	}
}

// alive proves that the log can be locked and the register read. A divergence is
// reported, and is not a failure: a restart could not repair it.
func (d *daemon) alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := d.ledger.Snapshot(ctx)
	if err == nil {
		err = d.checkBoot()
	}
	if err := d.report(err); err != nil {
		return err
	}
	if age := d.attester.Running(); age > 2*quoteWait {
		return fmt.Errorf("a quote has been running for %s", age)
	}
	return nil
}

func dmi(name string) string {
	b, err := os.ReadFile("/sys/class/dmi/id/" + name)
	if err != nil || len(b) > 256 {
		return ""
	}
	return string(trimSpace(b))
}
