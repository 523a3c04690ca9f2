package tdxsim

import (
	"encoding/binary"
	"errors"
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
	// outblob is the cached quote, made from inblob at generation made; cached says
	// that there is one, since a quote of no bytes is cached too.
	outblob []byte
	made    uint64
	cached  bool
}

// An entry's file: generation and made (8 bytes each, little-endian), cached and the
// length of inblob (a byte each), inblob, outblob.
const entryHeader = 18

func (e *entry) encode() []byte {
	b := make([]byte, 0, entryHeader+len(e.inblob)+len(e.outblob))
	b = binary.LittleEndian.AppendUint64(b, e.generation)
	b = binary.LittleEndian.AppendUint64(b, e.made)
	cached := byte(0)
	if e.cached {
		cached = 1
	}
	b = append(b, cached, byte(len(e.inblob)))
	b = append(b, e.inblob...)
	return append(b, e.outblob...)
}

func decodeEntry(b []byte) (*entry, error) {
	if len(b) < entryHeader || b[17] > byte(inblobMax) || len(b) < entryHeader+int(b[17]) || len(b) > entryHeader+inblobMax+quoteMax {
		return nil, errors.New("damaged entry")
	}
	end := entryHeader + int(b[17])
	return &entry{
		generation: binary.LittleEndian.Uint64(b),
		made:       binary.LittleEndian.Uint64(b[8:]),
		cached:     b[16] == 1,
		inblob:     b[entryHeader:end],
		outblob:    b[end:],
	}, nil
}

// loadEntry returns ENOENT if there is no such entry. The caller holds the configfs
// lock, here and below.
func (td *TD) loadEntry(name string) (*entry, error) {
	dir, err := td.entryDir()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoFile
	}
	if err != nil {
		return nil, err
	}
	return decodeEntry(b)
}

func (td *TD) storeEntry(name string, e *entry) error {
	dir, err := td.entryDir()
	if err != nil {
		return err
	}
	return replaceFile(td.dir, filepath.Join(dir, name), e.encode())
}

// createEntry is mkdir.
func (td *TD) createEntry(name string) error {
	dir, err := td.entryDir()
	if err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
		return syscall.EEXIST
	}
	if td.behaviour().NoProvider {
		return syscall.ENXIO
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return td.storeEntry(name, &entry{})
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
	e, err := td.loadEntry(name)
	if err != nil {
		return err
	}
	var refused error
	switch {
	case len(b) == 0:
		refused = syscall.EFAULT
	case len(b) > inblobMax:
		b, refused = nil, syscall.EFBIG
	}
	e.inblob = b
	e.generation++
	if err := td.storeEntry(name, e); err != nil {
		return err
	}
	return refused
}

// outblob reads the quote of an entry: the cached one, or a new one.
func (td *TD) outblob(name string, e *entry) ([]byte, error) {
	if len(e.inblob) == 0 {
		return nil, syscall.EINVAL
	}
	if e.cached && e.made == e.generation {
		return e.outblob, nil
	}
	quote, err := td.hostQuote(e.inblob)
	if err != nil {
		return nil, err
	}
	e.outblob, e.made, e.cached = quote, e.generation, true
	return quote, td.storeEntry(name, e)
}
