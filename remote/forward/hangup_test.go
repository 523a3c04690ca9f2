package forward_test

import (
	"context"
	"io"
	"net"
	"testing"
	"time"
)

// TestHangupEndsDial opens no channel for a client that is gone.
func TestHangupEndsDial(t *testing.T) {
	for name, gone := range map[string]func(t *testing.T, dial func(context.Context) (net.Conn, error)){
		"unix": func(t *testing.T, dial func(context.Context) (net.Conn, error)) { localUnix(t, dial).Close() },
		"tcp, reset": func(t *testing.T, dial func(context.Context) (net.Conn, error)) {
			c := local(t, dial)
			c.SetLinger(0)
			c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			nothingStays(t)
			ended := make(chan error, 1)
			gone(t, func(ctx context.Context) (net.Conn, error) {
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Second):
				}
				ended <- ctx.Err()
				return nil, context.Canceled
			})
			if err := <-ended; err == nil {
				t.Error("still dialled for")
			}
		})
	}
}

// TestSilenceIsNoHangup goes on for a client that may still read, or has left something to
// carry.
func TestSilenceIsNoHangup(t *testing.T) {
	for name, tc := range map[string]struct {
		act  func(t *testing.T, dial func(context.Context) (net.Conn, error)) net.Conn
		want string
	}{
		"unix, all said": {func(t *testing.T, dial func(context.Context) (net.Conn, error)) net.Conn {
			c := localUnix(t, dial)
			c.CloseWrite()
			return c
		}, ""},
		"tcp, all said": {func(t *testing.T, dial func(context.Context) (net.Conn, error)) net.Conn {
			c := local(t, dial)
			c.CloseWrite()
			return c
		}, ""},
		"unix, bytes and gone": {func(t *testing.T, dial func(context.Context) (net.Conn, error)) net.Conn {
			c := localUnix(t, dial)
			io.WriteString(c, "a line for a log\n")
			c.Close()
			return nil
		}, "a line for a log\n"},
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan string, 1)
			peer := backEnd(t, func(c net.Conn) {
				b, _ := io.ReadAll(c)
				io.WriteString(c, "answer")
				got <- string(b)
			})
			c := tc.act(t, func(ctx context.Context) (net.Conn, error) {
				select {
				case <-ctx.Done():
					got <- "no dial"
					return nil, ctx.Err()
				case <-time.After(350 * time.Millisecond): // some looks
				}
				return net.Dial("tcp", peer)
			})
			if c != nil {
				if b, err := io.ReadAll(c); err != nil || string(b) != "answer" {
					t.Errorf("the client reads %q, %v", b, err)
				}
			}
			if s := <-got; s != tc.want {
				t.Errorf("the peer reads %q, want %q", s, tc.want)
			}
		})
	}
}
