package guestapi

import (
	"errors"
	"math"
	"testing"
	"time"
)

func equalRates(r Rate) (all Rates) {
	for class := range all {
		all[class] = r
	}
	return all
}

func testCaller(uid uint32, group uint64) Caller {
	return Caller{PID: 1, UID: uid, Known: true, CgroupID: group}
}

func TestLimiter(t *testing.T) {
	now := time.Unix(1000, 0)
	l := NewLimiter(equalRates(Rate{PerSecond: 2, Burst: 3}))
	l.now = func() time.Time { return now }
	a := testCaller(1, 7)
	take := func(c Caller, class Class, want bool, missed int, wait time.Duration) {
		t.Helper()
		got, err := l.Take(c, class)
		var throttled *throttledError
		if (err == nil) != want || got != missed || errors.As(err, &throttled) && throttled.wait != wait {
			t.Errorf("%+v: %d missed, %v; want %d missed, %v", c, got, err, missed, wait)
		}
	}
	for range 3 {
		take(a, ClassKey, true, 0, 0)
	}
	take(a, ClassKey, false, 0, 500*time.Millisecond)
	take(a, ClassKey, false, 1, 500*time.Millisecond)
	a.PID = 2 // a process that it has forked
	take(a, ClassKey, false, 2, 500*time.Millisecond)
	take(a, ClassQuote, true, 0, 0) // another class
	take(testCaller(2, 7), ClassKey, true, 0, 0)
	take(testCaller(1, 8), ClassKey, true, 0, 0)
	take(Caller{}, ClassKey, true, 0, 0)
	now = now.Add(400 * time.Millisecond)
	take(a, ClassKey, false, 3, 100*time.Millisecond)
	now = now.Add(100 * time.Millisecond)
	take(a, ClassKey, true, 4, 0)
	take(a, ClassKey, false, 0, 500*time.Millisecond)
	now = now.Add(time.Hour)
	for range 3 {
		l.Take(a, ClassKey)
	}
	take(a, ClassKey, false, 0, 500*time.Millisecond)
}

func TestLimiterIsBounded(t *testing.T) {
	l := NewLimiter(equalRates(Rate{PerSecond: 1e-3, Burst: 1}))
	first := testCaller(0, 1)
	l.Take(first, ClassKey)
	for group := range uint64(3 * maxAccounts) {
		l.Take(testCaller(1, group+1), ClassKey)
		if _, err := l.Take(first, ClassKey); err == nil {
			t.Fatal("who calls all the time was forgotten")
		}
		if len(l.known) > maxAccounts || l.recent.Len() != len(l.known) {
			t.Fatalf("%d accounts are kept, %d in order", len(l.known), l.recent.Len())
		}
	}
}

func TestRateCheck(t *testing.T) {
	for _, r := range []Rate{{}, {PerSecond: 1}, {Burst: 1}, {PerSecond: -1, Burst: 1}, {PerSecond: math.NaN(), Burst: 1}, {PerSecond: math.Inf(1), Burst: 1}, {PerSecond: 1, Burst: -1}, {PerSecond: 1e7, Burst: 1}, {PerSecond: 1e-300, Burst: 1}, {PerSecond: 1, Burst: 2e6}} {
		if r.Check() == nil {
			t.Errorf("%+v is legal", r)
		}
	}
	least := Rate{PerSecond: 1e-6, Burst: 1}
	if err := least.Check(); err != nil {
		t.Error(err)
	}
	l := NewLimiter(equalRates(least))
	l.Take(Caller{}, ClassKey)
	var throttled *throttledError
	if _, err := l.Take(Caller{}, ClassKey); !errors.As(err, &throttled) || throttled.wait < 999999*time.Second {
		t.Errorf("got %v, want to wait for 11 days", err)
	}
}

// TestEveryMethodHasAClass: a method without one would count as a read, and not be
// recorded.
func TestEveryMethodHasAClass(t *testing.T) {
	for surface := Surface(1); len(methodsOf(surface)) > 0; surface++ {
		for name, m := range methodsOf(surface) {
			if m.class < ClassRead || m.class >= classes {
				t.Errorf("%s of %s has no class", name, surface)
			}
		}
	}
}
