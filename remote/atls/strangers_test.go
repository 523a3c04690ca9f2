package atls_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// stranger is one who dials from an address of the loopback network, and does not say
// what a peer would.
type stranger struct {
	name string
	tls  *tls.Config // nil: no TLS
	send []byte      // first, or after TLS
	// forger signs this channel with a key of its own, and shows an old quote of an accepted
	// TD with this channel's report data in it: only its signature does not hold.
	forger *atls.Key
}

// strangers are one of each kind.
func strangers(t testing.TB, victim *machine) []stranger {
	bare := tlsOf(t)
	bare.Certificates = nil
	both := tlsOf(t)
	both.NextProtos = []string{atls.ALPN, plainALPN} // the server chooses
	old, err := victim.quote(context.Background(), measure.ReportData{})
	if err != nil {
		t.Fatal(err)
	}
	old.Events, old.VMConfig = nil, strings.Repeat("x", 10000) // as long as with a log, and little work to write
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forger, err := atls.NewKey(key, func(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		forged := *old
		forged.Quote = bytes.Clone(old.Quote)
		copy(forged.Quote[48+520:], rd[:]) // header, and what comes before it in the body
		return &forged, nil
	}, victim.rtmr3)
	if err != nil {
		t.Fatal(err)
	}
	return []stranger{
		{name: "no certificate", tls: bare, send: makeFrame(1, hello())},
		{name: "garbage", send: []byte("GET / HTTP/1.1\r\nHost: everybody\r\n\r\n")},
		{name: "stalled"},
		{name: "forged evidence", tls: both, forger: forger},
	}
}

// dial connects from the nth address of 127.0.0.0/8, and stays until the other end has
// enough or ctx ends.
func (s *stranger) dial(ctx context.Context, address string, n int) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1+byte(n>>16), byte(n>>8), 1+byte(n%250))}}
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return
	}
	raw.(*net.TCPConn).SetLinger(0) // leaves no port behind
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	var c net.Conn = raw
	if s.tls != nil {
		c = tls.Client(raw, s.tls)
	}
	if s.forger != nil && s.forge(ctx, c.(*tls.Conn)) != nil {
		return
	}
	if len(s.send) > 0 {
		if _, err := c.Write(s.send); err != nil {
			return
		}
	}
	io.Copy(io.Discard, c)
}

// forge goes as far as evidence. A server that is none of ours gets as many bytes.
func (s *stranger) forge(ctx context.Context, c *tls.Conn) error {
	h := &handMade{Conn: c, key: s.forger}
	if err := c.Handshake(); err != nil {
		return err
	}
	if c.ConnectionState().NegotiatedProtocol == plainALPN {
		_, err := c.Write(make([]byte, 20000))
		c.CloseWrite()
		return err
	}
	if err := h.greet(s.tls); err != nil {
		return err
	}
	frame, err := h.attest(ctx)
	if err == nil {
		_, err = c.Write(frame)
	}
	return err
}

// plainALPN is what the floor of BenchmarkStrangers speaks.
const plainALPN = "plain"

// TestStrangersCostNoQuote has many of them, while an honest peer gets in.
func TestStrangersCostNoQuote(t *testing.T) {
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.PerSecond, l.Burst = 0, 0 }) // the defaults
	p.echo(t)
	kinds := strangers(t, p.client)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var group sync.WaitGroup
	for n := range 120 {
		s := &kinds[n%len(kinds)]
		group.Go(func() { s.dial(ctx, p.address, n) })
	}
	roundTrip(t, p.mustDial(t), "an honest peer")
	forged := 0
	for forged == 0 {
		for _, f := range p.failures.List() {
			if f.Code == atls.CodeEvidenceInvalid && len(f.Checks) > 0 && f.Checks[0].Name == "signature" {
				forged++
			}
		}
		time.Sleep(time.Millisecond)
	}
	if n := p.server.quoted(); n != 1 {
		t.Errorf("the server made %d quotes, want the honest peer's alone", n)
	}
	cancel()
	group.Wait()
}

// TestSilentMakeRoom has more silent connections than there may be handshakes, and then
// an honest client: it takes the place of one of them.
func TestSilentMakeRoom(t *testing.T) {
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.MaxHandshakes, l.MaxPerAddress = 8, 100 })
	p.echo(t)
	var silent []*tls.Conn
	for range 8 {
		c := p.stranger(t, tlsOf(t))
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	waits := p.byHand(t) // says hello, so the silent ones go first
	for range 6 {
		c, err := net.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	roundTrip(t, p.mustDial(t), "an honest peer")
	wantResult(t, silent[0], "busy")
	waits.accepted(t)
}

// TestAcceptedStay has as many handshakes as may be whose clients were accepted: none of
// them makes room for a newcomer.
func TestAcceptedStay(t *testing.T) {
	held, goOn := make(chan struct{}, 8), make(chan struct{})
	p := newPair(t, "", func(s, _ *atls.Config, l *atls.ListenerConfig) {
		l.MaxHandshakes = 1
		s.Attester = pausing{s.Attester, held, goOn}
	})
	p.echo(t)
	result := make(chan error, 1)
	go func() {
		c, err := p.dial()
		if err == nil {
			c.Close()
		}
		result <- err
	}()
	<-held
	c := p.stranger(t, tlsOf(t))
	if err := c.Handshake(); err == nil {
		if _, err := takeFrame(c); err == nil {
			t.Error("a newcomer gets in")
		}
	}
	if n := p.listener.Counts(); n.NoRoom != 1 || n.TooOften != 0 {
		t.Errorf("%d connections without room, %d too often, want 1 and 0", n.NoRoom, n.TooOften)
	}
	close(goOn)
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// flood has 1,000 strangers a second until stop is called, which says how many dialled.
func flood(t testing.TB, kinds []stranger, address string) (stop func() int64) {
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	var dialled, present atomic.Int64
	group.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			for range 5 {
				n++
				if present.Load() > 3000 {
					continue // the stalled ones: descriptors are bounded
				}
				present.Add(1)
				dialled.Add(1)
				group.Go(func() {
					defer present.Add(-1)
					own, cancel := context.WithTimeout(ctx, 2*time.Second)
					defer cancel()
					kinds[n%len(kinds)].dial(own, address, n%100000)
				})
			}
		}
	})
	return func() int64 { cancel(); group.Wait(); return dialled.Load() }
}

// benchHonest measures how long an honest peer's connection takes, in milliseconds.
func benchHonest(b *testing.B, address string, kinds []stranger, dial func() (net.Conn, error)) {
	if c, err := dial(); err != nil {
		b.Fatal(err)
	} else {
		c.Close()
	}
	var stop func() int64
	if kinds != nil {
		stop = flood(b, kinds, address)
		time.Sleep(time.Second) // the load is there
	}
	start, failed := time.Now(), 0
	var took []time.Duration
	for b.Loop() {
		begun := time.Now()
		c, err := dial()
		if err != nil {
			failed++
			continue
		}
		c.Write([]byte{1})
		io.ReadFull(c, make([]byte, 1))
		took = append(took, time.Since(begun))
		c.Close()
		time.Sleep(5 * time.Millisecond)
	}
	if stop != nil {
		spent := time.Since(start) + time.Second
		b.ReportMetric(float64(stop())/spent.Seconds(), "strangers/s")
	}
	if len(took) == 0 {
		b.Fatal("no honest peer got in")
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1e3, "p50-ms")
	b.ReportMetric(float64(took[len(took)*95/100].Microseconds())/1e3, "p95-ms")
	b.ReportMetric(float64(failed), "failed")
}

// BenchmarkStrangers is how long an honest peer's connection takes, without and under
// 1,000 hostile dials a second of the four kinds. Its floor is a plain mutual TLS server
// under the same. All of them are in this process, and share its processors.
func BenchmarkStrangers(b *testing.B) {
	victim := newMachine(b, "client", true) // the one that every server accepts
	for _, load := range []string{"quiet", "flood"} {
		kinds := strangers(b, victim)
		if load == "quiet" {
			kinds = nil
		}
		b.Run("plain-mtls/"+load, func(b *testing.B) {
			cfg := tlsOf(b)
			cfg.SessionTicketsDisabled, cfg.NextProtos = true, []string{plainALPN, atls.ALPN}
			l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			go echoAll(l)
			own := tlsOf(b)
			own.NextProtos = []string{plainALPN}
			benchHonest(b, l.Addr().String(), kinds, func() (net.Conn, error) { return tls.Dial("tcp", l.Addr().String(), own) })
		})
		for _, mode := range []string{"key", "quote"} {
			b.Run("atls-"+mode+"/"+load, func(b *testing.B) {
				p := newPair(b, `require = "`+mode+`"`, func(s, c *atls.Config, l *atls.ListenerConfig) { s.KeyTTL, c.KeyTTL = time.Hour, time.Hour })
				p.echo(b)
				benchHonest(b, p.address, kinds, p.dial)
				if mode == "key" && p.server.quoted() != 1 {
					b.Errorf("%d quotes, want 1", p.server.quoted())
				}
			})
		}
	}
}

// TestUnattestedClientsGetFewQuotes lets those who prove nothing spend a quote a second,
// which is no matter to a peer that does.
func TestUnattestedClientsGetFewQuotes(t *testing.T) {
	p := newPair(t, "allow_unattested_clients = true", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.Unattested = []string{"echo"} })
	p.echo(t)
	start := time.Now()
	var refused *atls.Error
	for range 40 {
		d, err := atls.NewDialer(atls.Config{Verifier: verifier(t, p.server.entry("server", "other", ""), p.server)}, p.connect)
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.DialContext(t.Context(), "tcp", p.address, "echo", []string{"server"})
		if err != nil {
			refused = wantCode(t, err, atls.CodeBusy, true)
			continue
		}
		c.Close()
	}
	if n, most := p.server.quoted(), 9+int(time.Since(start)/time.Second); n > most || refused == nil || refused.RetryAfter <= 0 {
		t.Errorf("the server made %d quotes for 40 clients that prove nothing, want at most %d, and a time to come again: %v", n, most, refused)
	}
	roundTrip(t, p.mustDial(t), "x")
}

// TestTooOften closes the connections of an address that comes too often, and counts
// them: there is no handshake to observe.
func TestTooOften(t *testing.T) {
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.PerSecond, l.Burst = 1, 1 })
	var last net.Conn
	for range 2 { // the first is let in, and waited for
		c, err := net.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		last = c
	}
	last.SetDeadline(time.Now().Add(9 * time.Second)) // less than a handshake has
	if _, err := last.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read: %v, want it closed", err)
	}
	if n := p.listener.Counts(); n.TooOften != 1 || n.NoRoom != 0 {
		t.Errorf("%d connections too often, %d without room, want 1 and 0", n.TooOften, n.NoRoom)
	}
}
