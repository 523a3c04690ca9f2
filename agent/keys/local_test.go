package keys_test

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/nacl/box"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

// hostAPI is a host with dstack's local key provider, which judges quotes by a Verifier of
// its own and may be broken in one way.
type hostAPI struct {
	td     *tdxsim.TD // the machine that the enclave is on
	guests *remote.Verifier
	seed   []byte

	enclave tdxsim.Enclave
	seal    func(public *[32]byte, seed []byte) []byte // nil: a sealed box
	bind    func(sealed []byte) [32]byte               // nil: SHA-256
	quote   func([]byte) []byte                        // nil: as it is
	answer  func([]byte) []byte                        // nil: as it is
	held    chan struct{}                              // if not nil, answers wait for it
	asked   int
}

func (h *hostAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.asked++
	if h.held != nil {
		select {
		case <-h.held:
		case <-r.Context().Done():
		}
	}
	answer, err := h.getSealingKey(r)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		answer, _ = json.Marshal(map[string]string{"error": err.Error()})
	}
	if h.answer != nil {
		answer = h.answer(answer)
	}
	w.Write(answer)
}

func (h *hostAPI) getSealingKey(r *http.Request) ([]byte, error) {
	if r.Method != http.MethodPost || r.URL.Path != "/api/GetSealingKey" || !r.URL.Query().Has("json") {
		return nil, errors.New("want POST /api/GetSealingKey?json")
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	var request struct{ Quote string }
	if err := json.Unmarshal(body, &request); err != nil {
		return nil, err
	}
	quote, err := hex.DecodeString(request.Quote)
	if err != nil {
		return nil, err
	}
	// Without the log, the enclave knows the registers and no more.
	result, err := h.guests.Appraise(r.Context(), &measure.Evidence{Quote: quote}, remote.Expect{AnyReportData: true})
	if err != nil {
		return nil, err
	}
	rd := result.Claims.Quote.Body.ReportData
	public := [32]byte(rd[:32])
	sealed, err := box.SealAnonymous(nil, h.seed, &public, rand.Reader)
	if err != nil {
		return nil, err
	}
	if h.seal != nil {
		sealed = h.seal(&public, h.seed)
	}
	var bound [64]byte
	hash := sha256.Sum256(sealed)
	if h.bind != nil {
		hash = h.bind(sealed)
	}
	copy(bound[:], hash[:])
	vouch, err := h.td.EnclaveQuote(h.enclave, bound)
	if err != nil {
		return nil, err
	}
	if h.quote != nil {
		vouch = h.quote(vouch)
	}
	return json.Marshal(map[string]string{"encrypted_key": hex.EncodeToString(sealed), "provider_quote": hex.EncodeToString(vouch)})
}

// localSetup is a guest beside such a host.
type localSetup struct {
	host     *hostAPI
	guest    *machine
	measured measure.Identity
	config   keys.LocalConfig
}

func newLocalSetup(t testing.TB, cfg tdxsim.Config, edit func(*hostAPI)) *localSetup {
	t.Helper()
	guest := newGuest(t)
	cfg.Seed, cfg.Now = []byte("host"), testNow
	td, err := tdxsim.New(t.TempDir(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	h := &hostAPI{td: td, guests: guest.anyAppVerifier(t), seed: bytes.Repeat([]byte{0x5a}, 32), enclave: tdxsim.Enclave{MREnclave: [32]byte{1, 2, 3}}}
	if edit != nil {
		edit(h)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "host"))
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: h}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	roots, err := dcap.NewRoots(td.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := td.EnclaveCollateral()
	if err != nil {
		t.Fatal(err)
	}
	s := &localSetup{host: h, guest: guest}
	s.measured = measure.Identity{AppID: testAppID, KeyProvider: string(measure.KeyProvider{Kind: measure.KeyProviderLocal, ID: append([]byte{1, 2, 3}, make([]byte, 29)...)}.Payload())}
	s.config = keys.LocalConfig{
		Measured: func(context.Context) (*measure.Identity, error) { return &s.measured, nil },
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
		},
		Path:       "/api",
		Attest:     guest.attest,
		Verifier:   dcap.NewVerifier(dcap.Config{Roots: roots}),
		Collateral: func(context.Context) (*dcap.Collateral, error) { return dcap.ParseEnclaveCollateral(bundle, roots) },
		TCBStatus:  []dcap.Status{dcap.UpToDate}, Timeout: 20 * time.Second, Now: testNow,
	}
	return s
}

// anyAppVerifier accepts the machine whatever runs there.
func (m *machine) anyAppVerifier(t testing.TB) *remote.Verifier {
	t.Helper()
	return m.newVerifier(t, "allow_any_app = true\nrequire_events = []")
}

func (s *localSetup) app(t testing.TB) (*keys.App, error) {
	t.Helper()
	l, err := keys.NewLocal(s.config)
	if err != nil {
		t.Fatal(err)
	}
	return l.App(t.Context())
}

// TestLocalProvider has the keys that dstack derives from a seed, whoever has given it.
func TestLocalProvider(t *testing.T) {
	s := newLocalSetup(t, tdxsim.Config{}, nil)
	app, err := s.app(t)
	if err != nil {
		t.Fatal(err)
	}
	defer app.Zero()
	again, err := s.app(t)
	if err != nil {
		t.Fatal(err)
	}
	one, err := app.Derive("a", "p", "")
	if err != nil {
		t.Fatal(err)
	}
	two, err := again.Derive("a", "p", "")
	if err != nil || !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Errorf("the same seed gives other keys (%v)", err)
	}
	want := hkdfOf(t, hkdfOf(t, s.host.seed, "app-k256-key"), "a")
	if !bytes.Equal(one.Bytes(), want) || len(one.Chain[1]) != 0 {
		t.Errorf("key is not the one of app-k256-key; chain %x", one.Chain)
	}
	if p := app.Provider(); p.Kind != measure.KeyProviderLocal || string(p.Payload()) != s.measured.KeyProvider {
		t.Errorf("provider is %s", p.Payload())
	}
	k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Now: testTime, Subject: "s"}, s.guest.attest)
	if err != nil {
		t.Fatal(err)
	}
	if chain := certificates(t, k); len(chain) != 2 || chain[1].Subject.CommonName != "App Root Cert" {
		t.Errorf("%d certificates", len(chain))
	}
}

// TestLocalProviderRefused has one vector for each way in which a host can lie.
func TestLocalProviderRefused(t *testing.T) {
	member := func(name, value string) func(*hostAPI) {
		return func(h *hostAPI) {
			h.answer = func(b []byte) []byte {
				var doc map[string]string
				if json.Unmarshal(b, &doc) != nil {
					return b
				}
				doc[name] = value
				b, _ = json.Marshal(doc)
				return b
			}
		}
	}
	for name, c := range map[string]struct {
		cfg    tdxsim.Config
		edit   func(*hostAPI)
		guest  func(*localSetup)
		reason string
		words  string
	}{
		"another enclave":   {edit: func(h *hostAPI) { h.enclave.MREnclave[0]++ }, reason: keys.LocalEnclave, words: "this boot has measured 010203"},
		"a debug enclave":   {edit: func(h *hostAPI) { h.enclave.Debug = true }, reason: keys.LocalEnclave, words: "debug mode"},
		"an old platform":   {cfg: tdxsim.Config{TCBStatus: "OutOfDate"}, reason: keys.LocalTCB, words: "OutOfDate"},
		"a revoked one":     {cfg: tdxsim.Config{Revoked: true}, reason: keys.LocalQuote, words: "revoked"},
		"a changed quote":   {edit: func(h *hostAPI) { h.quote = func(b []byte) []byte { b[48+64] ^= 1; return b } }, reason: keys.LocalQuote, words: "quote signature"},
		"no quote":          {edit: member("provider_quote", ""), reason: keys.LocalQuote, words: "0 bytes"},
		"a TD's own quote":  {edit: func(h *hostAPI) { h.quote = func([]byte) []byte { return tdQuote(t, h.td) } }, reason: keys.LocalQuote, words: "version 4"},
		"another answer":    {edit: member("encrypted_key", strings.Repeat("00", 80)), reason: keys.LocalBinding, words: "not for the key"},
		"bound to nothing":  {edit: func(h *hostAPI) { h.bind = func([]byte) [32]byte { return [32]byte{} } }, reason: keys.LocalBinding, words: "not for the key"},
		"for another guest": {edit: func(h *hostAPI) { h.seal = sealForOther }, reason: keys.LocalAnswer, words: "32 bytes for our key"},
		"a short seed":      {edit: func(h *hostAPI) { h.seed = h.seed[:31] }, reason: keys.LocalAnswer, words: "32 bytes for our key"},
		"a long seed":       {edit: func(h *hostAPI) { h.seed = append(h.seed, 1) }, reason: keys.LocalAnswer, words: "encrypted_key: 162 digits"},
		"an answer too large": {edit: func(h *hostAPI) { h.answer = func([]byte) []byte { return bytes.Repeat([]byte(" "), 300<<10) } }, reason: keys.LocalAnswer,
			words: "more than 262144 bytes"},
		"no JSON":             {edit: func(h *hostAPI) { h.answer = func([]byte) []byte { return []byte("<html>") } }, reason: keys.LocalAnswer, words: "not valid JSON"},
		"no members":          {edit: func(h *hostAPI) { h.answer = func([]byte) []byte { return []byte("{}") } }, reason: keys.LocalAnswer, words: "encrypted_key: want a string"},
		"we are not accepted": {edit: func(h *hostAPI) { h.guests = newKMSMachine(t, 1).anyAppVerifier(t) }, reason: keys.LocalDenied, words: "not genuine"},
		"nobody there":        {guest: func(s *localSetup) { s.config.Dial = refusedDial }, reason: keys.LocalUnreachable, words: "refused"},
		"it leaves early": {edit: func(h *hostAPI) { h.answer = func([]byte) []byte { panic(http.ErrAbortHandler) } }, reason: keys.LocalUnreachable,
			words: "EOF"},
		"no answer": {edit: func(h *hostAPI) { h.held = make(chan struct{}) }, guest: func(s *localSetup) { s.config.Timeout = 200 * time.Millisecond },
			reason: keys.LocalUnreachable, words: "no answer within 200ms"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newLocalSetup(t, c.cfg, c.edit)
			if c.guest != nil {
				c.guest(s)
			}
			app, err := s.app(t)
			var fault *keys.LocalError
			if app != nil || !errors.As(err, &fault) || fault.Reason != c.reason || !strings.Contains(err.Error(), c.words) {
				t.Errorf("keys: %v, error: %v, want %s and %q", app != nil, err, c.reason, c.words)
			}
		})
	}
}

func refusedDial(context.Context) (net.Conn, error) { return nil, errors.New("connection refused") }

// sealForOther seals for a key that the guest does not have.
func sealForOther(_ *[32]byte, seed []byte) []byte {
	public, _, err := box.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	sealed, err := box.SealAnonymous(nil, seed, public, rand.Reader)
	if err != nil {
		panic(err)
	}
	return sealed
}

func tdQuote(t *testing.T, td *tdxsim.TD) []byte {
	t.Helper()
	ev, err := (&machine{td: td}).attest(t.Context(), measure.ReportData{})
	if err != nil {
		t.Fatal(err)
	}
	return ev.Quote
}

func TestLocalProviderWantsAMeasuredBoot(t *testing.T) {
	s := newLocalSetup(t, tdxsim.Config{}, nil)
	for _, provider := range []string{"", `{"name":"none","id":""}`, `{"name":"local-sgx","id":"0102"}`, `{"name":"kms","id":"` + strings.Repeat("00", 32) + `"}`} {
		s.measured.KeyProvider = provider
		if _, err := s.app(t); err == nil || !strings.Contains(err.Error(), "key provider") {
			t.Errorf("%q: %v", provider, err)
		}
	}
	if s.host.asked != 0 {
		t.Errorf("it was asked %d times", s.host.asked)
	}
	if _, err := keys.NewLocal(keys.LocalConfig{}); err == nil {
		t.Error("an empty configuration is accepted")
	}
}

// hkdfOf is dstack's key derivation, by the standard library alone.
func hkdfOf(t *testing.T, secret []byte, context string) []byte {
	t.Helper()
	b, err := hkdf.Key(sha256.New, secret, []byte("RATLS"), context, 32)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
