package atls_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/remote/atls"
)

// closing is the address of a server that closes the first n connections at once, as a
// Listener without room does, and passes the others on to p.
func (p *pair) closing(t *testing.T, n int64, withReset bool) (address string, seen *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	seen = new(atomic.Int64)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if seen.Add(1) <= n {
				if withReset { // as where the client's first bytes are there
					c.Read(make([]byte, 1))
					c.(*net.TCPConn).SetLinger(0)
				}
				c.Close()
				continue
			}
			go func() {
				defer c.Close()
				up, err := net.Dial("tcp", p.address)
				if err != nil {
					return
				}
				defer up.Close()
				// Not by the kernel, whose pipes would stay for a while.
				go func() { io.Copy(up, struct{ io.Reader }{c}); up.Close() }()
				io.Copy(c, struct{ io.Reader }{up})
			}()
		}
	}()
	return l.Addr().String(), seen
}

// TestClosedAtOnce says what it may come from, and asks a few times, but not for ever.
func TestClosedAtOnce(t *testing.T) {
	for name, withReset := range map[string]bool{"end": false, "reset": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, "")
			p.echo(t)
			address, _ := p.closing(t, 2, withReset)
			if err := p.dialTo(t.Context(), address); err != nil {
				t.Errorf("a peer with room again: %v", err)
			}
			address, seen := p.closing(t, 1000, withReset)
			err := p.dialTo(t.Context(), address)
			if e := wantCode(t, err, atls.CodeClosed, false); e.Step != atls.StepTLS || !strings.Contains(err.Error(), "before it said anything: it may be full, or not speak tdx-atls/1") {
				t.Errorf("step %s, %v", e.Step, err)
			}
			if n := seen.Load(); n != 3 {
				t.Errorf("asked %d times, want 3", n)
			}
			if err := p.dialTo(t.Context(), address); !errors.As(err, new(*atls.BackOffError)) || seen.Load() != 3 {
				t.Errorf("at once after that: %v", err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			address, seen = p.closing(t, 1000, withReset)
			if err := p.dialTo(ctx, address); err == nil || seen.Load() > 1 {
				t.Errorf("after the caller has gone: %v, asked %d times", err, seen.Load())
			}
		})
	}
}

// TestFullListener lets a client in a moment later that has come too often.
func TestFullListener(t *testing.T) {
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.PerSecond, l.Burst = 5, 1 })
	p.echo(t)
	for range 3 {
		roundTrip(t, p.mustDial(t), "in the end")
	}
	if n := p.listener.Counts(); n.TooOften == 0 {
		t.Error("the listener was never too busy")
	}
}

// TestClosedLater tells an end of the connection from a peer that says something wrong,
// on both ends.
func TestClosedLater(t *testing.T) {
	p := newPair(t, "")
	c := p.stranger(t, tlsOf(t))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if f := p.failed(t, 1)[0]; f.Code != atls.CodeClosed || f.Step != atls.StepHello || f.Refused || !strings.Contains(f.Text, "closed the connection") {
		t.Errorf("the server has %+v", f)
	}
	address := hostile(t, func(c net.Conn) { c.Close() })
	err := p.dialTo(t.Context(), address)
	if e := wantCode(t, err, atls.CodeClosed, false); e.Step != atls.StepHello {
		t.Errorf("the client: %v", err)
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	go func() {
		if c, err := plain.Accept(); err == nil {
			io.WriteString(c, "SSH-2.0-nothing of ours\r\n")
			io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	wantCode(t, p.dialTo(t.Context(), plain.Addr().String()), atls.CodeBadFrame, false)
}

// gone is an Attester whose own connection has ended.
type gone struct{ atls.Attester }

func (gone) Attest(context.Context, *atls.Session, bool) (*atls.Statement, error) {
	return nil, io.EOF
}

// TestOwnFailureIsOurs does not blame the peer for it.
func TestOwnFailureIsOurs(t *testing.T) {
	p := newPair(t, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) { s.Attester = gone{s.Attester} })
	p.echo(t)
	_, err := p.dial()
	wantCode(t, err, atls.CodeInternal, true)
}
