package tdxsim_test

import (
	"errors"
	"sync"
	"syscall"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// The cases of TestConformance in which the host or the hardware does not do what
// it should, or takes its time.

func hostFails(t *testing.T, b *backend) {
	d := b.entry(t, "fails")
	b.write(t, d, 2)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.EBUSY, syscall.ETIMEDOUT, syscall.ENOMEM, syscall.EINVAL, syscall.EAGAIN} {
		b.set(t, tdxsim.HostBehaviour{Poll: fast, Errno: errno})
		b.outblob(t, d, errno)
	}
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	wantQuote(t, b.outblob(t, d, 0), 2, b.registers(t)) // the same inblob will do
	if got := b.generation(t, d); got != "1\n" {
		t.Errorf("generation %q", got)
	}
}

func emptyQuote(t *testing.T, b *backend) {
	d := b.entry(t, "empty")
	b.write(t, d, 3)
	b.set(t, tdxsim.HostBehaviour{Poll: fast, Empty: true})
	if q := b.outblob(t, d, 0); len(q) != 0 {
		t.Errorf("quote has %d bytes", len(q))
	}
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	if q := b.outblob(t, d, 0); len(q) != 0 {
		t.Errorf("an empty quote is not cached: %d bytes", len(q))
	}
	b.write(t, d, 3)
	wantQuote(t, b.outblob(t, d, 0), 3, b.registers(t))
}

func quoteLengths(t *testing.T, b *backend) {
	d := b.entry(t, "length")
	for _, n := range []int{100, 636, 8168, 131048} {
		b.set(t, tdxsim.HostBehaviour{Poll: fast, Length: n})
		b.write(t, d, 4)
		if q := b.outblob(t, d, 0); len(q) != n {
			t.Errorf("quote has %d bytes, want %d", len(q), n)
		}
	}
	b.set(t, tdxsim.HostBehaviour{Poll: fast, Length: 131049})
	b.write(t, d, 4)
	b.outblob(t, d, syscall.EFBIG)
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	wantQuote(t, b.outblob(t, d, 0), 4, b.registers(t))
}

func polled(t *testing.T, b *backend) {
	d := b.entry(t, "polled")
	b.set(t, tdxsim.HostBehaviour{Delay: 50 * time.Millisecond, Poll: 500 * time.Millisecond})
	b.write(t, d, 5)
	start := time.Now()
	b.outblob(t, d, 0)
	if took := time.Since(start); took < 490*time.Millisecond {
		t.Errorf("took %v, want a poll interval", took)
	}
}

func tooSlow(t *testing.T, b *backend) {
	d := b.entry(t, "slow")
	b.set(t, tdxsim.HostBehaviour{Delay: 1500 * time.Millisecond, Poll: 20 * time.Millisecond, Polls: 10})
	b.write(t, d, 6)
	start := time.Now()
	b.outblob(t, d, syscall.EIO)
	if took := time.Since(start); took < 190*time.Millisecond || took > time.Second {
		t.Errorf("took %v, want ten polls of 20 ms", took)
	}
	b.outblob(t, d, syscall.EBUSY)
	b.write(t, d, 7)
	b.outblob(t, d, syscall.EBUSY)
	time.Sleep(1600 * time.Millisecond)
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	wantQuote(t, b.outblob(t, d, 0), 7, b.registers(t))
}

func signal(t *testing.T, b *backend) {
	d, other := b.entry(t, "signal"), b.entry(t, "other")
	b.set(t, tdxsim.HostBehaviour{Delay: 1500 * time.Millisecond, Poll: 20 * time.Millisecond, Polls: 500})
	b.write(t, d, 8)
	b.write(t, other, 9)
	err := b.interrupted(300*time.Millisecond, func() error {
		_, err := b.client.ReadFile(d + "/outblob")
		return err
	})
	wantErrno(t, "interrupted", err, syscall.EINTR)
	b.outblob(t, d, syscall.EBUSY)
	b.outblob(t, other, syscall.EBUSY)
	b.generation(t, d) // waits for nothing now
	time.Sleep(1600 * time.Millisecond)
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	wantQuote(t, b.outblob(t, d, 0), 8, b.registers(t))
	wantQuote(t, b.outblob(t, other, 0), 9, b.registers(t))
}

// quoting starts a quote that takes a second, calls f when it is under way, and
// returns how the read went.
func (b *backend) quoting(t *testing.T, f func()) error {
	t.Helper()
	d := b.entry(t, "quoting")
	b.write(t, d, 10)
	b.set(t, tdxsim.HostBehaviour{Delay: time.Second, Poll: 20 * time.Millisecond, Polls: 500})
	done := make(chan error)
	go func() {
		_, err := b.client.ReadFile(d + "/outblob")
		done <- err
	}()
	time.Sleep(200 * time.Millisecond)
	f()
	return <-done
}

func serialised(t *testing.T, b *backend) {
	other, idle := b.entry(t, "waits"), b.entry(t, "idle")
	b.write(t, other, 11)
	b.outblob(t, other, 0)
	read := func(name string) func() error {
		return func() error { _, err := b.client.ReadFile(name); return err }
	}
	err := b.quoting(t, func() {
		var wg sync.WaitGroup
		for what, c := range map[string]struct {
			waits bool
			call  func() error
		}{
			"generation":     {true, read(other + "/generation")},
			"provider":       {true, read(other + "/provider")},
			"cached outblob": {true, read(other + "/outblob")},
			"inblob":         {true, func() error { return b.client.WriteFile(idle+"/inblob", make([]byte, 64)) }},
			"mkdir":          {true, func() error { return b.client.Mkdir(reports + "/made") }},
			"registers":      {false, func() error { _, err := b.bank.Registers(); return err }},
			"extend":         {false, func() error { return b.bank.Extend(2, measure.Digest{2}) }},
		} {
			wg.Go(func() {
				start := time.Now()
				if err := c.call(); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if took := time.Since(start); c.waits != (took > 500*time.Millisecond) {
					t.Errorf("%s took %v; waits: %v", what, took, c.waits)
				}
			})
		}
		wg.Wait()
	})
	if err != nil {
		t.Errorf("the quote that the others wait for: %v", err)
	}
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	if err := b.client.RemoveAll(reports + "/made"); err != nil {
		t.Error(err)
	}
}

func listWhileQuoting(t *testing.T, b *backend) {
	err := b.quoting(t, func() {
		start := time.Now()
		list, err := b.client.ReadDir(reports)
		if err != nil || len(list) != 1 {
			t.Errorf("entries %v, %v", list, err)
		}
		if took := time.Since(start); took > 400*time.Millisecond {
			t.Errorf("ls took %v", took)
		}
	})
	if err != nil {
		t.Error(err)
	}
}

func rmdirWhileQuoting(t *testing.T, b *backend) {
	err := b.quoting(t, func() {
		start := time.Now()
		if err := b.client.RemoveAll(reports + "/quoting"); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took < 400*time.Millisecond {
			t.Errorf("rmdir took %v, want the rest of the quote", took)
		}
	})
	// Linux may remove the entry between the read that has the quote and the one
	// that finds its end.
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		t.Error(err)
	}
}

func extend(t *testing.T, b *backend) {
	for i := range 4 {
		want := b.registers(t)
		d := measure.Digest{byte(i), 1, 2, 3}
		want.RTMR[i] = want.RTMR[i].Extend(d)
		if err := b.bank.Extend(i, d); err != nil {
			t.Errorf("RTMR%d: %v", i, err)
		}
		if got := b.registers(t); got != want {
			t.Errorf("after extending RTMR%d: %v, want %v", i, got, want)
		}
	}
	for _, i := range []int{-1, 4} {
		if err := b.bank.Extend(i, measure.Digest{}); err == nil {
			t.Errorf("there is no RTMR%d, but extending it succeeds", i)
		}
	}
}

func manyExtends(t *testing.T, b *backend) {
	const workers, each = 8, 25
	want := b.registers(t).RTMR[3]
	for range workers * each {
		want = want.Extend(measure.Digest{7})
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				if err := b.bank.Extend(3, measure.Digest{7}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := b.registers(t).RTMR[3]; got != want {
		t.Errorf("RTMR3 is not that of %d extends", workers*each)
	}
}

func extendFails(t *testing.T, b *backend) {
	before := b.registers(t)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENXIO} {
		b.set(t, tdxsim.HostBehaviour{Poll: fast, ExtendErrno: errno})
		if err := b.bank.Extend(3, measure.Digest{8}); !errors.Is(err, errno) {
			t.Errorf("extend: %v, want %v", err, errno)
		}
	}
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	if got := b.registers(t); got != before {
		t.Error("a failed extend moved a register")
	}
	if err := b.bank.Extend(3, measure.Digest{8}); err != nil {
		t.Error(err)
	}
}
