package main

import (
	"context"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// TestBootStepsAtOnce takes the boot step in several processes at the same time: one
// of them measures, the others find it done.
func TestBootStepsAtOnce(t *testing.T) {
	for range 5 {
		dir := shortDir(t)
		var steps sync.WaitGroup
		for range 4 {
			steps.Go(func() {
				cmd := exec.Command("tdx-agent", "measure", "--simulate", "--runtime-dir", string(dir))
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			})
		}
		steps.Wait()
		p := startAgent(t, dir)
		p.answering()
		var names []string
		for _, r := range p.eventLog().Records {
			names = append(names, r.Name)
		}
		p.kill()
		if n := strings.Count(strings.Join(names, " "), "system-ready"); n != 1 || names[len(names)-1] != "system-ready" {
			t.Fatalf("measured %v, want each event once, in order", names)
		}
	}
}

// TestBootStepWaitsNoLongerThanAsked holds the lock and takes the boot step.
func TestBootStepWaitsNoLongerThanAsked(t *testing.T) {
	dir, err := serverRuntimeDir(string(shortDir(t)), true)
	check(t, err)
	held, err := lockMeasure(t.Context(), dir)
	check(t, err)
	defer held.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lockMeasure(ctx, dir); err == nil || !strings.Contains(err.Error(), "another boot step") {
		t.Fatalf("got %v", err)
	}
}
