package tsm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tdx-agent/measure"
)

// fakeEntry is a Client with the behaviour of one report entry. The host's answers
// are scripted.
type fakeEntry struct {
	mkdir error // what Mkdir answers; nil makes the entry
	other string
	host  func(f *fakeEntry, try int) ([]byte, error) // the try-th read of outblob, from 1; nil is a good host

	mu         sync.Mutex
	name       string // "" until the entry is made
	provider   string
	generation int
	inblob     []byte
	tries      int
	removed    bool
	reads      int
}

func newFakeEntry(host func(*fakeEntry, int) ([]byte, error)) *fakeEntry {
	return &fakeEntry{host: host, provider: "tdx_guest\n"}
}

func (f *fakeEntry) Mkdir(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mkdir != nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: f.mkdir}
	}
	f.name, f.generation, f.inblob = path.Base(name), 0, nil
	return nil
}

func (f *fakeEntry) ReadDir(name string) ([]os.DirEntry, error) {
	if path.Base(name) != f.other {
		return nil, fs.ErrNotExist
	}
	f.name = f.other
	return nil, nil
}

func (f *fakeEntry) ReadFile(name string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	if path.Base(path.Dir(name)) != f.name {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	}
	switch path.Base(name) {
	case "generation":
		return fmt.Appendf(nil, "%d\n", f.generation), nil
	case "provider":
		return []byte(f.provider), nil
	case "outblob":
		f.tries++
		b, err := goodQuote(f.inblob), error(nil)
		if f.host != nil {
			b, err = f.host(f, f.tries)
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: name, Err: err}
		}
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (f *fakeEntry) WriteFile(name string, b []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.write(b)
	return nil
}

func (f *fakeEntry) write(b []byte) {
	f.inblob = append([]byte(nil), b...)
	f.generation++
}

func (f *fakeEntry) RemoveAll(string) error { f.removed = true; return nil }

func (f *fakeEntry) MkdirTemp(string, string) (string, error) { return "", fs.ErrInvalid }

// goodQuote is a version 4 quote of 5000 bytes for this report data.
func goodQuote(rd []byte) []byte {
	q := make([]byte, 5000)
	q[0], q[2], q[4] = 4, 2, 0x81
	copy(q[568:], rd)
	return q
}

func openFake(t *testing.T, f *fakeEntry) *Reports {
	t.Helper()
	r, err := OpenReports(ReportsConfig{Client: f})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

var someData = measure.ReportData{1, 2, 3, 63: 4}

// goodAfter fails n reads with err; then the host is good.
func goodAfter(n int, err error) func(*fakeEntry, int) ([]byte, error) {
	return func(f *fakeEntry, try int) ([]byte, error) {
		if try <= n {
			return nil, err
		}
		return goodQuote(f.inblob), nil
	}
}

func TestReportsRecover(t *testing.T) {
	for name, host := range map[string]func(*fakeEntry, int) ([]byte, error){
		"a good host":        nil,
		"busy for a while":   goodAfter(20, syscall.EBUSY),
		"a storm of signals": goodAfter(20, syscall.EINTR),
		"interrupted, then busy": func(f *fakeEntry, try int) ([]byte, error) {
			return goodAfter(10, []error{syscall.EINTR, syscall.EBUSY}[min(try-1, 1)])(f, try)
		},
		"foreign report data before our read": func(f *fakeEntry, try int) ([]byte, error) {
			if try <= 3 {
				f.write(make([]byte, 64))
			}
			return goodQuote(f.inblob), nil
		},
		"foreign short write": func(f *fakeEntry, try int) ([]byte, error) {
			if try == 1 {
				f.write(make([]byte, 63))
				return nil, syscall.EINVAL
			}
			return goodQuote(f.inblob), nil
		},
		"generation jumps, right data": func(f *fakeEntry, try int) ([]byte, error) {
			if try == 1 {
				f.generation += 7
			}
			return goodQuote(f.inblob), nil
		},
		"generation falls": func(f *fakeEntry, try int) ([]byte, error) {
			if try == 1 {
				f.generation = 0
			}
			return goodQuote(f.inblob), nil
		},
		"entry removed": func(f *fakeEntry, try int) ([]byte, error) {
			if try == 1 {
				f.name = ""
				return nil, syscall.ENOENT
			}
			return goodQuote(f.inblob), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeEntry(host)
				r := openFake(t, f)
				quote, err := r.Quote(t.Context(), someData)
				if err != nil {
					t.Fatal(err)
				}
				if err := checkQuote(quote, someData); err != nil {
					t.Error(err)
				}
				if f.removed {
					t.Error("the entry was removed")
				}
				isConflict := strings.HasPrefix(name, "foreign") || strings.HasPrefix(name, "generation")
				if n := r.Conflicts(); n > 0 != isConflict {
					t.Errorf("%d conflicts", n)
				}
			})
		})
	}
}

func TestReportsFail(t *testing.T) {
	blob := func(b []byte) func(*fakeEntry, int) ([]byte, error) {
		return func(*fakeEntry, int) ([]byte, error) { return b, nil }
	}
	always := func(err error) func(*fakeEntry, int) ([]byte, error) { return goodAfter(1<<30, err) }
	for _, c := range []struct {
		name   string
		host   func(*fakeEntry, int) ([]byte, error)
		errno  syscall.Errno
		reason string
	}{
		{"busy for ever", always(syscall.EBUSY), syscall.EBUSY, "in flight for too long"},
		{"signals for ever", always(syscall.EINTR), syscall.EINTR, "signals"},
		{"host error", always(syscall.EIO), syscall.EIO, "the host answered with an error"},
		{"host too late", always(syscall.ETIMEDOUT), syscall.ETIMEDOUT, "too late"},
		{"quote too long for the kernel", always(syscall.EFBIG), syscall.EFBIG, "longer than"},
		{"provider gone", always(syscall.ENXIO), syscall.ENXIO, "provider has gone"},
		{"entry not ours", always(syscall.EACCES), syscall.EACCES, "kernel-setup"},
		{"inblob never 64 bytes", always(syscall.EINVAL), syscall.EINVAL, "another program"},
		{"an errno nobody foresaw", always(syscall.ENOMEM), syscall.ENOMEM, "refused"},
		{"empty quote", blob(nil), 0, "no bytes"},
		{"short quote", blob(goodQuote(someData[:])[:1019]), 0, "1019 bytes"},
		{"foreign writer without end", func(f *fakeEntry, _ int) ([]byte, error) {
			f.write(make([]byte, 64))
			return goodQuote(f.inblob), nil
		}, 0, "another program writes"},
		{"host that quotes foreign data", blob(goodQuote([]byte{9})), 0, "other report data"},
		{"another provider", func(f *fakeEntry, _ int) ([]byte, error) {
			f.provider = "sev_guest\n"
			return goodQuote(f.inblob), nil
		}, 0, `"sev_guest", want "tdx_guest"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeEntry(c.host)
				r := openFake(t, f)
				quote, err := r.Quote(t.Context(), someData)
				var q *QuoteError
				if quote != nil || !errors.As(err, &q) || q.Errno != c.errno || !strings.Contains(q.Error(), c.reason) {
					t.Fatalf("got %d bytes and %v, want errno %d and %q", len(quote), err, c.errno, c.reason)
				}
				if c.errno != 0 && !errors.Is(err, c.errno) {
					t.Errorf("the errno is lost in %v", err)
				}
				f.mu.Lock()
				f.host, f.provider = nil, "tdx_guest\n"
				f.mu.Unlock()
				if _, err := r.Quote(t.Context(), someData); err != nil {
					t.Errorf("after the failure: %v", err)
				}
			})
		})
	}
}

// Another program's quote may take 31 s to get out of the way.
func TestReportsBusyBudget(t *testing.T) {
	for busy, want := range map[time.Duration]error{31 * time.Second: nil, 40 * time.Second: syscall.EBUSY} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			r := openFake(t, newFakeEntry(func(f *fakeEntry, _ int) ([]byte, error) {
				if time.Since(start) < busy {
					return nil, syscall.EBUSY
				}
				return goodQuote(f.inblob), nil
			}))
			_, err := r.Quote(t.Context(), someData)
			if !errors.Is(err, want) {
				t.Errorf("busy for %s: got %v after %s", busy, err, time.Since(start))
			}
			if took := time.Since(start); took > 35*time.Second {
				t.Errorf("busy for %s: gave up after %s", busy, took)
			}
		})
	}
}

// An abandoned request must not stop or confuse the next one.
func TestReportsAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := openFake(t, newFakeEntry(func(f *fakeEntry, _ int) ([]byte, error) {
			time.Sleep(20 * time.Second)
			return goodQuote(f.inblob), nil
		}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := r.Quote(ctx, measure.ReportData{1}); err != context.DeadlineExceeded || time.Since(start) != time.Second {
			t.Errorf("got %v after %s", err, time.Since(start))
		}
		if _, err := r.Quote(ctx, measure.ReportData{2}); err != context.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
		if _, err := r.Quote(t.Context(), someData); err != nil || time.Since(start) != 40*time.Second {
			t.Errorf("got %v after %s", err, time.Since(start))
		}
		// Nobody waits any more for a quote that is being retried.
		r.Close()
	})
}

func TestReportsClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeEntry(goodAfter(1<<30, syscall.EBUSY))
		r := openFake(t, f)
		var waiting sync.WaitGroup
		for range 2 { // one with the worker, one in line
			waiting.Go(func() {
				if _, err := r.Quote(t.Context(), someData); err != errClosed {
					t.Errorf("got %v", err)
				}
			})
		}
		synctest.Wait()
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Error(err)
		}
		waiting.Wait()
		if _, err := r.Quote(t.Context(), someData); err != errClosed || f.removed {
			t.Errorf("after Close: %v, removed %t", err, f.removed)
		}
	})
}

func TestOpenReports(t *testing.T) {
	var unsupported *measure.UnsupportedError
	for _, c := range []struct {
		mkdir error
		other string // an entry that is there
		entry string // the one that is used; "" is failure
	}{
		{nil, "", "tdx-agent"},
		{syscall.EEXIST, "tdx-agent", "tdx-agent"},
		{syscall.EACCES, "tdx-agent", "tdx-agent"},
		{syscall.EPERM, "tdx-agent", "tdx-agent"},
		{syscall.ENOSYS, "tdx-agent", "tdx-agent"},
		{syscall.ENOSYS, "com.intel.dcap", "com.intel.dcap"},
		{syscall.EACCES, "com.intel.dcap", ""}, // root's: it could not be written
		{syscall.EACCES, "", ""},
		{syscall.ENXIO, "", ""},
		{syscall.ENOENT, "", ""},
	} {
		f := newFakeEntry(nil)
		f.mkdir, f.other = c.mkdir, c.other
		r, err := OpenReports(ReportsConfig{Client: f})
		if f.reads != 0 {
			t.Errorf("%v: opening read %d files, any of which may hang", c.mkdir, f.reads)
		}
		if c.entry == "" {
			want := c.mkdir == syscall.ENXIO || c.mkdir == syscall.ENOENT
			if r != nil || !errors.Is(err, c.mkdir) || errors.As(err, &unsupported) != want {
				t.Errorf("%v: got %v", c.mkdir, err)
			}
			continue
		}
		if err != nil || r.entry != c.entry {
			t.Errorf("%v: got %v", c.mkdir, err)
			continue
		}
		r.Close()
	}
	for _, name := range []string{"..", "a/b", "a\x00", strings.Repeat("a", 256)} {
		if _, err := OpenReports(ReportsConfig{Client: newFakeEntry(nil), Entry: name}); err == nil {
			t.Errorf("entry %q was accepted", name)
		}
	}
}

// FuzzGeneration: whatever the generation file holds, there is an answer.
func FuzzGeneration(f *testing.F) {
	for _, s := range []string{"0\n", "1", "", "-1\n", "18446744073709551615\n", "18446744073709551616", "1\n\n", "0x1", "\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &fuzzedGeneration{fakeEntry: newFakeEntry(nil), b: b}
		c.name = "tdx-agent"
		r := &Reports{cfg: ReportsConfig{Client: c, Provider: "tdx_guest"}, entry: "tdx-agent"}
		if _, err := r.once(someData); err == nil {
			t.Errorf("a generation that stays %q was accepted", b)
		}
		if c.removed {
			t.Error("the entry was removed")
		}
	})
}

type fuzzedGeneration struct {
	*fakeEntry
	b []byte
}

func (c *fuzzedGeneration) ReadFile(name string) ([]byte, error) {
	if path.Base(name) == "generation" {
		return c.b, nil
	}
	return c.fakeEntry.ReadFile(name)
}
