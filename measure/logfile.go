package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	logName    = "rtmr3.log"
	lockName   = "rtmr3.lock"
	maxLogFile = 16 << 20 // a log at its bounds is under 1 MiB
)

// logStore is the file the log is kept in: the edge at which tests tear and fail
// writes.
type logStore interface {
	size() (int64, error)
	read() ([]byte, error)
	writeAt(b []byte, off int64) (int, error) // one write(2)
	truncate(size int64) error
	setAside() error // keeps the content under another name and starts empty
	close() error
}

// logFile needs no fsync: it must outlive the process, not the machine, whose
// registers are gone with it.
type logFile struct {
	path string
	f    *os.File
	dev  uint64 // which file f is; the number stays taken as long as f is open
	ino  uint64
}

func openLogFile(dir string) (*logFile, error) {
	s := &logFile{path: filepath.Join(dir, logName)}
	return s, s.open()
}

func (s *logFile) open() error {
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return &fs.PathError{Op: "open", Path: s.path, Err: err}
	}
	s.f, s.dev, s.ino = f, st.Dev, st.Ino
	return nil
}

// size also notices that another process has set the file aside.
func (s *logFile) size() (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(s.path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: s.path, Err: err}
	}
	if st.Dev != s.dev || st.Ino != s.ino {
		s.f.Close()
		if err := s.open(); err != nil {
			return 0, err
		}
		return -st.Size - 1, nil // never equal to what the caller remembers
	}
	return st.Size, nil
}

func (s *logFile) read() ([]byte, error) {
	b, err := io.ReadAll(io.NewSectionReader(s.f, 0, maxLogFile+1))
	if err == nil && len(b) > maxLogFile {
		err = fmt.Errorf("%s is larger than %d bytes", s.f.Name(), maxLogFile)
	}
	return b, err
}

func (s *logFile) writeAt(b []byte, off int64) (int, error) {
	return unix.Pwrite(int(s.f.Fd()), b, off)
}
func (s *logFile) truncate(size int64) error { return s.f.Truncate(size) }
func (s *logFile) close() error              { return s.f.Close() }

func (s *logFile) setAside() error {
	if err := os.Rename(s.path, s.path+".old"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s.f.Close()
	return s.open()
}

// fileLock is the lock between processes: our own, and dstack's where it exists.
type fileLock struct {
	paths [2]string
	files [2]*os.File // opened when first needed, kept
}

func newFileLock(dir, dstack string) *fileLock {
	return &fileLock{paths: [2]string{filepath.Join(dir, lockName), dstack}}
}

// acquire takes both locks, or fails when ctx ends or lockWait has passed.
func (l *fileLock) acquire(ctx context.Context) error {
	deadline := time.Now().Add(lockWait)
	for i, path := range l.paths {
		if path == "" {
			continue
		}
		if err := l.take(ctx, deadline, i, path); err != nil {
			l.release()
			return fmt.Errorf("lock the RTMR3 log (%s): %w", path, err)
		}
	}
	return nil
}

func (l *fileLock) take(ctx context.Context, deadline time.Time, i int, path string) error {
	if l.files[i] == nil {
		flags := os.O_RDWR | unix.O_NOFOLLOW | unix.O_NONBLOCK
		if i == 0 {
			flags |= os.O_CREATE
		}
		f, err := os.OpenFile(path, flags, 0o600)
		if i > 0 && errors.Is(err, os.ErrNotExist) {
			return nil // no dstack beside us
		}
		if err != nil {
			return err
		}
		l.files[i] = f
	}
	for {
		err := unix.Flock(int(l.files[i].Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || (err != unix.EWOULDBLOCK && err != unix.EINTR) {
			return err
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("another process holds it: %w", context.DeadlineExceeded)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("another process holds it: %w", ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (l *fileLock) release() {
	for _, f := range l.files {
		if f != nil {
			unix.Flock(int(f.Fd()), unix.LOCK_UN)
		}
	}
}

func (l *fileLock) close() {
	for _, f := range l.files {
		if f != nil {
			f.Close()
		}
	}
}

// refresh reads the file if its size says that another process has changed it, or
// if told to.
func (l *Ledger) refresh(force bool) error {
	size, err := l.store.size()
	if errors.Is(err, fs.ErrNotExist) {
		l.removed(err)
		return nil
	}
	if err != nil {
		return err
	}
	if size == l.size && l.damage == nil && !force {
		return nil
	}
	b, err := l.store.read()
	if err != nil {
		return err
	}
	records, good, damage := parseRecords(b)
	l.records, l.size, l.damage, l.bytes = records, int64(good), damage, 0
	for i := range records {
		records[i].size = eventSize(records[i].event())
		l.bytes += records[i].size
	}
	if damage == nil && good < len(b) {
		// An extend only ever follows a whole record, so a torn one never happened.
		if err := l.store.truncate(int64(good)); err != nil {
			return err
		}
		l.mended.Torn++
	}
	return nil
}

// removed notes that the file is gone. It is not made anew from what is remembered:
// the log is what other processes can read as well.
func (l *Ledger) removed(err error) {
	if errors.Is(l.damage, fs.ErrNotExist) {
		return
	}
	l.damage = fmt.Errorf("somebody has removed it: %w, want the log of %d events that replays to %s; put the file back from a copy, or reboot", err, len(l.records), l.tail())
	l.records, l.size, l.bytes = nil, 0, 0
}

// append writes r in one write. On any failure the file is what it was, or has a
// torn end that the next refresh drops.
func (l *Ledger) append(r Record) error {
	b, err := r.line()
	if err != nil {
		return err
	}
	n, err := l.store.writeAt(b, l.size)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return errors.Join(err, l.store.truncate(l.size))
	}
	l.size += int64(len(b))
	r.end, r.payload, r.size = l.size, r.event().Payload, eventSize(r.event())
	l.bytes += r.size
	l.records = append(l.records, r)
	return nil
}

// takeBack removes the last record: an intent that was never extended.
func (l *Ledger) takeBack() error {
	n := len(l.records) - 1
	var size int64
	if n > 0 {
		size = l.records[n-1].end
	}
	if err := l.store.truncate(size); err != nil {
		return fmt.Errorf("take back event %q, which was not extended: %w", l.records[n].Name, err)
	}
	l.bytes -= l.records[n].size
	l.records, l.size = l.records[:n:n], size
	return nil
}

func (l *Ledger) setAside() error {
	if err := l.store.setAside(); err != nil {
		return fmt.Errorf("set aside the log of an earlier boot: %w", err)
	}
	l.records, l.size, l.bytes, l.damage = nil, 0, 0, nil
	l.mended.SetAside++
	return nil
}

// Recoveries counts what a [Ledger] has mended after a crash or a reboot.
type Recoveries struct {
	Torn      int // records that were not written to their end
	TakenBack int // intents that were never extended
	SetAside  int // logs of an earlier boot
}

// Recoveries says what was mended since the log was opened.
func (l *Ledger) Recoveries() Recoveries {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mended
}
