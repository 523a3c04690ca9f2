package collateral_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// TestFloor has one vector for each number and date that may not fall. The fields of a
// set are as the floor's but for those that a vector changes.
func TestFloor(t *testing.T) {
	from := testDay
	window := func(after time.Duration) tdxsim.Window {
		return tdxsim.Window{From: from.Add(after), Until: from.Add(after + 30*day)}
	}
	base := func() tdxsim.Config {
		return tdxsim.Config{EvaluationNumber: 20, QEEvaluationNumber: 19, CRLNumber: 57, TCBInfo: window(0), QEIdentity: window(0), PCKCRL: window(0), RootCRL: window(0)}
	}
	for name, c := range map[string]struct {
		code, document string
		change         func(*tdxsim.Config)
	}{
		"same":                         {change: func(*tdxsim.Config) {}},
		"all newer":                    {change: func(c *tdxsim.Config) { c.EvaluationNumber, c.CRLNumber, c.TCBInfo = 21, 58, window(time.Hour) }},
		"CRL shorter and newer":        {change: func(c *tdxsim.Config) { c.CRLNumber, c.PCKCRL = 58, window(time.Hour) }},
		"TCB info number":              {"rolled_back", "tcb_info", func(c *tdxsim.Config) { c.EvaluationNumber = 19 }},
		"TCB info number, newer date":  {"rolled_back", "tcb_info", func(c *tdxsim.Config) { c.EvaluationNumber, c.TCBInfo = 19, window(time.Hour) }},
		"TCB info date":                {"rolled_back", "tcb_info", func(c *tdxsim.Config) { c.TCBInfo = window(-time.Second) }},
		"TCB info date, higher number": {"rolled_back", "tcb_info", func(c *tdxsim.Config) { c.EvaluationNumber, c.TCBInfo = 21, window(-time.Hour) }},
		"QE identity number":           {"rolled_back", "qe_identity", func(c *tdxsim.Config) { c.QEEvaluationNumber = 18 }},
		"QE identity date":             {"rolled_back", "qe_identity", func(c *tdxsim.Config) { c.QEIdentity = window(-time.Hour) }},
		"CRL number":                   {"rolled_back", "pck_crl", func(c *tdxsim.Config) { c.CRLNumber = 56 }},
		"CRL number, newer date":       {"rolled_back", "pck_crl", func(c *tdxsim.Config) { c.CRLNumber, c.PCKCRL = 56, window(time.Hour) }},
		"PCK CRL date":                 {"rolled_back", "pck_crl", func(c *tdxsim.Config) { c.PCKCRL = window(-time.Hour) }},
		"root CRL date":                {"rolled_back", "root_crl", func(c *tdxsim.Config) { c.RootCRL = window(-time.Hour) }},
		"longer CRL, older":            {"rolled_back", "pck_crl", func(c *tdxsim.Config) { c.Revoked, c.PCKCRL = true, window(-time.Hour) }},
		"other platform, older":        {change: func(c *tdxsim.Config) { c.FMSPC, c.EvaluationNumber, c.PCKCRL = [6]byte{9}, 19, window(-time.Hour) }},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, _ := config(t)
			high := base()
			high.Revoked = true // the CRL of the floor is the longer one
			bundle, _ := simulate(t, high)
			cfg.Files = []string{writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), bundle)}
			s := open(t, cfg)
			next := base()
			c.change(&next)
			bundle, _ = simulate(t, next)
			_, err := s.Offered(bundle)
			if e := wantCode(t, err, c.code); e != nil && (!strings.HasPrefix(e.Got, c.document) || !strings.HasPrefix(e.Want, "at least "+c.document)) {
				t.Errorf("%v does not say that it is about %s", e, c.document)
			}
			cfg.AllowRollback = true
			_, err = open(t, cfg).Offered(bundle)
			wantCode(t, err, "")
		})
	}
}

// TestRollback serves an older set after a newer one, before and after a restart, and
// then allows it.
func TestRollback(t *testing.T) {
	cfg, now := config(t)
	older, newer := dated(t, 20, 5, 0), dated(t, 21, 6, time.Hour)
	p := newPCCS(t, newer)
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	s := open(t, cfg)
	mustFetch(t, s)
	p.serve(t, older)
	if err := os.RemoveAll(filepath.Join(cfg.Dir, "bundles")); err != nil { // so that only the floor is left
		t.Fatal(err)
	}
	s = open(t, cfg)
	_, err := fetch(s)
	wantCode(t, err, "rolled_back")

	unknowing := newPCCS(t, older)
	unknowing.set(func(p *pccs) { p.instead[""] = notFound })
	two := cfg
	two.PCCS = []string{unknowing.URL, p.URL}
	_, err = fetch(open(t, two)) // the code is what matters most, not what came first
	wantCode(t, err, "rolled_back")

	early := cfg
	early.UpdateChannel = "early"
	if set := mustFetch(t, open(t, early)); evaluation(set) != 20 {
		t.Error("the channels have one floor")
	}

	cfg.AllowRollback = true
	if set := mustFetch(t, open(t, cfg)); evaluation(set) != 20 {
		t.Errorf("evaluation number %d", evaluation(set))
	}
	cfg.AllowRollback = false
	cfg.PCCS = nil
	_, err = fetch(open(t, cfg)) // the floor is where it was
	wantCode(t, err, "no_source")

	now.set(testDay.Add(time.Minute)) // before the newer set
	s = open(t, cfg)
	if s.Known(fmspc, dcap.CAPlatform) != nil {
		t.Error("something is known at a time that cannot be")
	}
	_, err = fetch(s)
	wantCode(t, err, "clock")
}

// TestClock turns the clock back to when an older set was the newest.
func TestClock(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir, cfg.AllowRollback = []string{p.URL}, t.TempDir(), true // which does not allow this
	mustFetch(t, open(t, cfg))
	p.serve(t, dated(t, 20, 5, -5*day))
	p.taken()
	now.set(testDay.Add(-day))
	s := open(t, cfg)
	_, err := fetch(s)
	if e := wantCode(t, err, "clock"); e != nil && !strings.Contains(e.Hint, "clock") {
		t.Errorf("%v does not say what to do", e)
	}
	if len(p.taken()) != 0 {
		t.Error("asked the network")
	}
	now.set(testDay)
	mustFetch(t, s)
}

// TestNotRaised shows what does not raise the floor: sets that are not valid yet.
func TestNotRaised(t *testing.T) {
	cfg, now := config(t)
	cfg.Dir = t.TempDir()
	cfg.Files = []string{writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), dated(t, 30, 5, day))}
	s := open(t, cfg)
	_, err := fetch(s)
	wantCode(t, err, "not_yet_valid")
	_, err = s.Offered(dated(t, 20, 5, 0))
	wantCode(t, err, "")
	now.set(testTime.Add(2 * day))
	if set := mustFetch(t, s); evaluation(set) != 30 {
		t.Error("the set does not come into its time")
	}
}

// TestFloorGone removes the floor while a store has it, which writes it again.
func TestFloorGone(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	s := open(t, cfg)
	mustFetch(t, s)
	name := filepath.Join(cfg.Dir, "floor.json")
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	other, _ := simulate(t, tdxsim.Config{FMSPC: [6]byte{8}})
	p.serve(t, other)
	if _, err := s.Fetch(t.Context(), [6]byte{8}, dcap.CAPlatform); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(name); err != nil || bytes.Count(text, []byte("fmspc")) != 2 {
		t.Errorf("%v in\n%s", err, text)
	}
}

// TestDamagedFloor wants an error, and the file left as it is.
func TestDamagedFloor(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	running := open(t, cfg)
	mustFetch(t, running)
	name := filepath.Join(cfg.Dir, "floor.json")
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string][]byte{
		"empty": {}, "cut": good[:len(good)/2], "other schema": bytes.Replace(good, []byte("/v1"), []byte("/v2"), 1), "not JSON": []byte("hello"),
		"more":          append(bytes.Clone(good), ' '),
		"unknown key":   bytes.Replace(good, []byte(`"fmspc"`), []byte(`"fmsp"`), 1),
		"other case":    bytes.Replace(good, []byte(`"fmspc"`), []byte(`"FMSPC"`), 1),
		"FMSPC":         bytes.Replace(good, []byte(`"50806f000000"`), []byte(`"50806f"`), 1),
		"CA":            bytes.Replace(good, []byte(`"platform"`), []byte(`"root"`), 1),
		"channel":       bytes.Replace(good, []byte(`"standard"`), []byte(`"late"`), 1),
		"date":          bytes.Replace(good, []byte("2026"), []byte("202"), 1),
		"negative":      bytes.Replace(good, []byte(": 20"), []byte(": -20"), 1),
		"too big":       bytes.Repeat([]byte(" "), 2<<20),
		"document gone": bytes.Replace(good, []byte(`"qe_identity"`), []byte(`"qe"`), 1),
	} {
		t.Run(what, func(t *testing.T) {
			writeFile(t, name, content)
			_, err := collateral.New(cfg)
			if e := wantCode(t, err, "floor"); e != nil && (!strings.Contains(e.Error(), name) || e.Hint == "") {
				t.Errorf("%v does not name the file and what to do", e)
			}
			_, err = running.Fetch(t.Context(), [6]byte{7}, dcap.CAPlatform)
			if e, _ := err.(*collateral.Error); e == nil || e.Code != "wrong_platform" {
				t.Error(err)
			}
			if after, err := os.ReadFile(name); err != nil || !bytes.Equal(after, content) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
	p.serve(t, dated(t, 21, 6, time.Hour))
	writeFile(t, name, good[:100])
	if err := os.RemoveAll(filepath.Join(cfg.Dir, "bundles")); err != nil {
		t.Fatal(err)
	}
	other, _ := simulate(t, tdxsim.Config{FMSPC: [6]byte{8}})
	p.serve(t, other)
	_, err = running.Fetch(t.Context(), [6]byte{8}, dcap.CAPlatform)
	wantCode(t, err, "floor")
}

func TestFullFloor(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	for n, code := range map[int]string{1023: "", 1024: "floor_full"} {
		full, err := collateral.FloorOf(n, testDay)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(cfg.Dir, "floor.json"), full)
		_, err = fetch(open(t, cfg))
		wantCode(t, err, code)
		if err := os.RemoveAll(filepath.Join(cfg.Dir, "bundles")); err != nil {
			t.Fatal(err)
		}
	}
	over, err := collateral.FloorOf(1025, testDay)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(cfg.Dir, "floor.json"), over)
	_, err = collateral.New(cfg)
	wantCode(t, err, "floor")
}

// TestLock holds the lock over the floor, as a process that was stopped would.
func TestLock(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	s := open(t, cfg)
	lock, err := os.Create(filepath.Join(cfg.Dir, "floor.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	_, err = fetch(s)
	if e := wantCode(t, err, "state"); e != nil && !strings.Contains(e.Error(), lock.Name()) {
		t.Errorf("%v does not name the lock", e)
	}
	_, err = s.Offered(dated(t, 20, 5, 0))
	wantCode(t, err, "")
}

// TestSharedFolder has several stores in one folder: none forgets another's marks.
func TestSharedFolder(t *testing.T) {
	cfg, _ := config(t)
	cfg.Dir = t.TempDir()
	first := newPCCS(t, dated(t, 21, 6, time.Hour))
	second := newPCCS(t, dated(t, 20, 5, 0))
	behind := cfg
	behind.PCCS = []string{second.URL}
	s := open(t, behind) // before the floor rises
	cfg.PCCS = []string{first.URL}
	mustFetch(t, open(t, cfg))
	_, err := fetch(s)
	wantCode(t, err, "rolled_back")

	var bundles [8][]byte
	for i := range bundles {
		bundles[i], _ = simulate(t, tdxsim.Config{FMSPC: [6]byte{byte(i + 1)}})
	}
	var wg sync.WaitGroup
	for i := range bundles {
		p, own := newPCCS(t, bundles[i]), cfg
		own.PCCS = []string{p.URL}
		s := open(t, own)
		wg.Go(func() {
			if _, err := s.Fetch(t.Context(), [6]byte{byte(i + 1)}, dcap.CAPlatform); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	text, err := os.ReadFile(filepath.Join(cfg.Dir, "floor.json"))
	if err != nil || bytes.Count(text, []byte("fmspc")) != len(bundles)+1 {
		t.Errorf("%v in\n%s", err, text)
	}
}

func FuzzFloor(f *testing.F) {
	for _, n := range []int{0, 1, 3} {
		text, err := collateral.FloorOf(n, testDay)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
		f.Add(text[:len(text)/2])
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if again, err := collateral.RecodeFloor(text); err == nil && !bytes.Equal(again, text) {
			t.Errorf("%q is accepted and written as %q", text, again)
		}
	})
}
