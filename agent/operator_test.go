package main

import (
	"os/exec"
	"testing"
)

// TestEmitExitStatus tells wrong names from those that nobody may use.
func TestEmitExitStatus(t *testing.T) {
	dir := shortDir(t)
	p := startAgent(t, dir)
	p.answering()
	for _, c := range []struct {
		name string
		want int
	}{{"", exitUsage}, {"line\nbreak", exitUsage}, {"app-id", exitDenied}, {"release", 0}} {
		cmd := exec.Command("tdx-agent", "emit", c.name, "00", "--runtime-dir", string(dir))
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != c.want {
			t.Errorf("emit %q: exit status %d, want %d: %s", c.name, got, c.want, out)
		}
	}
}
