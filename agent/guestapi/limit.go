package guestapi

import (
	"container/list"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// maxAccounts bounds the callers whose buckets are kept. Whoever is dropped starts with
// full ones: who may make control groups, as root and a user with a session may, has
// more than one account anyway.
const maxAccounts = 1024

// Rate is a token bucket: so many calls a second for ever, Burst of them at once.
type Rate struct {
	PerSecond float64 `toml:"per_second"`
	Burst     int     `toml:"burst"`
}

// Check reports whether the bucket lets a call through in less than two weeks.
func (r Rate) Check() error {
	if !(r.PerSecond >= 1e-6 && r.PerSecond <= 1e6) || r.Burst < 1 || r.Burst > 1e6 {
		return fmt.Errorf("per_second is %v and burst %d, want at least 0.000001 and 1, and neither more than 1000000", r.PerSecond, r.Burst)
	}
	return nil
}

// Rates are the buckets that every caller has, by [Class].
type Rates [classes]Rate

// Limiter counts the calls of every caller, a container or a user in a control group, by
// class. It may serve several Servers, whose callers then have one account.
type Limiter struct {
	rates Rates
	now   func() time.Time

	mu     sync.Mutex // guards what follows
	known  map[accountKey]*list.Element
	recent list.List // of *account, the last to call first
}

// account is what one caller has left.
type account struct {
	key     accountKey
	buckets [classes]*rate.Limiter // nil until it is needed
	refused [classes]int           // since the last call that was let through
}

// NewLimiter returns a Limiter, all of whose Rates must pass [Rate.Check].
func NewLimiter(rates Rates) *Limiter {
	return &Limiter{rates: rates, now: time.Now, known: map[accountKey]*list.Element{}}
}

// throttledError says that a caller has called too often.
type throttledError struct {
	class Class
	rate  Rate
	wait  time.Duration
}

func (e *throttledError) Error() string {
	return fmt.Sprintf("too many calls: your user and container may make %v of class %q a second, and %d at once; try again in %v",
		e.rate.PerSecond, e.class, e.rate.Burst, e.wait)
}

// RetryAfter is when to try again; it makes the answer a 429.
func (e *throttledError) RetryAfter() time.Duration { return e.wait }

// Take counts a call. Its error says that there were too many, and has a method
// RetryAfter() time.Duration. missed is how many calls of the class were refused since
// the last that was let through.
func (l *Limiter) Take(c Caller, class Class) (missed int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.account(c.account())
	now := l.now()
	bucket := a.buckets[class]
	if bucket == nil {
		bucket = rate.NewLimiter(rate.Limit(l.rates[class].PerSecond), l.rates[class].Burst)
		a.buckets[class] = bucket
	}
	missed = a.refused[class]
	if bucket.AllowN(now, 1) {
		a.refused[class] = 0
		return missed, nil
	}
	a.refused[class]++
	wait := (1 - bucket.TokensAt(now)) / l.rates[class].PerSecond
	return missed, &throttledError{class: class, rate: l.rates[class], wait: time.Duration(math.Ceil(wait*1000)) * time.Millisecond}
}

func (l *Limiter) account(key accountKey) *account {
	if e := l.known[key]; e != nil {
		l.recent.MoveToFront(e)
		return e.Value.(*account)
	}
	if l.recent.Len() >= maxAccounts {
		last := l.recent.Back()
		delete(l.known, last.Value.(*account).key)
		l.recent.Remove(last)
	}
	a := &account{key: key}
	l.known[key] = l.recent.PushFront(a)
	return a
}

// limit counts the call, if there is a limit. Methods that are not known count as reads.
func (s *Server) limit(c *call, class Class) error {
	if s.cfg.Limits == nil {
		return nil
	}
	_, err := s.cfg.Limits.Take(c.caller, max(class, ClassRead))
	return err
}
