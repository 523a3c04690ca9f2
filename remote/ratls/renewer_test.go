package ratls_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// attester makes quote-shaped evidence, and can be told to fail and to change.
type attester struct {
	t       testing.TB
	changes chan struct{}

	mu     sync.Mutex // guards what follows
	err    error
	quotes []time.Time
}

func (a *attester) Evidence(ctx context.Context, spki []byte) (*measure.Evidence, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quotes = append(a.quotes, time.Now())
	if a.err != nil {
		return nil, a.err
	}
	return evidence(a.t, ratls.ReportData(spki), measure.EventV1), nil
}

func (a *attester) Changed(ctx context.Context, _ *measure.Evidence) error {
	select {
	case <-a.changes:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *attester) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
}

func (a *attester) made() []time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.quotes)
}

// renewing runs f beside a Renewer, by a clock that moves when everybody waits.
func renewing(t *testing.T, cfg ratls.RenewerConfig, f func(*testing.T, *attester, *ratls.Renewer)) {
	synctest.Test(t, func(t *testing.T) {
		a := &attester{t: t, changes: make(chan struct{})}
		cfg.Attester = a
		r, err := ratls.NewRenewer(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		f(t, a, r)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func current(t *testing.T, r *ratls.Renewer) *tls.Certificate {
	t.Helper()
	c, err := r.Certificate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRenewal(t *testing.T) {
	for name, c := range map[string]struct {
		jitter func(time.Duration) time.Duration
		after  time.Duration
	}{
		"latest":   {func(time.Duration) time.Duration { return 0 }, 40 * time.Minute},
		"earliest": {func(most time.Duration) time.Duration { return most }, 34 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			renewing(t, ratls.RenewerConfig{Jitter: c.jitter, Server: true, Client: true}, func(t *testing.T, a *attester, r *ratls.Renewer) {
				first, start := current(t, r), time.Now()
				if life := first.Leaf.NotAfter.Sub(start); life != time.Hour || first.Leaf.NotBefore.After(start) {
					t.Errorf("lives from %v until %v, made at %v", first.Leaf.NotBefore, first.Leaf.NotAfter, start)
				}
				if _, err := ratls.Parse(first.Leaf); err != nil || len(first.Leaf.ExtKeyUsage) != 2 {
					t.Errorf("%v %v", err, first.Leaf.ExtKeyUsage)
				}
				time.Sleep(c.after - time.Second)
				synctest.Wait()
				if current(t, r) != first {
					t.Error("renewed before its time")
				}
				time.Sleep(2 * time.Second)
				synctest.Wait()
				second := current(t, r)
				if second == first || len(a.made()) != 2 {
					t.Fatalf("not renewed after %v", c.after)
				}
				if r.Until() != second.Leaf.NotAfter {
					t.Errorf("until %v, want %v", r.Until(), second.Leaf.NotAfter)
				}
				if string(first.Leaf.RawSubjectPublicKeyInfo) == string(second.Leaf.RawSubjectPublicKeyInfo) {
					t.Error("the key was used again")
				}
			})
		})
	}
}

func TestReissueOnChange(t *testing.T) {
	renewing(t, ratls.RenewerConfig{}, func(t *testing.T, a *attester, r *ratls.Renewer) {
		first := current(t, r)
		time.Sleep(10 * time.Minute)
		a.changes <- struct{}{}
		synctest.Wait()
		if current(t, r) == first {
			t.Error("the certificate shows an RTMR3 that was extended since")
		}
		// Event after event makes one quote a second at most.
		start, before := time.Now(), len(a.made())
		for time.Since(start) < 10*time.Second {
			a.changes <- struct{}{}
		}
		if n := len(a.made()) - before; n > 12 {
			t.Errorf("%d quotes in 10 s", n)
		}
	})
}

func TestFailingQuotes(t *testing.T) {
	renewing(t, ratls.RenewerConfig{}, func(t *testing.T, a *attester, r *ratls.Renewer) {
		first := current(t, r)
		a.fail(errors.New("the host is silent"))
		a.changes <- struct{}{}
		time.Sleep(59 * time.Minute)
		if current(t, r) != first {
			t.Error("another certificate without a quote")
		}
		made := a.made()
		for i := 3; i < len(made); i++ {
			if gap := made[i].Sub(made[i-1]); gap < 5*time.Second || gap > 80*time.Second {
				t.Errorf("attempt %d came %v after the last", i, gap)
			}
		}
		if len(made) < 40 {
			t.Errorf("%d attempts in an hour", len(made))
		}
		time.Sleep(2 * time.Minute)
		if _, err := r.Certificate(t.Context()); err == nil || !strings.Contains(err.Error(), "the host is silent") || !strings.Contains(err.Error(), "ended at") {
			t.Errorf("a stale certificate: error is %v", err)
		}
		a.fail(nil)
		time.Sleep(2 * time.Minute)
		if current(t, r) == first {
			t.Error("nothing new when the host answers again")
		}
	})
}

func TestNoFirstCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &attester{t: t, err: errors.New("no TDX here")}
		r, err := ratls.NewRenewer(ratls.RenewerConfig{Attester: a})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Certificate(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("before Run: %v", err)
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go r.Run(ctx)
		if _, err := r.Certificate(t.Context()); err == nil || !strings.Contains(err.Error(), "no TDX here") {
			t.Errorf("error is %v", err)
		}
	})
}

// TestClockJump sets the clock two hours ahead, as a host can.
func TestClockJump(t *testing.T) {
	var mu sync.Mutex
	var ahead time.Duration
	now := func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return time.Now().Add(ahead)
	}
	renewing(t, ratls.RenewerConfig{Now: now}, func(t *testing.T, a *attester, r *ratls.Renewer) {
		first := current(t, r)
		mu.Lock()
		ahead = 2 * time.Hour
		mu.Unlock()
		if _, err := r.Certificate(t.Context()); err == nil || !strings.Contains(err.Error(), "the clock has jumped") {
			t.Errorf("error is %v", err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if current(t, r) == first {
			t.Error("not renewed")
		}
	})
}

func TestLegacyOIDs(t *testing.T) {
	for want, omit := range map[string]bool{".1 .2 .8": false, ".8": true} {
		renewing(t, ratls.RenewerConfig{OmitLegacyOIDs: omit}, func(t *testing.T, _ *attester, r *ratls.Renewer) {
			var own []string
			for _, e := range current(t, r).Leaf.Extensions {
				if len(e.Id) > 5 && e.Id[6] == 62397 {
					own = append(own, e.Id.String()[len("1.3.6.1.4.1.62397.1"):])
				}
			}
			if got := strings.Join(own, " "); got != want {
				t.Errorf("extensions %s, want %s", got, want)
			}
		})
	}
}

func TestRenewerNeedsAttester(t *testing.T) {
	if _, err := ratls.NewRenewer(ratls.RenewerConfig{}); err == nil {
		t.Error("no Attester, no error")
	}
}

// TestLargeLog has a log that rustls would not read twice: what remains is the list that
// current dstack reads.
func TestLargeLog(t *testing.T) {
	_, spki := newKey(t)
	for payload, want := range map[int]string{30: ".1 .2 .8", 120: ".8"} {
		ev := evidence(t, ratls.ReportData(spki), measure.EventV1)
		for range 100 {
			e, err := measure.NewRuntimeEvent("log", make([]byte, payload), measure.EventV1)
			if err != nil {
				t.Fatal(err)
			}
			ev.Events = append(ev.Events, e)
		}
		list, err := ratls.Extensions(ev, spki)
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		for _, e := range list {
			total += len(e.Value)
		}
		if got := strings.Join(ids(list), " "); got != want || total > 60<<10 {
			t.Errorf("payloads of %d bytes: extensions %s of %d bytes, want %s", payload, got, total, want)
		}
	}
}

// unsure is an attester whose agent does not answer whether anything has changed.
type unsure struct {
	*attester
	asked *int
}

func (u unsure) Changed(context.Context, *measure.Evidence) error {
	*u.asked++
	return fmt.Errorf("no agent answers: %w", context.DeadlineExceeded) // not our own deadline
}

// TestChangeUnknown asks seldom enough, and renews in time all the same.
func TestChangeUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, asked := &attester{t: t}, 0
		r, err := ratls.NewRenewer(ratls.RenewerConfig{Attester: unsure{a, &asked}, Jitter: func(time.Duration) time.Duration { return 0 }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Minute+time.Second)
		defer cancel()
		if err := r.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if asked < 30 || asked > 60 {
			t.Errorf("asked %d times in 40 minutes", asked)
		}
		if n := len(a.made()); n != 2 {
			t.Errorf("%d quotes, want 2", n)
		}
	})
}
