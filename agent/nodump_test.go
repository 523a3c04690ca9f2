package main

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// TestForbidDumps asks the kernel, in a process of its own: the setting is for good.
func TestForbidDumps(t *testing.T) {
	const inside = "TDX_AGENT_TEST_DUMPS"
	if os.Getenv(inside) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestForbidDumps$")
		cmd.Env = append(os.Environ(), inside+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	check(t, forbidDumps())
	if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); n != 0 || err != nil {
		t.Fatalf("PR_GET_DUMPABLE is %d, %v, want 0", n, err)
	}
}
