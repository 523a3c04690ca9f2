package tsm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

var registerFileNames = []string{"mrtd:sha384", "mrconfigid", "mrowner", "mrownerconfig", "rtmr0:sha384", "rtmr1:sha384", "rtmr2:sha384", "rtmr3:sha384"}

// registerDir is a folder with the names of the kernel's, whose files are plain: a
// write stores what it should extend with. Register i is filled with i+1.
func registerDir(t *testing.T, names []string) string {
	t.Helper()
	dir := t.TempDir()
	for i, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte{byte(i + 1)}, 48), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func filled(b byte) (d measure.Digest) {
	for i := range d {
		d[i] = b
	}
	return d
}

func TestRegisterFilesRead(t *testing.T) {
	f, err := OpenRegisterFiles(registerDir(t, registerFileNames))
	if err != nil {
		t.Fatal(err)
	}
	want := measure.Registers{MRTD: filled(1), MRConfigID: filled(2), MROwner: filled(3), MROwnerConfig: filled(4),
		RTMR: [4]measure.Digest{filled(5), filled(6), filled(7), filled(8)}}
	if got := registersOf(t, f); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	// dstack's simulator has the RTMRs only.
	f, err = OpenRegisterFiles(registerDir(t, registerFileNames[4:]))
	if err != nil {
		t.Fatal(err)
	}
	want = measure.Registers{RTMR: [4]measure.Digest{filled(1), filled(2), filled(3), filled(4)}}
	if got := registersOf(t, f); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	// What moves is read anew each time.
	if err := os.WriteFile(filepath.Join(f.dir, "rtmr3:sha384"), bytes.Repeat([]byte{9}, 48), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := registersOf(t, f).RTMR[3]; got != filled(9) {
		t.Errorf("RTMR3 was written, got %s", got)
	}
	// So it is when another file has taken its place.
	if err := os.WriteFile(filepath.Join(f.dir, "new"), bytes.Repeat([]byte{10}, 48), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(f.dir, "new"), filepath.Join(f.dir, "rtmr3:sha384")); err != nil {
		t.Fatal(err)
	}
	if got := registersOf(t, f).RTMR[3]; got != filled(10) {
		t.Errorf("RTMR3 was replaced, got %s", got)
	}
	for _, size := range []int{0, 47, 49, 4096} {
		os.WriteFile(filepath.Join(f.dir, "rtmr2:sha384"), make([]byte, size), 0o600)
		if r, err := f.Registers(); err == nil || r != (measure.Registers{}) {
			t.Errorf("a register of %d bytes was accepted: %v", size, err)
		}
	}
}

// TestRegisterFilesStayOpen where they are the kernel's.
func TestRegisterFilesStayOpen(t *testing.T) {
	f, err := OpenRegisterFiles(registerDir(t, registerFileNames))
	if err != nil {
		t.Fatal(err)
	}
	for i := range f.rtmr {
		f.rtmr[i].isSysfs = true
		if err := os.Remove(f.rtmr[i].file.Name()); err != nil {
			t.Fatal(err)
		}
	}
	if got := registersOf(t, f).RTMR[3]; got != filled(8) {
		t.Errorf("got %s", got)
	}
	t.Run("sysfs", func(t *testing.T) {
		r, err := openRegister("/sys/kernel/uevent_seqnum")
		if err != nil {
			t.Skip(err)
		}
		defer r.file.Close()
		if !r.isSysfs {
			t.Error("a file of sysfs is not taken for one")
		}
	})
}

func TestOpenRegisterFiles(t *testing.T) {
	var unsupported *measure.UnsupportedError
	if _, err := OpenRegisterFiles(filepath.Join(t.TempDir(), "none")); !errors.As(err, &unsupported) {
		t.Errorf("no folder: %v", err)
	}
	if _, err := OpenRegisterFiles(registerDir(t, registerFileNames[:7])); err == nil || errors.As(err, &unsupported) {
		t.Errorf("a folder without RTMR3: %v", err)
	}
}

func TestRegisterFilesExtend(t *testing.T) {
	f, err := OpenRegisterFiles(registerDir(t, registerFileNames))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Extend(3, filled(0xee)); err != nil {
		t.Fatal(err)
	}
	if got := registersOf(t, f).RTMR; got != [4]measure.Digest{filled(5), filled(6), filled(7), filled(0xee)} {
		t.Errorf("48 bytes at offset 0 of RTMR3 were wanted, got %v", got)
	}
	f.Close()
	if r, err := f.Registers(); err == nil {
		t.Errorf("after Close: %v", r)
	}
	if f, err = OpenRegisterFiles(f.dir); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{-1, 4} {
		if err := f.Extend(i, filled(1)); err == nil {
			t.Errorf("RTMR%d was extended", i)
		}
	}
	if err := os.Remove(filepath.Join(f.dir, "rtmr3:sha384")); err != nil {
		t.Fatal(err)
	}
	if err := f.Extend(3, filled(1)); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a register that has gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(f.dir, "rtmr3:sha384")); err == nil {
		t.Error("the extend made a file")
	}
}

func TestRegisterFilesExtendLocked(t *testing.T) {
	dir := registerDir(t, registerFileNames)
	f, err := OpenRegisterFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(filepath.Join(dir, "rtmr3:sha384"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	synctest.Test(t, func(t *testing.T) {
		if err := unix.Flock(int(other.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := f.Extend(3, filled(1)); !errors.Is(err, syscall.EAGAIN) || registersOf(t, f).RTMR[3] != filled(8) {
			t.Errorf("under another's lock: %v", err)
		}
		if took := time.Since(start); took < lockWait || took > 2*lockWait {
			t.Errorf("waited %s for the lock", took)
		}
		time.AfterFunc(time.Second, func() { unix.Flock(int(other.Fd()), unix.LOCK_UN) })
		if err := f.Extend(3, filled(1)); err != nil {
			t.Errorf("once the lock is free: %v", err)
		}
	})
}

// An extend that failed may have happened. Only an unmoved register allows another.
func TestExtendRetrying(t *testing.T) {
	start, d := filled(1), filled(2)
	for _, c := range []struct {
		name   string
		write  func(try int, reg *measure.Digest) (int, error)
		want   string // in the error
		writes int
		final  measure.Digest
	}{
		{"success", func(_ int, r *measure.Digest) (int, error) { *r = r.Extend(d); return 48, nil }, "", 1, start.Extend(d)},
		{"busy twice, interrupted once", func(try int, r *measure.Digest) (int, error) {
			if try < 4 {
				return -1, []error{syscall.EBUSY, syscall.EBUSY, syscall.EINTR}[try-1]
			}
			*r = r.Extend(d)
			return 48, nil
		}, "", 4, start.Extend(d)},
		{"error after the extend", func(_ int, r *measure.Digest) (int, error) { *r = r.Extend(d); return -1, syscall.EINTR }, "", 1, start.Extend(d)},
		{"error, and another's extend", func(_ int, r *measure.Digest) (int, error) { *r = r.Extend(filled(9)); return -1, syscall.EBUSY }, "another program", 1, start.Extend(filled(9))},
		{"hardware error", func(int, *measure.Digest) (int, error) { return -1, syscall.EIO }, "input/output", 1, start},
		{"short write", func(int, *measure.Digest) (int, error) { return 20, nil }, "20 bytes of 48", 1, start},
		{"busy for ever", func(int, *measure.Digest) (int, error) { return -1, syscall.EBUSY }, "busy", extendTries, start},
	} {
		synctest.Test(t, func(t *testing.T) {
			reg, writes := start, 0
			err := extendRetrying(start, d,
				func() (int, error) { writes++; return c.write(writes, &reg) },
				func(now *measure.Digest) error { *now = reg; return nil })
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%s: got %v, want %q", c.name, err, c.want)
			}
			if writes != c.writes || reg != c.final {
				t.Errorf("%s: %d writes, register %s", c.name, writes, reg)
			}
		})
	}
	err := extendRetrying(start, d, func() (int, error) { return -1, syscall.EBUSY }, func(*measure.Digest) error { return syscall.EIO })
	if !errors.Is(err, syscall.EBUSY) || !errors.Is(err, syscall.EIO) {
		t.Errorf("a register that cannot be read: %v", err)
	}
}
