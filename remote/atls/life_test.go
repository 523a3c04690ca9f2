package atls_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/remote"
	"tdx-agent/remote/atls"
)

// TestMaxConnections has as many channels as there may be, whatever number of
// handshakes is under way at once: a client that finds no room is told so, and costs no
// quote.
func TestMaxConnections(t *testing.T) {
	held, goOn := make(chan struct{}, 8), make(chan struct{})
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.MaxConnections = 2 })
	p.echo(t)
	results := make(chan error, 3)
	for range 3 {
		m := newMachine(t, "client", true)
		d, err := atls.NewDialer(atls.Config{Verifier: verifier(t, p.server.entry("server", "other", ""), p.server), Attester: pausing{m.attester(t), held, goOn}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := d.DialContext(t.Context(), "tcp", p.address, "echo", []string{"server"})
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			results <- err
		}()
	}
	for range 3 {
		<-held // all are in their handshakes, none is open
	}
	close(goOn)
	refused := 0
	for range 3 {
		if err := <-results; err != nil {
			wantCode(t, err, atls.CodeBusy, true)
			refused++
		}
	}
	p.until(t, 2)
	if n := p.server.quoted(); refused != 1 || n != 2 {
		t.Errorf("%d clients refused, %d quotes, want 1 and 2", refused, n)
	}
	for _, c := range p.listener.Channels() {
		c.Close()
	}
	p.mustDial(t) // places are given back
}

// until waits until the server has n channels open: the client knows first.
func (p *pair) until(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); len(p.peers()) != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d channels are open, want %d", len(p.peers()), n)
		}
	}
}

// pausing makes statements when it is told to, and says that it was asked.
type pausing struct {
	atls.Attester
	held chan<- struct{}
	goOn <-chan struct{}
}

func (p pausing) Attest(ctx context.Context, s *atls.Session, keyMode bool) (*atls.Statement, error) {
	p.held <- struct{}{}
	<-p.goOn
	return p.Attester.Attest(ctx, s, keyMode)
}

// TestDeniedIsCut does not let a denied peer stay for the whole drain of a session.
func TestDeniedIsCut(t *testing.T) {
	var v *remote.Verifier
	p := newPair(t, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) { v, s.DeniedDrain = s.Verifier, 100*time.Millisecond })
	p.echo(t)
	c := p.mustDial(t)
	p.until(t, 1)
	server := p.listener.Channels()[0]
	server.Drain() // its session has ended, and it has 10 minutes
	deny(t, v, p.client, p.client.entry("client", "another", ""))
	start := time.Now()
	if n := p.listener.Reappraise(t.Context()); n != 1 {
		t.Fatalf("%d peers denied, want 1", n)
	}
	if !server.IsDraining() {
		t.Error("the channel of a denied peer goes on")
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) || time.Since(start) > 30*time.Second {
		t.Errorf("a denied peer is cut after %v (%v)", time.Since(start), err)
	}
}

// TestKnownByAnotherEntry ends the channel of a peer that a new policy accepts, but not as
// the one that the application behind the channel was told.
func TestKnownByAnotherEntry(t *testing.T) {
	for _, tc := range []struct {
		name, entries string
		denied        int
	}{
		{"the same", "%[1]s%[2]s", 0},
		{"another first", "%[2]s%[1]s", 1},
		{"another only", "%[2]s", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var v *remote.Verifier
			p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
			first := p.client.entry("client", "echo", "")
			second := strings.Replace(first, `name = "client"`, `name = "reader"`, 1)
			newPairOf(t, p, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) {
				v = verifier(t, first+second, p.client)
				s.Verifier = v
			})
			p.echo(t)
			p.mustDial(t)
			p.until(t, 1)
			server := p.listener.Channels()[0]
			deny(t, v, p.client, fmt.Sprintf("[defaults]\nmax_collateral_age = \"48h\"\n"+tc.entries, first, second))
			if n := p.listener.Reappraise(t.Context()); n != tc.denied || server.IsDraining() != (n > 0) || server.IsDenied() != (n > 0) {
				t.Errorf("%d denied, want %d; draining %v", n, tc.denied, server.IsDraining())
			}
		})
	}
}

// TestTransportDrains has requests over a channel whose session ends: the one under way
// gets its answer, and the next one has a channel of its own.
func TestTransportDrains(t *testing.T) {
	p := newPair(t, "")
	begun, goOn := make(chan struct{}, 4), make(chan struct{}, 4)
	server := &http.Server{ConnContext: atls.ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, _ := atls.PeerFromRequest(r)
		begun <- struct{}{}
		<-goOn
		fmt.Fprint(w, peer.Ref)
	})}
	go server.Serve(p.listener)
	t.Cleanup(func() { server.Close() })
	transport := atls.NewTransport(p.dialer, "echo", []string{"server"})
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	ask := func() string {
		resp, err := client.Get("http://" + p.address + "/")
		if err != nil {
			t.Error(err)
			return ""
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	goOn <- struct{}{}
	first := ask()
	<-begun
	second := make(chan string)
	go func() { second <- ask() }()
	<-begun
	mine := p.dialer.Channels()
	if len(mine) != 1 {
		t.Fatalf("%d channels for two requests", len(mine))
	}
	mine[0].Drain()
	goOn <- struct{}{}
	if got := <-second; got != first {
		t.Errorf("the request under way: %q, want an answer over %s", got, first)
	}
	goOn <- struct{}{}
	if got := ask(); got == first || got == "" {
		t.Errorf("the request after the session: %q, want another channel than %s", got, first)
	}
	// one that is idle when its session ends
	mine = p.dialer.Channels()
	if len(mine) != 1 || mine[0].IsDraining() {
		t.Fatalf("%d channels", len(mine))
	}
	third := mine[0].Peer().Ref
	mine[0].Drain()
	goOn <- struct{}{}
	if got := ask(); got == third || got == "" {
		t.Errorf("after an idle channel's session: %q, want another channel than %s", got, third)
	}
}

// TestFailures keeps what failed and not the evidence, however long it is.
func TestFailures(t *testing.T) {
	p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
	newPairOf(t, p, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		s.Verifier = verifier(t, p.client.entry("client", "another", ""), p.client)
	})
	p.echo(t)
	_, err := p.dial()
	e := wantCode(t, err, atls.CodePolicyDenied, true)
	p.listener.Close()
	list := p.failures.List()
	if len(list) != 1 {
		t.Fatalf("%d failures", len(list))
	}
	f := list[0]
	if f.Ref != e.Ref || f.Step != atls.StepVerify || f.Entry != "client" || f.Role != atls.Server || f.Service != "echo" || f.Refused || f.Err != nil {
		t.Errorf("kept %+v", f)
	}
	if len(f.Checks) != 1 || f.Checks[0].Name != "service" || f.Checks[0].Got != "echo" || !strings.Contains(f.Checks[0].Want, "another") {
		t.Errorf("the failed checks are %+v", f.Checks)
	}
	var all atls.Failures
	var group sync.WaitGroup
	for i := range 200 {
		group.Go(func() {
			all.Add(atls.Handshake{Code: atls.CodeBadFrame, Err: fmt.Errorf("%d %s", i, strings.Repeat("ä", 5000))})
			all.Add(atls.Handshake{Code: atls.CodeOK})
		})
	}
	group.Wait()
	if list = all.List(); len(list) != 64 {
		t.Errorf("%d failures are kept", len(list))
	}
	for _, f := range list {
		if len(f.Text) > 1024 || !strings.HasSuffix(f.Text, "ä...") {
			t.Errorf("the text has %d bytes and ends in %q", len(f.Text), f.Text[len(f.Text)-5:])
		}
	}
}

// TestFailuresOfStrangers keeps what an operator looks for while strangers come and go.
func TestFailuresOfStrangers(t *testing.T) {
	var all atls.Failures
	ended := func(step atls.Step, n int) {
		for range n {
			all.Add(atls.Handshake{Code: atls.CodeBadFrame, Step: step})
		}
	}
	count := func(step atls.Step) (n int) {
		for _, f := range all.List() {
			if f.Step == step {
				n++
			}
		}
		return n
	}
	ended(atls.StepVerify, 40)
	for _, step := range []atls.Step{atls.StepTLS, atls.StepHello, atls.StepWaitEvidence} {
		ended(step, 1000)
		if late, early := count(atls.StepVerify), count(step); late != 32 || early != 32 {
			t.Errorf("after 1000 that ended in %s: %d of those and %d of the refusals are kept, want 32 and 32", step, early, late)
		}
	}
	all.Add(atls.Handshake{Code: atls.CodePolicyDenied, Step: atls.StepVerify, Ref: "last"})
	if list := all.List(); len(list) != 64 || list[63].Ref != "last" || count(atls.StepVerify) != 33 {
		t.Errorf("%d are kept, of them %d refusals, want 64 with 33, the latest last", len(list), count(atls.StepVerify))
	}
	ended(atls.StepVerify, 64)
	if n := count(atls.StepVerify); n != 64 {
		t.Errorf("%d refusals are kept where nothing else happens, want 64", n)
	}
}

// TestBytes counts what an application has sent and got.
func TestBytes(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	c := p.mustDial(t)
	roundTrip(t, c, "hello")
	if in, out := c.Bytes(); in != 5 || out != 5 {
		t.Errorf("%d bytes read, %d written, want 5 each", in, out)
	}
	peer := c.Peer()
	if peer.Role != atls.Server || peer.Assurance() != "quote" || time.Since(peer.VerifiedAt) > time.Minute || peer.Evidence() == nil {
		t.Errorf("the peer is %+v", peer)
	}
}

// TestUnmeasuredKey takes no key in place of a quote that no event binds to the TD: its
// holder may be anywhere by now.
func TestUnmeasuredKey(t *testing.T) {
	for _, tc := range []struct {
		name       string
		isMeasured bool
		require    string
		want       []string
	}{
		{"measured", true, "key", []string{"quote", "key"}},
		{"not measured", false, "key", []string{"quote", "quote", "quote"}},
		{"not measured, where certificates would do", false, "certificate", []string{"quote", "quote"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", tc.isMeasured)}
			newPairOf(t, p, fmt.Sprintf("require = %q\nrequire_measured_agent_key = false", tc.require), func(s, c *atls.Config, _ *atls.ListenerConfig) {
				s.KeyTTL, c.KeyTTL = time.Minute, time.Minute
			})
			accepted := make(chan string, 8)
			go func() {
				for {
					c, err := p.listener.Accept()
					if err != nil {
						return
					}
					accepted <- c.(*atls.Conn).Peer().Assurance()
					c.Close()
				}
			}()
			for i, want := range tc.want {
				p.mustDial(t)
				if got := <-accepted; got != want {
					t.Errorf("channel %d: the client is attested by %s, want %s", i, got, want)
				}
			}
			if failures := p.failures.List(); len(failures) > 0 {
				t.Errorf("handshakes have failed: %+v", failures)
			}
		})
	}
}

// TestBackOffEndsWithPolicy dials a server again at once that a new policy may accept.
func TestBackOffEndsWithPolicy(t *testing.T) {
	var v *remote.Verifier
	p := newPair(t, "", func(_, c *atls.Config, _ *atls.ListenerConfig) { v = c.Verifier })
	p.echo(t)
	accepts := v.Policy()
	wrong := strings.Replace(p.server.entry("client", "other", ""), `name = "client"`, `name = "server"`, 1)
	deny(t, v, p.server, "[defaults]\nmax_collateral_age = \"48h\"\n"+wrong)
	_, err := p.dial()
	wantCode(t, err, atls.CodePolicyDenied, false)
	if _, err := p.dial(); !errors.As(err, new(*atls.BackOffError)) {
		t.Errorf("got %v, want a back-off", err)
	}
	if err := v.SetPolicy(accepts, store(t, accepts, p.server)); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, p.mustDial(t), "hello")
}
