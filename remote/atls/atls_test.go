package atls_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/cache"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// machine is a simulated TD with an agent key.
type machine struct {
	td     *tdxsim.TD
	key    *ecdsa.PrivateKey
	root   [32]byte
	bundle []byte

	mu     sync.Mutex // guards what follows
	events []measure.Event
	quotes int
}

func newMachine(t testing.TB, name string, measureKey bool) *machine {
	t.Helper()
	return bootMachine(t, name, func(m *machine) []byte {
		if !measureKey {
			return nil
		}
		der, err := x509.MarshalPKIXPublicKey(&m.key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(der)
		return sum[:]
	})
}

// bootMachine measures what measured returns as the agent key's hash, nil for none.
func bootMachine(t testing.TB, name string, measured func(*machine) []byte) *machine {
	t.Helper()
	td, err := tdxsim.New(t.TempDir(), tdxsim.Config{Seed: []byte(name)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	m := &machine{td: td}
	if m.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if m.bundle, err = td.Collateral(); err != nil {
		t.Fatal(err)
	}
	roots, err := dcap.NewRoots(td.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	m.root = roots.Pins()[0]
	if m.events, err = measure.ParseCCEL(td.CCEL()); err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256([]byte(name))
	m.emit(t, measure.EventAppID, hash[:20])
	m.emit(t, measure.EventComposeHash, hash[:])
	if hash := measured(m); hash != nil {
		m.emit(t, measure.EventAgentKey, hash)
	}
	m.emit(t, measure.EventSystemReady, nil)
	return m
}

func (m *machine) emit(t testing.TB, name string, payload []byte) {
	t.Helper()
	e, err := measure.NewRuntimeEvent(name, payload, measure.EventV1)
	if err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.td.Extend(measure.RTMR3, e.Digest); err != nil {
		t.Fatal(err)
	}
	m.events = append(m.events, e)
}

func (m *machine) quote(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.quotes++
	c := m.td.Client()
	dir, err := c.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		return nil, err
	}
	if err := c.WriteFile(dir+"/inblob", rd[:]); err != nil {
		return nil, err
	}
	q, err := c.ReadFile(dir + "/outblob")
	return &measure.Evidence{Quote: q, Events: append([]measure.Event(nil), m.events...), VMConfig: "{}"}, errors.Join(err, c.RemoveAll(dir))
}

func (m *machine) rtmr3(context.Context) (measure.Digest, error) {
	regs, err := m.td.Registers()
	return regs.RTMR[measure.RTMR3], err
}

func (m *machine) quoted() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.quotes
}

func (m *machine) attester(t testing.TB) *atls.Key {
	t.Helper()
	k, err := atls.NewKey(m.key, m.quote, m.rtmr3)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// entry is a policy entry that accepts m for a service.
func (m *machine) entry(name, service, more string) string {
	hash := sha256.Sum256([]byte(name))
	return fmt.Sprintf("[[peer]]\nname = %q\nroot = \"sha256:%x\"\nallow_simulated = true\nallow_any_image = true\ncompose_hash = [\"%x\"]\nservice = [%q]\n%s\n", name, m.root, hash, service, more)
}

// verifier accepts these entries, by the collateral of these machines.
func verifier(t testing.TB, entries string, machines ...*machine) *remote.Verifier {
	t.Helper()
	p, err := remote.ParsePolicy("policy.toml", []byte("version = 1\n[defaults]\nmax_collateral_age = \"48h\"\n"+entries))
	if err != nil {
		t.Fatal(err)
	}
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: store(t, p, machines...)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func store(t testing.TB, p *remote.Policy, machines ...*machine) *collateral.Store {
	t.Helper()
	roots, err := p.Roots()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for i, m := range machines {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.json", i)), m.bundle, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := collateral.New(collateral.Config{Roots: roots, Files: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// pair is a server on a loopback address and a client, each of which accepts the other.
type pair struct {
	server, client *machine
	listener       *atls.Listener
	dialer         *atls.Dialer
	failures       atls.Failures // of the server
	address        string
	pipes          pipes // instead of TCP, if it is made
}

// connect makes a connection below TLS to the server.
func (p *pair) connect(ctx context.Context, network, address string) (net.Conn, error) {
	if p.pipes == nil {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	theirs, ours := net.Pipe()
	p.pipes <- ours
	return theirs, nil
}

type option func(server, client *atls.Config, l *atls.ListenerConfig)

// newPair makes a pair of fresh machines; more is added to both policy entries.
func newPair(t testing.TB, more string, options ...option) *pair {
	t.Helper()
	return newPairOf(t, &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}, more, options...)
}

// newPairOf makes a pair of machines that are there.
func newPairOf(t testing.TB, p *pair, more string, options ...option) *pair {
	t.Helper()
	nothingStays(t)
	sc := atls.Config{Verifier: verifier(t, p.client.entry("client", "echo", more), p.client), Attester: p.server.attester(t), Observe: p.failures.Add}
	cc := atls.Config{Verifier: verifier(t, p.server.entry("server", "other", more), p.server), Attester: p.client.attester(t)}
	lc := atls.ListenerConfig{Services: []string{"echo"}, PerSecond: 10000, Burst: 10000}
	for _, o := range options {
		o(&sc, &cc, &lc)
	}
	lc.Config = sc
	var inner net.Listener = p.pipes
	var err error
	if p.pipes == nil {
		if inner, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	if p.listener, err = atls.NewListener(inner, lc); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.listener.Close() })
	if p.dialer, err = atls.NewDialer(cc, p.connect); err != nil {
		t.Fatal(err)
	}
	p.address = inner.Addr().String()
	return p
}

// peers lists those of the server's open channels.
func (p *pair) peers() (list []*atls.Peer) {
	for _, c := range p.listener.Channels() {
		list = append(list, c.Peer())
	}
	return list
}

// echo answers every connection with what it reads.
func (p *pair) echo(t testing.TB) {
	t.Helper()
	go func() {
		for {
			c, err := p.listener.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
}

func (p *pair) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return p.dialer.DialContext(ctx, "tcp", p.address, "echo", []string{"server"})
}

func (p *pair) mustDial(t testing.TB) *atls.Conn {
	t.Helper()
	c, err := p.dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*atls.Conn)
}

func roundTrip(t testing.TB, c net.Conn, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("got %q, %v, want %q", got, err, text)
	}
}

// wantCode wants an *Error of this code.
func wantCode(t testing.TB, err error, code atls.Code, isRemote bool) *atls.Error {
	t.Helper()
	e, ok := errors.AsType[*atls.Error](err)
	if !ok || e.Code != code || e.Remote != isRemote {
		t.Fatalf("got %v, want %s, of the peer: %v", err, code, isRemote)
	}
	return e
}

// TestFormula has the specification's computed example.
func TestFormula(t *testing.T) {
	frame := func(kind byte) []byte { return []byte{kind, 0, 0, 2, '{', '}'} }
	s := &atls.Session{Transcript: atls.Transcript(frame(1), frame(2)), ClientKey: sha256.Sum256([]byte("client-leaf")), ServerKey: sha256.Sum256([]byte("server-leaf"))}
	copy(s.Exporter[:], bytes.Repeat([]byte{0x11}, 32))
	if got := hex.EncodeToString(s.Transcript[:]); got != "236d91a23ec2d63eea594fb535bb8cd582b62efc76f8a9b7db26c4ef92b9cd90" {
		t.Errorf("th is %s", got)
	}
	rtmr3 := measure.Digest(bytes.Repeat([]byte{0x33}, 48))
	for role, want := range map[atls.Role]string{
		atls.Client: "b38e30277079b65849a45f2678939fd350903d6014b66af3b33c221c20e8d44c122ff0b623d9ccceac70e64476ff50c4ed40ceffc6fd01a439421d42834d0425",
		atls.Server: "777e73175803dfbad71db5f8bf03cd31072e56c2c2e719b6e92bd833ecbd0bcb2715bcf05bb139a10486b8d933a2d8daf3b8b59a5662a0a945915669d0cc5ad7",
	} {
		s.Role = role
		agent := sha256.Sum256([]byte("agent-" + strings.ToLower(string(role))))
		if got := atls.ReportData(s.Body(agent, rtmr3)); got.String() != want {
			t.Errorf("report data of %c are %s, want %s", role, got, want)
		}
	}
}

func TestMutual(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	c := p.mustDial(t)
	roundTrip(t, c, "hello")
	peer, ok := atls.PeerFromConn(c)
	if !ok || !peer.Attested() || peer.Entry() != "server" || peer.KeyMode || len(peer.Ref) != 16 || peer.AgentKey != p.server.attester(t).AgentKey() {
		t.Errorf("the server is %+v", peer)
	}
	peers := p.peers()
	if len(peers) != 1 || !peers[0].Attested() || peers[0].Entry() != "client" || peers[0].Ref != peer.Ref || peers[0].Service != "echo" {
		t.Errorf("the clients are %+v", peers)
	}
	if life := peer.Expires.Sub(peer.Opened); life != time.Hour {
		t.Errorf("the session lasts %v", life)
	}
	if s, c := p.server.quoted(), p.client.quoted(); s != 1 || c != 1 {
		t.Errorf("%d and %d quotes, want one each", s, c)
	}
}

// TestRefusals has one way for each end to refuse the other, and how each is told.
func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name     string
		options  func(t *testing.T, p *pair) option
		code     atls.Code
		isRemote bool // the server refuses
	}{
		{"the server does not know the client", func(t *testing.T, p *pair) option {
			other := newMachine(t, "other", true)
			return func(s, _ *atls.Config, _ *atls.ListenerConfig) {
				s.Verifier = verifier(t, other.entry("other", "echo", ""), other)
			}
		}, atls.CodeEvidenceInvalid, true},
		{"the client does not know the server", func(t *testing.T, p *pair) option {
			other := newMachine(t, "other", true)
			return func(_, c *atls.Config, _ *atls.ListenerConfig) {
				c.Verifier = verifier(t, strings.Replace(other.entry("server", "echo", ""), "name = \"other\"", "name = \"server\"", 1), other)
			}
		}, atls.CodeEvidenceInvalid, false},
		{"the service is not for this client", func(t *testing.T, p *pair) option {
			return func(s, _ *atls.Config, _ *atls.ListenerConfig) {
				s.Verifier = verifier(t, p.client.entry("client", "another", ""), p.client)
			}
		}, atls.CodePolicyDenied, true},
		{"the client's agent key is not measured", func(t *testing.T, p *pair) option {
			m := newMachine(t, "client", false)
			return func(_, c *atls.Config, _ *atls.ListenerConfig) { c.Attester = m.attester(t) }
		}, atls.CodePolicyDenied, true},
		{"the server's agent key is not measured", func(t *testing.T, p *pair) option {
			m := newMachine(t, "server", false)
			return func(s, _ *atls.Config, _ *atls.ListenerConfig) { s.Attester = m.attester(t) }
		}, atls.CodePolicyDenied, false},
		{"another application", func(t *testing.T, p *pair) option {
			return func(s, _ *atls.Config, _ *atls.ListenerConfig) {
				hash, other := sha256.Sum256([]byte("client")), sha256.Sum256([]byte("x"))
				s.Verifier = verifier(t, strings.Replace(p.client.entry("client", "echo", ""), fmt.Sprintf("%x", hash), fmt.Sprintf("%x", other), 1), p.client)
			}
		}, atls.CodePolicyDenied, true},
		{"no collateral", func(t *testing.T, p *pair) option {
			return func(s, _ *atls.Config, _ *atls.ListenerConfig) {
				s.Verifier = verifier(t, p.client.entry("client", "echo", ""))
			}
		}, atls.CodeCollateralUnavailable, true},
		{"unknown service", func(t *testing.T, p *pair) option {
			return func(_, _ *atls.Config, l *atls.ListenerConfig) { l.Services = []string{"other"} }
		}, atls.CodeUnsupported, true},
		{"no room for quotes", func(t *testing.T, p *pair) option {
			return func(s, _ *atls.Config, _ *atls.ListenerConfig) { s.Attester = failing{s.Attester} }
		}, atls.CodeInternal, true},
		{"a client without a TEE", func(t *testing.T, p *pair) option {
			return func(_, c *atls.Config, _ *atls.ListenerConfig) { c.Attester = nil }
		}, atls.CodeUnsupported, true},
		{"the own agent key", func(t *testing.T, p *pair) option {
			return func(s, c *atls.Config, _ *atls.ListenerConfig) {
				s.Attester = p.client.attester(t)
				c.Attester = s.Attester
			}
		}, atls.CodeBindingMismatch, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			names := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
			q := newPairOf(t, names, "", tc.options(t, names))
			q.echo(t)
			_, err := q.dial()
			e := wantCode(t, err, tc.code, tc.isRemote)
			if tc.isRemote && e.Err != nil {
				t.Errorf("the peer is told more than a code: %v", e.Err)
			}
			q.listener.Close()
			failed := q.failures.List()
			if len(failed) != 1 || e.Ref != "" && failed[0].Ref != e.Ref {
				t.Errorf("the server has kept %+v, want one failure with ref %s", failed, e.Ref)
			}
		})
	}
}

// failing is an attester whose quotes fail.
type failing struct{ atls.Attester }

func (failing) Attest(context.Context, *atls.Session, bool) (*atls.Statement, error) {
	return nil, errors.New("the host is silent")
}

func TestUnattestedClient(t *testing.T) {
	var serverVerifier *remote.Verifier
	p := newPair(t, "allow_unattested_clients = true", func(s, c *atls.Config, l *atls.ListenerConfig) {
		serverVerifier = s.Verifier
		c.Attester = nil
		l.Unattested = []string{"echo"}
	})
	p.echo(t)
	c := p.mustDial(t)
	roundTrip(t, c, "hello")
	if !c.Peer().Attested() {
		t.Error("the server was not appraised")
	}
	if peers := p.peers(); len(peers) != 1 || peers[0].Attested() || peers[0].Entry() != "" {
		t.Errorf("the clients are %+v", peers)
	}
	// The policy takes it back, for those who are connected too.
	if n := p.listener.Reappraise(context.Background()); n != 0 {
		t.Errorf("%d denied under the same policy", n)
	}
	deny(t, serverVerifier, p.client, p.client.entry("client", "echo", ""))
	if n := p.listener.Reappraise(context.Background()); n != 1 {
		t.Errorf("%d denied, want the unattested client", n)
	}
	_, err := p.dial()
	wantCode(t, err, atls.CodeUnsupported, true)
}

func TestEmptyExpect(t *testing.T) {
	p := newPair(t, "")
	if _, err := p.dialer.DialContext(context.Background(), "tcp", p.address, "echo", nil); err == nil || !strings.Contains(err.Error(), "no policy entry") {
		t.Errorf("got %v", err)
	}
}

// TestKeyMode reconnects without a quote until RTMR3 or the policy changes.
func TestKeyMode(t *testing.T) {
	p := newPair(t, `require = "key"`, func(s, c *atls.Config, _ *atls.ListenerConfig) { s.KeyTTL, c.KeyTTL = time.Minute, time.Minute })
	p.echo(t)
	quotes := func(want int) {
		t.Helper()
		if s, c := p.server.quoted(), p.client.quoted(); s != want || c != want {
			t.Errorf("%d quotes of the server and %d of the client, want %d each", s, c, want)
		}
	}
	if c := p.mustDial(t); c.Peer().KeyMode {
		t.Error("the first channel is in key mode")
	}
	quotes(1)
	for range 3 {
		c := p.mustDial(t)
		roundTrip(t, c, "again")
		if !c.Peer().KeyMode || !c.Peer().Attested() {
			t.Errorf("the peer is %+v", c.Peer())
		}
	}
	quotes(1)
	for _, counts := range []atls.Counts{p.listener.Counts(), p.dialer.Counts()} {
		if counts.KeyMode != (cache.Counts{Hits: 3, Misses: 1}) {
			t.Errorf("key mode was counted as %+v", counts.KeyMode)
		}
	}
	p.server.emit(t, "more", nil)
	p.client.emit(t, "more", nil)
	if c := p.mustDial(t); c.Peer().KeyMode {
		t.Error("key mode after RTMR3 was extended")
	}
	quotes(2)
}

// TestKeyModeNeedsPolicy makes quotes where the policy wants them, whatever the TTL.
func TestKeyModeNeedsPolicy(t *testing.T) {
	p := newPair(t, "", func(s, c *atls.Config, _ *atls.ListenerConfig) { s.KeyTTL, c.KeyTTL = time.Minute, time.Minute })
	p.echo(t)
	p.mustDial(t)
	if c := p.mustDial(t); c.Peer().KeyMode || p.server.quoted() != 2 || p.client.quoted() != 2 {
		t.Errorf("%d and %d quotes for two channels", p.server.quoted(), p.client.quoted())
	}
}

func TestHTTP(t *testing.T) {
	p := newPair(t, "")
	server := &http.Server{ConnContext: atls.ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, ok := atls.PeerFromRequest(r)
		if !ok {
			http.Error(w, "no peer", http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, peer.Entry())
	})}
	go server.Serve(p.listener)
	t.Cleanup(func() { server.Close() })
	transport := atls.NewTransport(p.dialer, "echo", []string{"server"})
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	for range 3 {
		resp, err := client.Get("http://" + p.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != "client" {
			t.Errorf("got %q, %v", b, err)
		}
	}
	if n := p.client.quoted(); n != 1 {
		t.Errorf("%d quotes for three requests, want 1", n)
	}
}

// TestReappraise drains the channels of peers that a new policy does not accept.
func TestReappraise(t *testing.T) {
	var serverVerifier *remote.Verifier
	p := newPair(t, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		serverVerifier = s.Verifier
		s.Drain = time.Millisecond
	})
	p.echo(t)
	c := p.mustDial(t)
	roundTrip(t, c, "x")
	if n := p.listener.Reappraise(context.Background()); n != 0 {
		t.Errorf("%d peers denied under the same policy", n)
	}
	policy, err := remote.ParsePolicy("policy.toml", []byte("version = 1\n"+p.client.entry("client", "another", "")))
	if err != nil {
		t.Fatal(err)
	}
	if err := serverVerifier.SetPolicy(policy, store(t, policy, p.client)); err != nil {
		t.Fatal(err)
	}
	if n := p.listener.Reappraise(context.Background()); n != 1 {
		t.Errorf("%d peers denied, want 1", n)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the channel of a denied peer: %v, want it cut", err)
	}
}

// TestSessionEnds cuts a channel after its session and its drain.
func TestSessionEnds(t *testing.T) {
	p := newPair(t, "", func(s, c *atls.Config, _ *atls.ListenerConfig) {
		c.MaxSession, c.Drain = 50*time.Millisecond, 50*time.Millisecond
	})
	p.echo(t)
	c := p.mustDial(t)
	<-c.Draining()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after its session: %v", err)
	}
}

// TestBackOff does not spend a quote on a target that has just refused one.
func TestBackOff(t *testing.T) {
	p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
	newPairOf(t, p, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		s.Verifier = verifier(t, p.client.entry("client", "another", ""), p.client)
	})
	p.echo(t)
	_, err := p.dial()
	wantCode(t, err, atls.CodePolicyDenied, true)
	_, err = p.dial()
	if _, ok := errors.AsType[*atls.BackOffError](err); !ok || p.client.quoted() != 1 {
		t.Errorf("got %v after %d quotes", err, p.client.quoted())
	}
}

// TestManyDials opens 64 channels at once.
func TestManyDials(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			c, err := p.dial()
			if err != nil {
				t.Error(err)
				return
			}
			roundTrip(t, c, "x")
			c.Close()
		})
	}
	group.Wait()
}
