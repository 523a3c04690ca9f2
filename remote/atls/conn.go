package atls

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"tdx-agent/remote"
)

// wire is a connection below TLS, whose end is an error. crypto/tls takes an end between
// two records for the peer's word that nothing more comes (close_notify), and whoever is
// on the way can make one.
type wire struct{ net.Conn }

// cutError is what a [Conn] reads where it was cut.
type cutError struct{}

func (cutError) Error() string {
	return "the connection has ended without the peer's word that this is the end"
}
func (cutError) Unwrap() error { return io.ErrUnexpectedEOF }

// Read implements net.Conn.
func (w wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	switch {
	case err == io.EOF && n > 0: // crypto/tls drops what comes with another error
		err = nil
	case err == io.EOF:
		err = cutError{}
	}
	return n, err
}

// Conn is an open channel: the peer was appraised, or is one that the service takes
// unattested. It ends by itself when its session does. A Read returns io.EOF only where
// the peer has said that this is the end.
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

	read, written atomic.Int64
	denied        atomic.Bool

	mu      sync.Mutex  // guards what follows
	cut     *time.Timer // ends the drain
	cutAt   time.Time
	onDrain func() // may be nil
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
		c.Cut() // no RESULT: the peer would take it for bytes of the application
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
	if h.isReserved {
		h.isReserved = false
		c.end.reserved--
	}
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
func (c *Conn) Drain() { c.drainFor(c.end.cfg.Drain) }

// drainFor ends the session, and cuts the channel after this time or the one that it has
// already.
func (c *Conn) drainFor(left time.Duration) {
	c.mu.Lock()
	at := time.Now().Add(left)
	switch {
	case c.cut == nil:
		c.cut, c.cutAt = time.AfterFunc(left, c.Cut), at
	case at.Before(c.cutAt):
		c.cut.Reset(left)
		c.cutAt = at
	}
	then := c.onDrain
	c.mu.Unlock()
	c.drain.Do(func() {
		close(c.draining)
		if then != nil {
			then()
		}
	})
}

// whenDraining has f called when the session ends, or now if it has ended.
func (c *Conn) whenDraining(f func()) {
	c.mu.Lock()
	c.onDrain = f
	isOver := c.cut != nil
	c.mu.Unlock()
	if isOver {
		f()
	}
}

// IsDraining reports whether the session has ended.
func (c *Conn) IsDraining() bool {
	select {
	case <-c.draining:
		return true
	default:
		return false
	}
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read.Add(int64(n))
	return n, err
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(int64(n))
	return n, err
}

// Bytes is how many bytes of the application were read and written so far.
func (c *Conn) Bytes() (read, written int64) { return c.read.Load(), c.written.Load() }

// Cut closes the channel without the word that this is the end: the peer's Read fails.
func (c *Conn) Cut() {
	if t, ok := c.Conn.(*tls.Conn); ok {
		t.NetConn().Close()
	}
	c.Close()
}

// Close closes the channel, and tells the peer that nothing more comes.
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

// IsDenied reports whether the policy was replaced by one that denies the peer, or knows
// it as another: nothing more that it asks for should be begun.
func (c *Conn) IsDenied() bool { return c.denied.Load() }

func (c *Conn) deny() {
	c.denied.Store(true)
	c.drainFor(min(c.end.cfg.DeniedDrain, c.end.cfg.Drain))
}

// reappraise judges the peer anew by the policy of now, and drains the channel if it
// is no longer accepted, or not as who the other end was told: in a moment if it is
// denied, in Config.Drain if that could not be told.
func (c *Conn) reappraise(ctx context.Context) error {
	if c.peer.evidence == nil {
		if c.end.cfg.Verifier.Policy().AllowsUnattested(c.service) {
			return nil
		}
		c.deny()
		return &unsupportedError{"the service takes no unattested clients any more"}
	}
	r, err := c.end.cfg.Verifier.Appraise(ctx, c.peer.evidence, remote.Expect{ReportData: c.peer.reportData, Entries: c.entries, CertificateLife: c.peer.life,
		Channel: &remote.Channel{AgentKey: c.peer.AgentKey, Service: c.service, KeyMode: c.peer.KeyMode, Certificate: c.peer.Certificate}})
	if err == nil && !c.peer.isStill(r) {
		err = &unsupportedError{fmt.Sprintf("the policy knows the peer by entry %q now, and the channel was opened for %q", r.Entry, c.peer.Entry())}
		c.deny()
		return err
	}
	switch {
	case errors.As(err, new(*remote.Rejection)):
		c.deny()
	case err != nil:
		c.Drain()
	}
	return err
}

// isStill reports whether a later result names the peer as the one that it was accepted
// by: applications have been told.
func (p *Peer) isStill(r *remote.Result) bool {
	sameImage := (r.Image == nil) == (p.Result.Image == nil) && (r.Image == nil || r.Image.Name == p.Result.Image.Name)
	return r.Entry == p.Result.Entry && sameImage
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

// hasRoom reports whether another channel may be open, those included that will be.
func (e *end) hasRoom(limit int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.open)+e.reserved < limit
}

// reserve keeps a place for the channel that the handshake will open.
func (h *handshake) reserve(limit int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.end.open)+h.reserved >= limit {
		return false
	}
	h.reserved++
	h.isReserved = true
	return true
}

// release gives the place back, if the handshake has one.
func (h *handshake) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isReserved {
		h.isReserved = false
		h.reserved--
	}
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
