package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
)

// TestStrangersSpendNoQuotes asks often and at once: the host makes one quote for each
// key, and new ones when RTMR3 has changed.
func TestStrangersSpendNoQuotes(t *testing.T) {
	d := benchDaemon(t)
	app, err := d.appKeys(t.Context())
	check(t, err)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) { // the background takes quotes of its own, until this
		if info, err := d.Info(t.Context()); err == nil && info.AppCert != "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the agent has no certificate")
		}
	}
	w := &workerGuest{daemon: d}
	ask := func() (ev *measure.Evidence) {
		for _, algorithm := range []string{"ed25519", "secp256k1"} {
			rd, err := app.AttestationReportData(algorithm)
			check(t, err)
			var all sync.WaitGroup
			for range 20 {
				all.Go(func() {
					got, err := w.Evidence(t.Context(), rd, guestapi.Caller{})
					if err != nil || string(got.Quote[568:632]) != string(rd[:]) {
						t.Errorf("%s: %v", algorithm, err)
					}
				})
			}
			all.Wait()
			if ev, err = w.Evidence(t.Context(), rd, guestapi.Caller{}); err != nil {
				t.Fatal(err)
			}
		}
		return ev
	}
	before := d.attester.Stats().OK
	first := ask()
	if got := d.attester.Stats().OK - before; got != 2 {
		t.Errorf("42 questions took %d quotes, want 2", got)
	}
	_, err = d.emit(t.Context(), measure.Entry{Name: "mine", Payload: []byte("x")})
	check(t, err)
	second := ask()
	if got := d.attester.Stats().OK - before; got != 4 {
		t.Errorf("after another event there were %d quotes, want 4", got)
	}
	if len(second.Events) != len(first.Events)+1 {
		t.Errorf("%d events, then %d", len(first.Events), len(second.Events))
	}
	if _, err := w.Evidence(t.Context(), measure.ReportData{1}, guestapi.Caller{}); err == nil || !strings.Contains(err.Error(), "evidence for 2 of them already") {
		t.Errorf("a third report data: %v", err)
	}
}

// TestStrangersWaitTogether has a host that fails: nobody asks it again at once.
func TestStrangersWaitTogether(t *testing.T) {
	d := benchDaemon(t)
	w := &workerGuest{daemon: d}
	failed := &workerAnswer{done: make(chan struct{}), err: errors.New("the host is out of quotes"), expires: time.Now().Add(time.Minute)}
	close(failed.done)
	s, err := d.ledger.Snapshot(t.Context())
	check(t, err)
	w.rtmr3, w.answers = s.Log, map[measure.ReportData]*workerAnswer{{}: failed}
	if _, err := w.Evidence(t.Context(), measure.ReportData{}, guestapi.Caller{}); err == nil || !strings.Contains(err.Error(), "out of quotes") {
		t.Errorf("error is %v", err)
	}
	if w.answers[measure.ReportData{}] != failed { // the host's own count includes what the background asks
		t.Error("the host was asked again")
	}
	failed.expires = time.Now().Add(-time.Second)
	if _, err := w.Evidence(t.Context(), measure.ReportData{}, guestapi.Caller{}); err != nil {
		t.Errorf("later: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.answers[measure.ReportData{2}] = &workerAnswer{done: make(chan struct{})}
	if _, err := w.Evidence(ctx, measure.ReportData{2}, guestapi.Caller{}); err == nil {
		t.Error("a caller who has left still waits")
	}
}

// TestStrangersArePaced asks for more than there is at once: a flood waits for its turn,
// and leaves the processors to this TD.
func TestStrangersArePaced(t *testing.T) {
	d := benchDaemon(t)
	path := filepath.Join(t.TempDir(), "worker.sock")
	l, err := net.Listen("unix", path)
	check(t, err)
	s := d.workerServer()
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	client := keptClient(path)
	start := time.Now()
	for range workerPace + workerPace/4 {
		r, err := client.Get("http://localhost/prpc/Nothing")
		check(t, err)
		r.Body.Close()
	}
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Errorf("%d calls took %v, want a quarter of a second", workerPace+workerPace/4, took)
	}
	client.CloseIdleConnections()
	check(t, s.Shutdown(t.Context()))
	check(t, <-done)
}

func TestWorkerListen(t *testing.T) {
	for listen, ok := range map[string]bool{"": true, "inherited": true, "/run/w.sock": true, "w.sock": false, "0.0.0.0:8090": false, "systemd": false} {
		path := filepath.Join(t.TempDir(), "agent.toml")
		check(t, os.WriteFile(path, []byte("[worker]\nlisten = \""+listen+"\"\n"), 0o600))
		if _, err := loadConfig(path); (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "worker.listen") {
			t.Errorf("%q: %v", listen, err)
		}
	}
	cfg := newConfig()
	cfg.Worker.Listen = workerInherited
	if _, err := listenAll(cfg, runtimeDir(t.TempDir()), true); err == nil || exitCode(err) != exitConfig || !strings.Contains(err.Error(), "tdx-agent-worker.socket") {
		t.Errorf("nothing to inherit: %v", err)
	}
}

// TestTakeListeners gives what systemd may pass.
func TestTakeListeners(t *testing.T) {
	pass := func(names ...string) map[string][]net.Listener {
		passed := map[string][]net.Listener{}
		for _, name := range names {
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			check(t, err)
			t.Cleanup(func() { l.Close() })
			passed[name] = append(passed[name], l)
		}
		return passed
	}
	usual := []string{"dstack", "tappd", "agent", "admin"}
	for _, c := range []struct {
		more   []string
		worker string
		want   string
	}{
		{nil, "", ""},
		{[]string{"worker"}, "inherited", ""},
		{nil, "inherited", `passed no socket named "worker"`},
		{[]string{"worker"}, "", `disable tdx-agent-worker.socket`},
		{[]string{"worker"}, "/run/w.sock", `disable tdx-agent-worker.socket`},
		{nil, "/run/w.sock", `let ListenStream= of tdx-agent-worker.socket name the path`},
		{[]string{"worker", "worker"}, "inherited", `2 sockets named "worker"`},
	} {
		got, err := takeListeners(pass(append(c.more, usual...)...), &Config{Worker: WorkerConfig{Listen: c.worker}})
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) || exitCode(err) != exitConfig {
				t.Errorf("%v, %q: %v", c.more, c.worker, err)
			}
			continue
		}
		if err != nil || len(got) != len(usual)+len(c.more) {
			t.Errorf("%v, %q: %d listeners, %v", c.more, c.worker, len(got), err)
		}
	}
}
