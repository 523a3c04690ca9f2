package audit

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultMaxBytes is the limit of one file; there are two.
const DefaultMaxBytes = 4 << 20

// The names of the files.
const (
	fileCurrent = "audit.jsonl"
	fileOlder   = "audit.1.jsonl"
	fileKey     = "audit.key"
)

// Options are how a Log is kept.
type Options struct {
	Version   string           // of the agent, for the first line
	Simulated bool             // whether its TD is
	MaxBytes  int64            // of one file; 0 means DefaultMaxBytes
	Now       func() time.Time // nil means time.Now
}

// Head is the end of the chain.
type Head struct {
	Seq  uint64 // of the last line
	Hash string // of the last line
	// Problem is why the last line could not be written, "" if it could.
	Problem string
	Lost    uint64 // lines that could not be written since the last that could
	// Damage is what somebody else has done to the file since it was opened, as far as
	// its name, number and size show; "" is nothing. It stays until the next start.
	Damage string
}

// Log appends to the record. Its methods may be called concurrently.
type Log struct {
	dir string
	o   Options

	mu       sync.Mutex // guards what follows
	mac      hash.Hash  // of requests, with the record's key
	file     *os.File
	dev, ino uint64 // of file
	size     int64  // of what is whole in file
	torn     bool   // something not whole follows
	head     Head
}

// Open continues the record in dir, which no other process may be writing, or begins
// one. A last line that broke off is removed; what comes before is not judged, see
// [Verify]. That the first line cannot be written is no error, but a problem in [Head].
func Open(dir string, o Options) (*Log, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	l := &Log{dir: dir, o: o, head: Head{Hash: first}}
	key, err := loadKey(filepath.Join(dir, fileKey))
	if err != nil {
		return nil, err
	}
	l.mac = hmac.New(sha256.New, key)
	if err := l.open(0); err != nil {
		return nil, err
	}
	torn, err := l.resume()
	if err != nil {
		l.file.Close()
		return nil, err
	}
	l.append(Entry{Kind: KindStart, Version: o.Version, Torn: torn}) // a failure is in Head
	return l, nil
}

// open opens the current file, with these flags on top, in the place of the one that is.
func (l *Log) open(flags int) error {
	f, err := os.OpenFile(l.path(fileCurrent), os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|flags, 0o600)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.dev, l.ino, l.size, l.torn = f, st.Dev, st.Ino, 0, false
	return nil
}

func (l *Log) path(name string) string { return filepath.Join(l.dir, name) }

// loadKey loads the key of the requests' HMAC, or makes it.
func loadKey(path string) ([]byte, error) {
	key, err := os.ReadFile(path)
	if err == nil && len(key) == sha256.Size {
		return key, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key = make([]byte, sha256.Size)
	rand.Read(key) // never fails
	return key, os.WriteFile(path, key, 0o600)
}

// resume finds the end of the chain, and returns how many bytes after it were removed.
func (l *Log) resume() (torn int, err error) {
	tail, size, err := readTail(l.file)
	if err != nil {
		return 0, err
	}
	whole := bytes.LastIndexByte(tail, '\n') + 1
	torn = len(tail) - whole
	l.size = size - int64(torn)
	if torn > 0 {
		if err := l.file.Truncate(l.size); err != nil {
			return 0, fmt.Errorf("remove a line that broke off: %w", err)
		}
	}
	if l.size == 0 { // the agent may have ended between renaming a file and writing the next
		older, err := os.Open(l.path(fileOlder))
		if errors.Is(err, fs.ErrNotExist) {
			return torn, nil
		}
		if err != nil {
			return torn, err
		}
		defer older.Close()
		if tail, _, err = readTail(older); err != nil {
			return torn, err
		}
		whole = bytes.LastIndexByte(tail, '\n') + 1
	}
	l.resumeAt(tail[:whole])
	return torn, nil
}

// resumeAt takes the last of whole lines as the head. One that makes no sense breaks the
// chain there, for [Verify] to find.
func (l *Log) resumeAt(lines []byte) {
	if len(lines) == 0 {
		return
	}
	lines = lines[:len(lines)-1]
	last := lines[bytes.LastIndexByte(lines, '\n')+1:]
	l.head.Hash = lineHash(last)
	if e, err := parse(last); err == nil {
		l.head.Seq = e.Seq
	}
}

// readTail reads the end of a file, which holds at least one whole line if there is any,
// and returns the file's size.
func readTail(f *os.File) ([]byte, int64, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !st.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is not a regular file", f.Name())
	}
	tail := make([]byte, min(st.Size(), 4*maxLine))
	_, err = f.ReadAt(tail, st.Size()-int64(len(tail)))
	if err != nil && err != io.EOF {
		return nil, 0, err
	}
	return tail, st.Size(), nil
}

// Call records a call. The arguments, as they were received, are not kept. Seq, Time,
// Kind, Request, Lost, Simulated and Prev of e are set here. When the error is not nil the call is
// not in the record, and the next line will say that one is missing.
func (l *Log) Call(e Entry, arguments []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Kind = KindCall
	if arguments != nil {
		e.Request = l.digest(e.Method, arguments)
	}
	for _, text := range []*string{&e.Socket, &e.Method, &e.Name} {
		*text = clip(*text)
	}
	if e.Caller != nil {
		e.Caller.Cgroup, e.Caller.Container = clip(e.Caller.Cgroup), clip(e.Caller.Container)
	}
	return l.append(e)
}

func (l *Log) digest(method string, arguments []byte) string {
	l.mac.Reset()
	l.mac.Write([]byte(method))
	l.mac.Write([]byte{0})
	l.mac.Write(arguments)
	return hex.EncodeToString(l.mac.Sum(nil))
}

// append writes a line, in one write: a crash leaves a whole line or one that broke off.
func (l *Log) append(e Entry) error {
	e.Seq, e.Time, e.Prev, e.Lost, e.Simulated = l.head.Seq+1, l.o.Now().UTC(), l.head.Hash, l.head.Lost, l.o.Simulated
	line, err := json.Marshal(e)
	if err == nil {
		err = l.write(append(line, '\n'))
	}
	if err != nil {
		l.head.Lost++
		l.head.Problem = err.Error()
		return err
	}
	l.head = Head{Seq: e.Seq, Hash: lineHash(line), Damage: l.head.Damage}
	return nil
}

func (l *Log) write(line []byte) error {
	if l.file == nil {
		return errors.New("the record is closed")
	}
	if err := l.prepare(); err != nil {
		return err
	}
	if l.size > 0 && l.size+int64(len(line)) > l.o.MaxBytes {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	if _, err := l.file.Write(line); err != nil {
		l.torn = l.file.Truncate(l.size) != nil
		return err
	}
	l.size += int64(len(line))
	return nil
}

// rotate makes the file the older one, in the place of the one that is, and begins a new.
func (l *Log) rotate() error {
	if err := os.Rename(l.path(fileCurrent), l.path(fileOlder)); err != nil {
		return err
	}
	if err := l.open(os.O_EXCL); err != nil {
		// What is written until that works follows the older lines.
		return errors.Join(err, os.Rename(l.path(fileOlder), l.path(fileCurrent)))
	}
	return nil
}

// look finds the file under its name, and what somebody else has done to it: without
// that, lines would go on into a file that nobody can read any more.
func (l *Log) look() (found unix.Stat_t, damage string, err error) {
	path := l.path(fileCurrent)
	err = unix.Lstat(path, &found)
	switch {
	case err == unix.ENOENT:
		return found, fmt.Sprintf("%s was removed at line %d", fileCurrent, l.head.Seq), nil
	case err != nil:
		return found, "", &os.PathError{Op: "stat", Path: path, Err: err}
	case found.Dev != l.dev || found.Ino != l.ino:
		return found, fmt.Sprintf("another file took the place of %s at line %d", fileCurrent, l.head.Seq), nil
	case found.Size != l.size && !(l.torn && found.Size > l.size):
		return found, fmt.Sprintf("%s has %d bytes at line %d, and the agent has written %d", fileCurrent, found.Size, l.head.Seq, l.size), nil
	}
	return found, "", nil
}

// prepare makes the file ready for the next line. The chain goes on wherever it was cut,
// so that [Verify] finds it. A file that is not ours is left alone.
func (l *Log) prepare() error {
	found, damage, err := l.look()
	if err != nil {
		return err
	}
	if l.head.Damage == "" {
		l.head.Damage = damage
	}
	switch {
	case found.Ino == 0:
		return l.open(os.O_EXCL)
	case found.Dev != l.dev || found.Ino != l.ino:
		return fmt.Errorf("%s is not the file that the agent writes: move it away, and the record goes on in a new one", l.path(fileCurrent))
	case damage != "":
		l.size, l.torn = found.Size, false
	case l.torn:
		if err := l.file.Truncate(l.size); err != nil {
			return fmt.Errorf("remove a line that broke off: %w", err)
		}
		l.torn = false
	}
	return nil
}

// Head returns the end of the chain, after a look at the file.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, damage, _ := l.look(); l.head.Damage == "" && l.file != nil { // if it cannot be seen, writing tells
		l.head.Damage = damage
	}
	return l.head
}

// Close ends the record. Later calls fail.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return f.Close()
}
