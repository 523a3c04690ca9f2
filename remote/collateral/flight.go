package collateral

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	maxFlights = 64   // platforms that are fetched at a time
	maxRefused = 1024 // platforms whose last fetch is remembered as a failure
)

// flight is a fetch for everybody who wants the same set. Those who wait own its
// goroutine: it ends when it is through or when the last of them goes.
type flight struct {
	done    chan struct{} // closed when set and err are there
	set     *Set
	err     error
	cancel  context.CancelFunc
	waiting int // guarded by Store.flightsMu
}

// refusal is a fetch that failed.
type refusal struct {
	at  time.Time
	err error
}

// join waits for the fetch of this platform, and starts it if there is none. Unless it
// is to renew a set, there is no fetch if the last has just succeeded or failed.
func (s *Store) join(ctx context.Context, p platform, renew bool) (*Set, error) {
	s.flightsMu.Lock()
	f := s.flights[p]
	if f == nil && !renew {
		if set, err := s.landed(p); set != nil || err != nil {
			s.flightsMu.Unlock()
			return set, err
		}
	}
	if f == nil && len(s.flights) >= maxFlights {
		s.flightsMu.Unlock()
		return nil, &Error{Code: "fetch_budget", Got: fmt.Sprint(maxFlights, " fetches at the same time"), Hint: "try again in a minute"}
	}
	if f == nil {
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f = &flight{done: make(chan struct{}), cancel: cancel}
		s.flights[p] = f
		go s.fly(own, p, f)
	}
	f.waiting++
	s.flightsMu.Unlock()

	select {
	case <-f.done:
		return f.set, f.err
	case <-ctx.Done():
	}
	s.flightsMu.Lock()
	defer s.flightsMu.Unlock()
	if f.waiting--; f.waiting == 0 {
		f.cancel()
		s.land(p, f) // whoever comes now begins anew
	}
	return nil, &Error{Code: "canceled", Err: ctx.Err()}
}

// landed returns what the last fetch of this platform brought, if that still counts.
// Called under flightsMu.
func (s *Store) landed(p platform) (*Set, error) {
	now := s.cfg.Now()
	if h := s.lookup(p); h.freshAt(now) {
		return h.set, nil
	}
	if r, ok := s.refused[p]; ok && r.current(now, s.cfg.Limits.Refused) {
		return nil, r.err
	}
	return nil, nil
}

// land takes f out of the flights. Called under flightsMu.
func (s *Store) land(p platform, f *flight) {
	if s.flights[p] == f {
		delete(s.flights, p)
	}
}

func (s *Store) fly(ctx context.Context, p platform, f *flight) {
	defer f.cancel()
	f.set, f.err = s.fetch(ctx, p)
	s.flightsMu.Lock()
	s.remember(p, f.err)
	s.land(p, f)
	s.flightsMu.Unlock()
	close(f.done)
}

// remember keeps failures of the sources, and forgets them when a fetch succeeds.
// Called under flightsMu.
func (s *Store) remember(p platform, err error) {
	delete(s.refused, p)
	if e, ok := errors.AsType[*Error](err); !ok || e.Code == "fetch_budget" || e.Code == "clock" || e.Code == "canceled" {
		return
	}
	now := s.cfg.Now()
	for old, r := range s.refused {
		if len(s.refused) >= maxRefused || !r.current(now, s.cfg.Limits.Refused) {
			delete(s.refused, old) // any one: the budget bounds what that costs
		}
	}
	s.refused[p] = refusal{now, err}
}

func (r *refusal) current(now time.Time, last time.Duration) bool {
	return !now.Before(r.at) && now.Before(r.at.Add(last))
}

// fetch asks the sources in their order until one has a set that can be admitted.
func (s *Store) fetch(ctx context.Context, p platform) (*Set, error) {
	if err := s.floor.checkClock(s.cfg.Now()); err != nil {
		return nil, err
	}
	defer s.client.CloseIdleConnections() // whose goroutines nobody would own
	var failures []*Error
	for i := range s.sources {
		src := &s.sources[i]
		if !s.budget.AllowN(s.cfg.Now(), 1) {
			failures = append(failures, &Error{Code: "fetch_budget", Source: src.name, Got: fmt.Sprint("more than ", s.cfg.Limits.PerMinute, " fetches in a minute"), Hint: "try again in a minute"})
			break
		}
		set, err := s.fetchFrom(ctx, src, p)
		if err == nil {
			s.log.Info("fetched collateral", "platform", p.String(), "source", src.name, "valid_until", set.Collateral.ValidUntil())
			return set, nil
		}
		failure := withSource(err, src.name)
		if ctx.Err() != nil {
			return nil, failure
		}
		s.log.Warn("a source has no collateral to use", "platform", p.String(), "error", failure)
		failures = append(failures, failure)
	}
	return nil, join(failures)
}

// fetchFrom fetches a set and checks it: signatures, platform, floor, time.
func (s *Store) fetchFrom(ctx context.Context, src *source, p platform) (*Set, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Limits.Source)
	defer cancel()
	bundle, fault := s.bundle(ctx, src, p)
	if fault != nil {
		return nil, fault
	}
	c, err := s.cfg.parse(bundle)
	if err != nil {
		return nil, &Error{Code: "not_genuine", Err: err, Hint: "do not trust this source"}
	}
	if got := platformOf(c); got != p {
		return nil, &Error{Code: "wrong_platform", Got: got.String(), Want: p.String(), Hint: "do not trust this source"}
	}
	set := &Set{Collateral: c, Source: src.name, Bundle: bundle}
	if err := s.checkFloor(set); err != nil {
		return nil, err
	}
	if err := outside(set, s.cfg.Now()); err != nil {
		return nil, err
	}
	if err := s.admit(set, false, func() { s.save(p, bundle) }); err != nil {
		return nil, err
	}
	return set, nil
}

// save puts a bundle into the cache. A cache that cannot be written costs a fetch
// after the next start, and no more.
func (s *Store) save(p platform, bundle []byte) {
	if s.state == nil {
		return
	}
	if err := s.state.write(s.state.bundle(p), bundle); err != nil {
		s.log.Warn("collateral is not cached", "platform", p.String(), "error", err)
	}
}

// withSource returns err as an *Error that names its source.
func withSource(err error, source string) *Error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return &Error{Code: "state", Source: source, Err: err}
	}
	if e.Source == "" {
		named := *e
		named.Source = source
		return &named
	}
	return e
}
