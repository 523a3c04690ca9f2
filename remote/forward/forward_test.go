package forward_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tdx-agent/remote/forward"
)

// local is a client of an Outbound whose channels are what dial opens.
func local(t *testing.T, dial func(context.Context) (net.Conn, error)) *net.TCPConn {
	t.Helper()
	return localAt(t, "tcp", "127.0.0.1:0", dial).(*net.TCPConn)
}

func localUnix(t *testing.T, dial func(context.Context) (net.Conn, error)) *net.UnixConn {
	t.Helper()
	return localAt(t, "unix", filepath.Join(shortDir(t), "s"), dial).(*net.UnixConn)
}

// shortDir is a folder for a socket: a test's own has too long a path.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "forward")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func localAt(t *testing.T, network, address string, dial func(context.Context) (net.Conn, error)) net.Conn {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- forward.Outbound(ctx, l, slog.New(slog.DiscardHandler), dial) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	c, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// TestHalfClose lets a client end what it sends and still get its answer.
func TestHalfClose(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		c.Write(append([]byte("got "), b...))
	}()
	c := local(t, func(context.Context) (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) })
	io.WriteString(c, "all")
	c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "got all" {
		t.Errorf("got %q, %v", b, err)
	}
}

// cutOff is a channel that somebody on the network cuts, as the TLS connection below
// reports it.
type cutOff struct{ net.Conn }

func (c cutOff) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// TestCutOff does not turn half an answer into a whole one.
func TestCutOff(t *testing.T) {
	c := local(t, func(context.Context) (net.Conn, error) {
		theirs, ours := net.Pipe()
		go func() {
			io.WriteString(theirs, "half")
			time.Sleep(50 * time.Millisecond)
			theirs.Close()
		}()
		return cutOff{ours}, nil
	})
	if b, err := io.ReadAll(c); err == nil {
		t.Errorf("got %q and its end, want an error", b)
	}
}

// TestPauses carries bursts of every size, with pauses between them in which no large
// buffer is held.
func TestPauses(t *testing.T) {
	peer := backEnd(t, echo)
	for name, c := range map[string]net.Conn{"tcp": local(t, to(peer)), "unix": localUnix(t, to(peer))} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 1, 1023, 1024, 1025, 40 << 10, 1024, 200 << 10, 3} {
				sent, got := make([]byte, size), make([]byte, size)
				for i := range sent {
					sent[i] = byte(i*size + i>>8)
				}
				go c.Write(sent)
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
					t.Fatalf("%d bytes came back as others: %v", size, err)
				}
				time.Sleep(60 * time.Millisecond) // longer than a large buffer waits
			}
		})
	}
}

// short is a listener that lacks descriptors at first.
type short struct {
	net.Listener
	failures int
}

func (l *short) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

// TestTooManyOpenFiles waits until there are descriptors again: whoever opens many
// connections must not end the process, and with it everybody's.
func TestTooManyOpenFiles(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- forward.NewEgress(forward.EgressConfig{}).Serve(ctx, &short{l, 3}) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
	if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 403 ") {
		t.Errorf("got %q, %v", b, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
