package collateral

import "time"

// Health says what a Store has and whether it can renew it.
type Health struct {
	Platforms int       // whose collateral is known
	Until     time.Time // when the first of it ends; zero: none is known
	Since     time.Time // when the last of it became known
	Refused   int       // platforms that no source had collateral for, lately
	Failed    uint64    // refreshes so far
}

// Health only looks into memory.
func (s *Store) Health() Health {
	s.mu.RLock()
	h := Health{Platforms: len(s.sets), Failed: s.failed}
	for _, held := range s.sets {
		if h.Until.IsZero() || held.until.Before(h.Until) {
			h.Until = held.until
		}
		if held.since.After(h.Since) {
			h.Since = held.since
		}
	}
	s.mu.RUnlock()
	s.flightsMu.Lock()
	defer s.flightsMu.Unlock()
	now := s.cfg.Now()
	for _, r := range s.refused {
		if r.current(now, s.cfg.Limits.Refused) {
			h.Refused++
		}
	}
	return h
}
