package atls_test

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"tdx-agent/remote/atls"
	"tdx-agent/remote/forward"
)

// benchCopy sends b.N mebibytes to the forwarder at address and waits until all of them
// have come out at the sink, which says how many it has got.
func benchCopy(b *testing.B, address string, sink <-chan int64) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	block := make([]byte, 1<<20)
	if _, err := c.Write(block); err != nil { // the channel opens meanwhile
		b.Fatal(err)
	}
	b.SetBytes(int64(len(block)))
	start := cpu(b)
	b.ResetTimer()
	for range b.N {
		if _, err := c.Write(block); err != nil {
			b.Fatal(err)
		}
	}
	c.(*net.TCPConn).CloseWrite()
	if got := <-sink; got != int64(b.N+1)<<20 {
		b.Fatalf("%d bytes came out of %d MiB", got, b.N+1)
	}
	b.StopTimer()
	b.ReportMetric(float64((cpu(b)-start).Microseconds())/float64(b.N), "cpu-µs/MiB")
}

// sink takes one connection and says how many bytes came.
func sink(b *testing.B) (address string, got <-chan int64) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	n := make(chan int64, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			copied, _ := io.Copy(io.Discard, struct{ io.Reader }{c})
			c.Close()
			n <- copied
		}
	}()
	return l.Addr().String(), n
}

// outbound is a forwarder from a local TCP port to what dial opens.
func outbound(b *testing.B, l net.Listener, dial func(context.Context) (net.Conn, error)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- forward.Outbound(ctx, l, slog.New(slog.DiscardHandler), dial) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
}

func dialTCP(address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}
}

func listenTCP(b *testing.B) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	return l
}

// BenchmarkForward carries bytes through two forwarders and a channel between them; its
// floor is the same forwarders with plain TLS between them.
func BenchmarkForward(b *testing.B) {
	b.Run("plain-tls", func(b *testing.B) {
		out, got := sink(b)
		server, err := tls.Listen("tcp", "127.0.0.1:0", tlsOf(b))
		if err != nil {
			b.Fatal(err)
		}
		outbound(b, server, dialTCP(out))
		local, own := listenTCP(b), tlsOf(b)
		outbound(b, local, func(ctx context.Context) (net.Conn, error) {
			return (&tls.Dialer{Config: own}).DialContext(ctx, "tcp", server.Addr().String())
		})
		benchCopy(b, local.Addr().String(), got)
	})
	b.Run("atls", func(b *testing.B) {
		out, got := sink(b)
		p := newPair(b, "")
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			done <- forward.Inbound(ctx, p.listener, slog.New(slog.DiscardHandler), map[string]forward.Service{"echo": {Dial: dialTCP(out)}})
		}()
		b.Cleanup(func() { cancel(); <-done })
		local := listenTCP(b)
		outbound(b, local, func(ctx context.Context) (net.Conn, error) {
			return p.dialer.DialContext(ctx, "tcp", p.address, "echo", []string{"server"})
		})
		benchCopy(b, local.Addr().String(), got)
	})
}

// BenchmarkIdleForward keeps sessions that have carried something, and says what each
// holds: in the forwarder at its one end, the other, and the channel between them.
func BenchmarkIdleForward(b *testing.B) {
	const small, large = 100, 40000
	l := listenTCP(b)
	b.Cleanup(func() { l.Close() })
	go func() { // answers, and holds nothing itself
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				request := make([]byte, small)
				if _, err := io.ReadFull(c, request); err == nil {
					c.Write(make([]byte, large))
				}
				c.Read(request)
			}()
		}
	}()
	p := newPair(b, `require = "key"`, func(s, c *atls.Config, l *atls.ListenerConfig) { s.KeyTTL, c.KeyTTL = time.Hour, time.Hour })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- forward.Inbound(ctx, p.listener, slog.New(slog.DiscardHandler), map[string]forward.Service{"echo": {Dial: dialTCP(l.Addr().String())}})
	}()
	b.Cleanup(func() { cancel(); <-done })
	local := listenTCP(b)
	outbound(b, local, func(ctx context.Context) (net.Conn, error) {
		return p.dialer.DialContext(ctx, "tcp", p.address, "echo", []string{"server"})
	})
	answer := make([]byte, large)
	before := inUse()
	for range b.N {
		c, err := net.Dial("tcp", local.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		c.Write(make([]byte, small))
		if _, err := io.ReadFull(c, answer); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	time.Sleep(200 * time.Millisecond) // what was carried is over
	b.ReportMetric(float64(inUse()-before)/1024/float64(b.N), "KiB/both-ends")
}
