package collateral

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// A lock is waited for 2 s. It is held for as long as two small files take to write.
const (
	lockTries = 200
	lockPause = 10 * time.Millisecond
)

// state is the state folder: floor.json, the lock over it, and the cached bundles,
// which are only a cache: what is damaged there is fetched again.
type state struct {
	dir     string
	channel string
}

func openState(dir, channel string) (*state, error) {
	s := &state{dir, channel}
	if err := os.MkdirAll(s.bundles(), 0o700); err != nil {
		return nil, s.failed(err)
	}
	return s, nil
}

func (s *state) floorFile() string { return filepath.Join(s.dir, "floor.json") }
func (s *state) bundles() string   { return filepath.Join(s.dir, "bundles") }

func (s *state) bundle(p platform) string {
	return filepath.Join(s.bundles(), fmt.Sprintf("%s-%x-%s.json", s.channel, p.fmspc, p.ca))
}

func (s *state) failed(err error) *Error {
	return &Error{Code: "state", Err: err, Hint: "the state folder must be writable and have room"}
}

// lock keeps other processes from changing the floor.
func (s *state) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, "floor.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, s.failed(err)
	}
	// Without blocking: a process that was stopped must not stop this one.
	for range lockTries {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK && err != unix.EINTR {
			break
		}
		time.Sleep(lockPause)
	}
	if err != nil {
		f.Close()
		return nil, s.failed(fmt.Errorf("lock %s: %w", f.Name(), err))
	}
	return func() { f.Close() }, nil
}

// readFloor returns an empty floor if there is none, and an error if it is damaged: to
// begin anew would forget what must not come back.
func (s *state) readFloor() (marks, error) {
	text, err := readFile(s.floorFile(), maxFloor)
	if errors.Is(err, fs.ErrNotExist) {
		return make(marks), nil
	}
	var m marks
	if err == nil {
		m, err = decodeMarks(text)
	}
	if err != nil {
		return nil, &Error{Code: "floor", Source: "file " + s.floorFile(), Err: err,
			Hint: "restore the file; or remove it, which accepts collateral older than what was seen before"}
	}
	return m, nil
}

func (s *state) writeFloor(m marks) error {
	text, err := m.encode()
	if err != nil {
		return s.failed(err)
	}
	if old, err := os.ReadFile(s.floorFile()); err == nil && bytes.Equal(old, text) {
		return nil
	}
	if err := s.write(s.floorFile(), text); err != nil {
		return s.failed(err)
	}
	return nil
}

// write replaces a file so that after a crash it is the old or the new one.
func (s *state) write(name string, content []byte) error {
	// The temporary file goes into the same folder: no other is surely writable.
	if err := renameio.WriteFile(name, content, 0o600, renameio.WithTempDir(filepath.Dir(name))); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// cached returns the names of the cached bundles of this channel.
func (s *state) cached() ([]string, error) {
	names, err := jsonFiles(s.bundles(), s.channel+"-")
	if err != nil {
		return nil, s.failed(err)
	}
	return names, nil
}

// readFile reads a regular file of at most limit bytes.
func readFile(name string, limit int64) ([]byte, error) {
	info, err := os.Stat(name) // before Open, which would wait for the writer of a FIFO
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return content, nil
}
