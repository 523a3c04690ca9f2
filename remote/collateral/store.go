package collateral

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"tdx-agent/remote/cache"
	"tdx-agent/remote/dcap"
)

// Set is genuine collateral of a platform. It is shared: nobody may change it.
type Set struct {
	Collateral *dcap.Collateral
	// Source is "file NAME", "cache NAME", "pccs https://host", "intel pcs" or "peer".
	Source string
	Bundle []byte // the JSON of a [dcap.Bundle]
}

// platform is what a set is about.
type platform struct {
	fmspc [6]byte
	ca    string
}

func platformOf(c *dcap.Collateral) platform { return platform{c.FMSPC(), c.CA()} }

func (p platform) String() string { return fmt.Sprintf("fmspc %x, %s ca", p.fmspc, p.ca) }

// held is a set that the store has. Only due changes.
type held struct {
	set         *Set
	from, until time.Time // when the set is valid
	usable      time.Time // until, with grace
	isFile      bool
	since       time.Time // when the set became known
	due         time.Time // when to fetch the next. Guarded by Store.mu
}

func (h *held) freshAt(now time.Time) bool {
	return h != nil && !now.Before(h.from) && !now.After(h.until)
}

func (h *held) usableAt(now time.Time) bool {
	return h != nil && !now.Before(h.from) && !now.After(h.usable)
}

// Store hands out collateral. It is for many goroutines.
type Store struct {
	cfg     Config
	log     *slog.Logger
	sources []source
	client  *http.Client
	budget  *rate.Limiter
	floor   *floor
	state   *state // nil: no folder

	mu     sync.RWMutex
	sets   map[platform]*held
	behind map[platform]*Error // files that are behind the floor
	failed uint64              // refreshes

	hits, misses atomic.Uint64 // of Known

	flightsMu sync.Mutex
	flights   map[platform]*flight
	refused   map[platform]refusal
}

// New reads the floor, the cached bundles and the bundle files. A damaged floor or a
// broken file is an error that names it; it is an [*Error]. Nothing is fetched.
func New(cfg Config) (*Store, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	sources, err := newSources(&cfg)
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg: cfg, log: cfg.Logger, sources: sources,
		client:  newClient(cfg.Limits, cfg.TLSRoots, cfg.Dial),
		budget:  rate.NewLimiter(rate.Limit(float64(cfg.Limits.PerMinute)/60), cfg.Limits.PerMinute),
		sets:    make(map[platform]*held),
		behind:  make(map[platform]*Error),
		flights: make(map[platform]*flight),
		refused: make(map[platform]refusal),
	}
	if cfg.Dir != "" {
		dir := cfg.Dir
		if cfg.Enclaves { // the same platform has a floor and a bundle for each
			dir = filepath.Join(dir, "sgx")
		}
		if s.state, err = openState(dir, cfg.UpdateChannel); err != nil {
			return nil, err
		}
	}
	if s.floor, err = openFloor(s.state); err != nil {
		return nil, err
	}
	if s.state != nil {
		if err := s.loadCache(); err != nil {
			return nil, err
		}
	}
	if err := s.Reload(); err != nil {
		return nil, err
	}
	return s, nil
}

// Known returns the set of this platform if there is one to use now, which may be in
// its grace, and otherwise nil. It only looks into memory.
func (s *Store) Known(fmspc [6]byte, ca string) *Set {
	now := s.cfg.Now()
	h := s.lookup(platform{fmspc, ca})
	if !h.usableAt(now) || s.floor.checkClock(now) != nil {
		s.misses.Add(1)
		return nil
	}
	s.hits.Add(1)
	return h.set
}

// Counts says how often [Store.Known] had a set.
func (s *Store) Counts() cache.Counts {
	return cache.Counts{Hits: s.hits.Load(), Misses: s.misses.Load()}
}

// StaleGrace is that of the Config: the dcap.Verifier that judges needs the same.
func (s *Store) StaleGrace() time.Duration { return s.cfg.StaleGrace }

func (s *Store) lookup(p platform) *held {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sets[p]
}

// Fetch returns a set that is valid now: one that is known, or else one from the
// network, which can take Limits.Source for each of the sources. If none has any, a
// known set in its grace is returned. The caller must have verified the PCK chain that
// names the platform: its FMSPC and CA go into URLs, and fetches cost. Callers who
// want the same set wait for one fetch. The error is an [*Error].
func (s *Store) Fetch(ctx context.Context, fmspc [6]byte, ca string) (*Set, error) {
	p, now := platform{fmspc, ca}, s.cfg.Now()
	if !isCA(ca) {
		return nil, &Error{Code: "wrong_platform", Got: fmt.Sprintf("CA %q", ca), Want: dcap.CAPlatform + " or " + dcap.CAProcessor}
	}
	if err := s.floor.checkClock(now); err != nil {
		return nil, err
	}
	known := s.lookup(p)
	if known.freshAt(now) || len(s.sources) == 0 && known.usableAt(now) {
		return known.set, nil
	}
	if len(s.sources) == 0 {
		return nil, s.nowhere(p, known, now)
	}
	set, err := s.join(ctx, p, false)
	if err != nil && ctx.Err() == nil && known.usableAt(now) {
		s.log.Warn("collateral is past its end, and there is no newer", "platform", p.String(), "source", known.set.Source, "error", err)
		return known.set, nil
	}
	return set, err
}

// nowhere says why there is no set and no network to ask.
func (s *Store) nowhere(p platform, known *held, now time.Time) error {
	if known != nil {
		return outside(known.set, now)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if err := s.behind[p]; err != nil {
		return err
	}
	return &Error{Code: "no_source", Got: "no bundle file and no server for " + p.String(), Hint: "configure a PCCS or Intel's PCS, or put a bundle file in place"}
}

// outside is the error of a set that is not valid now, or nil.
func outside(set *Set, now time.Time) error {
	from, until := set.Collateral.ValidFrom(), set.Collateral.ValidUntil()
	e := &Error{Source: set.Source, Got: now.UTC().Format(time.RFC3339)}
	switch {
	case now.Before(from):
		e.Code, e.Want, e.Hint = "not_yet_valid", "not before "+from.UTC().Format(time.RFC3339), "check the clock"
	case now.After(until):
		e.Code, e.Want, e.Hint = "expired", "not after "+until.UTC().Format(time.RFC3339), "get newer collateral, and check the clock"
	default:
		return nil
	}
	return e
}

// Offered checks the bundle that a peer sent along, against roots and floor. It is for
// this one quote: it is not kept, and does not raise the floor, because whoever chooses
// it would choose what others may use. Whether it is valid now and about the quote's
// platform is for [dcap.Verifier.Verify] to say. The error is an [*Error].
func (s *Store) Offered(bundle []byte) (*Set, error) {
	if err := s.floor.checkClock(s.cfg.Now()); err != nil {
		return nil, err
	}
	c, err := s.cfg.parse(bundle)
	if err != nil {
		return nil, &Error{Code: "not_genuine", Source: "peer", Err: err}
	}
	set := &Set{Collateral: c, Source: "peer", Bundle: bundle}
	if err := s.checkFloor(set); err != nil {
		return nil, err
	}
	return set, nil
}

func (s *Store) floorKey(c *dcap.Collateral) floorKey {
	return floorKey{platformOf(c), s.cfg.UpdateChannel}
}

// checkFloor returns the error of a set that is behind the floor and must not be.
func (s *Store) checkFloor(set *Set) error {
	err := s.floor.check(s.floorKey(set.Collateral), set.Collateral.Documents())
	if err == nil || s.cfg.AllowRollback {
		return nil
	}
	err.Source = set.Source
	return err
}

// admit makes a set of a configured source known and raises the floor to it. A set
// that is not valid yet raises nothing. save puts a fetched set into the cache, and is
// nil for others. Sets of files are not evicted.
func (s *Store) admit(set *Set, isFile bool, save func()) error {
	if err := s.checkFloor(set); err != nil {
		return err
	}
	now, c := s.cfg.Now(), set.Collateral
	if behind := s.floor.check(s.floorKey(c), c.Documents()); behind != nil {
		s.log.Warn("collateral behind the rollback floor is used, as configured", "source", set.Source, "error", behind)
	}
	h := &held{set: set, isFile: isFile, since: now, from: c.ValidFrom(), until: c.ValidUntil(), usable: c.UsableUntil(s.cfg.StaleGrace)}
	if !now.Before(h.from) {
		if err := s.floor.raise(s.floorKey(c), c.Documents(), s.cfg.AllowRollback, save); err != nil {
			return withSource(err, set.Source)
		}
	}
	h.due = s.firstRefresh(h, save == nil, now)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.checkFloor(set); err != nil {
		return err // somebody raised it meanwhile: theirs is the newer set
	}
	p := platformOf(c)
	if s.sets[p].freshAt(now) && !h.freshAt(now) {
		return nil
	}
	s.sets[p] = h
	delete(s.behind, p)
	s.evict(p)
	return nil
}

// evict drops the set that is known longest if there are too many, but not that of
// keep. Files have their own bound. Called under mu.
func (s *Store) evict(keep platform) {
	var first platform
	n := 0
	for p, h := range s.sets {
		if h.isFile {
			continue
		}
		n++
		if p != keep && (first.ca == "" || h.since.Before(s.sets[first].since)) {
			first = p
		}
	}
	if n <= s.cfg.Limits.Sets || first.ca == "" {
		return
	}
	delete(s.sets, first)
	if s.state != nil {
		_ = os.Remove(s.state.bundle(first)) // a cache: what stays is read at the next start
	}
}
