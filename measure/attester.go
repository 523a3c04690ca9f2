package measure

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// AttesterConfig is what an Attester is made of. Every field but VMConfig and Boot
// is required.
type AttesterConfig struct {
	Quoter Quoter
	Ledger *Ledger
	// Boot is the boot event log (RTMR0 to RTMR2), as parsed from the CCEL.
	Boot []Event
	// VMConfig is passed through in Evidence.
	VMConfig string
	// ServeDiverged gives quotes although the log does not explain RTMR3
	// (on_foreign_extend = "serve"). Relying parties will refuse them.
	ServeDiverged bool
}

// Attester makes Evidence of this TD.
type Attester struct {
	cfg     AttesterConfig
	queue   *quoteQueue
	boot    [4]Digest // what cfg.Boot replays to
	bootErr error

	mu    sync.Mutex // guards what follows
	last  *Quote     // the last quote made, for the registers in it
	stats QuoteStats
}

// QuoteStats counts what the Attester has done.
type QuoteStats struct {
	OK          int       `json:"ok"`
	Failed      int       `json:"failed"` // but for those whose caller has left
	Busy        int       `json:"busy"`   // refused, because too many waited
	LastSuccess time.Time `json:"last_success,omitzero"`
	LastFailure time.Time `json:"last_failure,omitzero"`
	LastError   string    `json:"last_error,omitempty"` // of the last failure, until a quote works
	LastMillis  int64     `json:"last_ms"`
	Queued      int       `json:"queued"`         // quotes that wait for their turn
	Remote      int       `json:"queued_channel"` // of these for the peers of channels
	Waiting     int       `json:"waiting"`        // callers who wait for one
}

// NewAttester returns an Attester; it makes no quote yet.
func NewAttester(cfg AttesterConfig) *Attester {
	a := &Attester{cfg: cfg, queue: newQuoteQueue(cfg.Quoter)}
	a.boot, a.bootErr = Replay(cfg.Boot)
	return a
}

// CheckBoot returns a [*DivergenceError] when the boot event log does not explain
// RTMR0 to RTMR2. Without such a log there is nothing to explain them, and Evidence
// does not pretend that there is.
func (a *Attester) CheckBoot(r Registers) error {
	if len(a.cfg.Boot) == 0 {
		return nil
	}
	if a.bootErr != nil {
		return fmt.Errorf("boot event log: %w", a.bootErr)
	}
	for i := range RTMR3 {
		if r.RTMR[i] != a.boot[i] {
			return &DivergenceError{Boot: fmt.Sprintf("RTMR%d", i), Log: a.boot[i], Register: r.RTMR[i]}
		}
	}
	return nil
}

// Evidence makes a quote that carries rd, with the event log that explains it. The
// log is the one of the moment at which the quote was made: an event that is
// recorded meanwhile is in both or in neither. caller groups requests for a fair
// queue. A [*DivergenceError] means that the log cannot explain RTMR3, or the boot
// event log RTMR0 to RTMR2; a [*BusyError] that too many wait.
//
// No lock is held while the host works: every record knows the register's value
// after it, so the quote itself tells which prefix of the log belongs to it.
func (a *Attester) Evidence(ctx context.Context, rd ReportData, caller string) (*Evidence, error) {
	return a.counted(ctx, rd, &a.queue.local, caller)
}

// RemoteEvidence is [Attester.Evidence] for somebody outside this TD. All of them
// together get at most half of the host's time, and whoever is in this TD the rest.
func (a *Attester) RemoteEvidence(ctx context.Context, rd ReportData) (*Evidence, error) {
	return a.counted(ctx, rd, &a.queue.remote, "")
}

func (a *Attester) counted(ctx context.Context, rd ReportData, l *line, caller string) (*Evidence, error) {
	start := time.Now()
	ev, quote, err := a.evidence(ctx, rd, l, caller)
	a.mu.Lock()
	defer a.mu.Unlock()
	if errors.As(err, new(*BusyError)) {
		a.stats.Busy++
		return nil, err
	}
	if errors.Is(err, context.Canceled) && errors.Is(ctx.Err(), context.Canceled) {
		return nil, err // the caller has left, and says nothing about the host
	}
	if err != nil {
		a.stats.Failed++
		a.stats.LastFailure, a.stats.LastError = time.Now().UTC(), err.Error()
		return nil, err
	}
	a.last = quote
	a.stats.OK++
	a.stats.LastSuccess, a.stats.LastError = time.Now().UTC(), ""
	a.stats.LastMillis = time.Since(start).Milliseconds()
	return ev, nil
}

func (a *Attester) evidence(ctx context.Context, rd ReportData, l *line, caller string) (*Evidence, *Quote, error) {
	before, err := a.cfg.Ledger.Snapshot(ctx)
	if err != nil && !a.serveAnyway(err) {
		return nil, nil, err
	}
	raw, err := a.queue.quote(ctx, quoteKey{data: rd, rtmr3: before.Register}, l, caller)
	if err != nil {
		return nil, nil, fmt.Errorf("quote: %w", err)
	}
	quote, err := ParseQuote(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("the kernel's quote: %w", err)
	}
	if err := a.CheckBoot(quote.Body.Registers); err != nil && !a.serveAnyway(err) {
		return nil, nil, err
	}
	records, err := a.explain(ctx, before, quote.Body.RTMR[RTMR3])
	if err != nil {
		return nil, nil, err
	}
	log := make([]Event, 0, len(a.cfg.Boot)+len(records))
	log = appendEvents(append(log, a.cfg.Boot...), records)
	return &Evidence{Quote: raw, Events: log, VMConfig: a.cfg.VMConfig}, quote, nil
}

// explain returns the records behind the quote's RTMR3.
func (a *Attester) explain(ctx context.Context, before Snapshot, rtmr3 Digest) ([]Record, error) {
	if records, ok := before.recordsAt(rtmr3); ok {
		return records, nil
	}
	after, err := a.cfg.Ledger.Snapshot(ctx)
	if err == nil {
		if records, ok := after.recordsAt(rtmr3); ok {
			return records, nil
		}
		err = &DivergenceError{Log: after.Log, Register: rtmr3}
	}
	if a.serveAnyway(err) {
		return after.Records, nil
	}
	return nil, err
}

func (a *Attester) serveAnyway(err error) bool {
	_, diverged := err.(*DivergenceError)
	return diverged && a.cfg.ServeDiverged
}

// LastQuote returns the last quote made, or nil before the first. Its registers are
// of that time.
func (a *Attester) LastQuote() *Quote {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

// Stats returns the counters.
func (a *Attester) Stats() QuoteStats {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.stats
	s.Queued, s.Remote, s.Waiting = a.queue.depth()
	return s
}

// Running is how long the quote in flight has been running; 0 when there is none.
func (a *Attester) Running() time.Duration {
	a.queue.mu.Lock()
	defer a.queue.mu.Unlock()
	if a.queue.since.IsZero() {
		return 0
	}
	return time.Since(a.queue.since)
}
