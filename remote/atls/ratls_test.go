package atls_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/ratls"
)

// weak is what a policy entry must say to accept RA-TLS.
const weak = "require = \"certificate\"\nrequire_measured_agent_key = false\n"

// certifier makes evidence for the certificates of a machine.
type certifier struct{ m *machine }

func (c certifier) Evidence(ctx context.Context, spki []byte) (*measure.Evidence, error) {
	return c.m.quote(ctx, ratls.ReportData(spki))
}

func (certifier) Changed(ctx context.Context, _ *measure.Evidence) error {
	<-ctx.Done()
	return ctx.Err()
}

// certificate is the machine's RA-TLS certificate, kept current until the test ends.
func (m *machine) certificate(t testing.TB) func(context.Context) (*tls.Certificate, error) {
	t.Helper()
	r, err := ratls.NewRenewer(ratls.RenewerConfig{Attester: certifier{m}, Server: true, Client: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r.Certificate
}

// newRATLSPair is a pair that speaks dstack's RA-TLS.
func newRATLSPair(t testing.TB, more string, options ...option) *pair {
	t.Helper()
	p := &pair{server: newMachine(t, "server", false), client: newMachine(t, "client", false)}
	speak := func(s, c *atls.Config, l *atls.ListenerConfig) {
		s.Attester, s.RATLS = nil, &atls.RATLS{Certificate: p.server.certificate(t)}
		c.Attester, c.RATLS = nil, &atls.RATLS{Certificate: p.client.certificate(t)}
	}
	return newPairOf(t, p, more, append([]option{speak}, options...)...)
}

func TestRATLS(t *testing.T) {
	p := newRATLSPair(t, weak)
	p.echo(t)
	for range 3 {
		c := p.mustDial(t)
		roundTrip(t, c, "hello")
		if peer := c.Peer(); !peer.Attested() || !peer.Certificate || peer.Entry() != "server" || peer.Expires.Sub(peer.Opened) > time.Hour {
			t.Errorf("the server is %+v", peer)
		} else if left := time.Until(peer.CertificateEnd()); left <= 0 || left > time.Hour {
			t.Errorf("its certificate ends in %v", left)
		}
	}
	channels := p.listener.Channels()
	if len(channels) != 3 {
		t.Fatalf("%d channels, want 3", len(channels))
	}
	if peer := channels[0].Peer(); peer.Assurance() != "certificate" || peer.Entry() != "client" || peer.Service != "echo" {
		t.Errorf("the client is %+v", peer)
	}
	if s, c := p.server.quoted(), p.client.quoted(); s != 1 || c != 1 {
		t.Errorf("%d and %d quotes for three connections, want one each", s, c)
	}
}

// TestRATLSNeedsConsent has policies that do not ask for the weaker way in so many words.
func TestRATLSNeedsConsent(t *testing.T) {
	for more, check := range map[string]string{
		"":                                   "assurance",
		`require = "key"`:                    "assurance",
		`require = "certificate"`:            "agent_key",
		"require_measured_agent_key = false": "assurance",
	} {
		p := newRATLSPair(t, more)
		p.echo(t)
		_, err := p.dial()
		wantCode(t, err, atls.CodePolicyDenied, false)
		rejection, ok := errors.AsType[*remote.Rejection](err)
		if !ok {
			t.Fatalf("%q: %v", more, err)
		}
		found := false
		for _, c := range rejection.Result.Failed() {
			found = found || c.Name == check
		}
		if !found {
			t.Errorf("%q: %v, want check %s to fail", more, err, check)
		}
	}
}

// leafOf makes a self-signed certificate with these extensions.
func leafOf(t testing.TB, extensions []pkix.Extension, life time.Duration) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life), ExtraExtensions: extensions}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// ratlsExtensions are those of a certificate of the machine.
func (m *machine) ratlsExtensions(t testing.TB, cert *tls.Certificate) (own []pkix.Extension) {
	t.Helper()
	ev, err := certifier{m}.Evidence(context.Background(), cert.Leaf.RawSubjectPublicKeyInfo)
	if err != nil {
		t.Fatal(err)
	}
	if own, err = ratls.Extensions(ev, cert.Leaf.RawSubjectPublicKeyInfo); err != nil {
		t.Fatal(err)
	}
	return own
}

// attestedLeaf is a certificate of the machine that lives so long, with these extensions
// as well.
func (m *machine) attestedLeaf(t testing.TB, life time.Duration, more ...pkix.Extension) *tls.Certificate {
	t.Helper()
	cert := leafOf(t, nil, life)
	key := cert.PrivateKey.(*ecdsa.PrivateKey)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotBefore: cert.Leaf.NotBefore, NotAfter: cert.Leaf.NotAfter,
		ExtraExtensions: append(m.ratlsExtensions(t, cert), more...)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// show dials the server with a certificate, and returns how the server ended that.
func (p *pair) show(t testing.TB, cfg *tls.Config, observed <-chan atls.Handshake) atls.Handshake {
	t.Helper()
	cfg.InsecureSkipVerify = true
	c, err := tls.Dial("tcp", p.address, cfg)
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	select {
	case h := <-observed:
		return h
	case <-time.After(30 * time.Second):
		t.Fatalf("the server says nothing; the client: %v", err)
		return atls.Handshake{}
	}
}

// TestRATLSRefusals has one vector per failure. What fails is the server's verdict.
func TestRATLSRefusals(t *testing.T) {
	observed := make(chan atls.Handshake, 1)
	p := newRATLSPair(t, weak, func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		s.Observe = func(h atls.Handshake) { observed <- h }
	})
	p.echo(t)
	claims := []pkix.Extension{ratls.UsageExtension(ratls.UsageKMS)}
	genuine, another := p.client.attestedLeaf(t, time.Hour), leafOf(t, nil, time.Hour)
	stranger := newMachine(t, "stranger", false)
	self, err := p.server.certificate(t)(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cert  *tls.Certificate
		code  atls.Code
		words string
	}{
		"plain certificate":      {another, atls.CodeEvidenceInvalid, "carries no dstack attestation"},
		"issuer's claims alone":  {leafOf(t, claims, time.Hour), atls.CodeEvidenceInvalid, "carries no dstack attestation"},
		"evidence of other key":  {leafOf(t, p.client.ratlsExtensions(t, genuine), time.Hour), atls.CodeEvidenceInvalid, "bound to another key"},
		"ended":                  {p.client.attestedLeaf(t, -time.Minute), atls.CodeEvidenceInvalid, "is valid from"},
		"another TD":             {stranger.attestedLeaf(t, time.Hour), atls.CodeEvidenceInvalid, "signature"},
		"the server's own image": {self, atls.CodeEvidenceInvalid, "signature"}, // below another root
		"stolen certificate":     {&tls.Certificate{Certificate: genuine.Certificate, PrivateKey: another.PrivateKey}, atls.CodeInternal, "invalid signature"},
		"broken signature":       {&tls.Certificate{Certificate: [][]byte{append(bytes.Clone(genuine.Certificate[0][:len(genuine.Certificate[0])-1]), genuine.Certificate[0][len(genuine.Certificate[0])-1]^1)}, PrivateKey: genuine.PrivateKey}, atls.CodeEvidenceInvalid, "signature is not of its own key"},
	} {
		h := p.show(t, &tls.Config{Certificates: []tls.Certificate{*c.cert}}, observed)
		if h.Code != c.code || h.Err == nil || !strings.Contains(h.Err.Error(), c.words) || h.Entry != "" && !errors.As(h.Err, new(*remote.Rejection)) {
			t.Errorf("%s: %s, %v (entry %q), want %s and %q", name, h.Code, h.Err, h.Entry, c.code, c.words)
		}
	}
	if h := p.show(t, &tls.Config{}, observed); h.Code != atls.CodeInternal || !strings.Contains(h.Err.Error(), "didn't provide a certificate") {
		t.Errorf("no certificate: %s, %v", h.Code, h.Err)
	}
	if h := p.show(t, &tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*genuine}}, observed); h.Code == atls.CodeOK {
		t.Error("took TLS 1.2")
	}
	if h := p.show(t, &tls.Config{Certificates: []tls.Certificate{*genuine}}, observed); h.Code != atls.CodeOK || h.Entry != "client" || h.Assurance != "certificate" {
		t.Errorf("genuine: %+v", h)
	}
}

// TestRATLSClaims has an issuer that calls another application the wanted one.
func TestRATLSClaims(t *testing.T) {
	observed := make(chan atls.Handshake, 1)
	p := newRATLSPair(t, weak, func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		s.Observe = func(h atls.Handshake) { observed <- h }
	})
	p.echo(t)
	wanted := p.client.attestedLeaf(t, time.Hour)
	a, err := ratls.Parse(wanted.Leaf)
	if err != nil {
		t.Fatal(err)
	}
	info, err := ratls.AppInfoOf(a.Evidence, nil)
	if err != nil {
		t.Fatal(err)
	}
	other := &machine{td: p.client.td, key: p.client.key, root: p.client.root, bundle: p.client.bundle, events: p.client.events}
	other.emit(t, "late", nil)
	liar := other.attestedLeaf(t, time.Hour, info.Extension())
	if h := p.show(t, &tls.Config{Certificates: []tls.Certificate{*liar}}, observed); h.Code != atls.CodeOK {
		t.Fatalf("a later moment of the same application: %v", h.Err)
	}
	other.events = other.events[:len(other.events)-1] // hides what happened since
	liar = other.attestedLeaf(t, time.Hour, info.Extension())
	if h := p.show(t, &tls.Config{Certificates: []tls.Certificate{*liar}}, observed); h.Code != atls.CodeEvidenceInvalid || !strings.Contains(h.Err.Error(), "event log") {
		t.Errorf("%s, %v, want the log to be refused whatever the issuer says", h.Code, h.Err)
	}
}

// TestRATLSOwnKey dials a server that shows the client's own certificate, with its key.
func TestRATLSOwnKey(t *testing.T) {
	m := newMachine(t, "server", false)
	one := m.attestedLeaf(t, time.Hour)
	same := func(context.Context) (*tls.Certificate, error) { return one, nil }
	p := newPairOf(t, &pair{server: m, client: m}, weak, func(s, c *atls.Config, l *atls.ListenerConfig) {
		s.Attester, s.RATLS = nil, &atls.RATLS{Certificate: same}
		c.Attester, c.RATLS = nil, &atls.RATLS{Certificate: same}
	})
	_, err := p.dial()
	wantCode(t, err, atls.CodeBindingMismatch, false)
}

// TestRATLSResumption has a client that would resume, and is appraised every time.
func TestRATLSResumption(t *testing.T) {
	observed := make(chan atls.Handshake, 1)
	p := newRATLSPair(t, weak, func(s, _ *atls.Config, _ *atls.ListenerConfig) {
		s.Observe = func(h atls.Handshake) { observed <- h }
	})
	p.echo(t)
	cfg := &tls.Config{Certificates: []tls.Certificate{*p.client.attestedLeaf(t, time.Hour)}, ClientSessionCache: tls.NewLRUClientSessionCache(4), InsecureSkipVerify: true}
	for range 2 {
		c, err := tls.Dial("tcp", p.address, cfg)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		if h := <-observed; h.Code != atls.CodeOK {
			t.Fatal(h.Err)
		}
		io.WriteString(c, "x") // the server's tickets would be read with the answer
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil || c.ConnectionState().DidResume {
			t.Errorf("%v, resumed: %v", err, c.ConnectionState().DidResume)
		}
		c.Close()
	}
}

// TestRATLSSession ends with the certificate.
func TestRATLSSession(t *testing.T) {
	short := newMachine(t, "server", false)
	leaf := short.attestedLeaf(t, time.Minute)
	p := newRATLSPair(t, weak, func(_, c *atls.Config, _ *atls.ListenerConfig) {})
	p.echo(t)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := atls.NewListener(inner, atls.ListenerConfig{Services: []string{"echo"}, Config: atls.Config{
		Verifier: verifier(t, p.client.entry("client", "echo", weak), p.client),
		RATLS:    &atls.RATLS{Certificate: func(context.Context) (*tls.Certificate, error) { return leaf, nil }}}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := atls.NewDialer(atls.Config{Verifier: verifier(t, short.entry("server", "other", weak), short), RATLS: &atls.RATLS{Certificate: p.client.certificate(t)}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.DialContext(context.Background(), "tcp", inner.Addr().String(), "", []string{"server"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if peer, _ := atls.PeerFromConn(c); peer.Expires.After(leaf.Leaf.NotAfter.Add(time.Second)) {
		t.Errorf("lasts until %v, the certificate until %v", peer.Expires, leaf.Leaf.NotAfter)
	}
}

// TestRATLSPolicyReload denies a certificate that was accepted a moment ago, and drains
// its connection.
func TestRATLSPolicyReload(t *testing.T) {
	var v *remote.Verifier
	p := newRATLSPair(t, weak, func(_, c *atls.Config, _ *atls.ListenerConfig) {
		v = c.Verifier
		c.Drain = time.Millisecond
	})
	p.echo(t)
	c := p.mustDial(t)
	roundTrip(t, c, "x")
	deny(t, v, p.server, p.server.entry("server", "other", weak+"rtmr3 = [\""+strings.Repeat("00", 48)+"\"]"))
	if n := p.dialer.Reappraise(context.Background()); n != 1 {
		t.Errorf("%d denied, want 1", n)
	}
	<-c.Draining()
	_, err := p.dial()
	wantCode(t, err, atls.CodePolicyDenied, false)
}

// TestRATLSUnattested opens a service to clients without a certificate, never to those
// with a bad one.
func TestRATLSUnattested(t *testing.T) {
	observed := make(chan atls.Handshake, 1)
	p := newRATLSPair(t, weak+"allow_unattested_clients = true", func(s, _ *atls.Config, l *atls.ListenerConfig) {
		l.Unattested = []string{"echo"}
		s.Observe = func(h atls.Handshake) { observed <- h }
	})
	p.echo(t)
	if h := p.show(t, &tls.Config{}, observed); h.Code != atls.CodeOK || h.Entry != "" {
		t.Errorf("no certificate: %+v", h)
	}
	if h := p.show(t, &tls.Config{Certificates: []tls.Certificate{*leafOf(t, nil, time.Hour)}}, observed); h.Code != atls.CodeEvidenceInvalid {
		t.Errorf("a bad certificate: %+v", h)
	}
}

// TestCertificateCache watches the verdict on one certificate, whose collateral gets too
// old for the policy meanwhile, by a clock of its own.
func TestCertificateCache(t *testing.T) {
	m := newMachine(t, "server", false)
	policy, err := remote.ParsePolicy("policy.toml", []byte("version = 1\n[defaults]\nmax_collateral_age = \"48h\"\n"+m.entry("server", "echo", weak)))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	now := time.Now()
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	pass := func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }
	v, err := remote.NewVerifier(remote.Config{Policy: policy, Collateral: store(t, policy, m), Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	chain := []*x509.Certificate{m.attestedLeaf(t, 100*time.Hour).Leaf}
	appraise := func(service string) error {
		_, _, err := v.AppraiseCertificate(context.Background(), chain, remote.Expect{Channel: &remote.Channel{Certificate: true, Service: service}})
		return err
	}
	names := []string{"server"}
	ends := func() bool { // without what is remembered: this list of entries is a new one
		names = append(names, "server")
		_, _, err := v.AppraiseCertificate(context.Background(), chain, remote.Expect{Entries: names, Channel: &remote.Channel{Certificate: true, Service: "echo"}})
		return err != nil
	}
	for _, step := range []time.Duration{time.Hour, 5 * time.Minute, 5 * time.Second} {
		for range 100 {
			if ends() {
				break
			}
			pass(step)
		}
		pass(-step)
	}
	if err := appraise("echo"); err != nil { // in the last seconds in which it is
		t.Fatal(err)
	}
	pass(4 * time.Minute)
	if !ends() {
		t.Fatal("the collateral is still young enough")
	}
	if err := appraise("echo"); err != nil {
		t.Errorf("not remembered: %v", err)
	}
	pass(2 * time.Minute)
	if err := appraise("echo"); err == nil {
		t.Error("remembered for six minutes")
	}
	pass(-6 * time.Minute)
	if err := appraise("echo"); err != nil {
		t.Fatal(err)
	}
	if err := appraise("other"); err == nil {
		t.Error("known for one service, accepted for another")
	}
	if err := v.SetPolicy(policy, store(t, policy, m)); err != nil {
		t.Fatal(err)
	}
	pass(4 * time.Minute)
	if err := appraise("echo"); err == nil {
		t.Error("remembered under another generation of the policy")
	}
	pass(200 * time.Hour)
	if err := appraise("echo"); !errors.As(err, new(*remote.CertificateError)) {
		t.Errorf("after its end: %v", err)
	}
}

// TestRATLSEntries has a service for other policy entries than the one that fits.
func TestRATLSEntries(t *testing.T) {
	observed := make(chan atls.Handshake, 1)
	p := &pair{server: newMachine(t, "server", false), client: newMachine(t, "client", false)}
	newPairOf(t, p, weak, func(s, c *atls.Config, l *atls.ListenerConfig) {
		s.Attester, s.RATLS = nil, &atls.RATLS{Certificate: p.server.certificate(t)}
		s.Verifier = verifier(t, p.client.entry("client", "echo", weak)+p.client.entry("another", "echo", weak), p.client)
		s.Observe = func(h atls.Handshake) { observed <- h }
		c.Attester, c.RATLS = nil, &atls.RATLS{Certificate: p.client.certificate(t)}
		l.Entries = map[string][]string{"echo": {"another"}}
	})
	cert := p.client.attestedLeaf(t, time.Hour)
	if h := p.show(t, &tls.Config{Certificates: []tls.Certificate{*cert}}, observed); h.Code != atls.CodePolicyDenied {
		t.Errorf("%+v, want policy_denied: the service is for another entry", h)
	}
}

// TestRATLSLifetime has a policy that wants certificates to be short, before and after a
// connection is open.
func TestRATLSLifetime(t *testing.T) {
	var v *remote.Verifier
	p := newRATLSPair(t, weak+`max_cert_lifetime = "2h"`, func(_, c *atls.Config, _ *atls.ListenerConfig) { v = c.Verifier })
	p.echo(t)
	c := p.mustDial(t)
	roundTrip(t, c, "x")
	deny(t, v, p.server, p.server.entry("server", "other", weak+`max_cert_lifetime = "1h"`)) // it lives 65 minutes
	if n := p.dialer.Reappraise(context.Background()); n != 1 {
		t.Errorf("%d denied, want 1", n)
	}
	_, err := p.dial()
	wantCode(t, err, atls.CodePolicyDenied, false)
	if !strings.Contains(err.Error(), "certificate lifetime: got 1h5m0s: want at most 1h0m0s") {
		t.Error(err)
	}
}

// TestRATLSZeroAgentKey has a server that has measured the agent key which a certificate
// lacks, 32 zeros, and a policy that demands a measured one.
func TestRATLSZeroAgentKey(t *testing.T) {
	zeros := func(*machine) []byte { return make([]byte, 32) }
	p := &pair{server: bootMachine(t, "server", zeros), client: newMachine(t, "client", false)}
	newPairOf(t, p, weak, func(s, c *atls.Config, _ *atls.ListenerConfig) {
		s.Attester, s.RATLS = nil, &atls.RATLS{Certificate: p.server.certificate(t)}
		c.Attester, c.RATLS = nil, &atls.RATLS{Certificate: p.client.certificate(t)}
		c.Verifier = verifier(t, p.server.entry("server", "other", `require = "certificate"`), p.server)
	})
	p.echo(t)
	_, err := p.dial()
	wantCode(t, err, atls.CodePolicyDenied, false)
	if !strings.Contains(err.Error(), "agent key: got a certificate, which no agent key has signed") {
		t.Error(err)
	}
}
