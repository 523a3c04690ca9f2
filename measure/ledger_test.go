package measure_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure"
)

// memoryBank is registers that nobody else can see.
type memoryBank struct {
	mu    sync.Mutex
	regs  measure.Registers
	unfit error // what Extend and Registers answer
}

func (b *memoryBank) Registers() (measure.Registers, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.regs, b.unfit
}

func (b *memoryBank) Extend(i int, d measure.Digest) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.unfit != nil {
		return b.unfit
	}
	b.regs.RTMR[i] = b.regs.RTMR[i].Extend(d)
	return nil
}

func openLedger(t *testing.T, cfg measure.LedgerConfig) *measure.Ledger {
	t.Helper()
	l, err := measure.OpenLedger(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func record(t *testing.T, l *measure.Ledger, e measure.Entry) measure.Record {
	t.Helper()
	r, err := l.Record(t.Context(), e)
	if err != nil {
		t.Fatalf("record %q: %v", e.Name, err)
	}
	return r
}

func TestLedgerExplainsRegister(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	l := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	for i := range 5 {
		record(t, l, measure.Entry{Name: fmt.Sprintf("event-%d", i), Payload: []byte{byte(i)}, Version: 1 + i%2})
	}
	for _, l := range []*measure.Ledger{l, openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})} {
		s, err := l.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		rtmr, err := measure.Replay(s.Events())
		if err != nil || rtmr[3] != bank.regs.RTMR[3] || s.Log != s.Register || len(s.Records) != 5 {
			t.Errorf("log of %d replays to %s, register is %s (%v)", len(s.Records), rtmr[3], bank.regs.RTMR[3], err)
		}
		if e, ok := s.At(s.Records[2].Next); !ok || len(e) != 3 {
			t.Errorf("At the third event: %d events, %v; want 3", len(e), ok)
		}
		if _, ok := s.At(measure.Digest{1}); ok {
			t.Error("At an unknown value found a prefix")
		}
	}
}

func TestLedgerIsIdempotent(t *testing.T) {
	bank := &memoryBank{}
	l := openLedger(t, measure.LedgerConfig{Dir: t.TempDir(), Registers: bank})
	a := record(t, l, measure.Entry{Name: "app-id", Payload: []byte("a"), Once: true})
	b := record(t, l, measure.Entry{Name: "app-id", Payload: []byte("a"), Once: true})
	if a.Seq != b.Seq {
		t.Errorf("the same once-only event was measured twice: %d and %d", a.Seq, b.Seq)
	}
	var conflict *measure.ConflictError
	if _, err := l.Record(t.Context(), measure.Entry{Name: "app-id", Payload: []byte("b"), Once: true}); !errors.As(err, &conflict) {
		t.Errorf("a second value of a once-only event: got %v, want a ConflictError", err)
	}
	record(t, l, measure.Entry{Name: "x", Key: "k"})
	before := bank.regs
	record(t, l, measure.Entry{Name: "x", Key: "k"})
	if _, err := l.Record(t.Context(), measure.Entry{Name: "y", Key: "k"}); !errors.As(err, &conflict) {
		t.Errorf("a key used for another event: got %v, want a ConflictError", err)
	}
	if bank.regs != before {
		t.Error("a repeated or refused entry has extended the register")
	}
}

func TestForeignExtend(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	cfg := measure.LedgerConfig{Dir: dir, Registers: bank}
	l := openLedger(t, cfg)
	record(t, l, measure.Entry{Name: "ours"})
	bank.Extend(3, measure.Digest{9})
	var d *measure.DivergenceError
	if _, err := l.Record(t.Context(), measure.Entry{Name: "next"}); !errors.As(err, &d) {
		t.Fatalf("record after a foreign extend: got %v, want a DivergenceError", err)
	}
	if d.Register != bank.regs.RTMR[3] || d.ExitCode() != 7 {
		t.Errorf("divergence says register %s and exit %d", d.Register, d.ExitCode())
	}
	reopened := openLedger(t, cfg) // an agent must start to tell
	s, err := reopened.Snapshot(t.Context())
	if !errors.As(err, &d) || len(s.Records) != 1 {
		t.Errorf("after a restart: %d records, %v", len(s.Records), err)
	}
}

func TestDstackEventsAreAdopted(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	var theirs []measure.Event
	extend := func(name string) {
		e, err := measure.NewRuntimeEvent(name, nil, measure.EventV1)
		if err != nil {
			t.Fatal(err)
		}
		theirs = append(theirs, e)
		bank.Extend(3, e.Digest)
	}
	extend("system-preparing")
	extend("system-ready")
	cfg := measure.LedgerConfig{Dir: dir, Registers: bank, Imported: func() ([]measure.Event, error) { return theirs, nil }}
	l := openLedger(t, cfg)
	record(t, l, measure.Entry{Name: "ours"})
	extend("dstack-again")
	s, err := l.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range s.Events() {
		names = append(names, e.Name)
	}
	if got := strings.Join(names, " "); got != "system-preparing system-ready ours dstack-again" {
		t.Errorf("log is %q", got)
	}
	// a log that does not explain the register is no excuse
	theirs = theirs[:1]
	bank.Extend(3, measure.Digest{7})
	var d *measure.DivergenceError
	if _, err := l.Snapshot(t.Context()); !errors.As(err, &d) {
		t.Errorf("unexplained extend beside dstack's log: got %v, want a DivergenceError", err)
	}
}

func TestEarlierBoot(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	l := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	record(t, l, measure.Entry{Name: "a"})
	record(t, l, measure.Entry{Name: "b"})
	bank.regs = measure.Registers{} // a reboot that kept the folder
	l = openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	record(t, l, measure.Entry{Name: "c"})
	s, err := l.Snapshot(t.Context())
	if err != nil || len(s.Records) != 1 || s.Records[0].Name != "c" {
		t.Errorf("after a reboot the log is %+v, %v", s.Records, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "rtmr3.log.old")); err != nil {
		t.Errorf("the earlier boot's log was not kept: %v", err)
	}
	if got := l.Recoveries(); got != (measure.Recoveries{SetAside: 1}) {
		t.Errorf("mended were %+v, want one log set aside", got)
	}
}

// TestRecoveries counts what a crash has left behind, once.
func TestRecoveries(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	l := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	record(t, l, measure.Entry{Name: "a"})
	before := bank.regs
	record(t, l, measure.Entry{Name: "b"})
	if got := l.Recoveries(); got != (measure.Recoveries{}) {
		t.Errorf("mended were %+v, want nothing", got)
	}
	bank.regs = before // b was written and never extended
	f, err := os.OpenFile(filepath.Join(dir, "rtmr3.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString("{") // what follows was torn
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	l = openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	record(t, l, measure.Entry{Name: "c"})
	if got := l.Recoveries(); got != (measure.Recoveries{Torn: 1, TakenBack: 1}) {
		t.Errorf("mended were %+v, want one torn and one taken back", got)
	}
}

func TestDamagedLog(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	l := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	for _, n := range []string{"a", "b", "c"} {
		record(t, l, measure.Entry{Name: n})
	}
	l.Close()
	path := filepath.Join(dir, "rtmr3.log")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		edit func([]byte) []byte
	}{
		{"a flipped bit in the middle", func(b []byte) []byte { b[30] ^= 1; return b }},
		{"a flipped bit at the end", func(b []byte) []byte { b[len(b)-9] ^= 1; return b }},
		{"the first record removed", func(b []byte) []byte { return b[strings.IndexByte(string(b), '\n')+1:] }},
		{"the last record removed", func(b []byte) []byte { return b[:strings.LastIndexByte(string(b[:len(b)-1]), '\n')+1] }},
		{"emptied", func(b []byte) []byte { return nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.WriteFile(path, tc.edit(append([]byte(nil), whole...)), 0o600); err != nil {
				t.Fatal(err)
			}
			l := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
			var d *measure.DivergenceError
			if _, err := l.Snapshot(t.Context()); !errors.As(err, &d) {
				t.Errorf("snapshot: got %v, want a DivergenceError", err)
			}
			if _, err := l.Record(t.Context(), measure.Entry{Name: "more"}); !errors.As(err, &d) {
				t.Errorf("record: got %v, want a DivergenceError", err)
			}
		})
	}
}

func TestRemovedLog(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	path := filepath.Join(dir, "rtmr3.log")
	l := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: bank})
	remove := func() {
		t.Helper()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	remove() // nothing was recorded, so nothing is lost
	record(t, l, measure.Entry{Name: "a"})
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	remove()
	for range 2 {
		var d *measure.DivergenceError
		if _, err := l.Snapshot(t.Context()); !errors.As(err, &d) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "want the log of 1 events that replays to "+bank.regs.RTMR[3].String()) {
			t.Errorf("snapshot: got %v, want a DivergenceError that names the missing file and what was in it", err)
		}
		if _, err := l.Record(t.Context(), measure.Entry{Name: "b"}); !errors.As(err, &d) {
			t.Errorf("record: got %v, want a DivergenceError", err)
		}
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	record(t, l, measure.Entry{Name: "b"})
	if s, err := l.Snapshot(t.Context()); err != nil || len(s.Records) != 2 {
		t.Errorf("after the file was put back: %d records, %v; want 2", len(s.Records), err)
	}
}

func TestLedgerIsBounded(t *testing.T) {
	bank := &memoryBank{}
	l := openLedger(t, measure.LedgerConfig{Dir: t.TempDir(), Registers: bank, MaxEvents: 3})
	var full *measure.FullError
	for i := range 4 {
		_, err := l.Record(t.Context(), measure.Entry{Name: "e"})
		if (i < 3) != (err == nil) || (i == 3 && !errors.As(err, &full)) {
			t.Errorf("event %d of at most 3: %v", i+1, err)
		}
	}
	l = openLedger(t, measure.LedgerConfig{Dir: t.TempDir(), Registers: &memoryBank{}, MaxBytes: 1000})
	if _, err := l.Record(t.Context(), measure.Entry{Name: "e", Payload: make([]byte, 600)}); !errors.As(err, &full) {
		t.Errorf("event over the bound in bytes: got %v, want a FullError", err)
	}
}

func TestCannotExtend(t *testing.T) {
	bank := &memoryBank{unfit: &measure.UnsupportedError{What: "read RTMR3", Needs: "something newer"}}
	l := openLedger(t, measure.LedgerConfig{Dir: t.TempDir(), Registers: bank})
	var u *measure.UnsupportedError
	if _, err := l.Record(t.Context(), measure.Entry{Name: "e"}); !errors.As(err, &u) {
		t.Errorf("got %v, want an UnsupportedError", err)
	}
	if s, err := l.Snapshot(t.Context()); err != nil || !s.Unread {
		t.Errorf("snapshot says unread %v, %v; want true", s.Unread, err)
	}
}

func TestTwoProcesses(t *testing.T) {
	dir, bank := t.TempDir(), &memoryBank{}
	cfg := measure.LedgerConfig{Dir: dir, Registers: bank}
	a, b := openLedger(t, cfg), openLedger(t, cfg)
	var wg sync.WaitGroup
	for i, l := range []*measure.Ledger{a, b, a, b} {
		wg.Go(func() {
			for j := range 25 {
				if _, err := l.Record(context.Background(), measure.Entry{Name: fmt.Sprintf("%d-%d", i, j)}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	s, err := a.Snapshot(t.Context())
	if err != nil || len(s.Records) != 100 {
		t.Errorf("log holds %d records, %v; want 100", len(s.Records), err)
	}
}

func TestLockHasADeadline(t *testing.T) {
	dir := t.TempDir()
	cfg := measure.LedgerConfig{Dir: dir, Registers: &memoryBank{}}
	l := openLedger(t, cfg)
	blocked, release := make(chan struct{}), make(chan struct{})
	slow := openLedger(t, measure.LedgerConfig{Dir: dir, Registers: &gatedBank{memoryBank: &memoryBank{}, blocked: blocked, release: release}})
	done := make(chan struct{})
	go func() { slow.Snapshot(context.Background()); close(done) }()
	<-blocked
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := l.Snapshot(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another process holds the lock: got %v, want deadline exceeded", err)
	}
	close(release)
	<-done
}

// gatedBank stops in its second read until released.
type gatedBank struct {
	*memoryBank
	reads   int
	blocked chan struct{}
	release chan struct{}
}

func (b *gatedBank) Registers() (measure.Registers, error) {
	if b.reads++; b.reads == 2 {
		close(b.blocked)
		<-b.release
	}
	return b.memoryBank.Registers()
}

func BenchmarkRecord(b *testing.B) {
	for _, n := range []int{0, 1000} {
		b.Run(fmt.Sprintf("after-%d", n), func(b *testing.B) {
			bank := &memoryBank{}
			l, err := measure.OpenLedger(b.Context(), measure.LedgerConfig{Dir: b.TempDir(), Registers: bank, MaxEvents: -1, MaxBytes: -1})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			for range n {
				if _, err := l.Record(b.Context(), measure.Entry{Name: "filler"}); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if _, err := l.Record(b.Context(), measure.Entry{Name: "event", Payload: []byte("payload")}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
