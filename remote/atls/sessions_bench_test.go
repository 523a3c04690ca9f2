package atls_test

import (
	"context"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// inUse is the memory in use by this process's heap and stacks, after a collection.
func inUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// BenchmarkIdle keeps every session that it opens: what one holds, of both ends
// together. As with "-benchtime 5000x", which is 5,000 of them.
func BenchmarkIdle(b *testing.B) {
	for name, more := range map[string]string{"key": `require = "key"`, "quote": ""} {
		b.Run(name, func(b *testing.B) {
			p := newPair(b, more, func(s, c *atls.Config, l *atls.ListenerConfig) {
				s.KeyTTL, c.KeyTTL = time.Hour, time.Hour
				l.MaxConnections = b.N + 10
			})
			p.echo(b)
			p.mustDial(b)
			conns := make([]net.Conn, 0, b.N)
			defer func() {
				for _, c := range conns {
					c.Close()
				}
			}()
			before := inUse()
			for range b.N {
				c, err := p.dial()
				if err != nil {
					b.Fatal(err)
				}
				conns = append(conns, c)
			}
			for len(p.peers()) < b.N+1 {
				time.Sleep(time.Millisecond)
			}
			b.StopTimer()
			b.ReportMetric(float64(inUse()-before)/1024/float64(b.N), "KiB/session")
			start := cpu(b)
			time.Sleep(2 * time.Second)
			b.ReportMetric(float64((cpu(b)-start).Microseconds())/2, "idle-cpu-µs/s")
			roundTrip(b, conns[b.N/2], "still there")
		})
	}
}

// slowHost makes 25 quotes a second, one after the other.
type slowHost struct {
	*machine
	turn sync.Mutex
}

func (h *slowHost) quote(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	h.turn.Lock()
	defer h.turn.Unlock()
	time.Sleep(40 * time.Millisecond)
	return h.machine.quote(ctx, rd)
}

// BenchmarkReconnect has peers come back in key mode to a server whose host makes 25
// quotes a second. The processor time is that of both ends; the server's is less than
// half of it.
func BenchmarkReconnect(b *testing.B) {
	p := &pair{server: newMachine(b, "server", true), client: newMachine(b, "client", true)}
	host := &slowHost{machine: p.server}
	k, err := atls.NewKey(p.server.key, host.quote, p.server.rtmr3)
	if err != nil {
		b.Fatal(err)
	}
	newPairOf(b, p, `require = "key"`, func(s, c *atls.Config, _ *atls.ListenerConfig) {
		s.Attester = k
		s.KeyTTL, c.KeyTTL = time.Hour, time.Hour
	})
	p.echo(b)
	benchDial(b, p.dial, nothing)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "peers/s")
	b.ReportMetric(float64(p.server.quoted()), "quotes")
}
