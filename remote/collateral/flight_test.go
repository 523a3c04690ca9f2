package collateral_test

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// gate is a handler that says when it is called, and waits to be let on to the PCCS.
type gate struct {
	p            *pccs
	called, pass chan struct{}
	gone         chan struct{} // gets a value when the client went instead
}

// gated puts a gate before the TCB info.
func gated(p *pccs) *gate {
	g := &gate{p, make(chan struct{}, 16), make(chan struct{}), make(chan struct{}, 16)}
	p.set(func(p *pccs) { p.instead["tcb"] = g.ServeHTTP })
	return g
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.called <- struct{}{}
	select {
	case <-g.pass:
	case <-r.Context().Done():
		g.gone <- struct{}{}
		return
	}
	g.p.set(func(p *pccs) { delete(p.instead, "tcb") })
	g.p.ServeHTTP(w, r)
	g.p.set(func(p *pccs) { p.requests = p.requests[:len(p.requests)-1] }) // counted twice
}

// TestSingleFlight has many callers for one set, some of whom go.
func TestSingleFlight(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	g := gated(p)
	cfg.PCCS = []string{p.URL}
	s := open(t, cfg)
	leaving, leave := context.WithCancel(context.Background())
	left := make(chan error)
	go func() {
		_, err := s.Fetch(leaving, fmspc, dcap.CAPlatform)
		left <- err
	}()
	<-g.called
	var wg sync.WaitGroup
	sets := make([]*collateral.Set, 8)
	for i := range sets {
		wg.Go(func() {
			var err error
			if sets[i], err = fetch(s); err != nil {
				t.Error(err)
			}
		})
	}
	waitFor(s, 1+len(sets))
	leave()
	err := <-left
	wantCode(t, err, "canceled")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v is no context.Canceled", err)
	}
	close(g.pass)
	wg.Wait()
	for _, set := range sets {
		if set != sets[0] {
			t.Error("more than one set")
		}
	}
	if n := len(p.taken()); n != 4 {
		t.Errorf("%d requests, want 4", n)
	}
}

// waitFor waits for this many callers to wait, of which nobody is told.
func waitFor(s *collateral.Store, callers int) {
	for {
		if _, n := s.Waiting(); n >= callers {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// TestLastLeaves shows that a fetch that nobody waits for ends, and is no failure.
func TestLastLeaves(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	g := gated(p)
	cfg.PCCS = []string{p.URL}
	s := open(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-g.called
		cancel()
	}()
	_, err := s.Fetch(ctx, fmspc, dcap.CAPlatform)
	wantCode(t, err, "canceled")
	if n, _ := s.Waiting(); n != 0 {
		t.Error("who comes now would join a fetch that ends")
	}
	<-g.gone
	close(g.pass)
	mustFetch(t, s)
	_, err = s.Fetch(ctx, fmspc, dcap.CAPlatform) // known: nothing to wait for
	wantCode(t, err, "")
}

// TestRefused shows that a failure counts for a minute, for its platform alone.
func TestRefused(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	p.set(func(p *pccs) { p.instead[""] = notFound })
	cfg.PCCS = []string{p.URL}
	s := open(t, cfg)
	for _, c := range []struct {
		after    time.Duration
		requests int
	}{{0, 1}, {0, 0}, {59 * time.Second, 0}, {60 * time.Second, 1}, {119 * time.Second, 0}} {
		now.set(testTime.Add(c.after))
		_, err := fetch(s)
		wantCode(t, err, "not_found")
		if n := len(p.taken()); n != c.requests {
			t.Errorf("%d requests after %v, want %d", n, c.after, c.requests)
		}
	}
	_, err := s.Fetch(t.Context(), [6]byte{1}, dcap.CAPlatform)
	wantCode(t, err, "not_found")
	if len(p.taken()) != 1 {
		t.Error("another platform was refused")
	}
	p.set(func(p *pccs) { clear(p.instead) })
	now.set(testTime.Add(3 * time.Minute))
	mustFetch(t, s)
}

// TestBudget spends a minute's fetches on platforms that nobody knows.
func TestBudget(t *testing.T) {
	cfg, now := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	p.set(func(p *pccs) { p.instead[""] = notFound })
	cfg.PCCS, cfg.Limits.PerMinute = []string{p.URL}, 3
	s := open(t, cfg)
	for i := byte(1); i <= 5; i++ {
		code := "not_found"
		if i > 3 {
			code = "fetch_budget"
		}
		_, err := s.Fetch(t.Context(), [6]byte{i}, dcap.CAPlatform)
		wantCode(t, err, code)
	}
	if n := len(p.taken()); n != 3 {
		t.Errorf("%d requests", n)
	}
	p.set(func(p *pccs) { clear(p.instead) })
	_, err := fetch(s)
	wantCode(t, err, "fetch_budget")
	now.set(testTime.Add(20 * time.Second)) // a third of the budget; and no failure to remember
	mustFetch(t, s)
}

// TestManyFlights fills the fetches that may go on at a time.
func TestManyFlights(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	p.set(func(p *pccs) { p.instead[""] = stall })
	cfg.PCCS, cfg.Limits.PerMinute = []string{p.URL}, 1000
	s := open(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			_, err := s.Fetch(ctx, [6]byte{byte(i + 1)}, dcap.CAPlatform)
			wantCode(t, err, "canceled")
		})
	}
	waitFor(s, 64)
	_, err := fetch(s)
	wantCode(t, err, "fetch_budget")
	cancel()
	wg.Wait()
}

// TestConcurrent uses a store from everywhere at once, while its source and its file
// become newer: what is known never becomes older.
func TestConcurrent(t *testing.T) {
	cfg, _ := config(t)
	var bundles [6][]byte
	for i := range bundles {
		bundles[i] = dated(t, 20+i, 5, 0)
	}
	p := newPCCS(t, bundles[0])
	name := writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), bundles[0])
	cfg.PCCS, cfg.Dir, cfg.Files = []string{p.URL}, t.TempDir(), []string{name}
	s := open(t, cfg)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for range 4 {
		wg.Go(func() {
			for last := 0; ctx.Err() == nil; {
				set, err := fetch(s)
				if err != nil || evaluation(set) < last || evaluation(s.Known(fmspc, dcap.CAPlatform)) < last {
					t.Errorf("evaluation number %d after %d, %v", evaluation(set), last, err)
				}
				last = evaluation(set)
				if _, err := s.Offered(bundles[len(bundles)-1]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i, bundle := range bundles {
		replaceFile(t, name, bundle)
		if err := s.Reload(); err != nil {
			t.Error(err)
		}
		p.serve(t, bundles[min(i+1, len(bundles)-1)])
		if _, err := s.Fetch(ctx, [6]byte{1}, dcap.CAPlatform); err == nil {
			t.Error("a set of another platform")
		}
	}
	cancel()
	wg.Wait()
	if evaluation(s.Known(fmspc, dcap.CAPlatform)) != 25 {
		t.Error("the newest set is not known")
	}
}

// replaceFile replaces a file at once.
func replaceFile(t testing.TB, name string, content []byte) {
	t.Helper()
	if err := os.Rename(writeFile(t, name+".new", content), name); err != nil {
		t.Fatal(err)
	}
}
