package measure_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/measure/tsm"
)

// guest is an Attester on a simulated TD whose host waits when told to.
type guest struct {
	*measure.Attester
	td     *tdxsim.TD
	ledger *measure.Ledger
	asked  atomic.Int64  // quotes the host was asked for
	begun  chan struct{} // one value for every quote the host was asked for
}

func newGuest(t *testing.T, serveDiverged bool) *guest {
	t.Helper()
	td, err := tdxsim.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	reports, err := tsm.OpenReports(tsm.ReportsConfig{Client: td.Client()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reports.Close() })
	boot, err := measure.ParseCCEL(td.CCEL())
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{td: td, begun: make(chan struct{}, 100)}
	g.ledger = openLedger(t, measure.LedgerConfig{Dir: t.TempDir(), Registers: td})
	g.Attester = measure.NewAttester(measure.AttesterConfig{Quoter: reports, Ledger: g.ledger, Boot: boot, VMConfig: `{"x":1}`, ServeDiverged: serveDiverged})
	g.hold(nil)
	return g
}

// hold makes the host keep every quote until the channel is closed.
func (g *guest) hold(until <-chan struct{}) {
	g.td.SetHost(tdxsim.HostBehaviour{Hold: until, Asked: func() {
		g.asked.Add(1)
		g.begun <- struct{}{}
	}})
}

// untilQueued returns when n requests wait. The queue has no event for that.
func (g *guest) untilQueued(n int) {
	for g.Stats().Queued < n {
		runtime.Gosched()
	}
}

// replays demands that a pair is one that a verifier accepts.
func replays(t *testing.T, ev *measure.Evidence) *measure.Quote {
	t.Helper()
	q, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		t.Fatal(err)
	}
	if rtmr, err := measure.Replay(ev.Events); err != nil || rtmr != q.Body.RTMR {
		t.Fatalf("log replays to %v, quote says %v (%v)", rtmr, q.Body.RTMR, err)
	}
	return q
}

func TestEvidenceIsAPair(t *testing.T) {
	g := newGuest(t, false)
	record(t, g.ledger, measure.Entry{Name: "one"})
	rd := measure.ReportData{1, 2, 3}
	ev, err := g.Evidence(t.Context(), rd, "a")
	if err != nil {
		t.Fatal(err)
	}
	if q := replays(t, ev); q.Body.ReportData != rd || ev.VMConfig != `{"x":1}` || len(ev.Events) != 21 {
		t.Errorf("report data %s, vm_config %s, %d events", q.Body.ReportData, ev.VMConfig, len(ev.Events))
	}
	if s := g.Stats(); s.OK != 1 || s.Failed != 0 || s.LastSuccess.IsZero() {
		t.Errorf("stats are %+v", s)
	}
}

// TestBootLogDoesNotExplain extends RTMR2 behind the boot event log's back: no verifier
// would accept such a pair, so it is given only where the operator has said so.
func TestBootLogDoesNotExplain(t *testing.T) {
	for _, serve := range []bool{false, true} {
		g := newGuest(t, serve)
		record(t, g.ledger, measure.Entry{Name: "one"})
		if err := g.td.Extend(2, measure.Digest{1}); err != nil {
			t.Fatal(err)
		}
		_, err := g.Evidence(t.Context(), measure.ReportData{}, "a")
		var d *measure.DivergenceError
		if serve && err != nil || !serve && (!errors.As(err, &d) || d.Boot != "RTMR2") {
			t.Errorf("serve %v: got %v", serve, err)
		}
		regs, err := g.td.Registers()
		if err != nil {
			t.Fatal(err)
		}
		if err := g.CheckBoot(regs); !errors.As(err, &d) || d.Register != regs.RTMR[2] {
			t.Errorf("CheckBoot: got %v", err)
		}
	}
}

// TestEventDuringQuote records events while the host is silent: neither waits for the
// other, and the log that comes back is the one of the quote.
func TestEventDuringQuote(t *testing.T) {
	g := newGuest(t, false)
	release := make(chan struct{})
	g.hold(release)
	type answer struct {
		ev  *measure.Evidence
		err error
	}
	done := make(chan answer, 1)
	go func() {
		ev, err := g.Evidence(context.Background(), measure.ReportData{}, "a")
		done <- answer{ev, err}
	}()
	<-g.begun
	record(t, g.ledger, measure.Entry{Name: "meanwhile"}) // would hang if it waited for the quote
	close(release)
	a := <-done
	if a.err != nil {
		t.Fatal(a.err)
	}
	replays(t, a.ev)
}

func TestForeignExtendStopsQuotes(t *testing.T) {
	for _, serve := range []bool{false, true} {
		g := newGuest(t, serve)
		record(t, g.ledger, measure.Entry{Name: "ours"})
		if err := g.td.Extend(measure.RTMR3, measure.Digest{7}); err != nil {
			t.Fatal(err)
		}
		_, err := g.Evidence(t.Context(), measure.ReportData{}, "a")
		if serve && err != nil {
			t.Errorf(`on_foreign_extend = "serve": %v`, err)
		}
		if d := (*measure.DivergenceError)(nil); !serve && !errors.As(err, &d) {
			t.Errorf("got %v, want a DivergenceError", err)
		}
	}
}

// TestForeignExtendDuringQuote is the one that only the quote can show.
func TestForeignExtendDuringQuote(t *testing.T) {
	g := newGuest(t, false)
	extended := make(chan struct{})
	g.hold(extended)
	done := make(chan error, 1)
	go func() {
		_, err := g.Evidence(context.Background(), measure.ReportData{}, "a")
		done <- err
	}()
	<-g.begun
	if err := g.td.Extend(measure.RTMR3, measure.Digest{7}); err != nil {
		t.Fatal(err)
	}
	close(extended)
	// the quote was made before the extend or after it: both are answers a caller can
	// use, a pair that replays or the refusal
	if err := <-done; err != nil && !errors.As(err, new(*measure.DivergenceError)) {
		t.Errorf("got %v", err)
	}
	if _, err := g.Evidence(t.Context(), measure.ReportData{}, "a"); !errors.As(err, new(*measure.DivergenceError)) {
		t.Errorf("afterwards: got %v, want a DivergenceError", err)
	}
}

// TestSameRequestsShareAQuote holds the first quote and asks for the same again.
func TestSameRequestsShareAQuote(t *testing.T) {
	g := newGuest(t, false)
	release := make(chan struct{})
	g.hold(release)
	var wg sync.WaitGroup
	ask := func(rd measure.ReportData) {
		wg.Go(func() {
			if _, err := g.Evidence(context.Background(), rd, "a"); err != nil {
				t.Error(err)
			}
		})
	}
	ask(measure.ReportData{1})
	<-g.begun
	for range 20 { // more than a caller may queue, but they are all the same
		ask(measure.ReportData{1})
	}
	for g.Stats().Waiting < 21 {
		runtime.Gosched()
	}
	// whoever asks after an event must not get the quote from before it
	record(t, g.ledger, measure.Entry{Name: "news"})
	ask(measure.ReportData{1})
	g.untilQueued(1)
	close(release)
	wg.Wait()
	if n := g.asked.Load(); n != 2 {
		t.Errorf("the host made %d quotes, want 2", n)
	}
}

// TestQueueIsFairAndBounded fills one caller's share: others still get their turn.
func TestQueueIsFairAndBounded(t *testing.T) {
	g := newGuest(t, false)
	release := make(chan struct{})
	g.hold(release)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var order []string
	ask := func(caller string, n int) {
		before := g.Stats().Queued
		wg.Go(func() {
			_, err := g.Evidence(context.Background(), measure.ReportData{byte(n), caller[0]}, caller)
			if err != nil {
				t.Errorf("%s %d: %v", caller, n, err)
			}
			mu.Lock()
			order = append(order, caller)
			mu.Unlock()
		})
		g.untilQueued(before + 1)
	}
	wg.Go(func() { g.Evidence(context.Background(), measure.ReportData{}, "first") })
	<-g.begun
	for n := range 16 {
		ask("greedy", n)
	}
	var busy *measure.BusyError
	if _, err := g.Evidence(t.Context(), measure.ReportData{99}, "greedy"); !errors.As(err, &busy) || busy.RetryAfter() <= 0 {
		t.Errorf("the 17th request of one caller: got %v, want a BusyError", err)
	}
	ask("modest", 0)
	for c := range 47 {
		ask(fmt.Sprintf("%c", 'A'+c), 100)
	}
	if _, err := g.Evidence(t.Context(), measure.ReportData{77}, "late"); !errors.As(err, &busy) {
		t.Errorf("the 65th request: got %v, want a BusyError", err)
	}
	close(release)
	wg.Wait()
	at := map[string]int{}
	for i, c := range order {
		if _, ok := at[c]; !ok {
			at[c] = i
		}
	}
	if at["modest"] > 10 {
		t.Errorf("the modest caller was served as number %d, behind the greedy one", at["modest"]+1)
	}
}

func TestAbandonedRequestLeavesTheQueue(t *testing.T) {
	g := newGuest(t, false)
	release := make(chan struct{})
	g.hold(release)
	done := make(chan struct{})
	go func() { g.Evidence(context.Background(), measure.ReportData{1}, "a"); close(done) }()
	<-g.begun
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := g.Evidence(ctx, measure.ReportData{2}, "b")
		gone <- err
	}()
	g.untilQueued(1)
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
	if s := g.Stats(); s.Queued != 0 || s.Failed != 0 || s.LastError != "" {
		t.Errorf("%d requests are queued and %d have failed (%q), want none: the host has done nothing wrong", s.Queued, s.Failed, s.LastError)
	}
	close(release)
	<-done
	if n := g.asked.Load(); n != 1 {
		t.Errorf("the host made %d quotes, want 1", n)
	}

	// Whoever has waited as long as he could is another matter.
	release = make(chan struct{})
	g.hold(release)
	late, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer stop()
	if _, err := g.Evidence(late, measure.ReportData{3}, "c"); !errors.Is(err, context.DeadlineExceeded) || g.Stats().Failed != 1 {
		t.Errorf("got %v, and %d have failed, want 1", err, g.Stats().Failed)
	}
	close(release)
}

// TestBadQuotesAreRefused lets the host answer what no caller may see.
func TestBadQuotesAreRefused(t *testing.T) {
	for name, h := range map[string]tdxsim.HostBehaviour{
		"empty": {Empty: true}, "short": {Length: 1019}, "another's": {ForeignReportData: true}, "version 3": {BadVersion: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, false)
			g.td.SetHost(h)
			if ev, err := g.Evidence(t.Context(), measure.ReportData{1}, "a"); err == nil {
				t.Errorf("handed out a quote of %d bytes", len(ev.Quote))
			}
			if s := g.Stats(); s.Failed != 1 || s.LastError == "" || s.LastFailure.IsZero() {
				t.Errorf("stats are %+v", s)
			}
			g.td.SetHost(tdxsim.HostBehaviour{})
			if _, err := g.Evidence(t.Context(), measure.ReportData{1}, "a"); err != nil {
				t.Error(err)
			}
			if s := g.Stats(); s.Failed != 1 || s.LastError != "" || s.LastFailure.IsZero() {
				t.Errorf("after a quote that worked, stats are %+v; want no last error", s)
			}
		})
	}
}
