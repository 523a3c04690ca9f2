package guestapi

import "testing"

// TestSlotsAreShared: one of root's containers must not shut out the others.
func TestSlotsAreShared(t *testing.T) {
	s := newSlots(10, 6, 4)
	var release []func()
	take := func(c Caller, want int) {
		t.Helper()
		got := 0
		for {
			free, ok := s.take(c)
			if !ok {
				break
			}
			release = append(release, free)
			got++
		}
		if got != want {
			t.Errorf("%v has %d connections, want %d", c, got, want)
		}
	}
	take(testCaller(0, 1), 4)
	take(testCaller(0, 2), 2) // what is left of root's
	take(testCaller(0, 3), 0)
	take(testCaller(7, 1), 4) // what is left at all
	take(Caller{}, 0)
	for _, free := range release {
		free()
		free() // a connection may be closed twice
	}
	if s.open != 0 || len(s.byUID) != 0 || len(s.byAccount) != 0 {
		t.Errorf("%d are open, of %d users and %d callers, want none", s.open, len(s.byUID), len(s.byAccount))
	}
	take(Caller{}, 10)
}

// TestRootOfAContainerIsOneCaller: it may become any user, and must not get connections as
// each of them. Two containers are two callers, though one has the other's name.
func TestRootOfAContainerIsOneCaller(t *testing.T) {
	s, l := newSlots(100, 80, 4), NewLimiter(equalRates(Rate{PerSecond: 1e-3, Burst: 4}))
	for group := range uint64(2) {
		open, calls := 0, 0
		for uid := range uint32(50) {
			c := testCaller(uid, group+1)
			c.Container = "0123456789abcdef"
			if _, ok := s.take(c); ok {
				open++
			}
			if _, err := l.Take(c, ClassKey); err == nil {
				calls++
			}
		}
		if open != 4 || calls != 4 {
			t.Errorf("container %d has %d connections and %d calls, want 4", group, open, calls)
		}
	}
}
