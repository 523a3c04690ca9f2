package main

import (
	"context"
	"fmt"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/status"
	"tdx-agent/measure"
)

// The RTMR3 log has room for everybody: a part that is the boot step's and the operator's
// alone, a part for each application that may record events, and what is left for the
// callers of dstack.sock and tappd.sock. Nobody can take another's.
const (
	reservedEvents   = 64
	reservedBytes    = 16 << 10
	bytesOfEvent     = 256 // of JSON, on the average
	defaultMaxEvents = 64
	maxDeclared      = (measure.DefaultMaxBytes - reservedBytes) / bytesOfEvent // events, all applications together
)

// maxEvents is how many events of the application a boot takes; 0 without the grant.
func (a *ApplicationConfig) maxEvents() int {
	switch {
	case !a.has("measure"):
		return 0
	case a.MaxEvents == 0:
		return defaultMaxEvents
	}
	return a.MaxEvents
}

func (a *ApplicationConfig) checkMaxEvents() error {
	switch {
	case a.MaxEvents != 0 && !a.has("measure"):
		return fmt.Errorf("max_events is given without the grant %q", "measure")
	case a.MaxEvents < 0 || a.MaxEvents > maxDeclared:
		return fmt.Errorf("max_events is %d, want 1 to %d", a.MaxEvents, maxDeclared)
	}
	return nil
}

func declaredEvents(all []ApplicationConfig) (n int) {
	for i := range all {
		n += all[i].maxEvents()
	}
	return n
}

func checkParts(all []ApplicationConfig) error {
	if n := declaredEvents(all); n > maxDeclared {
		return fmt.Errorf("the applications may record %d events together, want at most %d, so that each has room for its own: set max_events of those with the grant %q, which is %d without", n, maxDeclared, "measure", defaultMaxEvents)
	}
	return nil
}

func (a *ApplicationConfig) part() measure.Part {
	return measure.Part{Owner: fmt.Sprintf("application %q", a.Name), MaxEvents: a.maxEvents(), MaxBytes: a.maxEvents() * bytesOfEvent}
}

// undeclaredPart is that of dstack.sock and tappd.sock together.
func undeclaredPart(all []ApplicationConfig) measure.Part {
	n := declaredEvents(all)
	return measure.Part{Owner: "dstack.sock and tappd.sock", MaxEvents: measure.DefaultMaxEvents - reservedEvents - n, MaxBytes: measure.DefaultMaxBytes - reservedBytes - n*bytesOfEvent}
}

// socketGuest is the daemon as the callers of one socket see it.
type socketGuest struct {
	*daemon
	part measure.Part
}

// Emit implements guestapi.Guest.
func (g *socketGuest) Emit(ctx context.Context, name string, payload []byte, c guestapi.Caller) error {
	_, err := g.emit(ctx, measure.Entry{Name: name, Payload: payload, Caller: fmt.Sprintf("uid %d pid %d", c.UID, c.PID), Part: &g.part})
	return err
}

// eventParts tells, for status, who has used how much of the log.
func (d *daemon) eventParts(records []measure.Record) (parts []status.EventPart) {
	add := func(p measure.Part) {
		events, bytes := measure.Used(records, p.Owner)
		parts = append(parts, status.EventPart{Owner: p.Owner, Events: events, MaxEvents: p.MaxEvents, Bytes: bytes, MaxBytes: p.MaxBytes, Full: p.IsFull(events, bytes)})
	}
	for i := range d.cfg.Applications {
		if a := &d.cfg.Applications[i]; a.has("measure") {
			add(a.part())
		}
	}
	if d.cfg.Compat.FullAccess {
		add(undeclaredPart(d.cfg.Applications))
	}
	return parts
}
