package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/ratls"
)

// reloader replaces the policy of a Verifier when the process gets SIGHUP: everything
// that the flags name is read anew, the policy file, its images, the collateral files.
// What cannot be read or accepted changes nothing. It keeps the collateral fresh, too.
type reloader struct {
	flags    *verifierFlags
	verifier *remote.Verifier
	store    *collateral.Store
	log      *slog.Logger
	hangups  chan os.Signal
	renewer  *ratls.Renewer // nil: not RA-TLS, or without a certificate
}

func (f *verifierFlags) reloader(v *remote.Verifier, store *collateral.Store, log *slog.Logger) *reloader {
	return &reloader{flags: f, verifier: v, store: store, log: log, hangups: make(chan os.Signal, 1)}
}

// start works in group until ctx ends, and takes SIGHUP from here on, which like every
// signal comes to the first thread, and that one does nothing else. After a reload
// reappraise judges those who are connected anew and says how many are denied now; nil
// is nobody.
func (r *reloader) start(ctx context.Context, group *errgroup.Group, reappraise func(context.Context) int) {
	signal.Notify(r.hangups, syscall.SIGHUP)
	if r.renewer != nil {
		group.Go(func() error { return r.renewer.Run(ctx) })
	}
	group.Go(func() error { return r.run(ctx, reappraise) })
}

// once is for a command that dials once: it only keeps the certificate, until stop.
func (r *reloader) once(ctx context.Context) (stop func()) {
	if r.renewer == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.renewer.Run(ctx)
	}()
	return func() { cancel(); <-done }
}

func (r *reloader) run(ctx context.Context, reappraise func(context.Context) int) error {
	defer signal.Stop(r.hangups)
	for ctx.Err() == nil {
		if err := r.under(ctx, r.store, reappraise); err != nil {
			return err
		}
	}
	return nil
}

// under works with one store, until the next reload has another.
func (r *reloader) under(ctx context.Context, store *collateral.Store, reappraise func(context.Context) int) error {
	group, until := errgroup.WithContext(ctx)
	until, stop := context.WithCancel(until)
	defer stop()
	group.Go(func() error { return store.Run(until) })
	for r.wait(until) && !r.reload(ctx, reappraise) {
	}
	stop()
	return group.Wait()
}

// wait returns true for a SIGHUP, and false when ctx ends.
func (r *reloader) wait(ctx context.Context) bool {
	select {
	case <-r.hangups:
		return true
	case <-ctx.Done():
		return false
	}
}

// reload reports whether there is a new policy.
func (r *reloader) reload(ctx context.Context, reappraise func(context.Context) int) bool {
	notifyReloading()
	defer sdnotify.SdNotify(false, sdnotify.SdNotifyReady)
	old := r.verifier.Policy()
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	policy, store, err := r.flags.sources(ctx, r.log)
	if err == nil {
		err = r.verifier.SetPolicy(policy, store)
	}
	if err != nil {
		r.log.Error("the policy is not reloaded: the last one stays in force", "error", err, "generation", r.verifier.Generation(), "policy", old.ID)
		return false
	}
	r.store = store
	for _, n := range policy.Loosened() {
		r.log.Warn("policy", "note", n)
	}
	denied := 0
	if reappraise != nil {
		denied = reappraise(ctx)
	}
	r.log.Info("the policy is reloaded", "generation", r.verifier.Generation(), "policy", policy.ID, "was", old.ID, "simulated", policy.Simulated(), "connections_denied", denied)
	return true
}

// notifyReloading is what systemd waits for in a unit of Type=notify-reload. READY=1
// follows, whatever becomes of the reload: the process serves on.
func notifyReloading() {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) == nil {
		sdnotify.SdNotify(false, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", sdnotify.SdNotifyReloading, now.Nano()/1000))
	}
}
