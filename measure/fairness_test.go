package measure_test

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// quoteTakes is the host's time for a quote in these tests, whose clock is not the real
// one: nothing in them takes other time.
const quoteTakes = 40 * time.Millisecond

// paced is a guest whose host takes quoteTakes for each quote.
func paced(t *testing.T) *guest {
	g := newGuest(t, false)
	g.takes(quoteTakes)
	return g
}

func (g *guest) takes(d time.Duration) {
	g.td.SetHost(tdxsim.HostBehaviour{Delay: d, Poll: d, Asked: func() { g.asked.Add(1) }})
}

// flood asks for remote quotes, 32 at a time, until it is told to stop.
func (g *guest) flood(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for n := range 32 {
		group.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				rd := measure.ReportData{'R', byte(n)}
				binary.LittleEndian.PutUint32(rd[2:], uint32(i))
				if _, err := g.RemoteEvidence(ctx, rd); err != nil {
					time.Sleep(quoteTakes)
				}
			}
		})
	}
	return func() { cancel(); group.Wait() }
}

// quotesIn counts a lone caller's quotes, one after the other, in a span of time.
func quotesIn(t *testing.T, g *guest, span time.Duration) (n int) {
	for end := time.Now().Add(span); time.Now().Before(end); n++ {
		rd := measure.ReportData{'L'}
		binary.LittleEndian.PutUint32(rd[2:], uint32(n))
		if _, err := g.Evidence(t.Context(), rd, "local"); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// TestLocalKeepsHalf floods the queue with remote requests: a caller of this TD keeps
// half of the rate that it has alone, and the remote ones get the rest.
func TestLocalKeepsHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		const span = 4 * time.Second
		alone := quotesIn(t, g, span)
		defer g.flood(t)()
		before := g.asked.Load()
		among := quotesIn(t, g, span)
		remote := int(g.asked.Load()-before) - among
		if 2*among < alone || remote < alone/3 {
			t.Errorf("%d quotes alone; %d among %d remote ones, want half each", alone, among, remote)
		}
	})
}

// TestRemoteGetsHalf leaves half of the host's time free when nobody else asks.
func TestRemoteGetsHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		defer g.flood(t)()
		const span = 4 * time.Second
		time.Sleep(span)
		if n := g.asked.Load(); n < int64(span/quoteTakes/2)-2 || n > int64(span/quoteTakes/2)+1 {
			t.Errorf("%d remote quotes in the time of %d", n, span/quoteTakes)
		}
	})
}

// TestRemoteIsBounded fills the remote peers' line: callers of this TD have their own.
func TestRemoteIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		for n := range 33 { // one of them is with the host
			go g.RemoteEvidence(t.Context(), measure.ReportData{byte(n)})
			synctest.Wait()
		}
		if s := g.Stats(); s.Remote != 32 || s.Queued != 32 {
			t.Errorf("stats are %+v, want 32 in the line", s)
		}
		if _, err := g.RemoteEvidence(t.Context(), measure.ReportData{99}); !errors.As(err, new(*measure.BusyError)) {
			t.Errorf("the 34th remote request: got %v, want a BusyError", err)
		}
		start := time.Now()
		if _, err := g.Evidence(t.Context(), measure.ReportData{98}, "local"); err != nil || time.Since(start) > 3*quoteTakes {
			t.Errorf("a caller of this TD waits for %v (%v)", time.Since(start), err)
		}
		time.Sleep(80 * quoteTakes)
	})
}

// TestSlowHost has the share of remote requests follow what quotes take.
func TestSlowHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		defer g.flood(t)()
		time.Sleep(time.Second)
		g.takes(10 * quoteTakes)
		time.Sleep(10 * quoteTakes) // what was begun before
		before := g.asked.Load()
		time.Sleep(40 * quoteTakes)
		if n := g.asked.Load() - before; n < 1 || n > 3 {
			t.Errorf("%d remote quotes in the time of 4", n)
		}
	})
}

// TestTooLate refuses at once what would come after the caller has gone, and spends no
// quote on it.
func TestTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		quotesIn(t, g, quoteTakes) // the queue knows what a quote takes
		before := g.asked.Load()
		for n := range 10 {
			go g.Evidence(t.Context(), measure.ReportData{byte(n)}, "patient")
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 2*quoteTakes)
		defer cancel()
		start := time.Now()
		_, err := g.Evidence(ctx, measure.ReportData{99}, "patient")
		busy, ok := errors.AsType[*measure.BusyError](err)
		if !ok || time.Since(start) != 0 || busy.RetryAfter() != 10*quoteTakes {
			t.Errorf("after %v: got %v, want a BusyError of 10 quotes at once", time.Since(start), err)
		}
		// another caller has its turn in time
		ctx, cancel = context.WithTimeout(t.Context(), 4*quoteTakes)
		defer cancel()
		if _, err := g.Evidence(ctx, measure.ReportData{98}, "other"); err != nil {
			t.Error(err)
		}
		time.Sleep(20 * quoteTakes)
		if n := g.asked.Load() - before; n != 11 {
			t.Errorf("the host made %d quotes, want 11", n)
		}
		if s := g.Stats(); s.Busy != 1 || s.Failed != 0 {
			t.Errorf("stats are %+v, want one that was busy and none that failed", s)
		}
	})
}

// TestShed drops what was in time when it was queued and is no longer, because the host
// has become slow.
func TestShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		quotesIn(t, g, quoteTakes)
		g.takes(5*quoteTakes - quoteTakes/2)
		go g.Evidence(t.Context(), measure.ReportData{1}, "a")
		synctest.Wait()
		before := g.asked.Load()
		result := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 5*quoteTakes)
			defer cancel()
			_, err := g.Evidence(ctx, measure.ReportData{2}, "b")
			result <- err
		}()
		synctest.Wait()
		go g.Evidence(t.Context(), measure.ReportData{3}, "c")
		if err := <-result; !errors.As(err, new(*measure.BusyError)) {
			t.Errorf("got %v, want a BusyError", err)
		}
		time.Sleep(20 * quoteTakes)
		if n := g.asked.Load() - before; n != 1 {
			t.Errorf("the host made %d quotes afterwards, want c's alone", n)
		}
	})
}

// TestIdleHostIsAsked lets a caller who has less time than quotes take try an idle
// host: it may have become fast again.
func TestIdleHostIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := paced(t)
		quotesIn(t, g, quoteTakes)
		g.takes(time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), quoteTakes/2)
		defer cancel()
		if _, err := g.Evidence(ctx, measure.ReportData{9}, "hurried"); err != nil {
			t.Error(err)
		}
	})
}
