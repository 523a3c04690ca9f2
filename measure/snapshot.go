package measure

import (
	"context"
	"fmt"
)

// Snapshot is the log at one moment, when it was seen to explain the register.
type Snapshot struct {
	Records  []Record // in order; not to be modified
	Log      Digest   // what the records replay to
	Register Digest   // RTMR3 as read; equal to Log unless Unread
	// Unread says that this kernel offers no way to read RTMR3 without a quote, so
	// only a quote can show whether the log explains it.
	Unread bool
}

// Events returns the records as events, in order. Their payloads are not to be
// modified.
func (s *Snapshot) Events() []Event {
	return appendEvents(make([]Event, 0, len(s.Records)), s.Records)
}

// At returns the events that explain the RTMR3 value r: the longest prefix of the
// log that replays to it. ok is false when no prefix does.
func (s *Snapshot) At(r Digest) (events []Event, ok bool) {
	records, ok := s.recordsAt(r)
	return appendEvents(nil, records), ok
}

func (s *Snapshot) recordsAt(r Digest) (records []Record, ok bool) {
	for n := len(s.Records); n > 0; n-- {
		if s.Records[n-1].Next == r {
			return s.Records[:n], true
		}
	}
	return nil, r.IsZero()
}

func appendEvents(events []Event, records []Record) []Event {
	for i := range records {
		events = append(events, records[i].event())
	}
	return events
}

// Used is what an owner has of the log: events, and bytes of their JSON form. The records
// are those of a Snapshot.
func Used(records []Record, owner string) (events, bytes int) {
	for i := range records {
		if r := &records[i]; r.Owner == owner {
			events, bytes = events+1, bytes+r.size
		}
	}
	return events, bytes
}

// IsFull tells whether p has no room for another event where it has so many, in so many
// bytes: not even for one of version 1 without a payload.
func (p *Part) IsFull(events, bytes int) bool {
	return events >= p.MaxEvents || bytes+eventSize(Event{IMR: RTMR3, Type: RuntimeEventType, Name: "x", Version: EventV1}) > p.MaxBytes
}

// Snapshot reads the register, settles the log with it and returns the log. With a
// [*DivergenceError] the snapshot is returned as well, so that it can be shown.
func (l *Ledger) Snapshot(ctx context.Context) (Snapshot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.lock.acquire(ctx); err != nil {
		return Snapshot{}, err
	}
	defer l.lock.release()
	return l.settle()
}

// Check tells whether the log explains RTMR3, and returns the registers as read. It is for
// whoever asks often: while RTMR3 is what it was when the log explained it, it takes no
// lock, and does not look at the file. What became of that, the next Snapshot finds, and
// Check from then on.
func (l *Ledger) Check(ctx context.Context) (Registers, error) {
	regs, err := l.cfg.Registers.Registers()
	if err != nil {
		return Registers{}, fmt.Errorf("read RTMR3: %w", err)
	}
	if e := l.explained.Load(); e != nil && *e == regs.RTMR[RTMR3] {
		return regs, nil
	}
	_, err = l.Snapshot(ctx)
	return regs, err
}
