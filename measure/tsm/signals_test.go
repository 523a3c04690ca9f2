package tsm

import (
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// blocked returns those of a few signals that this thread does not take.
func blocked(t *testing.T) (got []syscall.Signal) {
	var mask unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &mask); err != nil {
		t.Error(err)
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGURG, syscall.SIGPROF, syscall.SIGSEGV} {
		if mask.Val[0]&(1<<(s-1)) != 0 {
			got = append(got, s)
		}
	}
	return got
}

// A signal would end the read of a quote, so the thread that reads takes none, but for
// those of a crash; and takes them again when the quote is there.
func TestSignalsWaitForTheQuote(t *testing.T) {
	var during []syscall.Signal
	r := openFake(t, newFakeEntry(func(f *fakeEntry, _ int) ([]byte, error) {
		during = blocked(t)
		return goodQuote(f.inblob), nil
	}))
	if _, err := r.Quote(t.Context(), someData); err != nil {
		t.Fatal(err)
	}
	if len(during) != 4 || during[3] != syscall.SIGPROF {
		t.Errorf("while the quote was read, blocked were %v; want all but SIGSEGV", during)
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := blocked(t)
	restore := blockSignals()
	if got := blocked(t); len(got) != 4 {
		t.Errorf("blockSignals blocked %v; want all but SIGSEGV", got)
	}
	restore()
	if after := blocked(t); len(after) != len(before) {
		t.Errorf("blocked are %v after restore, want %v as before", after, before)
	}
}
