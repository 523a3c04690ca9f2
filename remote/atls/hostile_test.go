package atls_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
)

// hostile is the address of a server without evidence, which does what answer does
// after each client's hello.
func hostile(t *testing.T, answer func(c net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	cfg := tlsOf(t)
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer raw.Close()
				c := tls.Server(raw, cfg)
				c.SetDeadline(time.Now().Add(30 * time.Second))
				if _, err := takeFrame(c); err == nil {
					answer(c)
					io.Copy(io.Discard, c)
				}
			}()
		}
	}()
	return l.Addr().String()
}

// helloServer is a server's hello that wants a quote.
func helloServer() []byte {
	return makeFrame(2, `{"v":1,"nonce":"`+zeros32+`","client_evidence":"quote","format":"dstack-tdx/1","order":"client-first","service":"echo","max_evidence":200000,"agent_key":"`+zeros32+`"}`)
}

func (p *pair) dialTo(ctx context.Context, address string) error {
	c, err := p.dialer.DialContext(ctx, "tcp", address, "echo", []string{"server"})
	if err == nil {
		c.Close()
	}
	return err
}

// TestRetryAfter takes every number that a stranger can say.
func TestRetryAfter(t *testing.T) {
	p := newPair(t, "")
	for _, tc := range []struct {
		said string
		want time.Duration
	}{{"9223372036855", time.Minute}, {"9223372036854775807", time.Minute}, {"-9223372036854775808", 0}, {"60000", time.Minute}, {"1500", 1500 * time.Millisecond}} {
		address := hostile(t, func(c net.Conn) {
			c.Write(makeFrame(4, `{"ok":false,"code":"busy","ref":"","ttl_s":0,"retry_after_ms":`+tc.said+`}`))
		})
		if e := wantCode(t, p.dialTo(context.Background(), address), atls.CodeBusy, true); e.RetryAfter != tc.want {
			t.Errorf("%s ms are %v, want %v", tc.said, e.RetryAfter, tc.want)
		}
	}
}

// TestBackOffIsNotThePeers has peers that would have a quote for every dial: one that
// is busy for no time at all, one that is silent until the caller's time is over, and
// one that wants the quote once more, which it has got.
func TestBackOffIsNotThePeers(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"busy":   func(c net.Conn) { c.Write(makeFrame(4, `{"ok":false,"code":"busy","ref":"","ttl_s":0}`)) },
		"silent": func(net.Conn) {},
		"again":  func(c net.Conn) { c.Write(makeFrame(4, `{"ok":false,"code":"reattest","ref":"","ttl_s":0}`)) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, "")
			address := hostile(t, func(c net.Conn) {
				c.Write(helloServer())
				if _, err := takeFrame(c); err == nil {
					answer(c)
				}
			})
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			if err := p.dialTo(ctx, address); err == nil {
				t.Fatal("accepted")
			}
			time.Sleep(10 * time.Millisecond)
			err := p.dialTo(context.Background(), address)
			if b, ok := errors.AsType[*atls.BackOffError](err); !ok || time.Until(b.Until) < 5*time.Second || p.client.quoted() != 1 {
				t.Errorf("got %v after %d quotes, want a back-off after 1", err, p.client.quoted())
			}
		})
	}
}

// deny replaces a verifier's policy by one that accepts m for another service only, or
// by another name.
func deny(t *testing.T, v *remote.Verifier, m *machine, entries string) {
	t.Helper()
	policy, err := remote.ParsePolicy("policy.toml", []byte("version = 1\n"+entries))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.SetPolicy(policy, store(t, policy, m)); err != nil {
		t.Fatal(err)
	}
}

// TestPolicyReplacedMeanwhile has a peer that keeps its handshake a frame short of the
// end while the policy is replaced and open channels are judged: it does not get in by
// the old one.
func TestPolicyReplacedMeanwhile(t *testing.T) {
	var v *remote.Verifier
	held, goOn := make(chan struct{}), make(chan struct{})
	p := newPair(t, "", func(s, c *atls.Config, _ *atls.ListenerConfig) {
		v = s.Verifier
		s.Attester = waiting{s.Attester, held, goOn} // when it is asked, the client was accepted
	})
	p.echo(t)
	result := make(chan error, 1)
	go func() {
		c, err := p.dial()
		if err == nil { // its own RESULT was the last, so it knows only now
			c.SetDeadline(time.Now().Add(20 * time.Second))
			c.Write([]byte("x"))
			_, err = io.ReadFull(c, make([]byte, 1))
			c.Close()
		}
		result <- err
	}()
	<-held
	deny(t, v, p.client, p.client.entry("client", "another", ""))
	if n := p.listener.Reappraise(context.Background()); n != 0 {
		t.Errorf("%d channels denied before there is one", n)
	}
	close(goOn)
	if err := <-result; err == nil {
		t.Error("a channel by the policy of before")
	}
	p.listener.Close() // waits for the handshake's end
	if n := len(p.peers()); n != 0 {
		t.Errorf("%d peers", n)
	}
	if f := p.failures.List(); len(f) != 1 || f[0].Code != atls.CodePolicyDenied || f[0].Step != atls.StepVerify {
		t.Errorf("the server has kept %+v", f)
	}
}

// waiting makes statements when it is told to.
type waiting struct {
	atls.Attester
	held, goOn chan struct{}
}

func (w waiting) Attest(ctx context.Context, s *atls.Session, keyMode bool) (*atls.Statement, error) {
	close(w.held)
	<-w.goOn
	return w.Attester.Attest(ctx, s, keyMode)
}

// TestReappraiseDialled drains dialled channels too, also those in key mode.
func TestReappraiseDialled(t *testing.T) {
	var v *remote.Verifier
	p := newPair(t, `require = "key"`, func(s, c *atls.Config, _ *atls.ListenerConfig) {
		s.KeyTTL, c.KeyTTL = time.Minute, time.Minute
		v = c.Verifier
		c.Drain = time.Millisecond
	})
	p.echo(t)
	first, second := p.mustDial(t), p.mustDial(t)
	if first.Peer().KeyMode || !second.Peer().KeyMode {
		t.Fatal("want a channel of each mode")
	}
	if n := p.dialer.Reappraise(context.Background()); n != 0 {
		t.Errorf("%d peers denied under the same policy", n)
	}
	deny(t, v, p.server, p.server.entry("server", "other", "")) // wants quotes
	if n := p.dialer.Reappraise(context.Background()); n != 1 {
		t.Errorf("%d peers denied where key mode is not allowed any more, want 1", n)
	}
	<-second.Draining()
	roundTrip(t, first, "x")
	deny(t, v, p.server, p.server.entry("server", "other", "rtmr3 = [\""+strings.Repeat("00", 48)+"\"]"))
	if n := p.dialer.Reappraise(context.Background()); n < 1 {
		t.Errorf("%d peers denied, want the other one", n)
	}
	<-first.Draining()
}

// TestUnreadEvidence has a client that does not read what the server has quoted for it:
// it takes the place of no other client.
func TestUnreadEvidence(t *testing.T) {
	p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
	inner := make(pipes)
	l, err := atls.NewListener(inner, atls.ListenerConfig{MaxQuotes: 1, Services: []string{"echo"}, Unattested: []string{"echo"},
		Config: atls.Config{Verifier: verifier(t, p.client.entry("client", "echo", "allow_unattested_clients = true"), p.client), Attester: p.server.attester(t)}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for i := range 3 {
		theirs, ours := net.Pipe()
		inner <- ours
		c := tls.Client(theirs, tlsOf(t))
		c.SetDeadline(time.Now().Add(30 * time.Second))
		defer theirs.Close()
		c.Write(makeFrame(1, hello(`["self","peer"]`, `["peer"]`)))
		if frame, err := takeFrame(c); err != nil || frame[0] != 2 {
			t.Fatalf("got %s, %v", frame, err)
		}
		header := make([]byte, 1)
		if _, err := io.ReadFull(c, header); err != nil || header[0] != 3 {
			t.Fatalf("client %d is told %d, %v, want evidence", i, header, err)
		}
	}
}

// pipes is a listener of connections without buffers.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{} }

// TestCloseIsHeard closes the listener while a handshake is between two waits. The next
// one, for a client that says nothing more, does not outlast that.
func TestCloseIsHeard(t *testing.T) {
	held, goOn, end := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var once sync.Once
	p := newPair(t, `require = "key"`, func(s, c *atls.Config, _ *atls.ListenerConfig) {
		s.KeyTTL, c.KeyTTL = time.Minute, time.Minute
		s.Now = func() time.Time { // when it has just accepted the client
			once.Do(func() { close(held); <-goOn })
			return time.Now()
		}
		c.Now = func() time.Time { <-end; return time.Now() }
	})
	dialled := make(chan struct{})
	go func() { p.dial(); close(dialled) }()
	<-held
	closed := make(chan error, 1)
	go func() { closed <- p.listener.Close() }()
	if _, err := p.listener.Accept(); err != net.ErrClosed {
		t.Errorf("Accept: %v", err)
	}
	time.Sleep(50 * time.Millisecond)
	close(goOn)
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Error("Close waits for a client")
	}
	close(end)
	<-dialled
}

// TestClientOf has the addresses that one machine can take turns with.
func TestClientOf(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1:4000":                 "192.0.2.1",
		"[::ffff:192.0.2.1]:4001":        "192.0.2.1",
		"[2001:db8:0:1::1]:4000":         "2001:db8:0:1::/64",
		"[2001:db8:0:1:ffff::ffff]:4001": "2001:db8:0:1::/64",
		"[fe80::1%lo]:4000":              "fe80::/64",
	} {
		if got, err := atls.ClientOf(address); err != nil || got != want {
			t.Errorf("%s counts as %q, %v, want %q", address, got, err, want)
		}
	}
	if got, err := atls.ClientOf("@"); err == nil || got != "" {
		t.Errorf("a Unix socket's client counts as %q, %v", got, err)
	}
}

// occupied is an attester whose quotes would come too late.
type occupied struct{ atls.Attester }

func (occupied) Attest(context.Context, *atls.Session, bool) (*atls.Statement, error) {
	return nil, fmt.Errorf("atls: quote: %w", &measure.BusyError{Queued: 32, Wait: 1500 * time.Millisecond})
}

// TestBusy tells the peer when to come again, whichever end has no quote to spare.
func TestBusy(t *testing.T) {
	p := newPair(t, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) { s.Attester = occupied{s.Attester} })
	p.echo(t)
	_, err := p.dial()
	if e := wantCode(t, err, atls.CodeBusy, true); e.RetryAfter != 1500*time.Millisecond {
		t.Errorf("try again in %v, want 1.5s", e.RetryAfter)
	}
	p = newPair(t, "", func(_, c *atls.Config, _ *atls.ListenerConfig) { c.Attester = occupied{c.Attester} })
	p.echo(t)
	_, err = p.dial()
	wantCode(t, err, atls.CodeBusy, false)
	_, err = p.dial()
	if b, ok := errors.AsType[*atls.BackOffError](err); !ok || time.Until(b.Until) > 1500*time.Millisecond {
		t.Errorf("got %v, want a back-off of the queue's own length", err)
	}
	if f := p.failed(t, 1); f[0].Code != atls.CodeBusy || !f[0].Refused {
		t.Errorf("the server has kept %+v", f)
	}
}

// failed waits until n handshakes have failed at the server: the client knows first.
func (p *pair) failed(t *testing.T, n int) []atls.Failure {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if list := p.failures.List(); len(list) >= n {
			return list
		}
	}
	t.Fatalf("the server has kept %+v, want %d failures", p.failures.List(), n)
	return nil
}

// TestDiversionInKeyMode sends a dial to another peer whose evidence is known from a
// channel that was meant for it.
func TestDiversionInKeyMode(t *testing.T) {
	p := newPair(t, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) { s.KeyTTL = time.Hour })
	other := newMachine(t, "expected", true)
	const key = `require = "key"`
	d, err := atls.NewDialer(atls.Config{Attester: p.client.attester(t), KeyTTL: time.Hour,
		Verifier: verifier(t, p.server.entry("server", "other", key)+other.entry("expected", "other", key), p.server, other)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.echo(t)
	for _, isKeyMode := range []bool{false, true} {
		c, err := d.DialContext(t.Context(), "tcp", p.address, "echo", []string{"server"})
		if err != nil {
			t.Fatal(err)
		}
		if peer, _ := atls.PeerFromConn(c); peer.KeyMode != isKeyMode {
			t.Errorf("key mode is %v, want %v", peer.KeyMode, isKeyMode)
		}
		c.Close()
	}
	_, err = d.DialContext(t.Context(), "tcp", p.address, "echo", []string{"expected"})
	wantCode(t, err, atls.CodePolicyDenied, false)
}

// TestAnotherServiceInKeyMode has a peer come back by its key for what only another peer
// may reach.
func TestAnotherServiceInKeyMode(t *testing.T) {
	const key = `require = "key"`
	other := newMachine(t, "other", true)
	p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
	newPairOf(t, p, key, func(s, c *atls.Config, l *atls.ListenerConfig) {
		s.KeyTTL, c.KeyTTL = time.Hour, time.Hour
		s.Verifier = verifier(t, p.client.entry("client", "echo", key)+other.entry("other", "secret", key), p.client, other)
		l.Services = []string{"echo", "secret"}
	})
	p.echo(t)
	p.mustDial(t)
	if c := p.mustDial(t); !c.Peer().KeyMode {
		t.Fatal("the second channel is not in key mode")
	}
	_, err := p.dialer.DialContext(t.Context(), "tcp", p.address, "secret", []string{"server"})
	wantCode(t, err, atls.CodePolicyDenied, true)
}

// TestKeyTTL wants a quote again of a peer whose last one is older than KeyTTL.
func TestKeyTTL(t *testing.T) {
	var later atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	p := newPair(t, `require = "key"`, func(s, c *atls.Config, _ *atls.ListenerConfig) {
		s.KeyTTL, c.KeyTTL, s.Now, c.Now = time.Minute, time.Minute, now, now
	})
	p.echo(t)
	for _, step := range []struct {
		after  time.Duration
		quotes int // of each end
	}{{0, 1}, {50 * time.Second, 1}, {61 * time.Second, 2}, {110 * time.Second, 2}} {
		later.Store(int64(step.after))
		p.mustDial(t)
		if s, c := p.server.quoted(), p.client.quoted(); s != step.quotes || c != step.quotes {
			t.Errorf("after %s: %d quotes of the server and %d of the client, want %d each", step.after, s, c, step.quotes)
		}
	}
}
