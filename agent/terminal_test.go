package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestErrorsSteerNoTerminal: what others say ends up in errors, such as a server's reason
// for its status.
func TestErrorsSteerNoTerminal(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"status", "--runtime-dir", "/nowhere/\x1b[2J\u202e\xff\r\n\té"}, &stdout, &stderr); code != exitUnreachable {
		t.Errorf("the status is %d", code)
	}
	if got := stderr.String(); !strings.Contains(got, `/nowhere/\x1b[2J\u202e\xff\r`+"\n\té/agent.sock") {
		t.Errorf("the error is %q", got)
	}
}
