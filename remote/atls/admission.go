package atls

import (
	"container/list"
	"context"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"

	"tdx-agent/remote/cache"
)

// standing is how far a client has come.
type standing int

const (
	unknown   standing = iota // it has not said hello
	greeted                   // its evidence is awaited
	appraised                 // accepted, or one who need not attest: it stays
)

// admission bounds the handshakes under way, all of them and those of an address. A
// client that finds no place takes that of the one who has got least far, and of these
// of the one who waits for longest: or else a few hundred connections that say nothing
// would keep everybody out for as long as an honest client may take.
type admission struct {
	most, perAddress int
	rate             rate.Limit
	burst            int
	counted          *counters

	mu       sync.Mutex // guards what follows, and admitted
	pending  map[string]int
	total    int
	waiting  [appraised]list.List // of *admitted, the oldest first
	limiters *cache.Cache[string, *rate.Limiter]
}

// admitted is a connection with a handshake under way.
type admitted struct {
	ctx    context.Context // its end is the handshake's
	cancel context.CancelFunc

	host      string
	standing  standing
	element   *list.Element // of its standing's list
	isEvicted bool
}

func newAdmission(cfg *ListenerConfig, counted *counters) *admission {
	return &admission{most: cfg.MaxHandshakes, perAddress: cfg.MaxPerAddress, rate: rate.Limit(cfg.PerSecond), burst: cfg.Burst, counted: counted,
		pending: map[string]int{}, limiters: cache.New[string, *rate.Limiter](2048)}
}

// admit counts a connection against its address. Nil: there is no place for it.
func (m *admission) admit(ctx context.Context, address string) *admitted {
	host, err := clientOf(address)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil { // other sockets than TCP have no addresses to tell clients by
		limiter, known := m.limiters.Get(host)
		if !known {
			limiter = rate.NewLimiter(m.rate, m.burst)
			m.limiters.Add(host, limiter)
		}
		if !limiter.Allow() {
			m.counted.tooOften.Add(1)
			return nil
		}
		if m.pending[host] >= m.perAddress {
			m.counted.noRoom.Add(1)
			return nil
		}
	}
	if m.total >= m.most && !m.evict() {
		m.counted.noRoom.Add(1)
		return nil
	}
	a := &admitted{host: host}
	a.ctx, a.cancel = context.WithTimeout(ctx, limitTotal)
	a.element = m.waiting[unknown].PushBack(a)
	m.pending[host]++
	m.total++
	return a
}

// evict ends a handshake of somebody who was not appraised yet, if there is one.
func (m *admission) evict() bool {
	for s := range m.waiting {
		if oldest := m.waiting[s].Front(); oldest != nil {
			a := oldest.Value.(*admitted)
			m.leave(a)
			a.isEvicted = true
			a.cancel()
			return true
		}
	}
	return false
}

// leave gives a's place back.
func (m *admission) leave(a *admitted) {
	if a.standing < appraised {
		m.waiting[a.standing].Remove(a.element)
	}
	m.total--
	if m.pending[a.host]--; m.pending[a.host] == 0 {
		delete(m.pending, a.host)
	}
}

// move notes how far a has come.
func (m *admission) move(a *admitted, s standing) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a.isEvicted {
		return
	}
	m.waiting[a.standing].Remove(a.element)
	if a.standing = s; s < appraised {
		a.element = m.waiting[s].PushBack(a)
	}
}

// done ends the handshake's part.
func (m *admission) done(a *admitted) {
	a.cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !a.isEvicted {
		m.leave(a)
	}
}

func (m *admission) wasEvicted(a *admitted) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return a.isEvicted
}

// clientOf is what limits count as one address: of IPv6 a /64, all of which one machine
// may have.
func clientOf(address string) (string, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return "", err
	}
	ip := a.Addr().Unmap().WithZone("")
	if ip.Is4() {
		return ip.String(), nil
	}
	prefix, err := ip.Prefix(64)
	return prefix.String(), err
}
