package measure

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
)

// world is the disk and the register, which outlive a crashed agent, with a crash or
// an I/O error at a chosen step. It stands in at the two edges of the ledger.
type world struct {
	disk, old []byte
	rtmr3     Digest

	step    int
	crashAt int // crash when this step is reached; 0 never
	torn    int // bytes of a write that reach the disk when the crash is in a write
	failAt  int // the operation at this step fails
	half    bool
}

type crash struct{}

var errInjected = errors.New("injected I/O error")

// at is one step: the machine may stop before it, or the operation may fail.
func (w *world) at() error {
	w.step++
	if w.step == w.crashAt {
		panic(crash{})
	}
	if w.step == w.failAt {
		return errInjected
	}
	return nil
}

func (w *world) size() (int64, error) { return int64(len(w.disk)), w.at() }
func (w *world) read() ([]byte, error) {
	return append([]byte(nil), w.disk...), w.at()
}

func (w *world) writeAt(b []byte, off int64) (int, error) {
	w.step++
	if off != int64(len(w.disk)) {
		panic(fmt.Sprintf("write at %d of a log of %d bytes", off, len(w.disk)))
	}
	if w.step == w.crashAt {
		w.disk = append(w.disk, b[:min(w.torn, len(b))]...)
		panic(crash{})
	}
	if w.step == w.failAt {
		if w.half {
			w.disk = append(w.disk, b[:len(b)/2]...)
			return len(b) / 2, errInjected
		}
		return 0, errInjected
	}
	w.disk = append(w.disk, b...)
	return len(b), nil
}

func (w *world) truncate(n int64) error {
	if err := w.at(); err != nil {
		return err
	}
	w.disk = w.disk[:n]
	return nil
}

func (w *world) setAside() error {
	if err := w.at(); err != nil {
		return err
	}
	w.old, w.disk = w.disk, nil
	return nil
}

func (w *world) close() error { return nil }

func (w *world) Registers() (Registers, error) {
	if err := w.at(); err != nil {
		return Registers{}, err
	}
	return Registers{RTMR: [4]Digest{3: w.rtmr3}}, nil
}

// Extend fails before the register moves, or, with half, after it did: the kernel
// says an error in both cases.
func (w *world) Extend(i int, d Digest) error {
	err := w.at()
	if err == nil || w.half {
		w.rtmr3 = w.rtmr3.Extend(d)
	}
	if err != nil {
		return syscall.EIO
	}
	return nil
}

func (w *world) open(t testing.TB, dir string) (*Ledger, error) {
	return newLedger(t.Context(), LedgerConfig{Dir: dir, Registers: w}, w)
}

// agrees opens the log anew, without faults, records one more event, and demands
// that the log explains the register.
func (w *world) agrees(t *testing.T, dir, what string) *Ledger {
	t.Helper()
	w.crashAt, w.failAt = 0, 0
	l, err := w.open(t, dir)
	if err != nil {
		t.Fatalf("%s: the ledger refuses to open: %v", what, err)
	}
	if _, err := l.Record(t.Context(), Entry{Name: "after", Key: "after"}); err != nil {
		t.Fatalf("%s: next event: %v", what, err)
	}
	records, good, err := parseRecords(w.disk)
	if err != nil || good != len(w.disk) {
		t.Fatalf("%s: log holds %d good bytes of %d: %v", what, good, len(w.disk), err)
	}
	if rtmr, err := Replay(appendEvents(nil, records)); err != nil || rtmr[RTMR3] != w.rtmr3 {
		t.Fatalf("%s: log replays to %s, register is %s (%v)", what, rtmr[RTMR3], w.rtmr3, err)
	}
	return l
}

// emit runs one event to its end or to the crash.
func (w *world) emit(l *Ledger, e Entry) (err error, crashed bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(crash); !ok {
				panic(r)
			}
			crashed = true
		}
	}()
	_, err = l.Record(context.Background(), e)
	return err, false
}

// prepared is a log of two events.
func prepared(t testing.TB, dir string) (*world, *Ledger) {
	w := &world{}
	l, err := w.open(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"one", "two"} {
		if _, err := l.Record(t.Context(), Entry{Name: n}); err != nil {
			t.Fatal(err)
		}
	}
	return w, l
}

// TestCrashEverywhere stops the machine at every step of an event, at every byte of
// its write, and again at every step of the recovery that follows.
func TestCrashEverywhere(t *testing.T) {
	dir := t.TempDir()
	w, l := prepared(t, dir)
	w.step = 0
	if err, _ := w.emit(l, Entry{Name: "third", Payload: []byte("x"), Key: "k"}); err != nil {
		t.Fatal(err)
	}
	steps, line := w.step, len(w.disk)/3+16
	points := 0
	for step := 1; step <= steps+1; step++ {
		for torn := 0; torn <= line; torn++ {
			w, l := prepared(t, dir)
			w.step, w.crashAt, w.torn = 0, step, torn
			_, crashed := w.emit(l, Entry{Name: "third", Payload: []byte("x"), Key: "k"})
			if crashed != (step <= steps) {
				t.Fatalf("step %d of %d: crashed is %v", step, steps, crashed)
			}
			l.lock.close() // as the kernel does for a process that died
			what := fmt.Sprintf("crash at step %d, byte %d", step, torn)
			w.crashInRecovery(t, dir, what)
			l = w.agrees(t, dir, what)
			if n := count(l, "third"); n > 1 {
				t.Fatalf("%s: event is in the log %d times", what, n)
			}
			if _, err := l.Record(t.Context(), Entry{Name: "third", Payload: []byte("x"), Key: "k"}); err != nil {
				t.Fatalf("%s: retry: %v", what, err)
			}
			if n := count(l, "third"); n != 1 {
				t.Fatalf("%s: after the retry the event is in the log %d times, want once", what, n)
			}
			l.lock.close()
			points++
			if w.torn == 0 && !w.wrote(step) {
				break // no write at this step, so no byte to tear
			}
		}
	}
	t.Logf("%d crash points, 0 divergences, 0 refusals to open", points)
}

// wrote tells whether step is the one that writes the record: the third after the
// size of the file and the register were read.
func (w *world) wrote(step int) bool { return step == 3 }

func (w *world) crashInRecovery(t *testing.T, dir, what string) {
	t.Helper()
	for step := 1; ; step++ {
		again := *w
		again.disk = append([]byte(nil), w.disk...)
		again.step, again.crashAt = 0, step
		crashed := func() (crashed bool) {
			defer func() { crashed = recover() != nil }()
			if l, err := again.open(t, dir); err == nil {
				l.lock.close()
			}
			return false
		}()
		l := again.agrees(t, dir, fmt.Sprintf("%s, then at step %d of the recovery", what, step))
		l.lock.close()
		if !crashed {
			return
		}
	}
}

func count(l *Ledger, name string) int {
	n := 0
	for i := range l.records {
		if l.records[i].Name == name {
			n++
		}
	}
	return n
}

// TestErrorEverywhere lets every operation fail once, the way an operating system
// fails it, within a process that lives on.
func TestErrorEverywhere(t *testing.T) {
	dir := t.TempDir()
	for _, half := range []bool{false, true} {
		for step := 1; step <= 12; step++ {
			w, l := prepared(t, dir)
			w.step, w.failAt, w.half = 0, step, half
			what := fmt.Sprintf("error at step %d (half done: %v)", step, half)
			err, _ := w.emit(l, Entry{Name: "third", Key: "k"})
			w.failAt = 0
			// the same process goes on
			if _, err2 := l.Record(t.Context(), Entry{Name: "third", Key: "k"}); err2 != nil {
				t.Fatalf("%s: first %v, then %v", what, err, err2)
			}
			if n := count(l, "third"); n != 1 {
				t.Fatalf("%s: event is in the log %d times, want once", what, n)
			}
			w.agrees(t, dir, what).lock.close()
			l.lock.close()
		}
	}
}

// TestErrorTwice lets the clean-up fail as well.
func TestErrorTwice(t *testing.T) {
	dir := t.TempDir()
	for first := 1; first <= 6; first++ {
		for second := first + 1; second <= 10; second++ {
			w, l := prepared(t, dir)
			w.step, w.failAt, w.half = 0, first, true
			w.emit(l, Entry{Name: "third", Key: "k"})
			w.step, w.failAt = first, second
			w.emit(l, Entry{Name: "third", Key: "k"})
			w.agrees(t, dir, fmt.Sprintf("errors at steps %d and %d", first, second)).lock.close()
			l.lock.close()
		}
	}
}
