package tsm

import (
	"errors"
	"fmt"
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
type RegisterFiles struct {
	dir    string
	static measure.Registers // those that never change
	rtmr   [4]registerFile
}

// registerFile is a file that stays open: opening it anew takes ten times as long as
// reading it, and every use of the RTMR3 log reads the registers.
type registerFile struct {
	file *os.File
	conn syscall.RawConn
	// isSysfs says that a read of the open file is one of the register. Elsewhere, as in
	// FUSE, it may be one of the page cache, or of a file that was replaced since.
	isSysfs bool
}

// OpenRegisterFiles takes the folder (on a TDX guest
// /sys/devices/virtual/misc/tdx_guest/measurements), which must hold rtmr0:sha384 to
// rtmr3:sha384. It is a [*measure.UnsupportedError] if there is no such folder.
func OpenRegisterFiles(dir string) (*RegisterFiles, error) {
	if !isDir(dir) {
		return nil, &measure.UnsupportedError{What: "reach the registers in " + dir, Needs: "Linux 6.16 or later (CONFIG_TSM_MEASUREMENTS) in a TDX guest"}
	}
	f := &RegisterFiles{dir: dir}
	if err := f.open(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is not a folder of measurement registers: %w", dir, err)
	}
	return f, nil
}

func (f *RegisterFiles) open() error {
	for _, reg := range []struct {
		name string
		to   *measure.Digest
	}{
		{"mrtd:sha384", &f.static.MRTD}, {"mrconfigid", &f.static.MRConfigID}, {"mrowner", &f.static.MROwner}, {"mrownerconfig", &f.static.MROwnerConfig},
	} {
		r, err := openRegister(filepath.Join(f.dir, reg.name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = r.read(reg.to)
			r.file.Close()
		}
		if err != nil {
			return err
		}
	}
	for i := range f.rtmr {
		r, err := openRegister(filepath.Join(f.dir, rtmrName(i)))
		if err != nil {
			return err
		}
		f.rtmr[i] = r
	}
	return nil
}

// Close closes the files.
func (f *RegisterFiles) Close() error {
	var errs []error
	for _, r := range f.rtmr {
		if r.file != nil {
			errs = append(errs, r.file.Close())
		}
	}
	return errors.Join(errs...)
}

func openRegister(path string) (registerFile, error) {
	file, err := os.Open(path)
	if err != nil {
		return registerFile{}, err
	}
	conn, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return registerFile{}, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &st); err != nil {
		file.Close()
		return registerFile{}, pathError("statfs", path, err)
	}
	return registerFile{file, conn, st.Type == unix.SYSFS_MAGIC}, nil
}

func rtmrName(index int) string { return fmt.Sprintf("rtmr%d:sha384", index) }

// Registers implements [measure.RegisterBank]. Each register is read on its own, so
// an RTMR that is extended meanwhile may be newer than those before it. The four
// that never change (MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG) are zero where the
// folder lacks them, as dstack's simulator does.
func (f *RegisterFiles) Registers() (measure.Registers, error) {
	r := f.static
	for i := range r.RTMR {
		if err := f.rtmr[i].read(&r.RTMR[i]); err != nil {
			return measure.Registers{}, err
		}
	}
	return r, nil
}

// read makes one read, at the beginning: the kernel gives the register of that moment.
func (r registerFile) read(to *measure.Digest) error {
	var b [len(to) + 1]byte // one more than there should be
	var n int
	var readErr error
	err := r.conn.Control(func(fd uintptr) {
		if readErr = unix.ENODEV; r.isSysfs {
			n, readErr = preadAtStart(int(fd), b[:])
		}
		if readErr == unix.ENODEV { // also when the driver was loaded anew
			n, readErr = readAnew(r.file.Name(), b[:])
		}
	})
	if err != nil {
		return fmt.Errorf("read a register: %w", err)
	}
	if readErr != nil {
		return fmt.Errorf("read a register: %w", pathError("read", r.file.Name(), readErr))
	}
	if n != len(to) {
		return fmt.Errorf("register %s has %d bytes or more, want %d", r.file.Name(), n, len(to))
	}
	copy(to[:], b[:])
	return nil
}

func readAnew(path string, b []byte) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return preadAtStart(fd, b)
}

func preadAtStart(fd int, b []byte) (n int, err error) {
	for n, err = unix.Pread(fd, b, 0); err == unix.EINTR; { // the kernel waits interruptibly
		n, err = unix.Pread(fd, b, 0)
	}
	return n, err
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
	if err := f.rtmr[index].read(&before); err != nil {
		return fmt.Errorf("extend RTMR%d (nothing was extended): %w", index, err)
	}
	err = extendRetrying(before, d,
		func() (int, error) { return unix.Pwrite(fd, d[:], 0) },
		func(now *measure.Digest) error { return f.rtmr[index].read(now) })
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
