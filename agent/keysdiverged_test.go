package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/atls"
)

// keyCalls are the calls that give something of the application's keys.
var keyCalls = []struct{ socket, path, body string }{
	{"dstack.sock", "/GetKey", `{"path":"a"}`},
	{"dstack.sock", "/GetTlsKey", `{}`},
	{"dstack.sock", "/Sign", `{"algorithm":"ed25519","data":"00"}`},
	{"tappd.sock", "/prpc/DeriveKey", `{"path":"a"}`},
	{"tappd.sock", "/prpc/DeriveKey", `{"random_seed":true}`},
	{"tappd.sock", "/prpc/DeriveK256Key", `{"path":"a"}`},
}

// wantKeys makes all keyCalls. Each must end with this exit status, 0 with a key, others
// with these words.
func (p *agentProcess) wantKeys(exit int, words string) {
	p.t.Helper()
	for _, call := range keyCalls {
		c := keptClient(p.dir.path(call.socket))
		resp, err := c.Post("http://localhost"+call.path, "application/json", strings.NewReader(call.body))
		check(p.t, err)
		b, err := io.ReadAll(resp.Body)
		check(p.t, err)
		resp.Body.Close()
		c.CloseIdleConnections()
		status, header := http.StatusOK, ""
		if exit != 0 {
			status, header = http.StatusBadRequest, fmt.Sprint(exit)
		}
		if resp.StatusCode != status || resp.Header.Get(guestapi.ExitHeader) != header || !strings.Contains(string(b), words) {
			p.t.Errorf("%s %s: got %s, exit status %q, %.300s; want %d, %q, %q", call.path, call.body, resp.Status, resp.Header.Get(guestapi.ExitHeader), b, status, header, words)
		}
	}
}

func fullAccess(t *testing.T, more string) (flag, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "agent.toml")
	check(t, os.WriteFile(path, []byte(more+"\n[compat]\nfull_access = true\n"), 0o600))
	return "--config", path
}

// TestNoKeysWhileDiverged extends registers that no log then explains. Keys that were
// given before are given no longer, as quotes are not, and the audit record says so.
func TestNoKeysWhileDiverged(t *testing.T) {
	for register, words := range map[int]string{measure.RTMR3: "no keys: RTMR3 is ", 2: "no keys: RTMR2 is "} {
		dir := shortDir(t)
		flag, config := fullAccess(t, "")
		p := startAgent(t, dir, flag, config)
		p.answering()
		p.wantKeys(0, "")
		td, err := tdxsim.Open(dir.td())
		check(t, err)
		check(t, td.Extend(register, measure.Digest{1}))
		check(t, td.Close())
		p.wantKeys(exitDiverged, words)
		p.kill()
		chain, err := audit.Verify(dir.log())
		check(t, err)
		refused := map[string]int{}
		for _, e := range chain.Entries {
			if e.Kind == audit.KindCall && e.Result == audit.Failed && e.Exit == exitDiverged {
				refused[e.Method]++
			}
		}
		if refused["GetKey"] != 1 || refused["GetTlsKey"] != 1 || refused["Sign"] != 1 || refused["DeriveKey"] != 2 || refused["DeriveK256Key"] != 1 {
			t.Errorf("RTMR%d: the audit record has %v", register, refused)
		}
		p = startAgent(t, dir, flag, config) // and a restart does not forget
		p.answering()
		p.wantKeys(exitDiverged, words)
		p.kill()
	}
}

// TestNoChannelSignatureWhileDiverged: a peer that has seen a quote takes the agent key's
// signature for the word that all is as it was then.
func TestNoChannelSignatureWhileDiverged(t *testing.T) {
	for register, words := range map[int]string{measure.RTMR3: "RTMR3 is ", 2: "RTMR2 is "} {
		dir := shortDir(t)
		p := startAgent(t, dir)
		p.answering()
		a, err := newChannelAttester(t.Context(), dir)
		check(t, err)
		defer a.client.CloseIdleConnections()
		session := &atls.Session{Role: atls.Server}
		if st, err := a.Attest(t.Context(), session, true); err != nil || len(st.Signature) == 0 {
			t.Errorf("before: %v", err)
		}
		td, err := tdxsim.Open(dir.td())
		check(t, err)
		check(t, td.Extend(register, measure.Digest{1}))
		check(t, td.Close())
		if st, err := a.Attest(t.Context(), session, true); err == nil || exitCode(err) != exitDiverged || !strings.Contains(err.Error(), words) {
			t.Errorf("RTMR%d: got %+v, %v, want exit status %d and %q", register, st, err, exitDiverged, words)
		}
		p.kill()
	}
}

// TestKeysWhileDivergedIfTold: whoever has quotes served has keys served.
func TestKeysWhileDivergedIfTold(t *testing.T) {
	dir := shortDir(t)
	flag, config := fullAccess(t, `on_foreign_extend = "serve"`)
	p := startAgent(t, dir, flag, config)
	p.answering()
	td, err := tdxsim.Open(dir.td())
	check(t, err)
	defer td.Close()
	check(t, td.Extend(measure.RTMR3, measure.Digest{1}))
	p.wantKeys(0, "")
	p.kill()
}

// TestKeysAndTheLogFile: what became of the log's file counts once it was noticed, which
// every 30 s it is, and a log that another process has added to is read again.
func TestKeysAndTheLogFile(t *testing.T) {
	dir := shortDir(t)
	flag, config := fullAccess(t, "")
	p := startAgent(t, dir, flag, config)
	p.answering()
	p.wantKeys(0, "")
	log := filepath.Join(dir.log(), "rtmr3.log")
	whole, err := os.ReadFile(log)
	check(t, err)
	check(t, os.Rename(log, log+".copy"))
	check(t, os.WriteFile(log, append([]byte("x"), whole[1:]...), 0o600))
	p.answering()
	p.wantKeys(exitDiverged, "the RTMR3 log is damaged")
	check(t, os.Rename(log+".copy", log))
	p.wantKeys(0, "")
	check(t, os.Remove(log))
	p.answering()
	p.wantKeys(exitDiverged, "somebody has removed it")
	check(t, os.WriteFile(log, whole, 0o600))
	p.wantKeys(0, "")

	td, err := tdxsim.Open(dir.td())
	check(t, err)
	defer td.Close()
	other, err := measure.OpenLedger(t.Context(), measure.LedgerConfig{Dir: dir.log(), Registers: td})
	check(t, err)
	defer other.Close()
	_, err = other.Record(t.Context(), measure.Entry{Name: "later"})
	check(t, err)
	p.wantKeys(0, "")
	p.kill()
}

// BenchmarkKeys is what a call for keys spends on whether the logs explain the registers.
func BenchmarkKeys(b *testing.B) {
	d := benchDaemon(b)
	for b.Loop() {
		_, err := d.appKeys(b.Context())
		check(b, err)
	}
}
