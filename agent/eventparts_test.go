package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/agent/status"
	"tdx-agent/measure"
)

// emitOn records an event through a socket, and returns the answer's status and text.
func emitOn(t *testing.T, c *http.Client, name string, payload int) (int, string) {
	t.Helper()
	resp, err := c.Post("http://localhost/EmitEvent", "application/json", strings.NewReader(fmt.Sprintf(`{"event":%q,"payload":%q}`, name, strings.Repeat("00", payload))))
	check(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	check(t, err)
	return resp.StatusCode, string(b)
}

// fill records events until one is refused, and returns how many were taken and why the
// last was not.
func fill(t *testing.T, c *http.Client, name string, payload int) (int, string) {
	t.Helper()
	for n := 0; ; n++ {
		if code, text := emitOn(t, c, name, payload); code != http.StatusOK {
			return n, text
		}
		if n > measure.DefaultMaxEvents {
			t.Fatal("the log takes any number of events")
		}
	}
}

// TestNobodyTakesAnothersEvents: whoever records all that he may, by number or by size,
// leaves the others and the operator their room.
func TestNobodyTakesAnothersEvents(t *testing.T) {
	dir, config := shortDir(t), filepath.Join(t.TempDir(), "agent.toml")
	check(t, os.WriteFile(config, []byte(`[compat]
full_access = true
[[application]]
name = "many"
grants = ["measure"]
allow_any_uid = true
[[application]]
name = "large"
grants = ["measure"]
allow_any_uid = true
max_events = 40
[[application]]
name = "late"
grants = ["measure"]
allow_any_uid = true
max_events = 216
[limits]
measure = {per_second = 10000.0, burst = 10000}
`), 0o600))
	p := startAgent(t, dir, "--config", config)
	p.answering()
	client := func(name string) *http.Client {
		c := keptClient(dir.applicationSocket(name))
		t.Cleanup(c.CloseIdleConnections)
		return c
	}
	n, text := fill(t, client("many"), "many/e", 0)
	if want := `the RTMR3 log has no more room for application \"many\": 65 events, at most 64;`; n != 64 || !strings.Contains(text, want) {
		t.Errorf("%d events, then %s; want 64, %s", n, text, want)
	}
	n, text = fill(t, client("large"), "large/e", 4096)
	if n != 1 || !strings.Contains(text, `no more room for application \"large\"`) || !strings.Contains(text, "bytes of JSON, at most 10240") {
		t.Errorf("%d events of 4 KiB, then %s; want 1 in 10 KiB", n, text)
	}
	// All 320 are declared here, which leaves no bytes to those that nobody declared.
	open := keptClient(dir.path("dstack.sock"))
	defer open.CloseIdleConnections()
	n, text = fill(t, open, "e", 0)
	if n != 0 || !strings.Contains(text, "no more room for dstack.sock and tappd.sock") {
		t.Errorf("%d events on dstack.sock, then %s", n, text)
	}
	// A restart remembers.
	p.kill()
	p = startAgent(t, dir, "--config", config)
	p.answering()
	if code, text := emitOn(t, client("many"), "many/e", 0); code == http.StatusOK || !strings.Contains(text, "no more room for") {
		t.Errorf("after a restart: %d, %s", code, text)
	}
	if n, text := fill(t, client("late"), "late/e", 24); n != 216 {
		t.Errorf("the last to come had %d events, want 216: %s", n, text)
	}
	p.wantExit(0, "emit", "operator", strings.Repeat("00", 500))
	var s status.Status
	check(t, callJSON(t.Context(), dir.agentSocket(), "/v1/status", &s))
	if len(s.Log.Parts) != 4 || s.Log.Parts[0].Events != 64 || s.Log.Parts[2].Events != 216 || s.Log.Parts[1].Bytes < 8192 {
		t.Errorf("status has %+v", s.Log.Parts)
	}
	full := map[string]bool{}
	for line := range strings.Lines(p.wantExit(0, "status")) {
		if owner, part, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && strings.Contains(part, " of at most ") {
			full[owner] = strings.HasSuffix(part, "; FULL until a reboot")
		}
	}
	want := map[string]bool{`application "many"`: true, `application "large"`: false, `application "late"`: true, "dstack.sock and tappd.sock": true} // the last has no bytes
	if !maps.Equal(full, want) {
		t.Errorf("status says of parts that are full %v, want %v", full, want)
	}
	if loosened := fmt.Sprint(s.Loosened); !strings.Contains(loosened, "application.large.max_events:40") || strings.Contains(loosened, "application.many.max_events") {
		t.Errorf("measured is %s", loosened)
	}
	p.kill()
}
