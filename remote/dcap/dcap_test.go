package dcap_test

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

var testTime = time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)

// set is a simulated TD's quote and collateral, and the root below which they are.
type set struct {
	quote, bundle []byte
	roots         *dcap.Roots
}

// simulate makes the set of a TD. TDs of the same seed, which is "" by default, have
// the same certificates.
func simulate(t testing.TB, cfg tdxsim.Config) *set {
	t.Helper()
	if cfg.Seed == nil {
		cfg.Seed = []byte("dcap")
	}
	cfg.Now = func() time.Time { return testTime }
	td, err := tdxsim.New(t.TempDir(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	s := &set{quote: makeQuote(t, td)}
	if s.bundle, err = td.Collateral(); err != nil {
		t.Fatal(err)
	}
	if s.roots, err = dcap.NewRoots(td.RootPEM()); err != nil {
		t.Fatal(err)
	}
	return s
}

func makeQuote(t testing.TB, td *tdxsim.TD) []byte {
	t.Helper()
	client := td.Client()
	dir, err := client.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		t.Fatal(err)
	}
	if err := client.WriteFile(dir+"/inblob", make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	q, err := client.ReadFile(dir + "/outblob")
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func (s *set) verifier() *dcap.Verifier {
	return dcap.NewVerifier(dcap.Config{Roots: s.roots, SecondOpinion: true})
}

func (s *set) collateral(t testing.TB) *dcap.Collateral {
	t.Helper()
	c, err := dcap.ParseCollateral(s.bundle, s.roots)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// edited returns the collateral with a part of the bundle changed.
func (s *set) edited(t testing.TB, edit func(*dcap.Bundle)) []byte {
	t.Helper()
	var b dcap.Bundle
	if err := json.Unmarshal(s.bundle, &b); err != nil {
		t.Fatal(err)
	}
	edit(&b)
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (s *set) verify(t testing.TB) (*dcap.Report, error) {
	t.Helper()
	return s.verifier().Verify(context.Background(), s.quote, s.collateral(t), testTime)
}

// mustVerify wants a report.
func (s *set) mustVerify(t testing.TB) *dcap.Report {
	t.Helper()
	r, err := s.verify(t)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantCode wants a *dcap.Error of this code.
func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	e, ok := errors.AsType[*dcap.Error](err)
	if !ok || e.Code != code || e.Stage == "" || e.Error() == "" {
		t.Errorf("got %v, want the code %s", err, code)
	}
}

func TestGenuine(t *testing.T) {
	for name, cfg := range map[string]tdxsim.Config{
		"version 4":              {},
		"version 5, body type 2": {QuoteVersion: 5, BodyType: 2},
		"version 5, body type 3": {QuoteVersion: 5},
		"module version 0":       {TEETCBSVN: [16]byte{5, 0, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			s := simulate(t, cfg)
			r := s.mustVerify(t)
			if r.Merged.Status != dcap.UpToDate || r.SecondOpinion != "agrees" || len(r.ShortSVNs) != 0 {
				t.Errorf("merged %v, second opinion %q, short %v", r.Merged, r.SecondOpinion, r.ShortSVNs)
			}
			if (r.Module.Status == "") != (cfg.TEETCBSVN[0] == 5) {
				t.Errorf("module %v", r.Module)
			}
			if r.PCK.CA != dcap.CAPlatform || r.EvaluationTCB != 20 || !r.StaleSince.IsZero() || r.TrailingBytes != 0 {
				t.Errorf("report %+v", r)
			}
		})
	}
}

// TestTrailing shows that bytes behind a quote are counted and nothing else, and that
// there is a limit.
func TestTrailing(t *testing.T) {
	s := simulate(t, tdxsim.Config{})
	v, c := s.verifier(), s.collateral(t)
	first := s.mustVerify(t)
	for n, code := range map[int]string{39: "", 4096: "", 4097: "quote_size", 1 << 20: "quote_size"} {
		r, err := v.Verify(context.Background(), append(s.quote[:len(s.quote):len(s.quote)], make([]byte, n)...), c, testTime)
		if code != "" {
			wantCode(t, err, code)
		} else if err != nil || r.TrailingBytes != n || r.QuoteSHA256 != first.QuoteSHA256 {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestDenies shows that nothing is verified without roots, collateral or time.
func TestDenies(t *testing.T) {
	s := simulate(t, tdxsim.Config{})
	c, ctx := s.collateral(t), context.Background()
	verify := func(v *dcap.Verifier, c *dcap.Collateral, at time.Time) error {
		r, err := v.Verify(ctx, s.quote, c, at)
		if r != nil {
			t.Error("a report beside an error")
		}
		return err
	}
	wantCode(t, verify(dcap.NewVerifier(dcap.Config{}), c, testTime), "no_roots")
	wantCode(t, verify(dcap.NewVerifier(dcap.Config{Roots: new(dcap.Roots)}), c, testTime), "no_roots")
	wantCode(t, verify(new(dcap.Verifier), c, testTime), "no_roots")
	wantCode(t, verify(nil, c, testTime), "no_roots")
	wantCode(t, verify(s.verifier(), nil, testTime), "no_collateral")
	wantCode(t, verify(s.verifier(), new(dcap.Collateral), testTime), "no_collateral")
	wantCode(t, verify(s.verifier(), c, time.Time{}), "no_time")
	wantCode(t, verify(dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots()}), c, testTime), "root_not_trusted")
	_, err := dcap.ParseCollateral(s.bundle, dcap.IntelRoots())
	wantCode(t, err, "root_not_trusted")
	_, err = dcap.ParseCollateral(s.bundle, nil)
	wantCode(t, err, "no_roots")
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	_, err = s.verifier().Verify(canceled, s.quote, c, testTime)
	wantCode(t, err, "canceled")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v is no context.Canceled", err)
	}
}

// TestOtherRoot crosses two platforms that are both trusted.
func TestOtherRoot(t *testing.T) {
	a, b := simulate(t, tdxsim.Config{Seed: []byte("a")}), simulate(t, tdxsim.Config{Seed: []byte("b")})
	_, err := a.verifier().Verify(context.Background(), a.quote, b.collateral(t), testTime)
	wantCode(t, err, "collateral_root")
}

func TestRoots(t *testing.T) {
	if name := dcap.IntelRoots().Name(); name != "Intel SGX Root CA" {
		t.Error(name)
	}
	if name := new(dcap.Roots).Name(); name != "none" {
		t.Error(name)
	}
	s := simulate(t, tdxsim.Config{})
	if name := s.roots.Name(); name == dcap.IntelRoots().Name() || name == "" {
		t.Errorf("a simulated root is called %q", name)
	}
	var b dcap.Bundle
	if err := json.Unmarshal(s.bundle, &b); err != nil {
		t.Fatal(err)
	}
	for name, pem := range map[string]string{"nothing": "", "text": "hello", "a signer": b.TCBInfoIssuerChain} {
		if _, err := dcap.NewRoots([]byte(pem)); err == nil {
			t.Errorf("%s is accepted as roots", name)
		}
	}
}

func TestPlatform(t *testing.T) {
	s := simulate(t, tdxsim.Config{FMSPC: [6]byte{1, 2, 3}})
	v := s.verifier()
	for _, f := range []func([]byte) ([6]byte, string, error){v.Platform, v.Signatures, v.Platform} {
		if fmspc, ca, err := f(s.quote); fmspc != [6]byte{1, 2, 3} || ca != dcap.CAPlatform || err != nil {
			t.Errorf("got %x, %s, %v", fmspc, ca, err)
		}
	}
	if c := s.collateral(t); c.FMSPC() != [6]byte{1, 2, 3} || c.CA() != dcap.CAPlatform {
		t.Errorf("collateral of %x, %s", c.FMSPC(), c.CA())
	}
	s.quote[200] ^= 1
	if _, _, err := v.Platform(s.quote); err != nil {
		t.Error(err)
	}
	_, _, err := v.Signatures(s.quote)
	wantCode(t, err, "quote_signature")
	_, _, err = dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots()}).Platform(s.quote)
	wantCode(t, err, "root_not_trusted")
}
