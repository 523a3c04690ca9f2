package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/agent/audit"
	"tdx-agent/measure"
)

// agentProcess is the real program, serving a simulated TD.
type agentProcess struct {
	t      testing.TB
	dir    runtimeDir
	cmd    *exec.Cmd
	stderr *strings.Builder
}

func startAgent(t testing.TB, dir runtimeDir, args ...string) *agentProcess {
	t.Helper()
	p := &agentProcess{t: t, dir: dir, stderr: &strings.Builder{}}
	p.cmd = exec.Command("tdx-agent", append([]string{"serve", "--simulate", "--runtime-dir", string(dir)}, args...)...)
	p.cmd.Stderr = p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill() })
	return p
}

// answering waits until the agent serves: it is asked until it answers.
func (p *agentProcess) answering() {
	p.t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, err := call(context.Background(), p.dir.agentSocket(), "GET", "/livez", nil); err == nil {
			return
		}
		if p.cmd.ProcessState != nil {
			break
		}
	}
	p.t.Fatalf("the agent does not answer:\n%s", p.stderr)
}

// kill ends the process as a crash does.
func (p *agentProcess) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

func (p *agentProcess) eventLog() *logDocument {
	p.t.Helper()
	var doc logDocument
	if err := callJSON(p.t.Context(), p.dir.agentSocket(), "/v1/log", &doc); err != nil {
		p.t.Fatal(err)
	}
	return &doc
}

// shortDir is a folder whose path leaves room for a socket's name.
func shortDir(t *testing.T) runtimeDir {
	t.Helper()
	dir, err := os.MkdirTemp("", "tdx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return runtimeDir(dir)
}

// TestKilledAnywhere kills the real process at random moments while it extends
// RTMR3 for several callers. Whenever it comes back, the log explains the register
// and holds every event that a caller was told of. So does the audit record.
func TestKilledAnywhere(t *testing.T) {
	kills := 200
	if s := os.Getenv("TDX_AGENT_KILLS"); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil {
			t.Fatalf("TDX_AGENT_KILLS: %v", err)
		}
	} else if testing.Short() {
		kills = 10
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := shortDir(t)
	acknowledged := map[string]bool{}
	p := startAgent(t, dir)
	p.answering()
	for i := range kills {
		for _, name := range emitUntilKilled(p, i, time.Duration(random.Int64N(int64(8*time.Millisecond)))) {
			acknowledged[name] = true
		}
		var args []string
		if len(acknowledged) > 250 {
			acknowledged, args = map[string]bool{}, []string{"--simulate-reboot"}
		}
		p = startAgent(t, dir, args...)
		p.answering()
		checkLog(t, fmt.Sprintf("kill %d", i), p.eventLog(), acknowledged)
		checkAudit(t, fmt.Sprintf("kill %d", i), dir, acknowledged)
	}
	p.kill()
}

// emitUntilKilled returns the events that callers were told of.
func emitUntilKilled(p *agentProcess, round int, after time.Duration) []string {
	var mu sync.Mutex
	var told []string
	started := make(chan struct{})
	var once sync.Once
	var wg sync.WaitGroup
	for c := range 3 {
		wg.Go(func() {
			client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", p.dir.adminSocket())
			}}}
			defer client.CloseIdleConnections()
			for n := 0; ; n++ {
				name := fmt.Sprintf("e-%d-%d-%d", round, c, n)
				resp, err := client.Post("http://localhost/v1/emit", "application/json", strings.NewReader(`{"event":"`+name+`","payload":"00"}`))
				if err != nil {
					return
				}
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK {
					return
				}
				mu.Lock()
				told = append(told, name)
				mu.Unlock()
				once.Do(func() { close(started) })
			}
		})
	}
	select {
	case <-started:
	case <-time.After(10 * time.Second):
	}
	time.Sleep(after) // the random moment of the kill
	p.kill()
	wg.Wait()
	return told
}

func checkLog(t *testing.T, what string, doc *logDocument, acknowledged map[string]bool) {
	t.Helper()
	if doc.Problem != "" {
		t.Fatalf("%s: %s", what, doc.Problem)
	}
	events, err := measure.ParseEventLog(doc.Events)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	rtmr, err := measure.Replay(events)
	if err != nil || rtmr[measure.RTMR3].String() != doc.Registers[measure.RTMR3] {
		t.Fatalf("%s: log replays to %s, register is %s (%v)", what, rtmr[measure.RTMR3], doc.Registers[measure.RTMR3], err)
	}
	seen := map[string]bool{}
	for _, e := range events {
		if seen[e.Name] {
			t.Fatalf("%s: event %q is in the log twice", what, e.Name)
		}
		seen[e.Name] = true
	}
	for name := range acknowledged {
		if !seen[name] {
			t.Fatalf("%s: event %q was acknowledged and is not in the log", what, name)
		}
	}
}

func checkAudit(t *testing.T, what string, dir runtimeDir, acknowledged map[string]bool) {
	t.Helper()
	chain, err := audit.Verify(dir.log())
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	seen := map[string]bool{}
	for _, e := range chain.Entries {
		seen[e.Name] = seen[e.Name] || e.Result == audit.OK
	}
	for name := range acknowledged {
		if !seen[name] {
			t.Fatalf("%s: event %q was acknowledged and is not in the audit record", what, name)
		}
	}
}

// TestEmittersBesideQuotes takes quotes while eight callers extend RTMR3: every pair
// that is handed out replays.
func TestEmittersBesideQuotes(t *testing.T) {
	dir := shortDir(t)
	p := startAgent(t, dir)
	p.answering()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for c := range 8 {
		wg.Go(func() {
			for n := 0; n < 40; n++ {
				body := fmt.Sprintf(`{"event":"e-%d-%d","payload":"00"}`, c, n)
				if _, err := call(ctx, dir.adminSocket(), "POST", "/v1/emit", []byte(body)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	emitted := make(chan struct{})
	go func() { wg.Wait(); close(emitted) }()
	pairs, lengths := 0, map[int]bool{}
	for done := false; !done; pairs++ {
		select {
		case <-emitted:
			done = true
		default:
		}
		b, err := call(ctx, dir.path("dstack.sock"), "POST", "/GetQuote", fmt.Appendf(nil, `{"report_data":"%04x"}`, pairs))
		if err != nil {
			t.Fatal(err)
		}
		lengths[checkPair(t, b)] = true
	}
	t.Logf("%d pairs, %d different lengths of the log", pairs, len(lengths))
	if len(lengths) < 2 {
		t.Error("no quote was taken while events were recorded")
	}
	p.kill()
}

// checkPair replays an answer of GetQuote and returns the length of its log.
func checkPair(t *testing.T, answer []byte) int {
	t.Helper()
	var pair struct{ Quote, EventLog string }
	var raw map[string]string
	if err := json.Unmarshal(answer, &raw); err != nil {
		t.Fatal(err)
	}
	pair.Quote, pair.EventLog = raw["quote"], raw["event_log"]
	quote, err := measure.ParseQuote(unhex(t, pair.Quote))
	if err != nil {
		t.Fatal(err)
	}
	events, err := measure.ParseEventLog([]byte(pair.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	rtmr, err := measure.Replay(events)
	if err != nil || rtmr != quote.Body.RTMR {
		t.Fatalf("a pair does not replay (%v):\nlog   %v\nquote %v", err, rtmr, quote.Body.RTMR)
	}
	return len(events)
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := payloadArg(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
