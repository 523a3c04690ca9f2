package atls

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"
)

// ListenerConfig says what a [Listener] offers and spends. A zero limit has its
// default.
type ListenerConfig struct {
	Config
	// Services are the names that clients may ask for. None means that nobody gets in.
	Services []string
	// Entries narrows down which policy entries may accept a client of a service. One
	// that is not here is for all entries that list the service.
	Entries map[string][]string
	// Unattested are the services that take clients which prove nothing, as long as the
	// policy in force allows it too.
	Unattested []string

	MaxHandshakes  int // under way at once. Default: 256
	MaxPerAddress  int // of these from one IPv4 address or IPv6 /64. Default: 16
	PerSecond      int // new connections from one of these. Default: 5
	Burst          int // at once, above PerSecond. Default: 20
	MaxQuotes      int // own quotes that handshakes wait for. Default: 32
	MaxConnections int // open channels. Default: 4096
}

func (c *ListenerConfig) complete() {
	for _, d := range []struct {
		field *int
		value int
	}{{&c.MaxHandshakes, 256}, {&c.MaxPerAddress, 16}, {&c.PerSecond, 5}, {&c.Burst, 20}, {&c.MaxQuotes, 32}, {&c.MaxConnections, 4096}} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
}

// Listener accepts channels. It implements net.Listener: Accept returns only channels
// that are open, and no slow client holds up another.
type Listener struct {
	inner net.Listener
	cfg   ListenerConfig
	end   *end

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	group  sync.WaitGroup
	ready  chan *Conn
	failed chan error // inner's Accept
	slots  chan struct{}

	admission *admission
}

// NewListener accepts channels on inner, which it closes with itself.
func NewListener(inner net.Listener, cfg ListenerConfig) (*Listener, error) {
	cfg.complete()
	if cfg.Attester == nil && cfg.RATLS == nil {
		return nil, errors.New("atls: a listener needs an Attester")
	}
	if err := cfg.checkOneService(); err != nil {
		return nil, err
	}
	e, err := newEnd(cfg.Config)
	if err != nil {
		return nil, err
	}
	l := &Listener{inner: inner, cfg: cfg, end: e, ready: make(chan *Conn), failed: make(chan error, 1), slots: make(chan struct{}, cfg.MaxQuotes),
		admission: newAdmission(&cfg, &e.counted)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.group.Go(l.acceptAll)
	return l, nil
}

// acceptAll starts a handshake for each connection until inner is closed.
func (l *Listener) acceptAll() {
	for {
		raw, err := l.inner.Accept()
		if err != nil {
			if l.ctx.Err() == nil && isTemporary(err) && l.pause() {
				continue
			}
			l.failed <- err
			return
		}
		a := l.admit(raw)
		if a == nil {
			raw.Close() // before TLS there is nothing to say it with
			continue
		}
		l.group.Go(func() { l.handshake(raw, a) })
	}
}

// isTemporary is what net/http waits out too: too many open files, for one.
func isTemporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

func (l *Listener) pause() bool {
	select {
	case <-l.ctx.Done():
		return false
	case <-time.After(20 * time.Millisecond):
		return true
	}
}

func (e *end) takesUnattested(cfg *ListenerConfig, service string) bool {
	return slices.Contains(cfg.Unattested, service) && e.cfg.Verifier.Policy().AllowsUnattested(service)
}

func (l *Listener) admit(raw net.Conn) *admitted {
	if !l.end.hasRoom(l.cfg.MaxConnections) {
		l.end.counted.noRoom.Add(1)
		return nil
	}
	return l.admission.admit(l.ctx, address(raw))
}

func (l *Listener) handshake(raw net.Conn, a *admitted) {
	c, err := l.handshaken(raw, a)
	l.admission.done(a)
	if err != nil {
		raw.Close()
		return
	}
	select {
	case l.ready <- c:
	case <-l.ctx.Done():
		c.Cut()
	}
}

func (l *Listener) handshaken(raw net.Conn, a *admitted) (*Conn, error) {
	ctx := a.ctx
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()
	h, ttl, err := l.talk(ctx, raw, a)
	if err != nil && l.admission.wasEvicted(a) {
		err = &busyError{time.Second}
	}
	var c *Conn
	if err == nil {
		c, err = h.open(ctx, ttl, h.peer.Service, l.cfg.Entries[h.peer.Service])
	}
	h.release()
	if failed := h.finish(err); failed != nil {
		return nil, failed
	}
	return c, nil
}

// talk appraises the client.
func (l *Listener) talk(ctx context.Context, raw net.Conn, a *admitted) (h *handshake, ttl time.Duration, err error) {
	if l.cfg.RATLS != nil {
		return l.end.serveRATLS(ctx, raw, &l.cfg)
	}
	if h, err = l.end.begin(ctx, raw, Server); err == nil {
		h.progress = func(s standing) { l.admission.move(a, s) }
		ttl, err = h.serve(ctx, &l.cfg, l.slots)
	}
	return h, ttl, err
}

// Accept returns the next open channel, a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case err := <-l.failed:
		l.failed <- err // for the next caller
		if l.ctx.Err() != nil {
			return nil, net.ErrClosed
		}
		return nil, err
	}
}

// Close ends handshakes under way and waits for them. Open channels stay.
func (l *Listener) Close() error {
	l.cancel()
	err := l.inner.Close()
	l.group.Wait()
	return err
}

// Addr is the address of the inner listener.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Channels lists the open ones.
func (l *Listener) Channels() []*Conn { return l.end.channels() }

// Counts says what l has counted.
func (l *Listener) Counts() Counts { return l.end.counted.read() }

// Reappraise judges the peers of all open channels by the policy of now, as after a
// reload, and drains the channels of those that are no longer accepted. It returns how
// many these are.
func (l *Listener) Reappraise(ctx context.Context) (denied int) { return l.end.reappraiseAll(ctx) }
