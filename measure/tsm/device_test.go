package tsm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"tdx-agent/measure"
)

// fakeModule answers the device's ioctls as dstack 0.5's module or mainline's.
type fakeModule struct {
	extends bool
	regs    measure.Registers
	report0 func(out []byte) syscall.Errno // may spoil the TD report
	extend  func(m *fakeModule, arg []byte) (int, syscall.Errno)
}

func (m *fakeModule) ioctl(cmd uint, arg []byte) (int, syscall.Errno) {
	switch {
	case cmd == ioctlReport0:
		out := arg[64:]
		clear(out)
		out[0] = 0x81
		copy(out[128:], arg[:64])
		at := 528
		for _, d := range append([]measure.Digest{m.regs.MRTD, m.regs.MRConfigID, m.regs.MROwner, m.regs.MROwnerConfig}, m.regs.RTMR[:]...) {
			at += copy(out[at:], d[:])
		}
		if m.report0 != nil {
			return 0, m.report0(out)
		}
		return 0, 0
	case cmd == ioctlExtend && m.extends && arg == nil:
		return -1, syscall.EFAULT
	case cmd == ioctlExtend && m.extends:
		if m.extend != nil {
			return m.extend(m, arg)
		}
		m.move(arg)
		return 0, 0
	}
	return -1, syscall.ENOTTY
}

func (m *fakeModule) move(arg []byte) {
	r := &m.regs.RTMR[arg[48]]
	*r = r.Extend(measure.Digest(arg[:48]))
}

func (m *fakeModule) open(t *testing.T) *Device {
	t.Helper()
	d := &Device{path: "/dev/tdx_guest", ioctl: m.ioctl, close: func() error { return nil }}
	if err := d.probe(); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDevice(t *testing.T) {
	m := &fakeModule{extends: true, regs: measure.Registers{MRTD: filled(1), MRConfigID: filled(2), MROwner: filled(3), MROwnerConfig: filled(4),
		RTMR: [4]measure.Digest{filled(5), filled(6), filled(7), filled(8)}}}
	d := m.open(t)
	if !d.CanExtend() {
		t.Error("EFAULT of the probe means that the module extends")
	}
	if got := registersOf(t, d); got != m.regs {
		t.Errorf("got %v, want %v", got, m.regs)
	}
	extendsAll(t, d)
	if tdr, err := d.TDReport(someData); err != nil || measure.ReportData(tdr[128:192]) != someData {
		t.Errorf("TD report: %v", err)
	}
}

func TestDeviceWithoutExtend(t *testing.T) {
	d := (&fakeModule{}).open(t)
	var unsupported *measure.UnsupportedError
	if err := d.Extend(3, filled(1)); d.CanExtend() || !errors.As(err, &unsupported) || !strings.Contains(err.Error(), "6.16") {
		t.Errorf("got %v", err)
	}
}

// Neither errno 0 nor result 0 proves that the register moved.
func TestDeviceExtendFails(t *testing.T) {
	for _, c := range []struct {
		name   string
		extend func(*fakeModule, []byte) (int, syscall.Errno)
		want   string
	}{
		{"status cut to 2", func(*fakeModule, []byte) (int, syscall.Errno) { return 2, 0 }, "status 0x2"},
		{"status cut to 0", func(*fakeModule, []byte) (int, syscall.Errno) { return 0, 0 }, "reported success"},
		{"status, though it moved", func(m *fakeModule, b []byte) (int, syscall.Errno) { m.move(b); return 2, 0 }, "status 0x2"},
		{"errno", func(*fakeModule, []byte) (int, syscall.Errno) { return -1, syscall.EIO }, "input/output"},
		{"another's extend in between", func(m *fakeModule, b []byte) (int, syscall.Errno) { m.move(b); m.move(b); return 0, 0 }, "reported success"},
		{"another register moved", func(m *fakeModule, b []byte) (int, syscall.Errno) {
			m.regs.RTMR[2] = filled(1)
			return 0, 0
		}, "reported success"},
	} {
		m := &fakeModule{extends: true, extend: c.extend}
		if err := m.open(t).Extend(3, filled(1)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
}

func TestTDReport(t *testing.T) {
	for _, c := range []struct {
		name    string
		report0 func(n int, out []byte) syscall.Errno
		want    string // in the error; "" is none
	}{
		{"interrupted, then busy", func(n int, _ []byte) syscall.Errno {
			return append([]syscall.Errno{syscall.EINTR, syscall.EBUSY}, make([]syscall.Errno, 9)...)[n-1]
		}, ""},
		{"busy for ever", func(int, []byte) syscall.Errno { return syscall.EBUSY }, "busy"},
		{"no such ioctl", func(int, []byte) syscall.Errno { return syscall.ENOTTY }, "inappropriate ioctl"},
		{"not a TDX report", func(_ int, out []byte) syscall.Errno { out[0] = 0; return 0 }, "type 0x0"},
		{"foreign report data", func(_ int, out []byte) syscall.Errno { out[128]++; return 0 }, "other report data"},
	} {
		synctest.Test(t, func(t *testing.T) {
			m, n := &fakeModule{}, 0
			d := m.open(t)
			m.report0 = func(out []byte) syscall.Errno { n++; return c.report0(n, out) }
			tdr, err := d.TDReport(someData)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || tdr[0] != 0) {
				t.Errorf("%s: got %v, want %q", c.name, err, c.want)
			}
		})
	}
}

func TestOpenDevice(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{plain, filepath.Dir(plain), plain + "x", "/dev/null"} {
		var unsupported *measure.UnsupportedError
		if _, err := OpenDevice(path); !errors.As(err, &unsupported) {
			t.Errorf("%s: got %v, want an UnsupportedError", path, err)
		}
	}
}
