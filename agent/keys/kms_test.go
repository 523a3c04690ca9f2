package keys_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tdx-agent/agent/keys"
	"tdx-agent/agent/keys/kmstest"
	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
	"tdx-agent/remote/ratls"
)

var (
	testTime  = time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)
	testAppID = bytes.Repeat([]byte{0xa1}, 20)
)

func testNow() time.Time { return testTime }

// machine is a simulated TD that has measured an application.
type machine struct {
	td     *tdxsim.TD
	root   [32]byte
	events []measure.Event
}

func newMachine(t testing.TB, seed string, application map[string][]byte, order ...string) *machine {
	t.Helper()
	td, err := tdxsim.New(t.TempDir(), tdxsim.Config{Seed: []byte(seed), Now: testNow})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	roots, err := dcap.NewRoots(td.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{td: td, root: roots.Pins()[0]}
	if m.events, err = measure.ParseCCEL(td.CCEL()); err != nil {
		t.Fatal(err)
	}
	for _, name := range order {
		e, err := measure.NewRuntimeEvent(name, application[name], measure.EventV1)
		if err != nil {
			t.Fatal(err)
		}
		if err := td.Extend(measure.RTMR3, e.Digest); err != nil {
			t.Fatal(err)
		}
		m.events = append(m.events, e)
	}
	return m
}

// newGuest is a TD that asks for keys, newKMSMachine one that gives them.
func newGuest(t testing.TB) *machine {
	return newMachine(t, "guest", map[string][]byte{"app-id": testAppID, "compose-hash": bytes.Repeat([]byte{2}, 32), "instance-id": bytes.Repeat([]byte{3}, 20)},
		"system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done", "system-ready")
}

func newKMSMachine(t testing.TB, composeHash byte) *machine {
	return newMachine(t, "kms", map[string][]byte{"app-id": bytes.Repeat([]byte{composeHash}, 20), "compose-hash": bytes.Repeat([]byte{composeHash}, 32), "instance-id": {}},
		"system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done", "system-ready")
}

// attest makes evidence of the machine.
func (m *machine) attest(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	c := m.td.Client()
	dir, err := c.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		return nil, err
	}
	defer c.RemoveAll(dir)
	if err := c.WriteFile(dir+"/inblob", rd[:]); err != nil {
		return nil, err
	}
	quote, err := c.ReadFile(dir + "/outblob")
	if err != nil {
		return nil, err
	}
	return &measure.Evidence{Quote: quote, Events: slices.Clone(m.events), VMConfig: vmConfig}, nil
}

// mrAggregated is what dstack calls this machine.
func (m *machine) mrAggregated(t testing.TB) []byte {
	t.Helper()
	ev, err := m.attest(t.Context(), measure.ReportData{})
	if err != nil {
		t.Fatal(err)
	}
	q, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		t.Fatal(err)
	}
	h := measure.MRAggregated(q.Body.Registers)
	return h[:]
}

// verifier accepts the machine's platform, with applications of this compose hash.
func (m *machine) verifier(t testing.TB, composeHash byte) *remote.Verifier {
	t.Helper()
	return m.newVerifier(t, fmt.Sprintf("compose_hash = [\"%x\"]", bytes.Repeat([]byte{composeHash}, 32)))
}

// newVerifier accepts the machine's platform with these terms.
func (m *machine) newVerifier(t testing.TB, terms string) *remote.Verifier {
	t.Helper()
	policy, err := remote.ParsePolicy("policy.toml", fmt.Appendf(nil, `version = 1
[[peer]]
name = "it"
root = "sha256:%x"
allow_simulated = true
allow_any_image = true
%s
`, m.root, terms))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := m.td.Collateral()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "collateral.json")
	if err := os.WriteFile(path, bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	roots, err := policy.Roots()
	if err != nil {
		t.Fatal(err)
	}
	store, err := collateral.New(collateral.Config{Roots: roots, Files: []string{path}, Now: testNow})
	if err != nil {
		t.Fatal(err)
	}
	v, err := remote.NewVerifier(remote.Config{Policy: policy, Collateral: store, Now: testNow})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// kmsSetup is a guest, a KMS and what the guest knows of it.
type kmsSetup struct {
	guest, kmsTD *machine
	server       *kmstest.Server
	url          string
	measured     measure.Identity
	config       keys.KMSConfig
}

// newKMSSetup starts a KMS that edit may have broken.
func newKMSSetup(t testing.TB, edit func(*kmstest.Config)) *kmsSetup {
	t.Helper()
	s := &kmsSetup{guest: newGuest(t), kmsTD: newKMSMachine(t, 0x11)}
	cfg := kmstest.Config{Host: "127.0.0.1", Guests: s.guest.verifier(t, 2), Attest: s.kmsTD.attest, Now: testNow}
	if edit != nil {
		edit(&cfg)
	}
	var err error
	if s.server, err = kmstest.New(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.server.Serve(l) }()
	t.Cleanup(func() { s.server.Close(); <-done })
	s.url = "https://" + l.Addr().String()
	s.measured = measure.Identity{AppID: testAppID, KeyProvider: string(measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: s.server.Root()}.Payload()),
		MRKMS: s.kmsTD.mrAggregated(t), OSImageHash: measure.OSImageHash(vmConfig)}
	s.config = keys.KMSConfig{URLs: []string{s.url}, Verifier: s.kmsTD.verifier(t, 0x11), Dial: new(net.Dialer).DialContext, Attest: s.guest.attest, VMConfig: vmConfig,
		Timeout: 20 * time.Second, Now: testNow, Measured: func(context.Context) (*measure.Identity, error) { return &s.measured, nil }}
	return s
}

func (s *kmsSetup) kms(t testing.TB) *keys.KMS {
	t.Helper()
	k, err := keys.NewKMS(s.config)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKMSGivesKeys(t *testing.T) {
	s := newKMSSetup(t, nil)
	app, err := s.kms(t).App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer app.Zero()
	wantKey, wantSignature, err := s.server.AppKey(testAppID)
	if err != nil {
		t.Fatal(err)
	}
	derived, err := app.Derive("vms", "signing", "")
	if err != nil {
		t.Fatal(err)
	}
	// The same key from a file gives the same.
	file, err := keys.ParseAppKeys(mustJSON(t, appKeys(t, hex.EncodeToString(wantKey), hex.EncodeToString(wantSignature))))
	if err != nil {
		t.Fatal(err)
	}
	want, err := file.Derive("vms", "signing", "")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(derived.Bytes(), want.Bytes()) || !bytes.Equal(derived.Chain[0], want.Chain[0]) || !bytes.Equal(derived.Chain[1], wantSignature) {
		t.Errorf("key or chain differ: %x, want %x", derived.Chain, want.Chain)
	}
	public, err := app.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	if root := recoverKey(t, derived.Chain[1], keccak([]byte("dstack-kms-issued:"), testAppID, public)); !bytes.Equal(root, s.server.PublicKey()) {
		t.Errorf("the chain leads to %x, not to the KMS root %x", root, s.server.PublicKey())
	}
	if p := app.Provider(); p.Kind != measure.KeyProviderKMS || !bytes.Equal(p.ID, s.server.Root()) {
		t.Errorf("provider is %s", p.Payload())
	}
	if got := s.server.Requests(); !slices.Equal(got, []string{"GetTempCaCert", "GetAppKey"}) {
		t.Errorf("requests were %q", got)
	}
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKMSSignsCertificates(t *testing.T) {
	s := newKMSSetup(t, nil)
	app, err := s.kms(t).App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Now: testTime, Subject: "Zähler", AltNames: []string{"a.example", "10.0.0.1"}, Server: true, RATLS: true, NotBefore: seconds(1000), NotAfter: seconds(4000000000)}, s.guest.attest)
	if err != nil {
		t.Fatal(err)
	}
	chain := certificates(t, k)
	leaf := chain[0]
	if len(chain) != 3 || leaf.Subject.CommonName != "Zähler" || !slices.Equal(leaf.DNSNames, []string{"a.example"}) || len(leaf.IPAddresses) != 1 || leaf.NotBefore.Unix() != 1000 || leaf.NotAfter.Unix() != 4000000000 ||
		!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) {
		t.Errorf("%d certificates; leaf %s %v %v %v", len(chain), leaf.Subject, leaf.DNSNames, leaf.NotAfter, leaf.ExtKeyUsage)
	}
	if a, err := ratls.Parse(leaf); err != nil || len(a.Evidence.Quote) == 0 {
		t.Errorf("the leaf's evidence: %v", err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(s.server.RootCertificate())
	between.AddCert(chain[1])
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: "a.example", CurrentTime: testTime}); err != nil {
		t.Error(err)
	}
	// A derived key is the same every time, and the KMS certifies it without evidence.
	one, err := app.IssueDerived(t.Context(), "p", keys.CertificateRequest{Now: testTime}, s.guest.attest)
	if err != nil {
		t.Fatal(err)
	}
	two, err := app.IssueDerived(t.Context(), "p", keys.CertificateRequest{Now: testTime}, s.guest.attest)
	if err != nil || !bytes.Equal(one.KeyPEM(), two.KeyPEM()) {
		t.Errorf("two keys of a path differ (%v)", err)
	}
	if _, err := ratls.Parse(certificates(t, one)[0]); !errors.Is(err, ratls.ErrNoAttestation) {
		t.Errorf("nobody asked for evidence: %v", err)
	}
}

// TestKMSThatWaits has servers that never answer, at three places.
func TestKMSThatWaits(t *testing.T) {
	held := make(chan struct{})
	t.Cleanup(func() { close(held) })
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	for name, c := range map[string]func(*kmsSetup){
		"no TLS":        func(s *kmsSetup) { s.config.URLs = []string{"https://" + silent.Addr().String()} },
		"no answer":     func(*kmsSetup) {},
		"no connection": func(s *kmsSetup) { s.config.Dial = waitingDial },
	} {
		t.Run(name, func(t *testing.T) {
			s := newKMSSetup(t, func(cfg *kmstest.Config) {
				cfg.Delay = func(r *http.Request) {
					select {
					case <-held:
					case <-r.Context().Done():
					}
				}
			})
			c(s)
			s.config.Timeout = 200 * time.Millisecond
			_, err := s.kms(t).App(t.Context())
			var fault *keys.KMSError
			if !errors.As(err, &fault) || fault.Reason != keys.KMSUnreachable || !strings.Contains(err.Error(), "no answer within 200ms") || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func waitingDial(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestKMSReplicas asks the second when the first cannot be had, and says of each what was
// wrong.
func TestKMSReplicas(t *testing.T) {
	s := newKMSSetup(t, nil)
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	gone := "https://" + dead.Addr().String()
	s.config.URLs = []string{gone, s.url}
	if _, err := s.kms(t).App(t.Context()); err != nil {
		t.Error(err)
	}
	other := newKMSSetup(t, nil) // a KMS of its own, with its own keys
	s.config.URLs = []string{gone, other.url}
	_, err = s.kms(t).App(t.Context())
	if err == nil || !strings.Contains(err.Error(), gone+": unreachable") || !strings.Contains(err.Error(), other.url+": root_key") || strings.Contains(err.Error(), "\n") {
		t.Errorf("error is %v", err)
	}
	if got := other.server.Requests(); len(got) != 0 {
		t.Errorf("a stranger was asked %q", got)
	}
}

func TestKMSWantsAMeasuredBoot(t *testing.T) {
	s := newKMSSetup(t, nil)
	for words, id := range map[string]func() (*measure.Identity, error){
		"not yet": func() (*measure.Identity, error) { return nil, errors.New("not yet") },
		`key provider "none"`: func() (*measure.Identity, error) {
			return &measure.Identity{KeyProvider: `{"name":"none","id":""}`}, nil
		},
		"is no public key": func() (*measure.Identity, error) {
			return &measure.Identity{KeyProvider: `{"name":"kms","id":"00"}`}, nil
		},
		"key provider: unexpected": func() (*measure.Identity, error) { return &measure.Identity{}, nil },
	} {
		s.config.Measured = func(context.Context) (*measure.Identity, error) { return id() }
		if _, err := s.kms(t).App(t.Context()); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("error is %v, want %q", err, words)
		}
	}
	if got := s.server.Requests(); len(got) != 0 {
		t.Errorf("it was asked %q", got)
	}
}

func TestKMSURLs(t *testing.T) {
	for text, ok := range map[string]bool{
		"https://kms.example": true, "https://kms.example:8000/x": true, "https://[::1]:1": true,
		"http://kms.example": false, "kms.example": false, "https://": false, "https://a@b": false, "https://a?b": false, "https://a#b": false, "https:a": false, "\x00": false,
	} {
		if _, err := keys.CheckKMSURL(text); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := keys.NewKMS(keys.KMSConfig{}); err == nil {
		t.Error("an empty configuration is accepted")
	}
}

// TestKMSChain has chains that are not the ones asked for.
func TestKMSChain(t *testing.T) {
	other := newKMSSetup(t, nil)
	otherApp, err := other.kms(t).App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := otherApp.IssueRandom(t.Context(), keys.CertificateRequest{}, other.guest.attest)
	if err != nil {
		t.Fatal(err)
	}
	others := foreign.ChainPEM()
	for name, c := range map[string]struct {
		change func(list []string) []string
		words  string
	}{
		"short":           {func(l []string) []string { return l[:2] }, "2 certificates, want 3"},
		"another KMS's":   {func([]string) []string { return others }, "the root is not the key"},
		"another's leaf":  {func(l []string) []string { return []string{others[0], l[1], l[2]} }, "of another key than the one"},
		"no PEM":          {func(l []string) []string { return []string{"x", l[1], l[2]} }, "element 0 is no certificate"},
		"other authority": {func(l []string) []string { return []string{l[0], others[1], l[2]} }, "the first certificate is not signed by the second"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newKMSSetup(t, func(cfg *kmstest.Config) {
				cfg.Answer = func(method string, b []byte) []byte {
					var doc map[string][]string
					if method != "SignCert" || json.Unmarshal(b, &doc) != nil {
						return b
					}
					doc["certificate_chain"] = c.change(doc["certificate_chain"])
					b, _ = json.Marshal(doc)
					return b
				}
			})
			app, err := s.kms(t).App(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, err = app.IssueRandom(t.Context(), keys.CertificateRequest{}, s.guest.attest)
			var fault *keys.KMSError
			if !errors.As(err, &fault) || fault.Reason != keys.KMSAnswer || !strings.Contains(err.Error(), c.words) {
				t.Errorf("error is %v, want %q", err, c.words)
			}
		})
	}
}

// TestKMSChainOfAnotherApplication has a KMS that takes us for another application.
func TestKMSChainOfAnotherApplication(t *testing.T) {
	s := newKMSSetup(t, nil)
	app, err := s.kms(t).App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.measured.AppID = bytes.Repeat([]byte{0xb2}, 20)
	_, err = app.IssueRandom(t.Context(), keys.CertificateRequest{}, s.guest.attest)
	var fault *keys.KMSError
	if !errors.As(err, &fault) || fault.Reason != keys.KMSAnswer || !strings.Contains(err.Error(), `want "app:ca" of b2b2`) {
		t.Errorf("error is %v", err)
	}
}

// TestKMSPrintsNothing looks for the key in whatever can be printed of a KMS and what it
// gave.
func TestKMSPrintsNothing(t *testing.T) {
	s := newKMSSetup(t, nil)
	k := s.kms(t)
	app, err := k.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := s.server.AppKey(testAppID)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "app", app, "kms", k)
	fmt.Fprintf(&out, "%v %+v %#v %x", app, k, k, app)
	for _, secret := range []string{hex.EncodeToString(key), string(key), fmt.Sprint(key)[1:40]} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("the key is printed")
		}
	}
}

// TestKMSForKeysOfAFile has keys that dstack's boot tools fetched: the KMS issues the
// certificates all the same.
func TestKMSForKeysOfAFile(t *testing.T) {
	s := newKMSSetup(t, nil)
	key, signature, err := s.server.AppKey(testAppID)
	if err != nil {
		t.Fatal(err)
	}
	doc := appKeys(t, hex.EncodeToString(key), hex.EncodeToString(signature))
	doc["key_provider"] = map[string]any{"Kms": map[string]any{"url": s.url + "/prpc", "pubkey": hex.EncodeToString(s.server.Root()), "tmp_ca_key": "", "tmp_ca_cert": ""}}
	path := filepath.Join(t.TempDir(), ".appkeys.json")
	if err := os.WriteFile(path, mustJSON(t, doc), 0o400); err != nil {
		t.Fatal(err)
	}
	app, err := keys.File{Path: path, KMS: s.kms(t)}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Subject: "s"}, s.guest.attest)
	if err != nil || len(k.Chain) != 3 {
		t.Errorf("%v: %v", k, err)
	}
	alone, err := keys.File{Path: path}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := alone.IssueRandom(t.Context(), keys.CertificateRequest{}, s.guest.attest); err == nil || !strings.Contains(err.Error(), "[keys.kms]") {
		t.Errorf("without a KMS to ask: %v", err)
	}
}
