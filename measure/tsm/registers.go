package tsm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// How long an extend waits for other programs and for the hardware.
const (
	lockWait    = 5 * time.Second
	lockPause   = 5 * time.Millisecond
	extendTries = 50
)

// needsExtend is what a kernel must have for an RTMR to be extended.
const needsExtend = "Linux 6.16 or later (CONFIG_TSM_MEASUREMENTS), or dstack OS 0.5's own module tdx_guest"

// RegisterFiles is the folder of measurement registers in sysfs, Linux 6.16 and
// later. It implements [measure.RegisterBank] and may be used by many goroutines and
// processes.
type RegisterFiles struct{ dir string }

// OpenRegisterFiles takes the folder (on a TDX guest
// /sys/devices/virtual/misc/tdx_guest/measurements), which must hold rtmr0:sha384 to
// rtmr3:sha384. It is a [*measure.UnsupportedError] if there is no such folder.
func OpenRegisterFiles(dir string) (*RegisterFiles, error) {
	if !isDir(dir) {
		return nil, &measure.UnsupportedError{What: "reach the registers in " + dir, Needs: "Linux 6.16 or later (CONFIG_TSM_MEASUREMENTS) in a TDX guest"}
	}
	for i := range 4 {
		if _, err := os.Stat(filepath.Join(dir, rtmrName(i))); err != nil {
			return nil, fmt.Errorf("%s is not a folder of measurement registers: %w", dir, err)
		}
	}
	return &RegisterFiles{dir: dir}, nil
}

func rtmrName(index int) string { return fmt.Sprintf("rtmr%d:sha384", index) }

// Registers implements [measure.RegisterBank]. Each register is read on its own, so
// an RTMR that is extended meanwhile may be newer than those before it. The four
// that never change (MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG) are zero where the
// folder lacks them, as dstack's simulator does.
func (f *RegisterFiles) Registers() (measure.Registers, error) {
	var r measure.Registers
	for _, reg := range []struct {
		name string
		to   *measure.Digest
	}{
		{"mrtd:sha384", &r.MRTD}, {"mrconfigid", &r.MRConfigID}, {"mrowner", &r.MROwner}, {"mrownerconfig", &r.MROwnerConfig},
	} {
		if err := f.read(reg.name, reg.to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return measure.Registers{}, err
		}
	}
	for i := range r.RTMR {
		if err := f.read(rtmrName(i), &r.RTMR[i]); err != nil {
			return measure.Registers{}, err
		}
	}
	return r, nil
}

func (f *RegisterFiles) read(name string, to *measure.Digest) error {
	file, err := os.Open(filepath.Join(f.dir, name))
	if err != nil {
		return fmt.Errorf("read a register: %w", err)
	}
	defer file.Close()
	b := make([]byte, len(to)+1) // one more than there should be
	n, err := io.ReadFull(file, b)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return fmt.Errorf("read a register: %w", err)
	}
	if n != len(to) {
		return fmt.Errorf("register %s has %d bytes or more, want %d", file.Name(), n, len(to))
	}
	copy(to[:], b)
	return nil
}

// Extend implements [measure.RegisterBank]. It holds the register file's lock (flock)
// meanwhile, for other programs that take it too. If the kernel is busy or a signal
// comes, it tries again for up to a second, but only while the register still has
// its old value.
func (f *RegisterFiles) Extend(index int, d measure.Digest) error {
	if err := checkIndex(index); err != nil {
		return err
	}
	path := filepath.Join(f.dir, rtmrName(index))
	// Not O_RDWR: a read would move the offset. The write is one pwrite of 48 bytes:
	// of a longer one the kernel would take the first 48 and extend with them.
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		err = pathError("open", path, err)
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("extend RTMR%d: run kernel-setup as root, which gives the register to the agent's user: %w", index, err)
		}
		return fmt.Errorf("extend RTMR%d: %w", index, err)
	}
	defer unix.Close(fd)
	if err := lockFile(fd); err != nil {
		return fmt.Errorf("extend RTMR%d: another program holds the lock of %s: %w", index, path, err)
	}
	var before measure.Digest
	if err := f.read(rtmrName(index), &before); err != nil {
		return fmt.Errorf("extend RTMR%d (nothing was extended): %w", index, err)
	}
	err = extendRetrying(before, d,
		func() (int, error) { return unix.Pwrite(fd, d[:], 0) },
		func(now *measure.Digest) error { return f.read(rtmrName(index), now) })
	if err != nil {
		return fmt.Errorf("extend RTMR%d: %w", index, pathError("write", path, err))
	}
	return nil
}

// extendRetrying writes until the kernel has taken the digest. An extend is not
// idempotent, so before each new try the register must be seen unmoved.
func extendRetrying(before, d measure.Digest, write func() (int, error), read func(*measure.Digest) error) error {
	for try := 1; ; try++ {
		n, err := write()
		if err == nil && n != len(d) {
			return fmt.Errorf("the kernel took %d bytes of %d", n, len(d))
		}
		if err == nil || try == extendTries || err != syscall.EBUSY && err != syscall.EINTR {
			return err
		}
		var now measure.Digest
		if readErr := read(&now); readErr != nil {
			return errors.Join(err, readErr)
		}
		switch now {
		case before.Extend(d):
			return nil
		case before:
			time.Sleep(time.Second / extendTries)
		default:
			return fmt.Errorf("another program extended it meanwhile: %w", err)
		}
	}
}

// lockFile takes the file's exclusive lock, within lockWait.
func lockFile(fd int) error {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockPause) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(deadline) {
			return err
		}
	}
}

func checkIndex(index int) error {
	if index < 0 || index > 3 {
		return fmt.Errorf("extend RTMR%d: want an index of 0 to 3", index)
	}
	return nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
