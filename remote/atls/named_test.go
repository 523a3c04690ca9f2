package atls_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
)

// twisted is an accepted TD that attests another channel than the one it is asked for,
// or says something else of itself.
type twisted struct {
	atls.Attester
	session   func(*atls.Session)
	statement func(*atls.Statement)
}

func (w twisted) Attest(ctx context.Context, s *atls.Session, keyMode bool) (*atls.Statement, error) {
	other := *s
	if w.session != nil {
		w.session(&other)
	}
	st, err := w.Attester.Attest(ctx, &other, keyMode)
	if err == nil && w.statement != nil {
		w.statement(st)
	}
	return st, err
}

// TestBound changes one thing after the other that report data and signature cover, at
// either end: genuine evidence of an accepted TD does not fit then.
func TestBound(t *testing.T) {
	for name, twist := range map[string]twisted{
		"role swap":                         {session: func(s *atls.Session) { s.Role = atls.Client + atls.Server - s.Role }},
		"another TLS connection's exporter": {session: func(s *atls.Session) { s.Exporter[0] ^= 1 }},
		"nonce swap, mode downgrade: another pair of hellos": {session: func(s *atls.Session) { s.Transcript[31] ^= 1 }},
		"another client's TLS key":                           {session: func(s *atls.Session) { s.ClientKey[0] ^= 1 }},
		"another server's TLS key":                           {session: func(s *atls.Session) { s.ServerKey[0] ^= 1 }},
		"TLS keys swapped":                                   {session: func(s *atls.Session) { s.ClientKey, s.ServerKey = s.ServerKey, s.ClientKey }},
		"RTMR3 that was not signed":                          {statement: func(st *atls.Statement) { st.RTMR3[0] ^= 1 }},
		"signature changed":                                  {statement: func(st *atls.Statement) { st.Signature[8] ^= 1 }},
		"quote changed, whose signatures would be dearer to check": {statement: func(st *atls.Statement) {
			ev := *st.Evidence
			ev.Quote = bytes.Clone(ev.Quote)
			ev.Quote[48+520] ^= 1 // report data
			st.Evidence = &ev
		}},
	} {
		for _, isServer := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, of the server: %v", name, isServer), func(t *testing.T) {
				p := newPair(t, "", func(s, c *atls.Config, _ *atls.ListenerConfig) {
					if isServer {
						twist.Attester, s.Attester = s.Attester, twist
						s.Attester = twist
					} else {
						twist.Attester = c.Attester
						c.Attester = twist
					}
				})
				p.echo(t)
				_, err := p.dial()
				wantCode(t, err, atls.CodeBindingMismatch, !isServer)
				if n := p.server.quoted(); !isServer && n != 0 {
					t.Errorf("the server made %d quotes for a client whose evidence did not fit", n)
				}
			})
		}
	}
}

// skimping signs where a quote is wanted.
type skimping struct{ atls.Attester }

func (s skimping) Attest(ctx context.Context, session *atls.Session, _ bool) (*atls.Statement, error) {
	return s.Attester.Attest(ctx, session, true)
}

// TestNoQuote does not take a signature where the hello said quote: the mode is the
// verifier's to choose.
func TestNoQuote(t *testing.T) {
	for _, isServer := range []bool{false, true} {
		p := newPair(t, `require = "key"`, func(s, c *atls.Config, _ *atls.ListenerConfig) {
			s.KeyTTL, c.KeyTTL = time.Minute, time.Minute
			if isServer {
				s.Attester = skimping{s.Attester}
			} else {
				c.Attester = skimping{c.Attester}
			}
		})
		p.echo(t)
		_, err := p.dial()
		wantCode(t, err, atls.CodeEvidenceInvalid, !isServer)
	}
}

// wantCheck wants the server's last failure to be one of this check alone.
func (p *pair) wantCheck(t *testing.T, name string) {
	t.Helper()
	list := p.failed(t, 1)
	f := list[len(list)-1]
	if len(f.Checks) == 0 || f.Checks[0].Name != name {
		t.Errorf("the server refused by %+v (%s), want the check %s", f.Checks, f.Text, name)
	}
}

// newKey makes an agent key that nobody has measured.
func newKey(t *testing.T, m *machine) (*atls.Key, []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	k, err := atls.NewKey(private, m.quote, m.rtmr3)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(der)
	return k, hash[:]
}

// TestRawQuoteIsNotEnough has a container of an accepted TD that may have any report
// data quoted, and makes a tdx-atls quote for a key of its own: the TD has measured
// another one.
func TestRawQuoteIsNotEnough(t *testing.T) {
	p := newPair(t, "", func(_, c *atls.Config, _ *atls.ListenerConfig) {})
	thief, _ := newKey(t, p.client)
	p = newPairOf(t, &pair{server: p.server, client: p.client}, "", func(_, c *atls.Config, _ *atls.ListenerConfig) { c.Attester = thief })
	p.echo(t)
	_, err := p.dial()
	wantCode(t, err, atls.CodePolicyDenied, true)
	p.wantCheck(t, "agent_key")
	if n := p.server.quoted(); n != 0 {
		t.Errorf("%d quotes for a thief", n)
	}
}

// TestLateEvents has a TD in which an application has added events with trusted names
// after system-ready. They count for nothing.
func TestLateEvents(t *testing.T) {
	t.Run("agent-key", func(t *testing.T) {
		m := newMachine(t, "client", false)
		key, hash := newKey(t, m)
		m.emit(t, measure.EventAgentKey, hash)
		p := newPairOf(t, &pair{server: newMachine(t, "server", true), client: m}, "", func(_, c *atls.Config, _ *atls.ListenerConfig) { c.Attester = key })
		p.echo(t)
		_, err := p.dial()
		wantCode(t, err, atls.CodeEvidenceInvalid, true)
		p.wantCheck(t, "identity")
	})
	t.Run("compose-hash", func(t *testing.T) {
		m, wanted := newMachine(t, "another", true), sha256.Sum256([]byte("client"))
		m.emit(t, measure.EventComposeHash, wanted[:])
		p := newPairOf(t, &pair{server: newMachine(t, "server", true), client: m}, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) {
			s.Verifier = verifier(t, m.entry("client", "echo", ""), m) // the hash of "client", and m's root
		})
		p.echo(t)
		_, err := p.dial()
		wantCode(t, err, atls.CodeEvidenceInvalid, true)
		p.wantCheck(t, "identity")
	})
}

// TestDiversion sends a dial to another peer that the policy accepts too: it is not the
// one that was expected.
func TestDiversion(t *testing.T) {
	p := newPair(t, "", func(_, c *atls.Config, _ *atls.ListenerConfig) {})
	other := newMachine(t, "expected", true)
	d, err := atls.NewDialer(atls.Config{Attester: p.client.attester(t), Verifier: verifier(t, p.server.entry("server", "other", "")+other.entry("expected", "other", ""), p.server, other)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.echo(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = d.DialContext(ctx, "tcp", p.address, "echo", []string{"expected"})
	e := wantCode(t, err, atls.CodePolicyDenied, false)
	if r, ok := errors.AsType[*remote.Rejection](err); !ok || r.Result.Entry != "expected" {
		t.Errorf("refused with %v, want the rejection of the entry that was expected", e)
	}
	if c, err := d.DialContext(ctx, "tcp", p.address, "echo", []string{"server"}); err == nil {
		c.Close()
	} else if !errors.As(err, new(*atls.BackOffError)) {
		t.Error(err)
	}
}

// TestServersTLS has servers whose TLS is not what the protocol wants.
func TestServersTLS(t *testing.T) {
	p := newPair(t, "")
	for name, edit := range map[string]func(*tls.Config){
		"no ALPN": func(c *tls.Config) { c.NextProtos = nil },
		"TLS 1.2": func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"P-384":   func(c *tls.Config) { c.Certificates = []tls.Certificate{selfMadeOf(t, elliptic.P384())} },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			cfg := tlsOf(t)
			edit(cfg)
			go func() {
				for {
					raw, err := l.Accept()
					if err != nil {
						return
					}
					c := tls.Server(raw, cfg)
					c.SetDeadline(time.Now().Add(20 * time.Second))
					takeFrame(c)
					raw.Close()
				}
			}()
			err = p.dialTo(t.Context(), l.Addr().String())
			if e, ok := errors.AsType[*atls.Error](err); !ok || e.Step != atls.StepTLS {
				t.Errorf("got %v, want the end in TLS", err)
			}
		})
	}
	if n := p.client.quoted(); n != 0 {
		t.Errorf("%d quotes for such servers", n)
	}
}

// TestBadServers has one vector for each frame of a server that comes too large or is
// something else, and for application bytes in its place.
func TestBadServers(t *testing.T) {
	application := []byte("HTTP/1.1 200 OK\r\n\r\n")
	for _, tc := range []struct {
		name  string
		hello []byte // nil: an honest one
		then  []byte
	}{
		{"application bytes instead of HELLO_S", application, nil},
		{"HELLO_S too large", makeFrame(2, strings.Repeat(" ", 4097)), nil},
		{"HELLO_S of another service", []byte(strings.Replace(string(helloServer()), `"echo"`, `"else"`, 1)), nil},
		{"HELLO_S with a mode that was not offered", makeFrame(2, strings.Replace(string(helloServer()[4:]), `"client_evidence":"quote"`, `"client_evidence":"both"`, 1)), nil},
		{"HELLO_S with a member twice", makeFrame(2, strings.Replace(string(helloServer()[4:]), `{"v":1`, `{"v":1,"v":1`, 1)), nil},
		{"application bytes instead of EVIDENCE", nil, application},
		{"EVIDENCE too large", nil, []byte{3, 4, 0, 1}},
		{"HELLO_S again", nil, helloServer()},
		{"RESULT ok without EVIDENCE", nil, makeFrame(4, `{"ok":true,"code":"ok","ref":"","ttl_s":1}`)},
		{"RESULT too large", nil, []byte{4, 0, 4, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, "")
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			cfg := tlsOf(t)
			go func() {
				raw, err := l.Accept()
				if err != nil {
					return
				}
				defer raw.Close()
				c := tls.Server(raw, cfg)
				c.SetDeadline(time.Now().Add(20 * time.Second))
				takeFrame(c)
				if tc.hello != nil {
					c.Write(tc.hello)
				} else {
					c.Write(helloServer())
					takeFrame(c)
					c.Write(tc.then)
				}
				takeFrame(c) // until the client refuses
			}()
			err = p.dialTo(t.Context(), l.Addr().String())
			isOK := strings.HasPrefix(tc.name, "RESULT ok")
			wantCode(t, err, atls.CodeBadFrame, isOK)
			if !isOK && !strings.Contains(err.Error(), "malformed") {
				t.Errorf("got %v, want what is malformed, and not that the server went away", err)
			}
			if n := p.client.quoted(); tc.hello != nil && n != 0 {
				t.Errorf("the client made %d quotes for such a hello", n)
			}
		})
	}
}

// handMade is a client of an accepted TD that sends each frame when the test says so.
type handMade struct {
	*tls.Conn
	session atls.Session
	key     *atls.Key
}

// byHand makes TLS and both hellos.
func (p *pair) byHand(t *testing.T) *handMade {
	t.Helper()
	cfg := tlsOf(t)
	h := &handMade{Conn: p.stranger(t, cfg), key: p.client.attester(t)}
	if err := h.greet(cfg); err != nil {
		t.Fatal(err)
	}
	return h
}

// greet exchanges hellos.
func (h *handMade) greet(cfg *tls.Config) error {
	hash := h.key.AgentKey()
	frameC := makeFrame(1, hello(`"agent_key":"`+zeros32+`"`, `"agent_key":"`+base64.StdEncoding.EncodeToString(hash[:])+`"`))
	if _, err := h.Write(frameC); err != nil {
		return err
	}
	frameS, err := takeFrame(h)
	if err != nil || frameS[0] != 2 {
		return fmt.Errorf("got %s, %v", frameS, err)
	}
	leaf, err := x509.ParseCertificate(cfg.Certificates[0].Certificate[0])
	if err != nil {
		return err
	}
	state := h.ConnectionState()
	h.session = atls.Session{Role: atls.Client, Transcript: atls.Transcript(frameC, frameS), ClientKey: sha256.Sum256(leaf.RawSubjectPublicKeyInfo),
		ServerKey: sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo)}
	ekm, err := state.ExportKeyingMaterial("EXPORTER-tdx-atls-v1", h.session.Transcript[:], 32)
	if err == nil {
		h.session.Exporter = [32]byte(ekm)
	}
	return err
}

// evidence is the client's EVIDENCE frame.
func (h *handMade) evidence(t *testing.T) []byte {
	t.Helper()
	frame, err := h.attest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return frame
}

func (h *handMade) attest(ctx context.Context) ([]byte, error) {
	st, err := h.key.Attest(ctx, &h.session, false)
	if err != nil {
		return nil, err
	}
	body, err := atls.EncodeStatement(st, "quote")
	return makeFrame(3, string(body)), err
}

// accepted sends evidence, and wants the server's and its RESULT ok.
func (h *handMade) accepted(t *testing.T) {
	t.Helper()
	h.Write(h.evidence(t))
	for _, kind := range []byte{3, 4} {
		if frame, err := takeFrame(h); err != nil || frame[0] != kind || kind == 4 && !strings.Contains(string(frame), `"ok":true`) {
			t.Fatalf("got %.200s, %v, want frame %d", frame, err, kind)
		}
	}
}

func (h *handMade) ref() string { return fmt.Sprintf("%x", h.session.Transcript[:8]) }

// TestByHand is the whole protocol written by hand, and what may not come in place of
// its last frame.
func TestByHand(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	h := p.byHand(t)
	h.accepted(t)
	h.Write(makeFrame(4, `{"ok":true,"code":"ok","ref":"`+h.ref()+`","ttl_s":60}`))
	roundTrip(t, h, "application bytes")
	if peers := p.peers(); len(peers) != 1 || peers[0].Expires.Sub(peers[0].Opened) != time.Minute {
		t.Errorf("the peers are %+v", peers)
	}
	for name, frame := range map[string][]byte{
		"application bytes before RESULT": []byte("GET / HTTP/1.1\r\n\r\n"),
		"RESULT of another channel":       makeFrame(4, `{"ok":true,"code":"ok","ref":"0011223344556677","ttl_s":60}`),
		"RESULT too large":                {4, 0, 4, 1},
		"EVIDENCE again":                  h.evidence(t),
	} {
		t.Run(name, func(t *testing.T) {
			h := p.byHand(t)
			h.accepted(t)
			h.Write(frame)
			wantResult(t, h, "bad_frame")
		})
	}
	if n := len(p.peers()); n != 1 {
		t.Errorf("%d channels are open, want the first alone", n)
	}
}

// TestBadLog has evidence that fits but for its event log.
func TestBadLog(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	for _, log := range []string{`[1]`, `1`, `"["`, `[]x`, `[`, ``} {
		h := p.byHand(t)
		head, tail, ok := bytes.Cut(h.evidence(t)[4:], []byte(`"event_log":[`))
		at := bytes.Index(tail, []byte(`],`))
		if !ok || at < 0 {
			t.Fatal("no event log in the frame")
		}
		member := `"event_log":` + log
		if log == "" {
			member = `"none":1`
		}
		h.Write(makeFrame(3, string(head)+member+string(tail[at+1:])))
		code := "evidence_invalid"
		if log == "[" { // whose end is not that of the value
			code = "bad_frame"
		}
		wantResult(t, h, code)
	}
	if n := p.server.quoted(); n != 0 {
		t.Errorf("%d quotes for them", n)
	}
}

// TestReplay sends the evidence of an earlier channel of the same peer.
func TestReplay(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	first := p.byHand(t)
	recorded := first.evidence(t)
	first.Write(recorded)
	if frame, err := takeFrame(first); err != nil || frame[0] != 3 {
		t.Fatalf("got %s, %v", frame, err)
	}
	second := p.byHand(t)
	second.Write(recorded)
	wantResult(t, second, "binding_mismatch")
	if n := p.server.quoted(); n != 1 {
		t.Errorf("the server made %d quotes, want the first alone", n)
	}
}

// TestOwnCollateral has a peer that brings collateral of its own where there is none: it
// counts for nothing, however genuine it is.
func TestOwnCollateral(t *testing.T) {
	p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true)}
	newPairOf(t, p, "", func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		s.Verifier = verifier(t, p.client.entry("client", "echo", ""))
	})
	p.echo(t)
	h := p.byHand(t)
	body := h.evidence(t)[4:]
	h.Write(makeFrame(3, strings.TrimSuffix(string(body), "}")+`,"collateral":`+string(p.client.bundle)+"}"))
	wantResult(t, h, "collateral_unavailable")
}
