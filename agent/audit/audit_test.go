package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start opens the record in dir for the length of the test.
func start(t testing.TB, dir string, o Options) *Log {
	t.Helper()
	o.Version = "test"
	l, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func call(t testing.TB, l *Log, name string) {
	t.Helper()
	err := l.Call(Entry{Socket: "s", Method: "GetKey", Class: "key", Name: name, Result: OK, Caller: &Caller{UID: 1, PID: 2}}, []byte(name))
	if err != nil {
		t.Fatal(err)
	}
}

func verified(t testing.TB, dir string) *Chain {
	t.Helper()
	c, err := Verify(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wantBroken checks that the record is found to be broken, for this reason.
func wantBroken(t testing.TB, dir, reason string) *Chain {
	t.Helper()
	c, err := Verify(dir)
	var broken *BrokenError
	if !errors.As(err, &broken) || !strings.Contains(err.Error(), reason) {
		t.Fatalf("got %v, want a BrokenError that says %q", err, reason)
	}
	return c
}

func read(t testing.TB, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, dir, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestChain(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	l := start(t, dir, Options{Now: func() time.Time { return at }})
	call(t, l, "web/a")
	call(t, l, "web/a")
	call(t, l, "web/b")
	c := verified(t, dir)
	if len(c.Entries) != 4 || c.Entries[0].Kind != KindStart || c.Entries[0].Version != "test" || c.Entries[0].Prev != first {
		t.Fatalf("lines are %+v", c.Entries)
	}
	a, same, b := c.Entries[1], c.Entries[2], c.Entries[3]
	if a.Seq != 2 || !a.Time.Equal(at) || a.Caller.UID != 1 || a.Name != "web/a" || a.Result != OK {
		t.Errorf("line 2 is %+v", a)
	}
	if a.Request != same.Request || a.Request == b.Request || len(a.Request) != 64 {
		t.Errorf("requests are %s, %s, %s: want the first two alike", a.Request, same.Request, b.Request)
	}
	h := l.Head()
	if err := c.Between(h.Seq, h.Hash, l.Head().Seq); err != nil || h.Seq != 4 {
		t.Errorf("head %+v: %v", h, err)
	}
	for name, mode := range map[string]os.FileMode{fileCurrent: 0o600, fileKey: 0o600} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
}

// TestEveryChangeBreaksTheChain changes every byte of a record, and takes out, doubles
// and swaps every line.
func TestEveryChangeBreaksTheChain(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{})
	call(t, l, "web/a")
	call(t, l, "web/b")
	h, whole := l.Head(), read(t, dir, fileCurrent)
	unchanged := func(what string) {
		t.Helper()
		c, err := Verify(dir)
		if err == nil {
			err = c.Between(h.Seq, h.Hash, l.Head().Seq)
		}
		var broken *BrokenError
		if !errors.As(err, &broken) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range whole {
		changed := bytes.Clone(whole)
		changed[i] ^= 1
		write(t, dir, fileCurrent, changed)
		unchanged(fmt.Sprintf("byte %d changed", i))
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(whole, []byte("\n")), []byte("\n"))
	lines[2] = append(lines[2], '\n')
	for i := range lines {
		for what, with := range map[string][][]byte{"taken out": {}, "doubled": {lines[i], lines[i]}, "swapped": {lines[(i+1)%3], lines[i]}} {
			end := min(i+1, 3)
			if what == "swapped" {
				end = min(i+2, 3)
			}
			var changed []byte
			for _, part := range [][][]byte{lines[:i], with, lines[end:]} {
				changed = append(changed, bytes.Join(part, nil)...)
			}
			write(t, dir, fileCurrent, changed)
			unchanged(fmt.Sprintf("line %d %s", i+1, what))
		}
	}
	for n := range len(whole) {
		write(t, dir, fileCurrent, whole[:n])
		unchanged(fmt.Sprintf("cut after %d bytes", n))
	}
	write(t, dir, fileCurrent, whole)
	if err := verified(t, dir).Between(h.Seq, h.Hash, h.Seq); err != nil {
		t.Error(err)
	}
}

// TestRewrittenChain: whoever can write the file can write another whole chain; only the
// head shows it.
func TestRewrittenChain(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	l, forged := start(t, dir, Options{}), start(t, other, Options{})
	call(t, l, "web/a")
	call(t, forged, "web/b")
	write(t, dir, fileCurrent, read(t, other, fileCurrent))
	c := verified(t, dir)
	h := l.Head()
	if err := c.Between(h.Seq, h.Hash, l.Head().Seq); err == nil || !strings.Contains(err.Error(), "replaced or cut") {
		t.Errorf("another chain: %v", err)
	}
	if err := c.Between(0, first, 9); err == nil {
		t.Error("a chain reaches the head of an empty one")
	}
	older := c.hashes[0]
	if err := c.Holds(h.Hash); err == nil || !strings.Contains(err.Error(), "no line has the hash") {
		t.Errorf("another chain holds the head: %v", err)
	}
	call(t, forged, "web/c")
	if err := verified(t, other).Between(2, c.hashes[1], 2); err == nil || !strings.Contains(err.Error(), "somebody else has written") {
		t.Errorf("a line that the agent has not written: %v", err)
	}
	if err := c.Holds(older); err != nil {
		t.Error(err)
	}
}

func TestCrashes(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{})
	call(t, l, "web/a")
	l.Close()
	whole := read(t, dir, fileCurrent)
	last := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for n := last; n < len(whole); n++ { // the last line broke off after n bytes
		write(t, dir, fileCurrent, whole[:n])
		if c := verified(t, dir); c.Torn != n-last || len(c.Entries) != 1 {
			t.Fatalf("%d bytes: %d torn after %d lines", n, c.Torn, len(c.Entries))
		}
		l := start(t, dir, Options{})
		call(t, l, "web/b")
		c := verified(t, dir)
		if len(c.Entries) != 3 || c.Entries[1].Torn != n-last || c.Entries[1].Kind != KindStart {
			t.Fatalf("%d bytes: lines are %+v", n, c.Entries)
		}
		l.Close()
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{MaxBytes: 2000})
	for i := range 50 {
		call(t, l, fmt.Sprint("web/", i))
		c := verified(t, dir)
		if h := l.Head(); c.Between(h.Seq, h.Hash, l.Head().Seq) != nil || h.Seq != uint64(i+2) {
			t.Fatalf("call %d: head %+v", i, h)
		}
		for _, name := range []string{fileCurrent, fileOlder} {
			if st, err := os.Stat(filepath.Join(dir, name)); err == nil && st.Size() > 2000 {
				t.Fatalf("%s has %d bytes", name, st.Size())
			}
		}
	}
	if c := verified(t, dir); c.Entries[0].Seq == 1 || len(c.Entries) < 6 {
		t.Errorf("%d lines from line %d", len(c.Entries), c.Entries[0].Seq)
	}

	// The agent ends between renaming a file and writing the next.
	l.Close()
	older, current := read(t, dir, fileOlder), read(t, dir, fileCurrent)
	write(t, dir, fileOlder, current)
	write(t, dir, fileCurrent, nil)
	l = start(t, dir, Options{})
	call(t, l, "web/x")
	if h := l.Head(); h.Seq != 53 || verified(t, dir).Between(53, h.Hash, 53) != nil {
		t.Errorf("head is %+v, want line 53", h)
	}
	l.Close()

	// The older file is the first to be tampered with: nobody looks there.
	write(t, dir, fileCurrent, current)
	write(t, dir, fileOlder, older[:len(older)-1])
	wantBroken(t, dir, "breaks off")
	write(t, dir, fileOlder, older[bytes.IndexByte(older, '\n')+1:])
	verified(t, dir) // older lines are dropped anyway
	write(t, dir, fileOlder, older[:bytes.LastIndexByte(older[:len(older)-1], '\n')+1])
	wantBroken(t, dir, "of the chain, and the line before is")
	if err := os.Remove(filepath.Join(dir, fileOlder)); err != nil {
		t.Fatal(err)
	}
	wantBroken(t, dir, "is missing")
	write(t, dir, fileOlder, older)
	if err := os.Remove(filepath.Join(dir, fileCurrent)); err != nil {
		t.Fatal(err)
	}
	wantBroken(t, dir, "is missing beside")
}

// TestFullDisk writes to a device that is always full.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{})
	call(t, l, "web/a")
	file := l.file
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	l.file = full
	for range 3 {
		if err := l.Call(Entry{Method: "GetKey"}, nil); err == nil {
			t.Fatal("a line went to a full disk")
		}
	}
	if h := l.Head(); h.Lost != 3 || h.Problem == "" || h.Seq != 2 {
		t.Errorf("head is %+v, want 3 lost", h)
	}
	l.file = file // there is room again, behind half a line
	if _, err := file.Write([]byte(`{"seq":3,"half`)); err != nil {
		t.Fatal(err)
	}
	call(t, l, "web/b")
	c := verified(t, dir)
	if e := c.Entries[len(c.Entries)-1]; e.Lost != 3 || e.Seq != 3 || e.Name != "web/b" {
		t.Errorf("the line after is %+v, want one that says that 3 are missing", e)
	}
	if h := l.Head(); h.Lost != 0 || h.Problem != "" {
		t.Errorf("head is %+v", h)
	}
}

// TestTouchedWhileWritten has somebody else lay hands on the file of a running agent. No
// line goes where nobody can read it, and the damage is told.
func TestTouchedWhileWritten(t *testing.T) {
	for name, test := range map[string]struct {
		touch   func(path string) error
		damage  string
		broken  string // why the record does not pass afterwards
		refused bool   // no line is written
	}{
		"removed": {touch: os.Remove, damage: "was removed at line 2", broken: "is missing, and audit.jsonl begins at line 3"},
		"moved": {touch: func(path string) error { return os.Rename(path, path+".moved") },
			damage: "was removed at line 2", broken: "is missing, and audit.jsonl begins at line 3"},
		"replaced": {touch: func(path string) error {
			return errors.Join(os.Rename(path, path+".moved"), os.WriteFile(path, nil, 0o600))
		}, damage: "took the place of audit.jsonl at line 2", refused: true},
		"link": {touch: func(path string) error {
			return errors.Join(os.Rename(path, path+".moved"), os.Symlink(path+".moved", path))
		}, damage: "took the place of audit.jsonl at line 2", refused: true},
		"cut":    {touch: func(path string) error { return os.Truncate(path, 0) }, damage: "has 0 bytes at line 2", broken: "begins at line 3"},
		"longer": {touch: func(path string) error { return os.Truncate(path, 4000) }, damage: "has 4000 bytes at line 2", broken: "audit.jsonl:3:"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := start(t, dir, Options{})
			call(t, l, "web/a")
			if h := l.Head(); h.Damage != "" {
				t.Fatalf("damage %q before anything was touched", h.Damage)
			}
			if err := test.touch(filepath.Join(dir, fileCurrent)); err != nil {
				t.Fatal(err)
			}
			if h := l.Head(); !strings.Contains(h.Damage, test.damage) || h.Seq != 2 {
				t.Errorf("head is %+v, want damage %q", h, test.damage)
			}
			err := l.Call(Entry{Method: "GetKey"}, nil)
			if (err != nil) != test.refused {
				t.Fatalf("the next line: %v", err)
			}
			if h := l.Head(); !strings.Contains(h.Damage, test.damage) || (h.Problem != "") != test.refused {
				t.Errorf("head is %+v, want damage %q", h, test.damage)
			}
			if !test.refused {
				wantBroken(t, dir, test.broken)
				return
			}
			if err := os.Remove(filepath.Join(dir, fileCurrent)); err != nil { // as the error says
				t.Fatal(err)
			}
			call(t, l, "web/b")
			wantBroken(t, dir, "begins at line 3")
		})
	}
}

// TestSimulatedIsSaidForEver reads a record whose first line, the start, is gone.
func TestSimulatedIsSaidForEver(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{MaxBytes: 1000, Simulated: true})
	for range 20 {
		call(t, l, "web/a")
	}
	if c := verified(t, dir); c.Entries[0].Kind == KindStart || !c.Entries[0].Simulated {
		t.Errorf("the record begins with %+v", c.Entries[0])
	}
}

func TestLongTextsAreCut(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{})
	long := strings.Repeat("\x01", 100<<10)
	if err := l.Call(Entry{Socket: long, Method: long, Name: long, Caller: &Caller{Cgroup: long, Container: long}}, []byte(long)); err != nil {
		t.Fatal(err)
	}
	call(t, l, "\xff\"\n\u2028")
	if c := verified(t, dir); len(c.Entries) != 3 {
		t.Errorf("%d lines, want 3", len(c.Entries))
	}
}

func TestConcurrentCalls(t *testing.T) {
	dir := t.TempDir()
	l := start(t, dir, Options{MaxBytes: 20000})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 50 {
				call(t, l, "web/a")
			}
		})
	}
	for range 20 {
		h := l.Head()
		c, err := Verify(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Between(h.Seq, h.Hash, l.Head().Seq); err != nil && h.Seq >= c.Entries[0].Seq {
			t.Error(err)
		}
	}
	group.Wait()
	if h := l.Head(); h.Seq != 401 || verified(t, dir).Between(401, h.Hash, 401) != nil {
		t.Errorf("head is %+v, want line 401", h)
	}
}

// TestPipe must not wait for somebody to write into it.
func TestPipe(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, fileCurrent), 0o600); err != nil {
		t.Fatal(err)
	}
	wantBroken(t, dir, "want a regular file")
}

func TestWhatIsNotARecord(t *testing.T) {
	for text, reason := range map[string]string{
		"\n":                               "not a line of this record",
		"{}\n":                             "not a line of this record",
		"{\"seq\":1,\"kind\":\"other\"}\n": "not a line of this record",
		"[]\n":                             "not a line of this record",
		"{\"seq\":-1,\"kind\":\"call\"}\n": "not a line of this record",
		"{\"seq\":1,\"kind\":\"call\"}\n":  "says that the line before has the hash",
		"{\"seq\":2,\"kind\":\"call\"}\n":  "is missing",
		strings.Repeat("x", 100<<10):       "has more than",
	} {
		dir := t.TempDir()
		write(t, dir, fileCurrent, []byte(text))
		wantBroken(t, dir, reason)

		// The agent goes on behind it, and the record stays broken.
		l := start(t, dir, Options{})
		call(t, l, "web/a")
		if strings.HasSuffix(text, "\n") {
			wantBroken(t, dir, reason)
		}
		l.Close()
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, fileCurrent), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); err == nil {
		t.Error("a folder was taken for a record")
	}
	if _, err := Verify(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no record: %v", err)
	}
}

// FuzzVerify: whatever stands in the files, nothing panics, and what is accepted is
// accepted again when the agent has gone on behind it.
func FuzzVerify(f *testing.F) {
	dir := f.TempDir()
	l := start(f, dir, Options{MaxBytes: 600})
	for range 5 {
		call(f, l, "web/a")
	}
	f.Add(read(f, dir, fileOlder), read(f, dir, fileCurrent))
	f.Add([]byte(nil), []byte("{\"seq\":1,\"kind\":\"start\",\"prev\":\""+first+"\"}\n"))
	f.Fuzz(func(t *testing.T, older, current []byte) {
		dir := t.TempDir()
		if len(older) > 0 {
			write(t, dir, fileOlder, older)
		}
		write(t, dir, fileCurrent, current)
		_, err := Verify(dir)
		l, openErr := Open(dir, Options{})
		if openErr != nil {
			t.Fatal(openErr)
		}
		defer l.Close()
		h := l.Head()
		c, again := Verify(dir)
		if err == nil && (again != nil || c.Between(h.Seq, h.Hash, l.Head().Seq) != nil) {
			t.Errorf("accepted before, and now %v; head %+v", again, h)
		}
	})
}

// BenchmarkCall writes a line; its floor is the write of as many bytes.
func BenchmarkCall(b *testing.B) {
	dir := b.TempDir()
	l := start(b, dir, Options{MaxBytes: 1 << 40})
	arguments := []byte(`{"path":"some/path","purpose":"signing","algorithm":"secp256k1"}`)
	b.Run("line", func(b *testing.B) {
		for b.Loop() {
			caller := Caller{UID: 1000, GID: 1000, PID: 12345, Cgroup: "/system.slice/docker-0123.scope"}
			if err := l.Call(Entry{Socket: "app-web", Method: "GetKey", Class: "key", Name: "some/path", Result: OK, Micros: 100, Caller: &caller}, arguments); err != nil {
				b.Fatal(err)
			}
		}
	})
	line := bytes.Repeat([]byte("x"), 450)
	b.Run("floor-write", func(b *testing.B) {
		f, err := os.OpenFile(filepath.Join(dir, "floor"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		for b.Loop() {
			if _, err := f.Write(line); err != nil {
				b.Fatal(err)
			}
		}
	})
}
