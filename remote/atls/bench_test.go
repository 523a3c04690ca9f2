package atls_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// cpu is what this process has used so far: both ends of a handshake, and the garbage
// collector.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchDial opens b.N connections one after the other and reports the processor time
// of both ends for each, without what exclude says.
func benchDial(b *testing.B, dial func() (net.Conn, error), exclude func() time.Duration) {
	once := func() {
		c, err := dial()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Write([]byte{1}); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
	once() // caches, and in key mode the quote
	start, excluded := cpu(b), exclude()
	for b.Loop() {
		once()
	}
	used := cpu(b) - start - (exclude() - excluded)
	b.ReportMetric(float64(used.Nanoseconds())/1e3/float64(b.N), "cpu-µs/op")
}

func nothing() time.Duration { return 0 }

// benchQuoter has the time of quotes counted: it is the host's, not the protocol's.
type benchQuoter struct {
	*machine
	b    *testing.B
	used atomic.Int64
}

func (q *benchQuoter) quote(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	start := cpu(q.b)
	defer func() { q.used.Add(int64(cpu(q.b) - start)) }()
	return q.machine.quote(ctx, rd)
}

// BenchmarkConnect opens channels between two ends in this process; its floor is mutual
// TLS 1.3 between the same, with the same keys and curves. What a quote costs is left
// out: it is simulated.
func BenchmarkConnect(b *testing.B) {
	b.Run("plain-mtls", func(b *testing.B) {
		cfg := tlsOf(b)
		cfg.SessionTicketsDisabled = true
		l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		go echoAll(l)
		own := tlsOf(b)
		benchDial(b, func() (net.Conn, error) { return tls.Dial("tcp", l.Addr().String(), own) }, nothing)
	})
	for name, more := range map[string]string{"key": `require = "key"`, "quote": ""} {
		b.Run(name, func(b *testing.B) {
			p := &pair{server: newMachine(b, "server", true), client: newMachine(b, "client", true)}
			server, client := &benchQuoter{machine: p.server, b: b}, &benchQuoter{machine: p.client, b: b}
			newPairOf(b, p, more, func(s, c *atls.Config, _ *atls.ListenerConfig) {
				s.Attester, c.Attester = server.attester(b), client.attester(b)
				if more != "" {
					s.KeyTTL, c.KeyTTL = time.Hour, time.Hour
				}
			})
			p.echo(b)
			benchDial(b, p.dial, func() time.Duration { return time.Duration(server.used.Load() + client.used.Load()) })
			if more == "" != (p.server.quoted() > 1) {
				b.Errorf("%d quotes of the server in mode %s", p.server.quoted(), name)
			}
		})
	}
}

func (q *benchQuoter) attester(b *testing.B) *atls.Key {
	k, err := atls.NewKey(q.key, q.quote, q.rtmr3)
	if err != nil {
		b.Fatal(err)
	}
	return k
}

func echoAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.Close()
		}()
	}
}
