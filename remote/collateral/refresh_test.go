package collateral_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// stepper is a Config.Wait that the test steps through time with.
type stepper struct {
	clock *clock
	waits chan time.Duration
	next  chan struct{}
}

func (s *stepper) wait(ctx context.Context, d time.Duration) error {
	select {
	case s.waits <- d:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-s.next:
		s.clock.set(s.clock.Now().Add(d))
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run starts Run and returns a function that lets it go on until it waits again.
func run(t *testing.T, cfg *collateral.Config, c *clock) (s *collateral.Store, start, step func()) {
	w := &stepper{c, make(chan time.Duration), make(chan struct{})}
	cfg.Wait = w.wait
	s = open(t, *cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	start = func() {
		go func() { done <- s.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		<-w.waits
	}
	return s, start, func() {
		w.next <- struct{}{}
		if d := <-w.waits; d <= 0 || d > time.Hour {
			t.Errorf("waits for %v", d)
		}
	}
}

// TestRefreshFails steps through the life of a set whose source has gone, and shows
// when it is asked, and that the set is known to its end.
func TestRefreshFails(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS = []string{p.URL}
	s, start, step := run(t, &cfg, now)
	now.set(testDay)
	set := mustFetch(t, s)
	p.set(func(p *pccs) { p.instead[""] = notFound })
	p.taken()
	start()
	var days []int
	end := testDay.Add(30 * day)
	for !now.Now().After(end.Add(-2 * day)) {
		if len(p.taken()) > 0 {
			days = append(days, int(now.Now().Sub(testDay)/day))
		}
		if s.Known(fmspc, dcap.CAPlatform) != set {
			t.Fatalf("not known at %v", now.Now())
		}
		step()
	}
	if want := []int{15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28}; !slices.Equal(days, want) {
		t.Errorf("asked on the days %v, want %v", days, want)
	}
	if h := s.Health(); h.Failed != uint64(len(days)) {
		t.Errorf("%d refreshes have failed, want %d", h.Failed, len(days))
	}
	if n := s.Counts(); n.Hits == 0 || n.Misses != 0 {
		t.Errorf("%d hits and %d misses", n.Hits, n.Misses)
	}
	for !now.Now().After(end) {
		step()
	}
	p.taken()
	step() // after the end it goes on every hour
	if len(p.taken()) != 1 || s.Known(fmspc, dcap.CAPlatform) != nil {
		t.Error("not asked after the end, or still known")
	}
	p.set(func(p *pccs) { clear(p.instead) })
	p.serve(t, dated(t, 20, 6, 30*day))
	step()
	if again := s.Known(fmspc, dcap.CAPlatform); again == nil || again == set {
		t.Error("no new set when the source is back")
	}
}

// TestRefresh renews a file's set from the network, keeps serving meanwhile, and
// refuses an older one.
func TestRefresh(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 19, 4, -time.Hour))
	cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
	cfg.Files = []string{writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), dated(t, 20, 5, 0))}
	s, start, step := run(t, &cfg, now)
	known := func() *collateral.Set { return s.Known(fmspc, dcap.CAPlatform) }
	start()
	file := known()
	now.set(testDay.Add(15*day - time.Minute))
	step()
	if n := len(p.taken()); known() != file || n != 4 {
		t.Errorf("%d requests, and a set of evaluation number %d", n, evaluation(known()))
	}
	p.serve(t, dated(t, 21, 6, 14*day))
	g := gated(p)
	now.set(testDay.Add(16*day - time.Minute))
	go func() {
		<-g.called
		if known() != file {
			t.Error("the set is not served while the next is fetched")
		}
		close(g.pass)
	}()
	step()
	if evaluation(known()) != 21 || known().Source != "pccs "+p.URL {
		t.Errorf("evaluation number %d", evaluation(known()))
	}
	p.taken()
	for range 24 {
		step()
	}
	if len(p.taken()) != 0 {
		t.Error("a new set is fetched again within its first half")
	}
	s = open(t, cfg) // the file is older than the cache now
	if set := mustFetch(t, s); evaluation(set) != 21 {
		t.Errorf("evaluation number %d after a restart", evaluation(set))
	}
}

// TestJitter delays a refresh, within bounds.
func TestJitter(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS = []string{p.URL}
	cfg.Jitter = func(most time.Duration) time.Duration { return most }
	s, start, step := run(t, &cfg, now)
	now.set(testDay)
	mustFetch(t, s)
	start()
	p.taken()
	for len(p.taken()) == 0 {
		step()
	}
	if late := now.Now().Sub(testDay.Add(15 * day)); late < 11*time.Hour || late > 13*time.Hour {
		t.Errorf("refreshed %v late, want 12h", late)
	}
}

// TestRunAlone has nothing to refresh from.
func TestRunAlone(t *testing.T) {
	cfg, now := config(t)
	cfg.Files = []string{writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), dated(t, 20, 5, 0))}
	_, start, step := run(t, &cfg, now)
	start()
	for range 24 * 31 {
		step()
	}
}

// TestRunEnds ends Run while it waits for a source.
func TestRunEnds(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	g := gated(p)
	cfg.PCCS = []string{p.URL}
	cfg.Files = []string{writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), dated(t, 20, 5, -20*day))}
	s := open(t, cfg)
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		<-g.called
		cancel(errors.New("the test is over"))
	}()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
	<-g.gone
}
