package atls

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"tdx-agent/remote"
	"tdx-agent/remote/cache"
)

// Back-off of a dialler that was refused: a quote is dear, and a peer that refuses one
// will refuse the next.
const (
	firstBackOff = 10 * time.Second
	lastBackOff  = 5 * time.Minute
)

// A peer that closes the connection at once may be full for a moment: its limit of new
// connections is counted by the second. That costs neither end much, so it is tried again
// within one dial, and a little later if that does not help.
const (
	closedTries   = 3
	closedPause   = 250 * time.Millisecond
	closedBackOff = time.Second
)

// Dialer opens channels. For many goroutines.
type Dialer struct {
	end *end
	// dial makes the connection below TLS.
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu      sync.Mutex // guards what follows
	targets *cache.Cache[target, *targetState]
}

type target struct{ address, service string }

// targetState lets one handshake with a target run at a time, and none during a
// back-off.
type targetState struct {
	turn chan struct{} // holds one token

	mu     sync.Mutex // guards what follows
	until  time.Time
	length time.Duration
	last   error
	policy *remote.Policy // that has refused; nil where the peer did
}

// NewDialer returns a Dialer. dial makes the connections below TLS; nil is a
// net.Dialer.
func NewDialer(cfg Config, dial func(ctx context.Context, network, address string) (net.Conn, error)) (*Dialer, error) {
	e, err := newEnd(cfg)
	if err != nil {
		return nil, err
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return &Dialer{end: e, dial: dial, targets: cache.New[target, *targetState](512)}, nil
}

// BackOffError says that a target refused lately and is not asked again yet.
type BackOffError struct {
	Until time.Time
	Last  error // its refusal
}

func (e *BackOffError) Error() string {
	return fmt.Sprintf("atls: not dialled before %s: %v", e.Until.UTC().Format(time.RFC3339), e.Last)
}

// Unwrap returns the refusal.
func (e *BackOffError) Unwrap() error { return e.Last }

// DialContext opens a channel to a service at an address. entries names the policy
// entries that may accept the peer: addresses prove nothing, so a host could divert the
// connection to any other peer that is accepted for something. It must not be empty.
// The connection is a *Conn, the error of a handshake an [*Error].
func (d *Dialer) DialContext(ctx context.Context, network, address, service string, entries []string) (net.Conn, error) {
	if len(entries) == 0 {
		return nil, errors.New("atls: dial: no policy entry is expected: name those that may accept the peer")
	}
	for _, name := range entries {
		if !d.end.cfg.Verifier.Policy().Has(name) {
			return nil, fmt.Errorf("atls: dial: the policy has no entry %q: it could accept nobody", name)
		}
	}
	t := d.target(target{address, service})
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("atls: dial %s: %w", address, ctx.Err())
	}
	policy := d.end.cfg.Verifier.Policy()
	if err := t.waiting(time.Now(), policy); err != nil {
		return nil, err
	}
	c, err := d.patiently(ctx, network, address, service, entries)
	for range 2 { // each end may find once that key mode does not do, and then keeps nothing of the other
		if failed, ok := errors.AsType[*Error](err); ok && failed.Code == CodeReattest {
			c, err = d.once(ctx, network, address, service, entries)
		}
	}
	if failed, ok := errors.AsType[*Error](err); ok && !errors.Is(ctx.Err(), context.Canceled) {
		t.refused(failed, policy)
	}
	if err != nil {
		return nil, err
	}
	t.accepted()
	return c, nil
}

func (d *Dialer) target(key target) *targetState {
	d.mu.Lock()
	defer d.mu.Unlock()
	t, ok := d.targets.Get(key)
	if !ok {
		t = &targetState{turn: make(chan struct{}, 1)}
		d.targets.Add(key, t)
	}
	return t
}

// waiting says that a back-off is under way. It ends with the policy that it is owed to.
func (t *targetState) waiting(now time.Time, policy *remote.Policy) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Before(t.until) && (t.policy == nil || t.policy == policy) {
		return &BackOffError{Until: t.until, Last: t.last}
	}
	return nil
}

// refused starts a back-off, unless the refusal cost no quote. Where it did, a peer that
// says busy has the next one no sooner than another.
func (t *targetState) refused(e *Error, policy *remote.Policy) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last, t.policy = e, nil
	if errors.As(e.Err, new(*remote.Rejection)) {
		t.policy = policy
	}
	isFree := e.isFree()
	switch {
	case e.Code == CodeClosed && isFree:
		t.until = time.Now().Add(closedBackOff + rand.N(closedBackOff/4))
	case e.Code == CodeBusy && !e.Remote: // our own quotes are slow: the peer has had none
		t.until = time.Now().Add(e.RetryAfter)
	case e.Code == CodeBusy:
		wait := e.RetryAfter
		if !isFree {
			wait = max(wait, firstBackOff)
		}
		t.until = time.Now().Add(wait + rand.N(wait/2+time.Millisecond))
	case isFree:
	default:
		t.length = min(max(2*t.length, firstBackOff), lastBackOff)
		t.until = time.Now().Add(t.length + rand.N(t.length/4))
	}
}

// isFree reports whether the handshake ended before it cost a quote.
func (e *Error) isFree() bool { return e.Step == StepTLS || e.Step == StepHello }

func (t *targetState) accepted() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.until, t.length, t.last, t.policy = time.Time{}, 0, nil, nil
}

// patiently makes one handshake, or another where the peer closes the connection at once.
func (d *Dialer) patiently(ctx context.Context, network, address, service string, entries []string) (net.Conn, error) {
	for pause := closedPause; ; pause *= 2 {
		c, err := d.once(ctx, network, address, service, entries)
		failed, ok := errors.AsType[*Error](err)
		if !ok || failed.Code != CodeClosed || !failed.isFree() || pause >= closedPause<<(closedTries-1) {
			return c, err
		}
		select {
		case <-time.After(pause + rand.N(pause/2)):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// once makes one handshake.
func (d *Dialer) once(ctx context.Context, network, address, service string, entries []string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limitTotal)
	defer cancel()
	raw, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("atls: dial %s: %w", address, err)
	}
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	h, ttl, err := d.talk(ctx, raw, address, service, entries)
	var c *Conn
	if err == nil {
		c, err = h.open(ctx, ttl, "", entries)
	}
	if failed := h.finish(err); failed != nil {
		raw.Close()
		return nil, failed
	}
	if !stop() {
		c.Cut()
		return nil, fmt.Errorf("atls: dial %s: %w", address, ctx.Err())
	}
	return c, nil
}

// talk appraises the server.
func (d *Dialer) talk(ctx context.Context, raw net.Conn, address, service string, entries []string) (h *handshake, ttl time.Duration, err error) {
	if d.end.cfg.RATLS != nil {
		h, ttl, err = d.end.dialRATLS(ctx, raw, address, service, entries)
	} else if h, err = d.end.begin(ctx, raw, Client); err == nil {
		ttl, err = h.dial(ctx, service, entries)
	}
	h.peer.Address, h.peer.Service = address, service // raw may end at a relay of ours
	return h, ttl, err
}

// Channels lists the open ones that d has opened.
func (d *Dialer) Channels() []*Conn { return d.end.channels() }

// Counts says what d has counted.
func (d *Dialer) Counts() Counts { return d.end.counted.read() }

// Reappraise is [Listener.Reappraise] for the channels that d has opened.
func (d *Dialer) Reappraise(ctx context.Context) (denied int) { return d.end.reappraiseAll(ctx) }
