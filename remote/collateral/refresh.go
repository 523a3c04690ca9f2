package collateral

import (
	"context"
	"time"
)

const (
	day       = 24 * time.Hour
	lastDays  = 14 * day  // before the end, when there is a try every day
	lookEvery = time.Hour // for what is due: the clock may jump, and sets come in between
)

// Run fetches every known set anew at half of its time, daily in the last 14 days of
// it, and hourly in the last day and after it. Sets stay in use meanwhile, and if that
// fails to their end. Run returns nil when ctx ends. Without a PCCS or Intel's PCS it
// only waits.
func (s *Store) Run(ctx context.Context) error {
	for {
		for _, p := range s.overdue() {
			if ctx.Err() != nil {
				return nil
			}
			s.refresh(ctx, p)
		}
		if s.cfg.Wait(ctx, s.untilDue()) != nil {
			return nil
		}
	}
}

func (s *Store) refresh(ctx context.Context, p platform) {
	_, err := s.join(ctx, p, true)
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.sets[p]
	if h == nil {
		return
	}
	if err != nil && ctx.Err() == nil {
		s.failed++
		s.log.Warn("collateral is not refreshed, and used until its end", "platform", p.String(), "valid_until", h.until, "error", err)
	}
	if !h.due.After(now) { // the same set as before, or none
		h.due = s.nextRefresh(h, now)
	}
}

// firstRefresh says when to fetch what replaces h, which was just read or fetched. What
// was read in the second half of its time is due: it may be long since a server was
// asked.
func (s *Store) firstRefresh(h *held, isRead bool, now time.Time) time.Time {
	if isRead && !now.Before(h.from.Add(h.until.Sub(h.from)/2)) {
		return now.Add(s.cfg.Jitter(time.Minute))
	}
	return s.nextRefresh(h, now)
}

// nextRefresh says when to fetch what replaces h, after a fetch.
func (s *Store) nextRefresh(h *held, now time.Time) time.Time {
	half, daily := h.from.Add(h.until.Sub(h.from)/2), h.until.Add(-lastDays)
	at := now.Add(time.Hour)
	switch {
	case now.Before(half):
		at = half
	case now.Before(daily):
		at = daily
	case now.Add(day).Before(h.until):
		at = now.Add(day)
	}
	return at.Add(s.cfg.Jitter(min(at.Sub(now)/8, day/2))) // so that not all agents come at once
}

// overdue returns the platforms whose sets are due.
func (s *Store) overdue() (due []platform) {
	if len(s.sources) == 0 {
		return nil
	}
	now := s.cfg.Now()
	s.mu.RLock()
	defer s.mu.RUnlock()
	for p, h := range s.sets {
		if !h.due.After(now) {
			due = append(due, p)
		}
	}
	return due
}

// untilDue is how long to wait.
func (s *Store) untilDue() time.Duration {
	now := s.cfg.Now()
	next := now.Add(lookEvery)
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, h := range s.sets {
		if len(s.sources) > 0 && h.due.Before(next) {
			next = h.due
		}
	}
	return max(next.Sub(now), time.Second)
}
