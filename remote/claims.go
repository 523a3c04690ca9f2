package remote

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"strings"

	"tdx-agent/measure"
	"tdx-agent/remote/cache"
	"tdx-agent/remote/dcap"
)

// Claims is what evidence says, and how far it proves that. A verdict follows from
// claims, a policy, what is expected, and the time.
type Claims struct {
	// Quote is the parsed quote, nil if it could not be parsed. It is proven if
	// SignatureErr is nil. Its slices are parts of the evidence.
	Quote        *measure.Quote
	SignatureErr *dcap.Error // why the quote is not genuine

	// Report is what collateral says of the quote: nil if it is not genuine, or if
	// CollateralErr says why no collateral could judge it.
	Report        *dcap.Report
	CollateralErr error
	Source        string // where the collateral came from

	// HasLog says that there was an event log. Replayed are RTMR0 to RTMR3 by it;
	// Covered says which of them the log is complete for: certificates carry a boot
	// log cut down to three events.
	HasLog   bool
	Replayed [4]measure.Digest
	Covered  [4]bool
	LogErr   error // the log contradicts itself

	// Identity is what the log's events say. It is proven if the log replays to the
	// quote's RTMR3 and IdentityErr is nil.
	Identity    measure.Identity
	IdentityErr error

	// VMConfig is the host's claim; nothing proves it.
	VMConfig string
}

// OSImageHash is the os_image_hash that the vm_config claims, nil if it has none.
// Nothing proves it.
func (c *Claims) OSImageHash() []byte { return measure.OSImageHash(c.VMConfig) }

// Genuine reports that nothing in the evidence is forged or contradicts the rest.
func (c *Claims) Genuine() bool {
	return c.Quote != nil && c.SignatureErr == nil && c.LogErr == nil && c.IdentityErr == nil && (!c.HasLog || c.replays())
}

// replays reports whether the log explains the quote's registers, where it covers
// them.
func (c *Claims) replays() bool {
	for i, is := range c.Covered {
		if is && c.Replayed[i] != c.Quote.Body.RTMR[i] {
			return false
		}
	}
	return true
}

// cut names the boot registers that the log has no events for and the quote has.
func (c *Claims) cut() string {
	var names []string
	for i, is := range c.Covered[:measure.RTMR3] {
		if !is && c.Replayed[i] != c.Quote.Body.RTMR[i] {
			names = append(names, fmt.Sprintf("RTMR%d", i))
		}
	}
	return strings.Join(names, ", ")
}

// proven reports whether the identity is worth anything. An error says why not.
func (c *Claims) proven(era string) error {
	switch {
	case !c.HasLog:
		return errors.New("there is no event log")
	case c.Quote == nil || c.SignatureErr != nil:
		return errors.New("the quote is not genuine")
	case c.LogErr != nil || !c.replays():
		return errors.New("the event log does not replay to the quote")
	case c.IdentityErr != nil:
		return c.IdentityErr
	case !c.Identity.Ready && era != "0.3":
		return errors.New("the event log has no system-ready, so that an application could have added events")
	}
	return nil
}

// logClaims is what follows from an event log alone.
type logClaims struct {
	events      []measure.Event // of its own, to tell it from another
	replayed    [4]measure.Digest
	covered     [4]bool
	logErr      error
	identity    measure.Identity
	identityErr error
}

// Caps of what is remembered of event logs.
const (
	maxKnownLogs    = 64 // a generation
	maxKnownEvents  = 512
	maxKnownPayload = 128 << 10
)

// logs remembers event logs that belonged to accepted evidence.
type logs struct {
	seed  maphash.Seed
	known *cache.Cache[uint64, *logClaims]
}

func newLogs() *logs {
	return &logs{seed: maphash.MakeSeed(), known: cache.New[uint64, *logClaims](maxKnownLogs)}
}

// claims replays a log and reads its identity, unless it is known.
func (l *logs) claims(events []measure.Event) (c *logClaims, key uint64) {
	key = l.key(events)
	if known, ok := l.known.Get(key); ok && sameEvents(known.events, events) {
		return known, key
	}
	c = new(logClaims)
	if c.replayed, c.logErr = measure.Replay(events); c.logErr == nil {
		c.identity, c.identityErr = measure.IdentityOf(events)
		if c.identityErr == nil && len(c.identity.Late) > 0 {
			c.identityErr = fmt.Errorf("identity events: %q after system-ready, where applications add events", c.identity.Late)
		}
	}
	c.covered = covered(events)
	return c, key
}

// remember keeps a log. Only those of accepted evidence come here.
func (l *logs) remember(c *logClaims, key uint64, events []measure.Event) {
	if c.events != nil || len(events) > maxKnownEvents {
		return
	}
	size := 0
	for i := range events {
		size += len(events[i].Name) + len(events[i].Payload)
	}
	if size > maxKnownPayload {
		return
	}
	kept := *c
	kept.events = make([]measure.Event, len(events))
	for i, e := range events {
		e.Payload = bytes.Clone(e.Payload)
		kept.events[i] = e
	}
	kept.identity, _ = measure.IdentityOf(kept.events) // no part of the caller's bytes
	l.known.Add(key, &kept)
}

func (l *logs) key(events []measure.Event) uint64 {
	var h maphash.Hash
	h.SetSeed(l.seed)
	for i := range events {
		h.Write(events[i].Digest[:])
		h.WriteString(events[i].Name)
		h.Write(events[i].Payload)
	}
	return h.Sum64()
}

func sameEvents(a, b []measure.Event) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := &a[i], &b[i]
		if x.IMR != y.IMR || x.Type != y.Type || x.Digest != y.Digest || x.Version != y.Version || x.Name != y.Name || !bytes.Equal(x.Payload, y.Payload) {
			return false
		}
	}
	return true
}

// covered says which registers a log is complete for: RTMR3 always, the others unless
// the log was cut. A cut log has none of their events, or of RTMR0 the three that
// measure ACPI tables.
func covered(events []measure.Event) [4]bool {
	c := [4]bool{measure.RTMR3: true}
	for i := range events {
		e := &events[i]
		if e.IMR >= 0 && e.IMR < measure.RTMR3 && !e.MeasuresACPI() {
			c[e.IMR] = true
		}
	}
	return c
}
