package atls_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/remote/atls"
)

// between is the address of somebody on the way to p's server, who can cut the client's
// connection.
func (p *pair) between(t *testing.T) (address string, client chan net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	client = make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		up, err := net.Dial("tcp", p.address)
		if err != nil {
			return
		}
		defer up.Close()
		client <- c
		go func() { io.Copy(up, struct{ io.Reader }{c}); up.Close() }()
		io.Copy(c, struct{ io.Reader }{up})
	}()
	return l.Addr().String(), client
}

// TestCut tells an end from what somebody on the way makes of a connection, which may be
// between two records, and from what the other side could not finish.
func TestCut(t *testing.T) {
	for name, tc := range map[string]struct {
		end  func(server *atls.Conn, wire net.Conn)
		want error
	}{
		"closed":         {func(s *atls.Conn, _ net.Conn) { s.Close() }, io.EOF},
		"half closed":    {func(s *atls.Conn, _ net.Conn) { s.CloseWrite() }, io.EOF},
		"cut by server":  {func(s *atls.Conn, _ net.Conn) { s.Cut() }, io.ErrUnexpectedEOF},
		"cut on the way": {func(_ *atls.Conn, c net.Conn) { c.(*net.TCPConn).CloseWrite() }, io.ErrUnexpectedEOF},
	} {
		for kind, newOf := range map[string]func(*testing.T) *pair{
			"tdx-atls": func(t *testing.T) *pair { return newPair(t, "") },
			"RA-TLS":   func(t *testing.T) *pair { return newRATLSPair(t, weak) },
		} {
			t.Run(name+", "+kind, func(t *testing.T) {
				p := newOf(t)
				address, client := p.between(t)
				accepted := make(chan *atls.Conn, 1)
				go func() {
					c, err := p.listener.Accept()
					if err == nil {
						io.WriteString(c, "half")
						accepted <- c.(*atls.Conn)
					}
				}()
				c, err := p.dialer.DialContext(t.Context(), "tcp", address, "echo", []string{"server"})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(20 * time.Second))
				b := make([]byte, 4)
				if _, err := io.ReadFull(c, b); err != nil {
					t.Fatal(err)
				}
				server := <-accepted
				defer server.Close()
				tc.end(server, <-client)
				if _, err := c.Read(b); !errors.Is(err, tc.want) {
					t.Errorf("read %v, want %v", err, tc.want)
				}
			})
		}
	}
}

// withEnd is a connection whose last bytes come together with its end, as a net.Conn may
// have it.
type withEnd struct {
	net.Conn
	isLast *atomic.Bool // read all there is until the end
	left   []byte
}

func (c *withEnd) Read(b []byte) (int, error) {
	if !c.isLast.Load() {
		return c.Conn.Read(b)
	}
	more, err := io.ReadAll(c.Conn)
	c.left = append(c.left, more...)
	n := copy(b, c.left)
	if c.left = c.left[n:]; err == nil && len(c.left) == 0 {
		err = io.EOF
	}
	return n, err
}

// TestLastBytesWithEnd takes what comes with the end.
func TestLastBytesWithEnd(t *testing.T) {
	p := newPair(t, "")
	isLast := new(atomic.Bool)
	d, err := atls.NewDialer(atls.Config{Attester: p.client.attester(t), Verifier: verifier(t, p.server.entry("server", "other", ""), p.server)},
		func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := p.connect(ctx, network, address)
			return &withEnd{Conn: c, isLast: isLast}, err
		})
	if err != nil {
		t.Fatal(err)
	}
	goOn := make(chan struct{})
	go func() {
		c, err := p.listener.Accept()
		if err == nil {
			<-goOn
			io.WriteString(c, "all of it")
			c.Close()
		}
	}()
	c, err := d.DialContext(t.Context(), "tcp", p.address, "echo", []string{"server"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	isLast.Store(true)
	close(goOn)
	if b, err := io.ReadAll(c); err != nil || string(b) != "all of it" {
		t.Errorf("got %q, %v", b, err)
	}
}
