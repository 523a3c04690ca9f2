package tdxsim

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// fileLock excludes other processes, by flock, and other goroutines. Goroutines
// wait on a channel and not on a mutex, so that a testing/synctest bubble in which
// one sleeps with the lock can still advance its clock.
type fileLock struct {
	turn chan struct{}
	file *os.File
}

func openLock(name string) (*fileLock, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("tdxsim: %w", err)
	}
	return &fileLock{turn: make(chan struct{}, 1), file: f}, nil
}

// acquire waits for the lock; the holder calls release once.
func (l *fileLock) acquire() (release func(), err error) {
	l.turn <- struct{}{}
	if err := flock(l.file, unix.LOCK_EX); err != nil {
		<-l.turn
		return nil, err
	}
	return func() {
		// Unlocking a descriptor that was closed meanwhile fails; the lock is gone then.
		_ = flock(l.file, unix.LOCK_UN)
		<-l.turn
	}, nil
}

// flock goes through the descriptor's own guard, since Close may run meanwhile.
func flock(f *os.File, how int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Control(func(fd uintptr) {
		for {
			if result = unix.Flock(int(fd), how); result != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return &fs.PathError{Op: "flock", Path: f.Name(), Err: fs.ErrClosed}
	}
	if result != nil {
		return &fs.PathError{Op: "flock", Path: f.Name(), Err: result}
	}
	return nil
}

// The state file is the boot id (16 bytes), then the eight registers (48 bytes
// each) in TDINFO's order. It is changed in place, by one pwrite inside one page
// at a time: a process is killed before it or after it.
const (
	bootIDSize   = 16
	registerSize = len(measure.Digest{})
	stateSize    = bootIDSize + 8*registerSize
	firstRTMR    = 4 // the index of RTMR0 among the registers
)

// freshState is the state after a boot.
func (td *TD) freshState() []byte {
	c := &td.platform.cfg
	regs := measure.Registers{
		MRTD: c.MRTD, MRConfigID: c.MRConfigID, MROwner: c.MROwner, MROwnerConfig: c.MROwnerConfig,
		RTMR: afterBoot(td.boot),
	}
	b := make([]byte, bootIDSize, stateSize)
	// crypto/rand does not fail.
	_, _ = rand.Read(b)
	b[6] = b[6]&0x0f | 0x40 // a version 4 UUID (RFC 9562, 5.4)
	b[8] = b[8]&0x3f | 0x80
	for _, d := range registerList(&regs) {
		b = append(b, d[:]...)
	}
	return b
}

func (td *TD) writeState(b []byte) error {
	release, err := td.registers.acquire()
	if err != nil {
		return err
	}
	defer release()
	_, err = td.registers.file.WriteAt(b, 0)
	return err
}

// readState returns the boot id and the registers.
func (td *TD) readState() (bootID string, regs measure.Registers, err error) {
	release, err := td.registers.acquire()
	if err != nil {
		return "", regs, err
	}
	defer release()
	var b [stateSize]byte
	if _, err := td.registers.file.ReadAt(b[:], 0); err != nil {
		return "", regs, fmt.Errorf("tdxsim: %s: want %d bytes: %w", td.registers.file.Name(), stateSize, err)
	}
	for i, d := range registerList(&regs) {
		copy(d[:], b[bootIDSize+i*registerSize:])
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16]), regs, nil
}

// extendState is the atomic step behind Extend.
func (td *TD) extendState(index int, d measure.Digest) error {
	release, err := td.registers.acquire()
	if err != nil {
		return err
	}
	defer release()
	offset := int64(bootIDSize + (firstRTMR+index)*registerSize)
	var r measure.Digest
	if _, err := td.registers.file.ReadAt(r[:], offset); err != nil {
		return err
	}
	r = r.Extend(d)
	_, err = td.registers.file.WriteAt(r[:], offset)
	return err
}

// replaceFile writes a file of this folder so that it is never seen half written.
// The caller holds the configfs lock, so one temporary name will do. Nothing is
// synced: what a power failure loses, a real TD has lost too.
func replaceFile(dir, name string, b []byte) error {
	temporary := filepath.Join(dir, "new")
	if err := os.WriteFile(temporary, b, 0o600); err != nil {
		return fmt.Errorf("tdxsim: %w", err)
	}
	if err := os.Rename(temporary, name); err != nil {
		return fmt.Errorf("tdxsim: %w", err)
	}
	return nil
}

// entryDir is where the configfs entries of this boot are. A new boot has a new
// folder, so that changing the boot id removes all entries at once.
func (td *TD) entryDir() (string, error) {
	id, _, err := td.readState()
	return filepath.Join(td.dir, entryPrefix+id), err
}

const entryPrefix = "report-"

// dropOldEntries clears up after earlier boots.
func (td *TD) dropOldEntries() error {
	current, err := td.entryDir()
	if err != nil {
		return err
	}
	files, err := os.ReadDir(td.dir)
	if err != nil {
		return fmt.Errorf("tdxsim: %w", err)
	}
	for _, f := range files {
		if strings.HasPrefix(f.Name(), entryPrefix) && f.Name() != filepath.Base(current) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(td.dir, f.Name())))
		}
	}
	return err
}
