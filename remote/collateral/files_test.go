package collateral_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

func TestFiles(t *testing.T) {
	cfg, now := config(t)
	dir := t.TempDir()
	p := newPCCS(t, dated(t, 22, 7, 2*time.Hour))
	name := writeFile(t, filepath.Join(dir, "a.json"), dated(t, 20, 5, 0))
	other, _ := simulate(t, tdxsim.Config{FMSPC: [6]byte{1}})
	writeFile(t, filepath.Join(dir, "b.json"), other)
	writeFile(t, filepath.Join(dir, "README"), []byte("not a bundle"))
	if err := os.Mkdir(filepath.Join(dir, "c.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	cfg.Files, cfg.PCCS, cfg.Dir = []string{dir, name}, []string{p.URL}, t.TempDir()
	var log bytes.Buffer
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	s := open(t, cfg)
	set := mustFetch(t, s)
	if set.Source != "file "+name || s.Known(fmspc, dcap.CAPlatform) != set || s.Known([6]byte{1}, dcap.CAPlatform) == nil || len(p.taken()) != 0 {
		t.Errorf("source %q", set.Source)
	}

	// Reload takes what is newer, leaves what is not, and changes nothing for a broken file.
	writeFile(t, name, dated(t, 21, 6, time.Hour))
	if set = mustFetch(t, s); evaluation(set) != 20 {
		t.Error("a file is read without being told")
	}
	broken := writeFile(t, filepath.Join(dir, "broken.json"), []byte("{}"))
	if e := wantCode(t, s.Reload(), "file"); e == nil || !strings.Contains(e.Error(), broken) {
		t.Errorf("%v does not name %s", e, broken)
	}
	if set = mustFetch(t, s); evaluation(set) != 20 {
		t.Error("part of the files was taken")
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	wantCode(t, s.Reload(), "")
	if set = mustFetch(t, s); evaluation(set) != 21 {
		t.Error("the newer file was not taken")
	}
	writeFile(t, name, dated(t, 20, 5, 0))
	wantCode(t, s.Reload(), "")
	if set = mustFetch(t, s); evaluation(set) != 21 || !strings.Contains(log.String(), name) {
		t.Errorf("the older file was taken, or that it was not is not logged:\n%s", &log)
	}

	// An older file alone is no error at the start, and the reason when it is all there is.
	if err := os.RemoveAll(filepath.Join(cfg.Dir, "bundles")); err != nil {
		t.Fatal(err)
	}
	servers := cfg.PCCS
	cfg.PCCS = nil
	_, err := fetch(open(t, cfg))
	if e := wantCode(t, err, "rolled_back"); e != nil && e.Source != "file "+name {
		t.Errorf("source %q", e.Source)
	}

	cfg.PCCS = servers
	if set = mustFetch(t, open(t, cfg)); evaluation(set) != 22 { // and cached
		t.Errorf("evaluation number %d", evaluation(set))
	}
	cfg.PCCS = nil

	// A file of tomorrow does not replace what is valid today.
	writeFile(t, name, dated(t, 23, 8, day))
	if set = mustFetch(t, open(t, cfg)); evaluation(set) != 22 {
		t.Errorf("evaluation number %d", evaluation(set))
	}
	writeFile(t, name, dated(t, 20, 5, 0))

	// After its end the network is asked, if there is one.
	cfg.Dir = ""
	now.set(testTime.Add(30 * day))
	_, err = fetch(open(t, cfg))
	wantCode(t, err, "expired")
	p.serve(t, dated(t, 22, 7, 29*day))
	cfg.PCCS = []string{p.URL}
	if set = mustFetch(t, open(t, cfg)); evaluation(set) != 22 {
		t.Error("not from the network")
	}
	cfg.PCCS, cfg.StaleGrace = nil, 24*time.Hour
	if set = mustFetch(t, open(t, cfg)); evaluation(set) != 20 {
		t.Error("no grace without a network")
	}
}

// TestBrokenFiles wants each broken file named.
func TestBrokenFiles(t *testing.T) {
	good := dated(t, 20, 5, 0)
	foreign, _ := simulate(t, tdxsim.Config{Seed: []byte("foreign")})
	for what, write := range map[string]func(t *testing.T, name string){
		"missing": func(*testing.T, string) {},
		"empty":   func(t *testing.T, name string) { writeFile(t, name, nil) },
		"cut":     func(t *testing.T, name string) { writeFile(t, name, good[:len(good)-1]) },
		"forged": func(t *testing.T, name string) {
			writeFile(t, name, bytes.Replace(good, []byte("UpToDate"), []byte("UpToDatf"), 1))
		},
		"foreign":  func(t *testing.T, name string) { writeFile(t, name, foreign) },
		"too big":  func(t *testing.T, name string) { writeFile(t, name, append(bytes.Clone(good), make([]byte, 5<<20)...)) },
		"fifo":     func(t *testing.T, name string) { mkfifo(t, name) },
		"dangling": func(t *testing.T, name string) { symlink(t, "nowhere", name) },
	} {
		t.Run(what, func(t *testing.T) {
			cfg, _ := config(t)
			name := filepath.Join(t.TempDir(), "bundle.json")
			write(t, name)
			for _, path := range []string{name, filepath.Dir(name)} {
				if path != name && what == "missing" {
					continue
				}
				cfg.Files = []string{path}
				_, err := collateral.New(cfg)
				if e := wantCode(t, err, "file"); e != nil && e.Source != "file "+name {
					t.Errorf("%v does not name the file", e)
				}
			}
		})
	}
}

func mkfifo(t *testing.T, name string) {
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, to, name string) {
	if err := os.Symlink(to, name); err != nil {
		t.Fatal(err)
	}
}

// TestManyFiles shows the bounds on how many files and bytes are read.
func TestManyFiles(t *testing.T) {
	cfg, _ := config(t)
	good, dir := dated(t, 20, 5, 0), t.TempDir()
	add := func(n int, content []byte) {
		for i := range n {
			writeFile(t, filepath.Join(dir, fmt.Sprintf("%03d.json", i)), content)
		}
	}
	cfg.Files = []string{dir}
	open(t, cfg) // an empty folder
	add(14, append(bytes.Repeat([]byte(" "), 5<<20-len(good)), good...))
	_, err := collateral.New(cfg)
	wantCode(t, err, "file")
	add(14, good)
	open(t, cfg)
	add(257, good)
	_, err = collateral.New(cfg)
	wantCode(t, err, "file")
}

// TestRealBundles loads a genuine bundle below Intel's root, if the fixtures are there.
func TestRealBundles(t *testing.T) {
	dir := os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = "../../../shared/fixtures"
	}
	names, err := filepath.Glob(filepath.Join(dir, "collateral", "*-collateral.json"))
	if err != nil || len(names) == 0 {
		t.Skip("no fixtures: set TDX_AGENT_FIXTURES")
	}
	read := 0
	for _, name := range names {
		bundle, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		c, err := dcap.ParseCollateral(bundle, dcap.IntelRoots())
		if err != nil {
			t.Logf("%s: %v", name, err)
			continue
		}
		read++
		at := c.ValidFrom().Add(time.Minute)
		s := open(t, collateral.Config{Roots: dcap.IntelRoots(), Files: []string{name}, Now: func() time.Time { return at }, Dir: t.TempDir()})
		if set, err := s.Fetch(t.Context(), c.FMSPC(), c.CA()); err != nil || set.Collateral.SHA256() != c.SHA256() {
			t.Errorf("%s: %v", name, err)
		}
	}
	if read == 0 {
		t.Error("no bundle of the fixtures is genuine")
	}
}
