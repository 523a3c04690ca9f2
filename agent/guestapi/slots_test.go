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
