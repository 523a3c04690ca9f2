package collateral_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

const day = 24 * time.Hour

var (
	testDay  = time.Date(2026, 11, 3, 0, 0, 0, 0, time.UTC)
	testTime = testDay.Add(12 * time.Hour)
	fmspc    = [6]byte{0x50, 0x80, 0x6f}
)

// clock is a time that the test sets.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = t
}

// simulate makes a genuine bundle. All are below the same root, which is of testTime.
func simulate(t testing.TB, cfg tdxsim.Config) (bundle []byte, roots *dcap.Roots) {
	t.Helper()
	if cfg.Seed == nil {
		cfg.Seed = []byte("collateral")
	}
	if cfg.FMSPC == [6]byte{} {
		cfg.FMSPC = fmspc
	}
	cfg.Now, cfg.Certificates = func() time.Time { return testTime }, tdxsim.Window{From: testDay.AddDate(-1, 0, 0)}
	td, err := tdxsim.New(t.TempDir(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	if bundle, err = td.Collateral(); err != nil {
		t.Fatal(err)
	}
	if roots, err = dcap.NewRoots(td.RootPEM()); err != nil {
		t.Fatal(err)
	}
	return bundle, roots
}

// dated is a bundle of this evaluation and CRL number, all issued this long after the
// start of testTime's day, for 30 days.
func dated(t testing.TB, evaluation int, crl int64, after time.Duration) []byte {
	t.Helper()
	from := testDay.Add(after)
	w := tdxsim.Window{From: from, Until: from.Add(30 * day)}
	bundle, _ := simulate(t, tdxsim.Config{EvaluationNumber: evaluation, CRLNumber: crl, TCBInfo: w, QEIdentity: w, PCKCRL: w, RootCRL: w})
	return bundle
}

// config is one without any source, without jitter, at testTime.
func config(t testing.TB) (collateral.Config, *clock) {
	t.Helper()
	_, roots := simulate(t, tdxsim.Config{})
	c := &clock{now: testTime}
	return collateral.Config{
		Roots: roots, Now: c.Now,
		Jitter: func(time.Duration) time.Duration { return 0 },
		Wait:   func(ctx context.Context, _ time.Duration) error { return ctx.Err() },
	}, c
}

func open(t testing.TB, cfg collateral.Config) *collateral.Store {
	t.Helper()
	s, err := collateral.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fetch fetches the set of fmspc.
func fetch(s *collateral.Store) (*collateral.Set, error) {
	return s.Fetch(context.Background(), fmspc, dcap.CAPlatform)
}

func mustFetch(t testing.TB, s *collateral.Store) *collateral.Set {
	t.Helper()
	set, err := fetch(s)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// wantCode wants an *Error of this code, none if that is "".
func wantCode(t testing.TB, err error, code string) *collateral.Error {
	t.Helper()
	e, ok := errors.AsType[*collateral.Error](err)
	if code == "" && err == nil {
		return nil
	}
	if !ok || e.Code != code || strings.HasSuffix(e.Error(), ": ") {
		t.Errorf("got %v, want the code %q", err, code)
	}
	return e
}

func writeFile(t testing.TB, name string, content []byte) string {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// evaluation is the evaluation number of a set's TCB info, or 0.
func evaluation(set *collateral.Set) int {
	if set == nil {
		return 0
	}
	n, _ := set.Collateral.EvaluationNumbers()
	return n
}

func TestConfig(t *testing.T) {
	for name, change := range map[string]func(*collateral.Config){
		"no roots":       func(c *collateral.Config) { c.Roots = nil },
		"empty roots":    func(c *collateral.Config) { c.Roots = new(dcap.Roots) },
		"channel":        func(c *collateral.Config) { c.UpdateChannel = "late" },
		"grace":          func(c *collateral.Config) { c.StaleGrace = dcap.MaxStaleGrace + 1 },
		"negative grace": func(c *collateral.Config) { c.StaleGrace = -1 },
		"limit":          func(c *collateral.Config) { c.Limits.PerMinute = -1 },
		"scheme":         func(c *collateral.Config) { c.PCCS = []string{"ftp://pccs.invalid"} },
		"no host":        func(c *collateral.Config) { c.PCCS = []string{"https:///x"} },
		"user":           func(c *collateral.Config) { c.PCCS = []string{"https://user:secret@pccs.invalid"} },
		"query":          func(c *collateral.Config) { c.PCCS = []string{"https://pccs.invalid/?a=b"} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg, _ := config(t)
			change(&cfg)
			_, err := collateral.New(cfg)
			if e := wantCode(t, err, "config"); e != nil && strings.Contains(e.Error(), "secret") {
				t.Errorf("%v tells the secret", e)
			}
		})
	}
}

// TestNoSource shows what is said when nothing is configured.
func TestNoSource(t *testing.T) {
	cfg, _ := config(t)
	s := open(t, cfg)
	_, err := fetch(s)
	wantCode(t, err, "no_source")
	_, err = s.Fetch(context.Background(), fmspc, "root")
	wantCode(t, err, "wrong_platform")
	if s.Known(fmspc, dcap.CAPlatform) != nil {
		t.Error("something is known")
	}
}

func TestOffered(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS = []string{p.URL}
	s := open(t, cfg)
	offer := func(bundle []byte, code string) {
		t.Helper()
		set, err := s.Offered(bundle)
		wantCode(t, err, code)
		if (set == nil) != (code != "") || set != nil && (set.Source != "peer" || string(set.Bundle) != string(bundle)) {
			t.Errorf("set %+v with error %v", set, err)
		}
	}
	offer(dated(t, 21, 6, time.Hour), "")
	offer(dated(t, 19, 4, -day), "") // the one before raised nothing
	if s.Known(fmspc, dcap.CAPlatform) != nil || len(p.taken()) != 0 {
		t.Error("an offered set is kept, or led to a fetch")
	}
	mustFetch(t, s)
	offer(dated(t, 19, 4, -day), "rolled_back")
	offer(dated(t, 20, 5, 0), "")
	foreign, _ := simulate(t, tdxsim.Config{Seed: []byte("foreign")})
	offer(foreign, "not_genuine")
	offer([]byte("{"), "not_genuine")
	offer(make([]byte, 6<<20), "not_genuine")
	now.set(testDay.Add(-time.Hour))
	offer(dated(t, 20, 5, 0), "clock")
}

// TestKnown shows that Known takes nothing but memory.
func TestKnown(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir, cfg.StaleGrace = []string{p.URL}, t.TempDir(), time.Hour
	s := open(t, cfg)
	known := func() *collateral.Set { return s.Known(fmspc, dcap.CAPlatform) }
	if known() != nil || len(p.taken()) != 0 {
		t.Error("Known is not empty, or asked the network")
	}
	set := mustFetch(t, s)
	p.taken()
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if known() != set || s.Known(fmspc, dcap.CAProcessor) != nil || s.Known([6]byte{1}, dcap.CAPlatform) != nil {
		t.Error("Known does not tell platforms apart")
	}
	if n := testing.AllocsPerRun(100, func() { known() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	end := testDay.Add(30 * day)
	for at, want := range map[time.Time]*collateral.Set{
		testDay.Add(-time.Second): nil, testDay: set, end: set, end.Add(time.Hour): set, end.Add(time.Hour + time.Second): nil,
	} {
		now.set(at)
		if known() != want {
			t.Errorf("at %v: got %v", at, known())
		}
	}
	if len(p.taken()) != 0 {
		t.Error("Known asked the network")
	}
}

// TestStale shows the grace: the last set, and a try each time the refusal ends.
func TestStale(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.StaleGrace = []string{p.URL}, 2*time.Hour
	s := open(t, cfg)
	set := mustFetch(t, s)
	p.set(func(p *pccs) { p.instead[""] = notFound })
	p.taken()
	now.set(testDay.Add(30*day + time.Hour))
	if got := mustFetch(t, s); got != set || len(p.taken()) != 1 {
		t.Error("no stale set, or no try for a new one")
	}
	if got := mustFetch(t, s); got != set || len(p.taken()) != 0 {
		t.Error("no stale set, or a try too many")
	}
	now.set(testDay.Add(30*day + 3*time.Hour))
	_, err := fetch(s)
	wantCode(t, err, "not_found")
	p.set(func(p *pccs) { clear(p.instead) })
	p.serve(t, dated(t, 20, 5, 30*day))
	now.set(now.Now().Add(2 * time.Minute))
	if got := mustFetch(t, s); got == set {
		t.Error("the old set after its grace")
	}
}

func TestCache(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir, cfg.Limits.Sets = []string{p.URL}, filepath.Join(t.TempDir(), "state"), 2
	want := mustFetch(t, open(t, cfg))
	cfg.PCCS = nil
	got := mustFetch(t, open(t, cfg))
	if string(got.Bundle) != string(want.Bundle) || !strings.HasPrefix(got.Source, "cache ") {
		t.Errorf("from the cache: %s", got.Source)
	}
	names := cached(t, cfg.Dir)
	if len(names) != 1 {
		t.Fatalf("cached: %q", names)
	}

	// Damage, another platform's name, and an older set are left out.
	for name, content := range map[string][]byte{"damaged": want.Bundle[:1000], "older": dated(t, 19, 5, -day)} {
		t.Run(name, func(t *testing.T) {
			writeFile(t, names[0], content)
			_, err := fetch(open(t, cfg))
			wantCode(t, err, "no_source")
		})
	}
	writeFile(t, strings.Replace(names[0], "50806f", "50806e", 1), want.Bundle)
	_, err := fetch(open(t, cfg))
	wantCode(t, err, "no_source")

	// The network is asked again, and what is too much goes from memory and disk.
	cfg.PCCS = []string{p.URL}
	s := open(t, cfg)
	mustFetch(t, s)
	for i := byte(1); i <= 3; i++ {
		other, _ := simulate(t, tdxsim.Config{FMSPC: [6]byte{i}})
		p.serve(t, other)
		now.set(now.Now().Add(time.Second))
		if _, err := s.Fetch(context.Background(), [6]byte{i}, dcap.CAPlatform); err != nil {
			t.Fatal(err)
		}
	}
	for i, isKnown := range map[byte]bool{1: false, 2: true, 3: true} {
		if (s.Known([6]byte{i}, dcap.CAPlatform) != nil) != isKnown {
			t.Errorf("set %d: want known %t", i, isKnown)
		}
	}
	for _, name := range cached(t, cfg.Dir) {
		if strings.Contains(name, "010000000000") {
			t.Errorf("%s is not removed", name)
		}
	}
	open(t, cfg)
	if names := cached(t, cfg.Dir); len(names) > 2 {
		t.Errorf("cached: %q", names)
	}
}

func cached(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "bundles", "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestState shows that no set is handed out whose floor is not on disk.
func TestState(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	s := open(t, cfg)
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	_, err := fetch(s)
	wantCode(t, err, "state")
	if s.Known(fmspc, dcap.CAPlatform) != nil {
		t.Error("the set is known")
	}
	cfg.Dir = filepath.Join(writeFile(t, filepath.Join(t.TempDir(), "file"), nil), "state")
	_, err = collateral.New(cfg)
	wantCode(t, err, "state")
}

func BenchmarkKnown(b *testing.B) {
	cfg, _ := config(b)
	cfg.Now = nil // the real clock is part of it
	w := tdxsim.Window{From: time.Now().Add(-day), Until: time.Now().Add(day)}
	bundle, _ := simulate(b, tdxsim.Config{TCBInfo: w, QEIdentity: w, PCKCRL: w, RootCRL: w})
	cfg.Files = []string{writeFile(b, filepath.Join(b.TempDir(), "bundle.json"), bundle)}
	s := open(b, cfg)
	if s.Known(fmspc, dcap.CAPlatform) == nil {
		b.Fatal("not known")
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s.Known(fmspc, dcap.CAPlatform)
		}
	})
}
