package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sdnotify "github.com/coreos/go-systemd/v22/daemon"
)

// keepNotified tells systemd that the process is ready and, until ctx ends, that it is
// alive as long as alive says so, with line as its status.
func keepNotified(ctx context.Context, log *slog.Logger, alive func(context.Context) error, line func() string) {
	sdnotify.SdNotify(false, sdnotify.SdNotifyReady+"\nSTATUS="+line())
	defer sdnotify.SdNotify(false, sdnotify.SdNotifyStopping)
	interval, err := sdnotify.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(max(interval/3, 100*time.Millisecond))
	defer tick.Stop()
	for {
		if err := alive(ctx); err == nil {
			sdnotify.SdNotify(false, sdnotify.SdNotifyWatchdog+"\nSTATUS="+line())
		} else if ctx.Err() == nil {
			log.Error("watchdog", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// passedListener takes the one socket that systemd passes to a process which serves
// one. Nil and no error: systemd passed none.
func passedListener(name string) (net.Listener, error) {
	passed, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("sockets from systemd: %w", err)
	}
	if len(passed) == 0 {
		return nil, nil
	}
	if ls := passed[name]; len(passed) == 1 && len(ls) == 1 {
		return ls[0], nil
	}
	for _, ls := range passed {
		for _, l := range ls {
			l.Close()
		}
	}
	return nil, exitf(exitConfig, "systemd passed %d kinds of sockets, want one named %q (FileDescriptorName=)", len(passed), name)
}
