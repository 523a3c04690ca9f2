package atls

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"tdx-agent/remote"
	"tdx-agent/remote/cache"
)

// Handshake is how one ended, for logs and metrics.
type Handshake struct {
	Time      time.Time
	Duration  time.Duration
	Remote    string // address
	Role      Role   // ours
	Service   string // the client's word until the handshake has succeeded
	Ref       string
	Step      Step // StepOpen if it succeeded
	Code      Code
	Entry     string // the policy entry that accepts the peer, or came closest
	Assurance string // of the peer: "quote", "key", "certificate", "none"
	Err       error  // the local cause
}

// Counts are of one end, since it was made.
type Counts struct {
	// KeyMode says how often a peer that may use key mode was known, so that its signature
	// did, and how often a quote was asked of it.
	KeyMode cache.Counts
	// Connections that a Listener has closed before TLS: of addresses that come too often,
	// and where there was no room, for the address or at all. None has a [Handshake].
	TooOften, NoRoom uint64
}

type counters struct{ keyHits, keyMisses, tooOften, noRoom atomic.Uint64 }

func (c *counters) read() Counts {
	return Counts{KeyMode: cache.Counts{Hits: c.keyHits.Load(), Misses: c.keyMisses.Load()}, TooOften: c.tooOften.Load(), NoRoom: c.noRoom.Load()}
}

// Failure is a handshake that failed, without the evidence that it failed by.
type Failure struct {
	Handshake                // Err is nil: Text and Checks say what it said
	Refused   bool           // by the peer, which says no more than Code
	Text      string         // at most 1 KiB
	Checks    []remote.Check // that failed
}

// Bounds of Failures. What a peer shows goes into the text and into what checks got.
const (
	maxFailures     = 64
	maxFailureText  = 1 << 10
	maxFailedChecks = 32
)

// NewFailure keeps of h what is worth keeping for long.
func NewFailure(h Handshake) Failure {
	f := Failure{Handshake: h}
	f.Err = nil
	if h.Err == nil {
		return f
	}
	f.Text = clip(h.Err.Error())
	if e, ok := errors.AsType[*Error](h.Err); ok {
		f.Refused = e.Remote
	}
	rejection, ok := errors.AsType[*remote.Rejection](h.Err)
	if !ok {
		return f
	}
	f.Text = "the evidence is not genuine"
	if rejection.Genuine() {
		f.Text = "policy " + rejection.Result.Policy + " accepts no such peer"
	}
	for _, c := range rejection.Result.Failed() {
		if len(f.Checks) == maxFailedChecks {
			break
		}
		c.Got, c.Want, c.Hint = clip(c.Got), clip(c.Want), clip(c.Hint)
		f.Checks = append(f.Checks, c)
	}
	return f
}

// clip returns a copy of text that keeps nothing else alive.
func clip(text string) string {
	if len(text) <= maxFailureText {
		return strings.Clone(text)
	}
	cut := maxFailureText - len("...")
	for cut > 0 && !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + "..."
}

// Failures keeps the last 64 handshakes that failed. Of these at most half had ended
// before the peer's evidence was there, unless there are no others: anybody can have as
// many of them as they like. The zero value is empty. For many goroutines.
type Failures struct {
	mu   sync.Mutex
	list []Failure // the oldest first
}

// Add keeps h if it failed.
func (f *Failures) Add(h Handshake) {
	if h.Code == CodeOK {
		return
	}
	kept := NewFailure(h)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.list) == maxFailures {
		f.drop()
	}
	f.list = append(f.list, kept)
}

// drop makes room for one more.
func (f *Failures) drop() {
	early, first := 0, 0
	for i := range slices.Backward(f.list) {
		if f.list[i].isEarly() {
			early, first = early+1, i
		}
	}
	if early < maxFailures/2 {
		first = 0
	}
	f.list = slices.Delete(f.list, first, first+1)
}

// isEarly is for what costs a stranger next to nothing.
func (f *Failure) isEarly() bool {
	return f.Step == StepTLS || f.Step == StepHello || f.Step == StepWaitEvidence
}

// List returns them, the oldest first.
func (f *Failures) List() []Failure {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}
