package measure

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Bounds of the quote queue. The host makes one quote at a time, each in a second or
// more, so a longer queue would only promise what cannot be kept.
const (
	maxQueued          = 64
	maxQueuedPerCaller = 16
)

// BusyError says that the quote queue is full.
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
type quoteQueue struct {
	quoter Quoter

	mu      sync.Mutex
	jobs    map[quoteKey]*quoteJob
	callers []string               // those with waiting jobs, in the order of their turns
	waiting map[string][]*quoteJob // by caller
	queued  int
	present int // callers who wait, for a queued quote or for the one in flight
	running bool
	took    time.Duration // the last quote
	since   time.Time     // when the quote in flight began; zero when there is none
}

// quoteKey tells which requests are the same. RTMR3 is part of it: who has just
// recorded an event must not get a quote that was begun before.
type quoteKey struct {
	data  ReportData
	rtmr3 Digest
}

type quoteJob struct {
	key     quoteKey
	caller  string
	ctx     context.Context // ends when nobody waits any more
	cancel  context.CancelFunc
	waiters int
	done    chan struct{} // closed when quote and err are set
	quote   []byte
	err     error
}

func newQuoteQueue(q Quoter) *quoteQueue {
	return &quoteQueue{quoter: q, jobs: map[quoteKey]*quoteJob{}, waiting: map[string][]*quoteJob{}}
}

// quote waits for a quote. The result is shared and not to be modified.
func (q *quoteQueue) quote(ctx context.Context, key quoteKey, caller string) ([]byte, error) {
	job, err := q.join(key, caller)
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

func (q *quoteQueue) join(key quoteKey, caller string) (*quoteJob, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if job := q.jobs[key]; job != nil && job.ctx.Err() == nil {
		job.waiters++
		q.present++
		return job, nil
	}
	if q.queued >= maxQueued || len(q.waiting[caller]) >= maxQueuedPerCaller {
		return nil, &BusyError{Queued: q.queued, Wait: max(time.Second, q.took)}
	}
	job := &quoteJob{key: key, caller: caller, waiters: 1, done: make(chan struct{})}
	job.ctx, job.cancel = context.WithCancel(context.Background())
	q.jobs[key] = job
	if len(q.waiting[caller]) == 0 {
		q.callers = append(q.callers, caller)
	}
	q.waiting[caller] = append(q.waiting[caller], job)
	q.queued++
	q.present++
	if !q.running {
		q.running = true
		go q.work() // ends when nothing is waiting
	}
	return job, nil
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
	if i := slices.Index(q.waiting[job.caller], job); i >= 0 {
		q.remove(job.caller, i)
		q.forget(job)
	}
}

// remove takes a waiting job out of its caller's line.
func (q *quoteQueue) remove(caller string, i int) {
	q.waiting[caller] = slices.Delete(q.waiting[caller], i, i+1)
	q.queued--
	if len(q.waiting[caller]) == 0 {
		delete(q.waiting, caller)
		q.callers = slices.DeleteFunc(q.callers, func(c string) bool { return c == caller })
	}
}

func (q *quoteQueue) forget(job *quoteJob) {
	if q.jobs[job.key] == job {
		delete(q.jobs, job.key)
	}
}

// next takes the first job of the caller whose turn it is, and sends that caller to
// the end of the line.
func (q *quoteQueue) next() *quoteJob {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.callers) == 0 {
		q.running = false
		return nil
	}
	caller := q.callers[0]
	job := q.waiting[caller][0]
	q.callers = append(slices.Delete(q.callers, 0, 1), caller)
	q.remove(caller, 0)
	q.since = time.Now()
	return job
}

func (q *quoteQueue) work() {
	for job := q.next(); job != nil; job = q.next() {
		quote, err := q.quoter.Quote(job.ctx, job.key.data)
		if err != nil && job.ctx.Err() != nil {
			err = errors.New("the quote was abandoned by everybody who waited for it")
		}
		job.quote, job.err = quote, err
		q.mu.Lock()
		q.took, q.since = time.Since(q.since), time.Time{}
		q.forget(job)
		q.mu.Unlock()
		close(job.done)
	}
}

// depth is how many quotes are queued, and how many callers wait.
func (q *quoteQueue) depth() (queued, waiting int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.queued, q.present
}
