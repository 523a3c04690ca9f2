package tsm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tdx-agent/measure"
)

// machine is a folder with some of a TDX guest's interfaces in it, as plain files.
func machine(t *testing.T) (string, Paths) {
	t.Helper()
	dir := t.TempDir()
	return dir, Paths{
		Reports:      filepath.Join(dir, "report"),
		Measurements: filepath.Join(dir, "measurements"),
		Device:       filepath.Join(dir, "tdx_guest"),
		AttestConf:   filepath.Join(dir, "tdx-attest.conf"),
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func writeRegisters(t *testing.T, dir string) {
	for _, name := range registerFileNames {
		write(t, filepath.Join(dir, name), strings.Repeat("\x05", 48))
	}
}

func TestDetectNothing(t *testing.T) {
	_, p := machine(t)
	_, err := Detect(p)
	var unsupported *measure.UnsupportedError
	if !errors.As(err, &unsupported) || !strings.Contains(err.Error(), "not a TDX guest") || !strings.Contains(err.Error(), "6.7") {
		t.Errorf("got %v", err)
	}
	if Present(p) {
		t.Error("nothing is there, and yet a TDX guest is present")
	}
}

func TestDetectFiles(t *testing.T) {
	dir, p := machine(t)
	if err := os.Mkdir(p.Reports, 0o755); err != nil {
		t.Fatal(err)
	}
	k, err := Detect(p)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if k.QuoteSource != "configfs-tsm" || k.RegisterSource != "none" || k.CanExtend || !isDir(filepath.Join(dir, "report/tdx-agent")) {
		t.Errorf("got %+v", k)
	}
	var unsupported *measure.UnsupportedError
	if err := k.Registers.Extend(3, filled(1)); !errors.As(err, &unsupported) || !strings.Contains(err.Error(), "6.16") {
		t.Errorf("extend: %v", err)
	}
	if _, err := k.Registers.Registers(); !errors.As(err, &unsupported) {
		t.Errorf("registers: %v", err)
	}

	writeRegisters(t, p.Measurements)
	p.Entry = "mine"
	k, err = Detect(p)
	if err != nil {
		t.Fatal(err)
	}
	if k.RegisterSource != "sysfs" || !k.CanExtend || !isDir(filepath.Join(dir, "report/mine")) {
		t.Errorf("got %+v", k)
	}
	if err := errors.Join(k.Close(), k.Close()); err != nil {
		t.Error(err)
	}
	if !isDir(filepath.Join(dir, "report/mine")) {
		t.Error("Close removed the entry")
	}
	if !Present(p) {
		t.Error("a folder of registers is not noticed")
	}
}

// A QGS port without a device gives no TD report to send there.
func TestDetectQGSWithoutDevice(t *testing.T) {
	_, p := machine(t)
	write(t, p.AttestConf, "# dstack\nport = 4050\n")
	var unsupported *measure.UnsupportedError
	if _, err := Detect(p); !errors.As(err, &unsupported) || !strings.Contains(err.Error(), "TD report") {
		t.Errorf("got %v", err)
	}
}

// Without the right to make an entry it stays unknown whether there is a provider.
func TestDetectMayNotMakeEntry(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may; the test bed's machine has this case too (TestKernelUnprivileged)")
	}
	_, p := machine(t)
	if err := os.Mkdir(p.Reports, 0o555); err != nil {
		t.Fatal(err)
	}
	if _, err := Detect(p); !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), "kernel-setup") {
		t.Errorf("got %v", err)
	}
	write(t, p.AttestConf, "port = 4050\n")
	if _, err := Detect(p); err == nil || !strings.Contains(err.Error(), "TD report") {
		t.Errorf("with a QGS port: %v", err)
	}
}

func TestParseAttestConf(t *testing.T) {
	for conf, want := range map[string]uint32{
		"":                                  0,
		"port = 4050":                       4050,
		"port=4050\n":                       4050,
		"  port\t=  1 \r\n":                 1,
		"#port = 1\nport = 2\nport = 3\n":   2,
		"port = x\nport = 5":                5,
		"port = -1\nport = 4294967296\n":    0,
		"ports = 1\nport\nport =\nxport= 2": 0,
		"port = 0\n":                        0,
	} {
		if got := parseAttestConf(conf); got != want {
			t.Errorf("%q: got %d, want %d", conf, got, want)
		}
	}
}

func TestDetectOverrides(t *testing.T) {
	dir, p := machine(t)
	if err := os.Mkdir(p.Reports, 0o755); err != nil {
		t.Fatal(err)
	}
	writeRegisters(t, p.Measurements)
	entry := filepath.Join(dir, "elsewhere", "com.intel.dcap")
	write(t, filepath.Join(entry, "provider"), "tdx_guest\n")
	write(t, filepath.Join(dir, "sev", "provider"), "sev_guest\n")
	long := filepath.Join(dir, strings.Repeat("x", 240))
	write(t, filepath.Join(long, "provider"), "tdx_guest\n")
	registers := filepath.Join(entry, "measurements")
	writeRegisters(t, registers)

	const quote, rtmr = "DCAP_TDX_QUOTE_CONFIGFS_PATH", "DCAP_TDX_RTMR_SYSFS_PATH"
	detect := func(env map[string]string) (*Kernel, error) {
		p.Env = func(name string) string { return env[name] }
		k, err := Detect(p)
		if k != nil {
			t.Cleanup(func() { k.Close() })
		}
		return k, err
	}
	k, err := detect(map[string]string{quote: entry, rtmr: registers})
	if err != nil {
		t.Fatal(err)
	}
	if k.Quoter.(*Reports).entry != "com.intel.dcap" || k.Registers.(*RegisterFiles).dir != registers {
		t.Errorf("got %+v", k)
	}
	if notes := strings.Join(k.Notes, "\n"); !strings.Contains(notes, quote) || !strings.Contains(notes, rtmr) {
		t.Errorf("the notes do not name the overrides: %q", notes)
	}
	for _, bad := range []map[string]string{
		{quote: "elsewhere/com.intel.dcap"}, {quote: filepath.Join(dir, "none")}, {quote: filepath.Join(dir, "sev")},
		{quote: long}, {quote: p.Reports}, {rtmr: "measurements"}, {rtmr: dir}, {rtmr: filepath.Join(dir, "none")},
	} {
		if _, err := detect(bad); err == nil {
			t.Errorf("%v was accepted, or passed over", bad)
		}
	}
	p.Env = nil
	t.Setenv(quote, filepath.Join(dir, "none"))
	if k, err = Detect(p); err != nil || len(k.Notes) != 0 {
		t.Errorf("without Env the environment must not matter: %v", err)
	}
	k.Close()
}

func TestPresentAsksProvider(t *testing.T) {
	for _, c := range []struct {
		name  string
		entry *fakeEntry
		want  bool
	}{
		{"TDX, no entry", &fakeEntry{provider: "tdx_guest\n"}, true},
		{"SEV, no entry", &fakeEntry{provider: "sev_guest\n"}, false},
		{"no provider", &fakeEntry{mkdir: syscall.ENXIO}, false},
		{"may not ask", &fakeEntry{mkdir: syscall.EACCES}, true},
	} {
		c.entry.other = "report" // the folder can be listed
		if got := mayProvideTDX(c.entry, "tdx-agent"); got != c.want {
			t.Errorf("%s: got %t", c.name, got)
		}
	}
	for provider, want := range map[string]bool{"tdx_guest\n": true, "sev_guest\n": false} {
		_, p := machine(t)
		write(t, filepath.Join(p.Reports, "someones", "provider"), provider)
		if got := Present(p); got != want {
			t.Errorf("an entry of %q: got %t", provider, got)
		}
	}
}

func TestSetup(t *testing.T) {
	_, p := machine(t)
	me := Owner{UID: os.Getuid(), GID: os.Getgid()} // giving to oneself needs no root
	notes, err := Setup(p, me)
	if err != nil || len(notes) != 3 {
		t.Errorf("nothing there: %q, %v", notes, err)
	}
	write(t, filepath.Join(p.Reports, "tdx-agent", "inblob"), "")
	write(t, filepath.Join(p.Reports, "tdx-agent", "outblob"), "")
	writeRegisters(t, p.Measurements)
	for range 2 {
		notes, err = Setup(p, me)
		if all := strings.Join(notes, "\n"); err != nil || strings.Count(all, "belongs to") != 3 || !strings.Contains(all, "rtmr3") {
			t.Errorf("got %q, %v", notes, err)
		}
	}
	if err := os.RemoveAll(p.Reports); err != nil {
		t.Fatal(err)
	}
	write(t, p.Reports, "a file")
	if notes, err := Setup(p, me); err != nil || !strings.Contains(notes[0], "no "+p.Reports) {
		t.Errorf("a file in the way: %q, %v", notes, err)
	}
}
