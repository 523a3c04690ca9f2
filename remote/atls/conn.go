package atls

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"tdx-agent/remote"
)

// Conn is an open channel: the peer was appraised, or is one that the service takes
// unattested. It ends by itself when its session does.
type Conn struct {
	net.Conn // the TLS connection

	end      *end
	peer     *Peer
	service  string   // that the policy must let the peer reach, "" where we dialled
	entries  []string // that may accept the peer, nil for any
	draining chan struct{}

	once   sync.Once
	drain  sync.Once
	expiry *time.Timer // starts the drain
	cut    *time.Timer // ends it
	mu     sync.Mutex  // guards cut
}

// open makes the channel of a handshake that is done. Where the policy was replaced
// meanwhile, the peer is judged anew: reappraiseAll may have looked before the channel
// was there.
func (h *handshake) open(ctx context.Context, ttl time.Duration, service string, entries []string) (*Conn, error) {
	c := newConn(h, ttl, service, entries)
	if h.cfg.Verifier.Policy() == h.policy {
		return c, nil
	}
	h.step = StepVerify
	if err := c.reappraise(ctx); err != nil {
		c.Close() // no RESULT: the peer would take it for bytes of the application
		return nil, err
	}
	return c, nil
}

// newConn opens a channel for the shorter of our session and the peer's.
func newConn(h *handshake, ttl time.Duration, service string, entries []string) *Conn {
	life := h.cfg.MaxSession
	if ttl > 0 {
		life = min(life, ttl)
	}
	h.conn.SetDeadline(time.Time{})
	h.peer.Opened = h.cfg.Now()
	h.peer.Expires = h.peer.Opened.Add(life)
	c := &Conn{Conn: h.conn, end: h.end, peer: h.peer, service: service, entries: entries, draining: make(chan struct{})}
	c.end.mu.Lock()
	defer c.end.mu.Unlock()
	c.end.open[c] = struct{}{}
	c.expiry = time.AfterFunc(life, c.Drain)
	return c
}

// Peer says who is at the other end.
func (c *Conn) Peer() *Peer { return c.peer }

// Draining is closed when the session has ended: whoever uses the channel should
// finish and open another. After Config.Drain it is cut.
func (c *Conn) Draining() <-chan struct{} { return c.draining }

// Drain ends the session early.
func (c *Conn) Drain() {
	c.drain.Do(func() {
		close(c.draining)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.cut = time.AfterFunc(c.end.cfg.Drain, func() { c.Close() })
	})
}

// Close closes the channel.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.expiry.Stop()
		c.mu.Lock()
		if c.cut != nil {
			c.cut.Stop()
		}
		c.mu.Unlock()
		c.end.mu.Lock()
		delete(c.end.open, c)
		c.end.mu.Unlock()
	})
	return err
}

// reappraise judges the peer anew by the policy of now, and drains the channel if it
// is no longer accepted.
func (c *Conn) reappraise(ctx context.Context) error {
	if c.peer.evidence == nil {
		if c.end.cfg.Verifier.Policy().AllowsUnattested(c.service) {
			return nil
		}
		c.Drain()
		return &unsupportedError{"the service takes no unattested clients any more"}
	}
	_, err := c.end.cfg.Verifier.Appraise(ctx, c.peer.evidence, remote.Expect{ReportData: c.peer.reportData, Entries: c.entries,
		Channel: &remote.Channel{AgentKey: c.peer.AgentKey, Service: c.service, KeyMode: c.peer.KeyMode}})
	if err != nil {
		c.Drain()
	}
	return err
}

// channels lists the open ones.
func (e *end) channels() (all []*Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range e.open {
		all = append(all, c)
	}
	return all
}

func (e *end) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.open)
}

func (e *end) reappraiseAll(ctx context.Context) (denied int) {
	for _, c := range e.channels() {
		if c.reappraise(ctx) != nil {
			denied++
		}
	}
	return denied
}

// PeerFromConn says who is at the other end of a connection of a [Listener] or a
// [Dialer].
func PeerFromConn(c net.Conn) (*Peer, bool) {
	conn, ok := c.(*Conn)
	if !ok {
		return nil, false
	}
	return conn.peer, true
}

type peerKey struct{}

// ConnContext is for http.Server.ConnContext: it lets handlers know the peer.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if p, ok := PeerFromConn(c); ok {
		return context.WithValue(ctx, peerKey{}, p)
	}
	return ctx
}

// PeerFromContext says who sent a request, in a server with [ConnContext].
func PeerFromContext(ctx context.Context) (*Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(*Peer)
	return p, ok
}

// PeerFromRequest is [PeerFromContext] of a request.
func PeerFromRequest(r *http.Request) (*Peer, bool) { return PeerFromContext(r.Context()) }

// CloseWrite says that nothing more will be sent. The peer may go on sending.
func (c *Conn) CloseWrite() error {
	half, ok := c.Conn.(*tls.Conn)
	if !ok {
		return errors.ErrUnsupported
	}
	return half.CloseWrite()
}
