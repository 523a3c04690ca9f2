package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of a file: its limit can be set higher than the default.
const maxFile = 256 << 20

// BrokenError says where the record is not what the agent has written.
type BrokenError struct {
	File   string
	Line   int // from 1; 0 if it is the whole file
	Reason string
}

func (e *BrokenError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Reason)
	}
	return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Reason)
}

// Chain is a record whose lines follow one another.
type Chain struct {
	Entries []Entry // the oldest first
	// Torn is how many bytes of a line that broke off stand at the end. They are no line
	// yet; the agent removes them when it starts.
	Torn   int
	hashes []string
}

// Head returns the sequence number and hash of the last line: 0 and zeros if there is
// none.
func (c *Chain) Head() (seq uint64, hash string) {
	if len(c.Entries) == 0 {
		return 0, first
	}
	return c.Entries[len(c.Entries)-1].Seq, c.hashes[len(c.hashes)-1]
}

// Between reports whether the chain is what an agent writes whose head was before, with
// this hash, when the files were not yet read, and after when they were: it goes through
// the one and not beyond the other. The error is a [*BrokenError].
func (c *Chain) Between(before uint64, hash string, after uint64) error {
	last, end := c.Head()
	if last > after {
		return &BrokenError{File: fileCurrent, Reason: fmt.Sprintf("the agent's last line is %d, and the record goes on to line %d: somebody else has written", after, last)}
	}
	if len(c.Entries) > 0 && before >= c.Entries[0].Seq && before <= last {
		end, last = c.hashes[before-c.Entries[0].Seq], before
	}
	if last == before && end == hash {
		return nil
	}
	return &BrokenError{File: fileCurrent, Reason: fmt.Sprintf("the agent says that line %d has the hash %s; the record has %s as line %d: it was replaced or cut", before, clip(hash), end, last)}
}

// Holds reports whether some line of the chain has this hash: whether an older head is
// in it. The error is a [*BrokenError].
func (c *Chain) Holds(hash string) error {
	if slices.Contains(c.hashes, hash) {
		return nil
	}
	return &BrokenError{File: fileCurrent, Reason: fmt.Sprintf("no line has the hash %s: it was replaced or cut, or that line is older than the record", clip(hash))}
}

// Verify reads the record in dir and checks its chain. The agent may be writing it, and
// change files: then it is read again. A *BrokenError comes with the lines before the
// first that is wrong.
func Verify(dir string) (*Chain, error) {
	current, older := filepath.Join(dir, fileCurrent), filepath.Join(dir, fileOlder)
	for range 100 {
		f, err := openFile(current)
		if err == nil {
			c, isStill, err := verify(dir, f)
			if isStill {
				return c, err
			}
		} else if _, olderErr := os.Stat(older); !errors.Is(err, fs.ErrNotExist) || olderErr != nil {
			return nil, err
		}
		time.Sleep(10 * time.Millisecond) // until there is a new file; nothing tells
	}
	return nil, &BrokenError{File: current, Reason: fmt.Sprintf("is missing beside %s, or never stays the same", fileOlder)}
}

// verify reads both files, and says whether current, which it closes, is the current one
// still. It stays open till then: the number of a file that is gone is given to the next.
func verify(dir string, current *os.File) (c *Chain, isStill bool, err error) {
	defer current.Close()
	c, err = readChain(dir, current)
	mine, statErr := current.Stat()
	if statErr != nil {
		return c, false, statErr
	}
	now, statErr := os.Stat(current.Name())
	return c, statErr == nil && os.SameFile(mine, now), err
}

func readChain(dir string, current *os.File) (*Chain, error) {
	c := &Chain{}
	older := filepath.Join(dir, fileOlder)
	f, err := openFile(older)
	absent := errors.Is(err, fs.ErrNotExist)
	if err == nil {
		err = c.read(f, false)
		f.Close()
	}
	if err != nil && !absent {
		return c, err
	}
	if err := c.read(current, true); err != nil {
		return c, err
	}
	if absent && len(c.Entries) > 0 && c.Entries[0].Seq != 1 {
		return c, &BrokenError{File: older, Reason: fmt.Sprintf("is missing, and %s begins at line %d of the chain", fileCurrent, c.Entries[0].Seq)}
	}
	return c, nil
}

// openFile does not wait where a file is a pipe: [Chain.read] refuses it.
func openFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
}

// read adds the lines of a file. Only the last one of the current file may have broken
// off.
func (c *Chain) read(f *os.File, current bool) error {
	path := f.Name()
	if st, err := f.Stat(); err != nil {
		return err
	} else if !st.Mode().IsRegular() || st.Size() > maxFile {
		return &BrokenError{File: path, Reason: fmt.Sprintf("want a regular file of at most %d bytes", maxFile)}
	}
	r := bufio.NewReaderSize(f, maxLine)
	for n := 1; ; n++ {
		line, err := r.ReadSlice('\n')
		switch {
		case err == nil:
			if err := c.add(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
				return &BrokenError{File: path, Line: n, Reason: err.Error()}
			}
		case errors.Is(err, bufio.ErrBufferFull):
			return &BrokenError{File: path, Line: n, Reason: fmt.Sprintf("has more than %d bytes", maxLine)}
		case err != io.EOF:
			return err
		case len(line) > 0 && !current:
			return &BrokenError{File: path, Line: n, Reason: "breaks off"}
		default:
			c.Torn = len(line)
			return nil
		}
	}
}

// add checks that a line follows the last one. The first that there is may follow lines
// that were dropped.
func (c *Chain) add(line []byte) error {
	e, err := parse(line)
	if err != nil {
		return err
	}
	seq, prev := c.Head()
	switch {
	case len(c.Entries) == 0 && e.Seq > 1:
	case e.Seq != seq+1:
		return fmt.Errorf("is line %d of the chain, and the line before is %d", e.Seq, seq)
	case e.Prev != prev:
		return fmt.Errorf("says that the line before has the hash %s, and it has %s", clip(e.Prev), prev)
	}
	c.Entries = append(c.Entries, e)
	c.hashes = append(c.hashes, lineHash(line))
	return nil
}
