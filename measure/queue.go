package measure

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Bounds of the quote queue. The host makes one quote at a time, so a longer queue
// would only promise what cannot be kept.
const (
	maxQueued          = 64 // of this TD
	maxQueuedPerCaller = 16
	maxQueuedRemote    = 32 // for the peers of channels
	maxRetryAfter      = 30 * time.Second
)

// BusyError says that a quote would come too late: too many wait, or those that wait
// take longer than the caller has.
type BusyError struct {
	Queued int
	Wait   time.Duration // when to try again
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("%d quotes are waiting already; try again in %s", e.Queued, e.Wait)
}

// RetryAfter is when to try again.
func (e *BusyError) RetryAfter() time.Duration { return e.Wait }

// ExitCode is the program's exit status for this error.
func (e *BusyError) ExitCode() int { return 9 }

// quoteQueue gives every caller its turn at the one Quoter. Callers are served
// round robin, each caller's requests in order; requests for the same quote, also of
// different callers, share one.
//
// Quotes for remote peers stand in a line of their own, which gets at most half of the
// host's time: after each, the host is free for callers of this TD for as long as a
// quote takes.
type quoteQueue struct {
	quoter Quoter

	mu         sync.Mutex
	jobs       map[quoteKey]*quoteJob
	local      line
	remote     line
	present    int // callers who wait, for a queued quote or for the one in flight
	running    bool
	changed    chan struct{} // holds a token when the lines have changed
	typical    time.Duration // what a quote takes, a moving average; 0 before the first
	since      time.Time     // when the quote in flight began; zero when there is none
	remoteFrom time.Time     // no quote for remote peers begins before
}

// line is those who wait, with requests that are not begun.
type line struct {
	limit, perCaller int

	callers []string               // in the order of their turns
	waiting map[string][]*quoteJob // by caller
	queued  int
}

// quoteKey tells which requests are the same. RTMR3 is part of it: who has just
// recorded an event must not get a quote that was begun before.
type quoteKey struct {
	data  ReportData
	rtmr3 Digest
}

type quoteJob struct {
	key      quoteKey
	line     *line
	caller   string
	ctx      context.Context // ends when nobody waits any more
	cancel   context.CancelFunc
	waiters  int
	deadline time.Time     // of the most patient; zero: none
	done     chan struct{} // closed when quote and err are set
	quote    []byte
	err      error
}

func newQuoteQueue(q Quoter) *quoteQueue {
	return &quoteQueue{quoter: q, jobs: map[quoteKey]*quoteJob{}, changed: make(chan struct{}, 1),
		local:  line{limit: maxQueued, perCaller: maxQueuedPerCaller, waiting: map[string][]*quoteJob{}},
		remote: line{limit: maxQueuedRemote, perCaller: maxQueuedRemote, waiting: map[string][]*quoteJob{}}}
}

// quote waits for a quote. The result is shared and not to be modified.
func (q *quoteQueue) quote(ctx context.Context, key quoteKey, l *line, caller string) ([]byte, error) {
	job, err := q.join(ctx, key, l, caller)
	if err != nil {
		return nil, err
	}
	select {
	case <-job.done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	q.leave(job)
	if err != nil {
		return nil, err
	}
	return job.quote, job.err
}

func (q *quoteQueue) join(ctx context.Context, key quoteKey, l *line, caller string) (*quoteJob, error) {
	deadline, _ := ctx.Deadline()
	q.mu.Lock()
	defer q.mu.Unlock()
	if job := q.jobs[key]; job != nil && job.ctx.Err() == nil {
		job.waiters++
		q.present++
		if deadline.IsZero() || !job.deadline.IsZero() && deadline.After(job.deadline) {
			job.deadline = deadline
		}
		return job, nil
	}
	wait := q.wait(l, caller)
	isLate := q.isOccupied() && !deadline.IsZero() && time.Until(deadline) < wait+q.typical
	if isLate || l.queued >= l.limit || len(l.waiting[caller]) >= l.perCaller {
		return nil, q.busy(wait)
	}
	job := &quoteJob{key: key, line: l, caller: caller, waiters: 1, deadline: deadline, done: make(chan struct{})}
	job.ctx, job.cancel = context.WithCancel(context.Background())
	q.jobs[key] = job
	l.add(job)
	q.present++
	if !q.running {
		q.running = true
		go q.work() // ends when nothing is waiting
	}
	q.tell()
	return job, nil
}

// wait is how long a new request of a caller will stand in a line, as far as that is
// known: 0 before the first quote.
func (q *quoteQueue) wait(l *line, caller string) time.Duration {
	n, blocked := l.ahead(caller), time.Duration(0)
	if l == &q.remote {
		n, blocked = 2*n, max(0, time.Until(q.remoteFrom))
	} else {
		n += min(q.remote.queued, n+1)
	}
	if !q.since.IsZero() {
		n++
	}
	return blocked + time.Duration(n)*q.typical
}

// isOccupied reports whether the host has something to do. Where it has not, a request
// is made however long quotes took: the host shows how long they take today.
func (q *quoteQueue) isOccupied() bool {
	return !q.since.IsZero() || q.local.queued+q.remote.queued > 0
}

// ahead is how many requests of a line come before a new one of this caller.
func (l *line) ahead(caller string) int {
	own := len(l.waiting[caller])
	n := own
	for other, jobs := range l.waiting {
		if other != caller {
			n += min(len(jobs), own+1)
		}
	}
	return n
}

func (q *quoteQueue) busy(wait time.Duration) *BusyError {
	if wait == 0 {
		wait = time.Second
	}
	return &BusyError{Queued: q.local.queued + q.remote.queued, Wait: min(wait.Round(time.Millisecond), maxRetryAfter)}
}

// tell wakes the worker where it waits for a time to come.
func (q *quoteQueue) tell() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// leave ends a caller's wait. The last to leave cancels the job, if it still runs.
func (q *quoteQueue) leave(job *quoteJob) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.present--
	if job.waiters--; job.waiters > 0 {
		return
	}
	job.cancel()
	if i := slices.Index(job.line.waiting[job.caller], job); i >= 0 {
		job.line.remove(job.caller, i)
		q.forget(job)
		q.tell()
	}
}

func (l *line) add(job *quoteJob) {
	if len(l.waiting[job.caller]) == 0 {
		l.callers = append(l.callers, job.caller)
	}
	l.waiting[job.caller] = append(l.waiting[job.caller], job)
	l.queued++
}

// remove takes a waiting job out of its caller's requests.
func (l *line) remove(caller string, i int) {
	l.waiting[caller] = slices.Delete(l.waiting[caller], i, i+1)
	l.queued--
	if len(l.waiting[caller]) == 0 {
		delete(l.waiting, caller)
		l.callers = slices.DeleteFunc(l.callers, func(c string) bool { return c == caller })
	}
}

// take takes the first job of the caller whose turn it is, and sends that caller to
// the end of the line.
func (l *line) take() *quoteJob {
	caller := l.callers[0]
	job := l.waiting[caller][0]
	l.callers = append(slices.Delete(l.callers, 0, 1), caller)
	l.remove(caller, 0)
	return job
}

func (q *quoteQueue) forget(job *quoteJob) {
	if q.jobs[job.key] == job {
		delete(q.jobs, job.key)
	}
}

// next takes the job whose turn it is, or says how long there is none. Nothing waits if
// both are zero.
func (q *quoteQueue) next() (job *quoteJob, wait time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		now := time.Now()
		wait = q.remoteFrom.Sub(now)
		switch {
		case q.remote.queued > 0 && wait <= 0:
			job = q.remote.take()
		case q.local.queued > 0:
			job = q.local.take()
		case q.remote.queued > 0:
			return nil, wait
		default:
			q.running = false
			return nil, 0
		}
		if !q.shed(job, now) {
			q.since = now
			return job, 0
		}
	}
}

// shed answers a job that would come too late, where somebody else waits for the host.
func (q *quoteQueue) shed(job *quoteJob, now time.Time) bool {
	if job.deadline.IsZero() || q.local.queued+q.remote.queued == 0 || job.deadline.Sub(now) >= q.typical {
		return false
	}
	job.err = q.busy(q.typical)
	q.forget(job)
	close(job.done)
	return true
}

func (q *quoteQueue) work() {
	for {
		job, wait := q.next()
		switch {
		case job != nil:
			q.make(job)
		case wait > 0:
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-q.changed:
			}
			timer.Stop()
		default:
			return
		}
	}
}

func (q *quoteQueue) make(job *quoteJob) {
	job.quote, job.err = q.quoter.Quote(job.ctx, job.key.data)
	if job.err != nil && job.ctx.Err() != nil {
		job.err = errors.New("the quote was abandoned by everybody who waited for it")
	}
	q.mu.Lock()
	took := time.Since(q.since)
	q.since = time.Time{}
	switch {
	case job.err != nil: // says nothing of what a quote takes
	case q.typical == 0:
		q.typical = took
	default:
		q.typical += (took - q.typical) / 8
	}
	if job.line == &q.remote {
		q.remoteFrom = time.Now().Add(max(q.typical, took))
	}
	q.forget(job)
	q.mu.Unlock()
	close(job.done)
}

// depth is how many quotes are queued, and how many callers wait.
func (q *quoteQueue) depth() (queued, remote, waiting int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.local.queued + q.remote.queued, q.remote.queued, q.present
}
