package tsm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Owner is who the agent runs as.
type Owner struct{ UID, GID int }

// Setup is run by root before the agent starts. It makes the report entry, or keeps
// the one that is there, and gives the entry's inblob and outblob and the file of
// RTMR3 to the owner, so that the agent itself needs no privileges. Where there is no
// register folder it gives away the device, without which the agent could not even
// read RTMR3. What this machine does not have is skipped; the notes say what was done
// and what was not. The overrides in the environment have no effect here.
func Setup(p Paths, o Owner) (notes []string, err error) {
	p = p.orDefaults()
	s := setup{owner: o}
	s.reports(p)
	if isDir(p.Measurements) {
		s.give(filepath.Join(p.Measurements, rtmrName(3)))
	} else {
		s.note("no %s (Linux before 6.16)", p.Measurements)
		s.give(p.Device)
	}
	return s.notes, errors.Join(s.errs...)
}

type setup struct {
	owner Owner
	notes []string
	errs  []error
}

func (s *setup) note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

func (s *setup) reports(p Paths) {
	if !isDir(p.Reports) {
		s.note("no %s (Linux before 6.7, or not a TDX guest)", p.Reports)
		return
	}
	c := &dirClient{reports: p.Reports}
	err := c.Mkdir(filepath.Join(reportPath, p.Entry))
	switch {
	case errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENOSYS):
		s.note("no report entry: %v", err)
		return
	case err != nil && !errors.Is(err, fs.ErrExist):
		s.errs = append(s.errs, fmt.Errorf("report entry: %w", err))
		return
	}
	for _, file := range []string{"inblob", "outblob"} {
		s.give(filepath.Join(p.Reports, p.Entry, file))
	}
}

func (s *setup) give(path string) {
	err := os.Lchown(path, s.owner.UID, s.owner.GID)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.note("no %s", path)
	case err != nil:
		s.errs = append(s.errs, err)
	default:
		s.note("%s belongs to %d:%d", path, s.owner.UID, s.owner.GID)
	}
}
