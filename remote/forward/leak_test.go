package forward_test

import (
	"os"
	"runtime"
	"testing"
	"time"
)

// nothingStays wants goroutines and descriptors back at their count of now when the test
// is over and has cleaned up what comes after this call.
func nothingStays(t *testing.T) {
	goroutines, files := runtime.NumGoroutine(), descriptors(t)
	t.Cleanup(func() {
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			runtime.GC() // ends the pipes that the kernel has copied through, which Go keeps for another time
			g, f := runtime.NumGoroutine(), descriptors(t)
			if g <= goroutines && f <= files {
				return
			}
			if time.Now().After(end) {
				stacks := make([]byte, 1<<20)
				t.Errorf("%d goroutines and %d descriptors, before it were %d and %d\n%s", g, f, goroutines, files, stacks[:runtime.Stack(stacks, true)])
				return
			}
		}
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
