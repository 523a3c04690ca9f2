package main

import (
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoDumpsOfKeys asks the kernel, in a process for each command, which fails at once, and
// after that the memory would be in its core file.
func TestNoDumpsOfKeys(t *testing.T) {
	const inside = "TDX_AGENT_TEST_DUMPS"
	if line := os.Getenv(inside); line != "" {
		run(t.Context(), strings.Fields(line), io.Discard, io.Discard)
		if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); n != 0 || err != nil {
			t.Fatalf("PR_GET_DUMPABLE is %d, %v, want 0", n, err)
		}
		return
	}
	for line, kept := range map[string]bool{
		"serve --config /none":                              true,
		"measure --config /none":                            true,
		"endpoint --policy /none --service a=127.0.0.1:1":   true,
		"connect --policy /none --service a unix:/none":     true,
		"fetch --policy /none --service a http://127.0.0.1": true,
		"get-cert --policy /none unix:/none":                true,
		"egress --config /none":                             false, // has none
	} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoDumpsOfKeys$")
		cmd.Env = append(os.Environ(), inside+"="+line)
		if out, err := cmd.CombinedOutput(); (err == nil) != kept {
			t.Errorf("%s: %v: %s", line, err, out)
		}
	}
}
