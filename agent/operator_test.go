package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// TestEmitExitStatus tells wrong names from those that nobody may use.
func TestEmitExitStatus(t *testing.T) {
	dir := shortDir(t)
	p := startAgent(t, dir)
	p.answering()
	for name, want := range map[string]int{"": exitUsage, "line\nbreak": exitUsage, "app-id": exitDenied, "release": 0} {
		p.wantExit(want, "emit", name, "00")
	}
}

// wantExit runs a command against the agent.
func (p *agentProcess) wantExit(want int, args ...string) string {
	p.t.Helper()
	cmd := exec.Command("tdx-agent", append(args, "--runtime-dir", string(p.dir))...)
	out, _ := cmd.CombinedOutput()
	if got := cmd.ProcessState.ExitCode(); got != want {
		p.t.Errorf("%q: exit status %d, want %d: %.500s", args, got, want, out)
	}
	return string(out)
}

// everyCommand are the commands that show or use the log.
var everyCommand = [][]string{{"status"}, {"status", "--json"}, {"quote"}, {"log", "show"}, {"log", "show", "--json"},
	{"log", "replay"}, {"log", "replay", "--json"}, {"log", "export"}, {"emit", "x", "00"}}

// TestDivergedExitStatus takes the last record away, as if somebody had extended
// RTMR3 without one. No command answers as if nothing were wrong, and all are well
// again with the record.
func TestDivergedExitStatus(t *testing.T) {
	dir := shortDir(t)
	p := startAgent(t, dir)
	p.answering()
	p.wantExit(0, "emit", "release", "00")
	file := filepath.Join(dir.log(), "rtmr3.log")
	whole, err := os.ReadFile(file)
	check(t, err)
	check(t, os.WriteFile(file, whole[:bytes.LastIndexByte(whole[:len(whole)-1], '\n')+1], 0o600))
	for _, args := range everyCommand {
		p.wantExit(exitDiverged, args...)
	}
	p.wantExit(exitTimeout, "wait", "--timeout", "100ms")
	check(t, os.WriteFile(file, whole, 0o600))
	for _, args := range everyCommand {
		p.wantExit(0, args...)
	}
}

// TestBootDivergedExitStatus extends RTMR2 of the running TD, which the boot event log
// then does not explain: quotes would be refused by whoever replays them.
func TestBootDivergedExitStatus(t *testing.T) {
	dir := shortDir(t)
	p := startAgent(t, dir)
	p.answering()
	p.wantExit(0, "wait", "--timeout", "20s")
	td, err := tdxsim.Open(dir.td())
	check(t, err)
	defer td.Close()
	check(t, td.Extend(2, measure.Digest{1}))
	for _, args := range everyCommand[:len(everyCommand)-1] { // an event may still be recorded
		p.wantExit(exitDiverged, args...)
	}
	p.wantExit(exitTimeout, "wait", "--timeout", "100ms")
	if out := p.wantExit(exitDiverged, "status"); !strings.Contains(out, "NOT READY") || !strings.Contains(out, "RTMR2  MISMATCH") {
		t.Errorf("status says %s", out)
	}
	p.kill()
	p = startAgent(t, dir) // and a restart does not forget
	p.answering()
	p.wantExit(exitDiverged, "status")
	p.wantExit(exitDiverged, "quote")
}

// TestStartsOnDamagedLog: whatever is wrong with the log, the agent starts and says so.
// Settings that only the log could show to be measured are off meanwhile.
func TestStartsOnDamagedLog(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"lost":    func([]byte) []byte { return nil },
		"flipped": func(b []byte) []byte { b[len(b)/4] ^= 1; return b },
		"garbage": func([]byte) []byte { return []byte("garbage\nand more\n") },
	} {
		for _, settings := range []string{"", "on_foreign_extend = \"serve\"\n[compat]\nfull_access = true\n[kernel]\nallow_env_overrides = true\n"} {
			t.Run(fmt.Sprintf("%s, loosened %v", name, settings != ""), func(t *testing.T) {
				dir := shortDir(t)
				config := filepath.Join(t.TempDir(), "agent.toml")
				check(t, os.WriteFile(config, []byte(settings), 0o600))
				p := startAgent(t, dir, "--config", config)
				p.answering()
				p.kill()
				file := filepath.Join(dir.log(), "rtmr3.log")
				b, err := os.ReadFile(file)
				check(t, err)
				check(t, os.WriteFile(file, damage(b), 0o600))
				p = startAgent(t, dir, "--config", config)
				p.answering()
				for _, args := range everyCommand {
					p.wantExit(exitDiverged, args...)
				}
				if out := p.wantExit(exitDiverged, "status"); strings.Contains(out, "LOOSENED") || strings.Contains(out, "dstack.sock gives read, quote, raw report data, keys") {
					t.Errorf("status says %s", out)
				}
			})
		}
	}
}

// TestOperatorConnectionsAreBounded opens what one user may have open on each of the
// operators' sockets. The next command is told so, and one connection less lets it in.
func TestOperatorConnectionsAreBounded(t *testing.T) {
	dir := shortDir(t)
	p := startAgent(t, dir)
	p.answering()
	for socket, args := range map[string][]string{dir.agentSocket(): {"status"}, dir.adminSocket(): {"emit", "x", "00"}} {
		var held []net.Conn
		for range maxConnsPerUID {
			held = append(held, p.hold(socket))
		}
		if out := p.wantExit(exitThrottled, args...); !strings.Contains(out, "too many open connections") {
			t.Errorf("%q beyond the bound says %s", args, out)
		}
		held[0].Close()
		p.freed(socket)
		p.wantExit(0, args...)
	}
}

// hold opens a connection and keeps it once the agent has taken it: one that is turned away,
// since a call of before is not over, is tried again.
func (p *agentProcess) hold(socket string) net.Conn {
	p.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		c, err := net.Dial("unix", socket)
		check(p.t, err)
		c.SetDeadline(end)
		_, err = io.WriteString(c, "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
		check(p.t, err)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		check(p.t, err)
		if resp.StatusCode == http.StatusNotFound {
			p.t.Cleanup(func() { c.Close() })
			return c
		}
		c.Close()
	}
	p.t.Fatalf("%s takes no further connection", socket)
	return nil
}

// freed waits until the agent takes a request on this socket again.
func (p *agentProcess) freed(socket string) {
	p.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, err := call(p.t.Context(), socket, "GET", "/nothing", nil); exitCode(err) == exitFailure {
			return // its own 404
		}
	}
	p.t.Fatalf("%s does not free a connection that was closed", socket)
}
