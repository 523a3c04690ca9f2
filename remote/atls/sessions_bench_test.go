package atls_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
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

// serverProcess is the environment variable that makes BenchmarkServerProcess a server.
const serverProcess = "TDX_ATLS_BENCH_SERVER"

// BenchmarkServerProcess is the server of BenchmarkReconnect, in a process of its own
// with one processor. It serves until its standard input ends.
func BenchmarkServerProcess(b *testing.B) {
	if os.Getenv(serverProcess) == "" {
		b.Skip("BenchmarkReconnect starts it")
	}
	p := &pair{server: newMachine(b, "server", true), client: newMachine(b, "client", true)}
	host := &slowHost{machine: p.server}
	k, err := atls.NewKey(p.server.key, host.quote, p.server.rtmr3)
	if err != nil {
		b.Fatal(err)
	}
	newPairOf(b, p, `require = "key"`, func(s, _ *atls.Config, l *atls.ListenerConfig) {
		s.Attester, s.KeyTTL, l.MaxConnections = k, time.Hour, 20000
	})
	go func() {
		for {
			c, err := p.listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for one := make([]byte, 1); ; {
					if _, err := io.ReadFull(c, one); err != nil {
						return
					}
					c.Write(one)
				}
			}()
		}
	}()
	fmt.Printf("address %s\n", p.address)
	io.Copy(io.Discard, os.Stdin)
	fmt.Printf("quotes %d\n", p.server.quoted())
}

// server is such a process.
type server struct {
	cmd     *exec.Cmd
	in      io.Closer
	out     *bufio.Scanner
	address string
}

func startServer(b *testing.B) *server {
	s := &server{cmd: exec.Command(os.Args[0], "-test.run=^$", "-test.bench=^BenchmarkServerProcess$", "-test.benchtime=1x")}
	s.cmd.Env = append(os.Environ(), serverProcess+"=1", "GOMAXPROCS=1")
	in, err := s.cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	s.in, s.out = in, bufio.NewScanner(out)
	if err := s.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	s.address = s.line(b, "address ")
	return s
}

func (s *server) line(b *testing.B, prefix string) string {
	for s.out.Scan() {
		if _, rest, ok := strings.Cut(s.out.Text(), prefix); ok {
			return rest
		}
	}
	b.Fatalf("the server does not say %q", prefix)
	return ""
}

// used is the processor time of the server so far, to 10 ms.
func (s *server) used(b *testing.B) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	var ticks int
	for _, f := range strings.Fields(rest)[11:13] { // utime, stime
		n, err := strconv.Atoi(f)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func (s *server) resident(b *testing.B) (kib int) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	if kib, err = strconv.Atoi(strings.Fields(rest)[0]); err != nil {
		b.Fatal(err)
	}
	return kib
}

// stop ends the server and returns how many quotes it has made.
func (s *server) stop(b *testing.B) string {
	s.in.Close()
	quotes := s.line(b, "quotes ")
	for s.out.Scan() {
	}
	s.cmd.Wait()
	return quotes
}

// atOnce is how many peers connect at the same time.
const atOnce = 8

func once(b *testing.B, d *atls.Dialer, address string) net.Conn {
	c, err := d.DialContext(context.Background(), "tcp", address, "echo", []string{"server"})
	if err == nil {
		c.Write([]byte{1})
		_, err = io.ReadFull(c, make([]byte, 1))
	}
	if err != nil {
		b.Error(err)
		return nil
	}
	return c
}

// BenchmarkReconnect has peers come back in key mode to a server in another process,
// whose host makes 25 quotes a second. With "keep" they stay: -benchtime 5000x is 5,000
// idle sessions. With "p256" they know no ML-KEM.
func BenchmarkReconnect(b *testing.B) {
	for _, name := range []string{"leave", "leave-p256", "keep"} {
		keep := name == "keep"
		b.Run(name, func(b *testing.B) {
			if name == "leave-p256" {
				defer atls.UseKeyExchanges([]tls.CurveID{tls.CurveP256})()
			}
			s := startServer(b)
			p := &pair{server: newMachine(b, "server", true), client: newMachine(b, "client", true)}
			dialers := make([]*atls.Dialer, atOnce)
			for i := range dialers { // one for each target and time, so there are more
				d, err := atls.NewDialer(atls.Config{Verifier: verifier(b, p.server.entry("server", "other", `require = "key"`), p.server), Attester: p.client.attester(b), KeyTTL: time.Hour}, nil)
				if err != nil {
					b.Fatal(err)
				}
				dialers[i] = d
				once(b, d, s.address).Close()
			}
			start, held := s.used(b), s.resident(b)
			kept := make([]net.Conn, b.N)
			b.ResetTimer()
			var group sync.WaitGroup
			for i, d := range dialers {
				group.Go(func() {
					for n := i; n < b.N; n += atOnce {
						if kept[n] = once(b, d, s.address); !keep {
							kept[n].Close()
						}
					}
				})
			}
			group.Wait()
			b.StopTimer()
			each := (s.used(b) - start) / time.Duration(b.N)
			b.ReportMetric(float64(each.Microseconds()), "server-cpu-µs/op")
			b.ReportMetric(float64(time.Second)/float64(max(each, 1)), "peers/s/core")
			if keep {
				b.ReportMetric(float64(s.resident(b)-held)/float64(b.N), "server-RSS-KiB/session")
				before := s.used(b)
				time.Sleep(3 * time.Second)
				b.ReportMetric(float64((s.used(b)-before).Microseconds())/3, "server-idle-µs/s")
			}
			for i, c := range kept {
				if keep {
					roundTrip(b, c, fmt.Sprint("session ", i))
				}
				c.Close()
			}
			if quotes := s.stop(b); quotes != strconv.Itoa(atOnce) {
				b.Errorf("the server made %s quotes, want one for each dialler", quotes)
			}
		})
	}
}
