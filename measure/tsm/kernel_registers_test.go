package tsm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"tdx-agent/measure"
)

func TestKernelRegisterFiles(t *testing.T) {
	needKernel(t)
	f, err := OpenRegisterFiles(Paths{}.orDefaults().Measurements)
	if unsupported := (*measure.UnsupportedError)(nil); errors.As(err, &unsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	extendsAll(t, f)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.EBUSY} {
		before := registersOf(t, f)
		old, _ := os.ReadFile(knobs + "/extend_errno")
		os.WriteFile(knobs+"/extend_errno", fmt.Appendf(nil, "%d", errno), 0)
		if err := f.Extend(3, measure.Digest{8}); !errors.Is(err, errno) {
			t.Errorf("got %v, want %v", err, errno)
		}
		os.WriteFile(knobs+"/extend_errno", old, 0)
		if registersOf(t, f) != before {
			t.Error("a refused extend moved a register")
		}
	}
	want := registersOf(t, f).RTMR[3]
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 10 {
				if err := f.Extend(3, measure.Digest{1}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for range 80 {
		want = want.Extend(measure.Digest{1})
	}
	if got := registersOf(t, f).RTMR[3]; got != want {
		t.Errorf("after 80 extends by 8 goroutines: got %s, want %s", got, want)
	}
}

func TestKernelDevice(t *testing.T) {
	needKernel(t)
	d, err := OpenDevice("/dev/tdx_guest")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	tdr, err := d.TDReport(measure.ReportData{1, 2, 3})
	if err != nil || tdr[128] != 1 {
		t.Errorf("TD report: %v", err)
	}
	if f, err := OpenRegisterFiles(Paths{}.orDefaults().Measurements); err == nil {
		if registersOf(t, f) != registersOf(t, d) {
			t.Error("sysfs and the TD report differ")
		}
	}
	if !d.CanExtend() {
		var unsupported *measure.UnsupportedError
		if err := d.Extend(3, measure.Digest{1}); !errors.As(err, &unsupported) {
			t.Errorf("got %v, want an UnsupportedError", err)
		}
		return
	}
	extendsAll(t, d)
	knob(t, "extend_errno", fmt.Sprint(int(syscall.EIO)))
	if err := d.Extend(3, measure.Digest{8}); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
}

func registersOf(t *testing.T, b measure.RegisterBank) measure.Registers {
	t.Helper()
	r, err := b.Registers()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// extendsAll extends each RTMR and looks at all registers.
func extendsAll(t *testing.T, b measure.RegisterBank) {
	t.Helper()
	for i := range 4 {
		want := registersOf(t, b)
		d := measure.Digest{byte(i + 1), 47: 0xff}
		want.RTMR[i] = want.RTMR[i].Extend(d)
		if err := b.Extend(i, d); err != nil {
			t.Fatal(err)
		}
		if got := registersOf(t, b); got != want {
			t.Errorf("after the extend of RTMR%d: got %v, want %v", i, got, want)
		}
	}
	for _, i := range []int{-1, 4} {
		if err := b.Extend(i, measure.Digest{}); err == nil {
			t.Errorf("RTMR%d was extended", i)
		}
	}
}

func TestKernelDetect(t *testing.T) {
	needKernel(t)
	if !Present(Paths{}) {
		t.Error("the TDX guest was not noticed")
	}
	k, err := Detect(Paths{})
	if err != nil {
		// dstack 0.5's shape: quotes only through QGS.
		conf := filepath.Join(t.TempDir(), "tdx-attest.conf")
		if err := os.WriteFile(conf, []byte("port = 4050\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Logf("without %s: %v", conf, err)
		if k, err = Detect(Paths{AttestConf: conf}); err != nil {
			t.Fatal(err)
		}
	}
	defer k.Close()
	t.Logf("quotes %s, registers %s, extends %t, notes %q", k.QuoteSource, k.RegisterSource, k.CanExtend, k.Notes)
	registersOf(t, k.Registers)
	err = k.Registers.Extend(3, measure.Digest{})
	if unsupported := (*measure.UnsupportedError)(nil); (err == nil) != k.CanExtend || err != nil && !errors.As(err, &unsupported) {
		t.Errorf("extend: %v", err)
	}
}

func TestKernelSetup(t *testing.T) {
	needKernel(t)
	notes, err := Setup(Paths{}, Owner{UID: 1000, GID: 1000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Setup(Paths{}, Owner{}) })
	t.Log(strings.Join(notes, "\n"))
	for _, path := range []string{"/sys/kernel/config/tsm/report/tdx-agent/inblob", "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"} {
		st, err := os.Stat(path)
		if err != nil {
			continue // a machine without it
		}
		if uid := st.Sys().(*syscall.Stat_t).Uid; uid != 1000 {
			t.Errorf("%s belongs to %d", path, uid)
		}
	}
}

const unprivileged = "TDX_AGENT_TEST_UNPRIVILEGED"

// After Setup a process without any privilege quotes and extends.
func TestKernelUnprivileged(t *testing.T) {
	if os.Getenv(unprivileged) == "" {
		needKernel(t)
		if _, err := Setup(Paths{}, Owner{UID: 1000, GID: 1000}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { Setup(Paths{}, Owner{}) })
		knob(t, "quote_len", "5000")
		child := exec.Command(os.Args[0], "-test.run=^TestKernelUnprivileged$", "-test.v")
		child.Env = []string{unprivileged + "=1"}
		child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
		if out, err := child.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	conf := filepath.Join(t.TempDir(), "tdx-attest.conf")
	if err := os.WriteFile(conf, []byte("port = 4050\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := Detect(Paths{AttestConf: conf}) // for dstack 0.5's shape
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if k.CanExtend {
		extendRTMR3(t, k.Registers)
	}
	if k.QuoteSource == "qgs-vsock" {
		return // the machine has no host to ask
	}
	if _, err := k.Quoter.Quote(t.Context(), measure.ReportData{1}); err != nil {
		t.Error(err)
	}
}

func extendRTMR3(t *testing.T, b measure.RegisterBank) {
	t.Helper()
	want := registersOf(t, b).RTMR[3].Extend(measure.Digest{7})
	if err := b.Extend(3, measure.Digest{7}); err != nil {
		t.Fatal(err)
	}
	if got := registersOf(t, b).RTMR[3]; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
