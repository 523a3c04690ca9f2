package forward_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tdx-agent/remote/atls"
	"tdx-agent/remote/forward"
)

// TestUnixCutOff does not turn half an answer into a whole one for a client that has sent
// anything, whether it has finished that or not.
func TestUnixCutOff(t *testing.T) {
	for name, tc := range map[string]struct {
		finish func(*net.UnixConn)
		cut    bool
	}{
		"cut":                     {func(*net.UnixConn) {}, true},
		"cut, after all was said": {func(c *net.UnixConn) { c.CloseWrite() }, true},
		"whole":                   {func(c *net.UnixConn) { c.CloseWrite() }, false},
	} {
		var same *os.File // as the client's, but not closed with it
		t.Run(name, func(t *testing.T) {
			arrived := make(chan struct{})
			peer := backEnd(t, func(c net.Conn) {
				io.ReadFull(c, make([]byte, 3))
				io.WriteString(c, "half")
				<-arrived
				if tc.cut {
					c.(*net.TCPConn).SetLinger(0)
				}
			})
			c := localUnix(t, to(peer))
			io.WriteString(c, "ask")
			b := make([]byte, 4)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "half" {
				t.Fatalf("%q, %v", b, err)
			}
			tc.finish(c)
			close(arrived)
			want := io.EOF
			if tc.cut {
				want = syscall.ECONNRESET
			}
			if _, err := c.Read(b); !errors.Is(err, want) {
				t.Errorf("read %v, want %v", err, want)
			}
			var err error
			if same, err = c.File(); err != nil {
				t.Fatal(err)
			}
		})
		// All is closed now.
		if code, err := unix.GetsockoptInt(int(same.Fd()), unix.SOL_SOCKET, unix.SO_ERROR); code != 0 || err != nil {
			t.Errorf("%s: and then %v, %v", name, syscall.Errno(code), err)
		}
		same.Close()
	}
}

// TestCutThroughEgress tells a service on TCP, which the process that has the channel
// reaches by way of an Egress, an end from a cut, before it has said anything.
func TestCutThroughEgress(t *testing.T) {
	ends := make(chan error, 1)
	address := backEnd(t, func(c net.Conn) {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err := io.Copy(io.Discard, c)
		ends <- err
	})
	_, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, address)})
	through := forward.Through(socket)
	p := newPair(t, map[string]forward.Service{
		"raw": {Dial: func(ctx context.Context) (net.Conn, error) { return through(ctx, "tcp", address) }},
	}, newMachine(t, "client", true), "client", "")
	for name, tc := range map[string]struct {
		end  func(*atls.Conn)
		want error
	}{
		"closed": {func(c *atls.Conn) { c.Close() }, nil},
		"cut":    {(*atls.Conn).Cut, syscall.ECONNRESET},
	} {
		c := p.dial(t, p.dialer, "raw")
		io.WriteString(c, "half of what is to be kept")
		tc.end(c)
		if err := <-ends; !errors.Is(err, tc.want) {
			t.Errorf("%s: the service reads %v, want %v", name, err, tc.want)
		}
	}
}
