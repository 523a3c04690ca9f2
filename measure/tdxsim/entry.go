package tdxsim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"tdx-agent/measure"
)

const inblobMax = len(measure.ReportData{})

// entry is the kernel's state of one configfs-tsm report.
type entry struct {
	generation uint64 // of inblob
	inblob     []byte // empty: none
	// The cached quote was made from inblob at generation made; cached says that
	// there is one, since a quote of no bytes is cached too.
	made   uint64
	cached bool
	size   uint32 // of the cached quote
}

// An entry's file: a header, then the cached quote. The header is the fields of
// entry in order, integers little-endian, inblob as a length byte and 64 bytes. It
// is written by one pwrite inside one page, and only after the quote that it
// speaks of, so that a process killed in between has done nothing.
const (
	headerSize  = 86
	quoteOffset = 128
)

func (e *entry) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = binary.LittleEndian.AppendUint64(b, e.generation)
	b = append(b, byte(len(e.inblob)))
	b = append(b, e.inblob...)
	b = append(b, make([]byte, inblobMax-len(e.inblob))...)
	b = binary.LittleEndian.AppendUint64(b, e.made)
	cached := byte(0)
	if e.cached {
		cached = 1
	}
	b = append(b, cached)
	return binary.LittleEndian.AppendUint32(b, e.size)
}

func decodeEntry(b []byte) (*entry, error) {
	if len(b) != headerSize || int(b[8]) > inblobMax {
		return nil, fmt.Errorf("%w: damaged entry", syscall.EIO)
	}
	e := &entry{
		generation: binary.LittleEndian.Uint64(b),
		inblob:     b[9 : 9+b[8]],
		made:       binary.LittleEndian.Uint64(b[73:]),
		cached:     b[81] == 1,
		size:       binary.LittleEndian.Uint32(b[82:]),
	}
	if e.size > quoteMax {
		return nil, fmt.Errorf("%w: damaged entry", syscall.EIO)
	}
	return e, nil
}

// openEntry returns ENOENT if there is no such entry. The caller holds the configfs
// lock, here and below.
func (td *TD) openEntry(name string) (*os.File, *entry, error) {
	dir, err := td.entryDir()
	if err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, errNoFile
	}
	if err != nil {
		return nil, nil, err
	}
	var b [headerSize]byte
	n, err := f.ReadAt(b[:], 0)
	if err == nil || errors.Is(err, io.EOF) {
		var e *entry
		if e, err = decodeEntry(b[:n]); err == nil {
			return f, e, nil
		}
	}
	f.Close()
	return nil, nil, err
}

// findEntry returns ENOENT if there is no such entry.
func (td *TD) findEntry(name string) error {
	dir, err := td.entryDir()
	if err != nil {
		return err
	}
	if _, err = os.Lstat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
		return errNoFile
	}
	return err
}

// createEntry is mkdir.
func (td *TD) createEntry(name string) error {
	dir, err := td.entryDir()
	if err != nil {
		return err
	}
	if td.findEntry(name) == nil {
		return syscall.EEXIST
	}
	if td.behaviour().NoProvider {
		return syscall.ENXIO
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return replaceFile(td.dir, filepath.Join(dir, name), new(entry).encode())
}

// deleteEntry is rmdir.
func (td *TD) deleteEntry(name string) error {
	dir, err := td.entryDir()
	if err != nil {
		return err
	}
	err = os.Remove(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return errNoFile
	}
	return err
}

// commit is what one open, one write of b and a close do to inblob. The kernel
// reports what it thinks of the write, and commits what it took, be it nothing.
func (td *TD) commit(name string, b []byte) error {
	f, e, err := td.openEntry(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var refused error
	switch {
	case len(b) == 0:
		refused = syscall.EFAULT
	case len(b) > inblobMax:
		b, refused = nil, syscall.EFBIG
	}
	e.inblob = b
	e.generation++
	if _, err := f.WriteAt(e.encode(), 0); err != nil {
		return err
	}
	return refused
}

// outblob reads the quote of an entry: the cached one, or a new one.
func (td *TD) outblob(f *os.File, e *entry) ([]byte, error) {
	if len(e.inblob) == 0 {
		return nil, syscall.EINVAL
	}
	if e.cached && e.made == e.generation {
		quote := make([]byte, e.size)
		if _, err := f.ReadAt(quote, quoteOffset); err != nil {
			return nil, err // the file was cut
		}
		return quote, nil
	}
	quote, err := td.hostQuote(e.inblob)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(quote, quoteOffset); err != nil {
		return nil, err
	}
	e.made, e.cached, e.size = e.generation, true, uint32(len(quote))
	if _, err := f.WriteAt(e.encode(), 0); err != nil {
		return nil, err
	}
	return quote, nil
}
