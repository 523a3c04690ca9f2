package measure

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of the RTMR3 log. The whole log travels with every quote, so its size is
// what a relying party pays for each of them.
const (
	DefaultMaxEvents = 512
	DefaultMaxBytes  = 96 << 10 // of the events' dstack JSON form
)

// lockWait bounds how long an operation waits for another process of this TD that
// holds the log; it is far above what an extend takes.
const lockWait = 10 * time.Second

// LedgerConfig says where the log is and which register it explains.
type LedgerConfig struct {
	Dir       string       // folder of the log and its lock; it must live no longer than the register (/run)
	Registers RegisterBank // whose RTMR3 the log explains

	// DstackLock is the lock file of dstack's own runtime log. It is taken as well
	// when it exists, so that dstack-util and this agent never interleave.
	DstackLock string
	// Imported returns the events that dstack itself has measured. They are
	// consulted only when the log does not explain the register; nil means none.
	Imported func() ([]Event, error)

	MaxEvents int              // 0 means DefaultMaxEvents, negative no limit
	MaxBytes  int              // 0 means DefaultMaxBytes, negative no limit
	Now       func() time.Time // nil means time.Now
}

// Ledger is the RTMR3 log and the only writer of RTMR3.
//
// The register is the commit record. An event becomes part of the log in these
// steps, and a crash between any two of them is mended when the log is next used:
//
//	intent    the record, with the register's value before and after, is written
//	          in one write; nothing else refers to it yet
//	extend    the register moves from prev to next: this commits the event
//	read back the register is compared with next
//
// Whenever the log is used, the register is read and compared with the last record:
//
//	register == next   the log explains the register
//	register == prev   the last intent never happened; it is taken back
//	otherwise          dstack's own log may explain it; else somebody has extended
//	                   RTMR3 without a record: [DivergenceError]. No event is ever
//	                   extended to cover that up.
//
// A Ledger may be used by several goroutines, and the same folder by several
// processes at once.
type Ledger struct {
	cfg   LedgerConfig
	store logStore
	lock  *fileLock

	// explained is RTMR3 when the log was last seen to explain it; nil: it does not.
	explained atomic.Pointer[Digest]

	mu      sync.Mutex // guards the fields below and serialises this process's use of the file
	records []Record   // what the file holds up to size; the last may be an intent
	size    int64      // bytes of the file that records came from
	bytes   int        // JSON size of all events
	damage  error      // the file is damaged in the middle, not merely torn at its end, or it is gone
	mended  Recoveries
}

// Entry is an event to be recorded.
type Entry struct {
	Name    string
	Payload []byte
	Version int // EventV1 or EventV2; 0 means the version of the log's last record, else EventV1

	// Once makes a second record of this name an error unless the payload is the
	// same, in which case nothing is extended.
	Once bool
	// Key makes the entry idempotent: where a record with this key exists, that is
	// the answer. Same key, other event: an error.
	Key    string
	Caller string // who asked, for the log's reader; not measured
	Part   *Part  // of the log that the entry takes room of; nil: all that is left
}

// Part is what an owner may have of the log, in events and in bytes of their JSON form.
type Part struct {
	Owner               string
	MaxEvents, MaxBytes int // at least 1
}

// OpenLedger opens or creates the log in cfg.Dir and settles it with the register.
// A divergence is not an error here, because an agent that does not start cannot
// say what is wrong: [Ledger.Snapshot] reports it, and Record refuses.
func OpenLedger(ctx context.Context, cfg LedgerConfig) (*Ledger, error) {
	store, err := openLogFile(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("open RTMR3 log: %w", err)
	}
	l, err := newLedger(ctx, cfg, store)
	if err != nil {
		store.close()
		return nil, err
	}
	return l, nil
}

func newLedger(ctx context.Context, cfg LedgerConfig, store logStore) (*Ledger, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.MaxEvents == 0 {
		cfg.MaxEvents = DefaultMaxEvents
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = DefaultMaxBytes
	}
	l := &Ledger{cfg: cfg, store: store, lock: newFileLock(cfg.Dir, cfg.DstackLock)}
	_, err := l.Snapshot(ctx)
	if d := (*DivergenceError)(nil); errors.As(err, &d) {
		err = nil
	}
	if err != nil {
		l.lock.close()
		return nil, fmt.Errorf("open RTMR3 log: %w", err)
	}
	return l, nil
}

// Close releases the files. The log itself stays.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lock.close()
	return l.store.close()
}

// Record extends RTMR3 with the entry's event and returns its record, or the
// record that an earlier call with the same Key (or the same once-only event)
// made. After an error other than a refusal the event may still have been
// extended; the next use of the log finds out, and a Key makes a retry safe.
func (l *Ledger) Record(ctx context.Context, e Entry) (Record, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.lock.acquire(ctx); err != nil {
		return Record{}, err
	}
	defer l.lock.release()
	s, err := l.settle()
	if err != nil {
		return Record{}, err
	}
	if s.Unread {
		return Record{}, &UnsupportedError{What: "extend RTMR3", Needs: "a readable RTMR3: Linux 6.16 or later, or dstack OS 0.5"}
	}
	event, err := l.newEvent(e)
	if err != nil {
		return Record{}, err
	}
	if done, err := l.existing(e, event); done != nil || err != nil {
		return deref(done), err
	}
	if err := l.room(event, e.Part); err != nil {
		return Record{}, err
	}
	return l.extend(e, event, s.Log)
}

func deref(r *Record) Record {
	if r == nil {
		return Record{}
	}
	return *r
}

func (l *Ledger) newEvent(e Entry) (Event, error) {
	version := e.Version
	if version == 0 {
		version = EventV1
		if n := len(l.records); n > 0 {
			version = l.records[n-1].version()
		}
	}
	return NewRuntimeEvent(e.Name, e.Payload, version)
}

// existing finds the record that answers e without another extend.
func (l *Ledger) existing(e Entry, event Event) (*Record, error) {
	if !e.Once && e.Key == "" {
		return nil, nil
	}
	for i := range l.records {
		r := &l.records[i]
		switch {
		case e.Key != "" && r.Key == e.Key:
			if r.Digest != event.Digest {
				return nil, &ConflictError{Name: e.Name, Reason: fmt.Sprintf("idempotency key %q was used for event %q with another payload", e.Key, r.Name)}
			}
			return r, nil
		case e.Once && r.Name == e.Name:
			if r.Digest != event.Digest {
				return nil, &ConflictError{Name: e.Name, Reason: fmt.Sprintf("got payload %x, measured was %s; a second value is refused", e.Payload, r.Payload)}
			}
			return r, nil
		}
	}
	return nil, nil
}

func (l *Ledger) room(event Event, p *Part) error {
	size := eventSize(event)
	if p != nil {
		events, bytes := Used(l.records, p.Owner)
		if n := events + 1; n > p.MaxEvents {
			return &FullError{Owner: p.Owner, What: "events", Got: n, Want: p.MaxEvents}
		}
		if n := bytes + size; n > p.MaxBytes {
			return &FullError{Owner: p.Owner, What: "bytes of JSON", Got: n, Want: p.MaxBytes}
		}
	}
	if n := len(l.records) + 1; l.cfg.MaxEvents > 0 && n > l.cfg.MaxEvents {
		return &FullError{What: "events", Got: n, Want: l.cfg.MaxEvents}
	}
	if n := l.bytes + size; l.cfg.MaxBytes > 0 && n > l.cfg.MaxBytes {
		return &FullError{What: "bytes of JSON", Got: n, Want: l.cfg.MaxBytes}
	}
	return nil
}

// extend is the three steps of the type's comment, with prev as the register's
// value. What it leaves behind on an error is an intent that settle understands.
func (l *Ledger) extend(e Entry, event Event, prev Digest) (Record, error) {
	r := newRecord(len(l.records)+1, event, prev)
	r.Time, r.Caller, r.Key = l.cfg.Now().UTC(), e.Caller, e.Key
	if e.Part != nil {
		r.Owner = e.Part.Owner
	}
	if err := l.append(r); err != nil {
		return Record{}, fmt.Errorf("write event %q to the RTMR3 log (nothing was extended): %w", e.Name, err)
	}
	extendErr := l.cfg.Registers.Extend(RTMR3, event.Digest)
	now, err := l.cfg.Registers.Registers()
	if err != nil {
		return Record{}, fmt.Errorf("event %q: RTMR3 could not be read back, so whether it was extended is not known yet: %w", e.Name, errors.Join(err, extendErr))
	}
	switch now.RTMR[RTMR3] {
	case r.Next: // even after an error: the register has the last word
		return r, nil
	case r.Prev:
		if extendErr == nil {
			extendErr = errors.New("the kernel reported success, but the register did not move")
		}
		if err := l.takeBack(); err != nil {
			extendErr = errors.Join(extendErr, err)
		}
		return Record{}, fmt.Errorf("extend RTMR3 with event %q: %w", e.Name, extendErr)
	}
	return Record{}, &DivergenceError{Log: r.Next, Register: now.RTMR[RTMR3]}
}

// settle brings the log and the register into agreement as the type's comment
// says, or tells that it cannot be done.
func (l *Ledger) settle() (Snapshot, error) {
	s, err := l.settled()
	if err == nil && !s.Unread {
		l.explained.Store(&s.Log)
	} else {
		l.explained.Store(nil)
	}
	return s, err
}

func (l *Ledger) settled() (Snapshot, error) {
	if err := l.refresh(false); err != nil {
		return Snapshot{}, err
	}
	regs, err := l.cfg.Registers.Registers()
	if u := (*UnsupportedError)(nil); errors.As(err, &u) {
		return Snapshot{Records: l.records, Log: l.tail(), Unread: true}, nil
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("read RTMR3: %w", err)
	}
	live := regs.RTMR[RTMR3]
	if live != l.tail() { // never judge by what is only remembered
		if err := l.refresh(true); err != nil {
			return Snapshot{}, err
		}
	}
	if err := l.reconcile(live); err != nil {
		return Snapshot{Records: l.records, Log: l.tail(), Register: live}, err
	}
	return Snapshot{Records: l.records[:len(l.records):len(l.records)], Log: live, Register: live}, nil
}

// tail is what the log replays to.
func (l *Ledger) tail() Digest {
	if n := len(l.records); n > 0 {
		return l.records[n-1].Next
	}
	return Digest{}
}

func (l *Ledger) reconcile(live Digest) error {
	if l.damage == nil {
		if live == l.tail() {
			return nil
		}
		if n := len(l.records); n > 0 && live == l.records[n-1].Prev {
			if err := l.takeBack(); err != nil {
				return err
			}
			l.mended.TakenBack++
			return nil
		}
		if adopted, err := l.adopt(l.tail(), live); adopted || err != nil {
			return err
		}
	}
	// A register of zero, or one that dstack's log explains from zero, has seen
	// none of our records: they are of an earlier boot, in a folder that outlived it.
	if l.damage != nil || len(l.records) > 0 {
		explained := live.IsZero()
		if !explained {
			_, explained = l.imported(Digest{}, live)
		}
		if explained {
			if err := l.setAside(); err != nil {
				return err
			}
			_, err := l.adopt(Digest{}, live)
			return err
		}
	}
	return &DivergenceError{Log: l.tail(), Register: live, Err: l.damage}
}

// imported returns those of dstack's events that lead from one register value to
// another.
func (l *Ledger) imported(from, to Digest) ([]Event, bool) {
	if l.cfg.Imported == nil || from == to {
		return nil, false
	}
	events, err := l.cfg.Imported()
	if err != nil {
		return nil, false // dstack's log explains nothing; the divergence is reported
	}
	for i := range events {
		at := from
		for j := i; j < len(events); j++ {
			if at = at.Extend(events[j].Digest); at == to {
				return events[i : j+1], true
			}
		}
	}
	return nil, false
}

// adopt takes over the events of dstack's log that lead from one value to the
// other. A crash in the middle leaves a log that the rest of them still explains.
func (l *Ledger) adopt(from, to Digest) (bool, error) {
	events, ok := l.imported(from, to)
	if !ok {
		return false, nil
	}
	for _, e := range events {
		r := newRecord(len(l.records)+1, e, l.tail())
		r.Time, r.Caller = l.cfg.Now().UTC(), "dstack"
		if err := l.append(r); err != nil {
			return false, fmt.Errorf("adopt event %q of dstack's log: %w", e.Name, err)
		}
	}
	return true, nil
}
