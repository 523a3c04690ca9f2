package main

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
)

// workerInherited is the value of worker.listen for the socket that systemd passes: serve
// has no network of its own, so a TCP port can only be bound by somebody else.
const workerInherited = "inherited"

// WorkerConfig says where strangers may ask about this VM.
type WorkerConfig struct {
	Listen string `toml:"listen"`
}

func (c *WorkerConfig) check() error {
	if c.Listen == "" || c.Listen == workerInherited || filepath.IsAbs(c.Listen) {
		return nil
	}
	return fmt.Errorf(`worker.listen is %q, want "" (off), %q (the socket of tdx-agent-worker.socket) or the absolute path of a Unix socket; serve binds no TCP port itself`, c.Listen, workerInherited)
}

// workerServer serves the external service. Its callers may be anybody, so they get what
// is made once and told to all.
func (d *daemon) workerServer() *guestapi.Server {
	return guestapi.NewServer(guestapi.Config{Surface: guestapi.Worker, Grants: guestapi.Grants{Read: true, Quote: true}, Guest: &workerGuest{daemon: d}, Keys: d.appKeys,
		PublicTCBInfo: d.files != nil && d.files.Compose.PublicTCBInfo, Version: version(), Revision: revision(), Logger: d.log, CallTimeout: quoteWait, MaxConns: 64,
		Pace: rate.NewLimiter(workerPace, workerPace),
		Observe: func(method string, status int, isThrottled bool) {
			d.metrics.called(guestapi.Worker.String(), method, status, isThrottled)
		}})
}

// The bounds of what strangers may cost.
const (
	maxWorkerEvidence = 2   // one for each algorithm of the application's signing key
	workerPace        = 200 // calls a second, and at once after a quiet second
	workerRetry       = 30 * time.Second
)

// workerGuest is the daemon as strangers see it: one quote for each key and state of
// RTMR3, whoever asks and however often.
type workerGuest struct {
	*daemon

	mu      sync.Mutex // guards what follows
	rtmr3   measure.Digest
	answers map[measure.ReportData]*workerAnswer // of rtmr3
}

// Emit implements guestapi.Guest. Strangers have no grant for it.
func (*workerGuest) Emit(context.Context, string, []byte, guestapi.Caller) error {
	return exitf(exitDenied, "strangers record no events")
}

// workerAnswer is evidence that is being made or was.
type workerAnswer struct {
	done    chan struct{} // closed when what follows is there
	ev      *measure.Evidence
	err     error
	expires time.Time // of err
}

// Evidence implements guestapi.Guest. The report data is that of a key of the
// application. A failure is told to everybody who asks in the next 30 s.
func (w *workerGuest) Evidence(ctx context.Context, rd measure.ReportData, c guestapi.Caller) (*measure.Evidence, error) {
	s, err := w.ledger.Snapshot(ctx)
	if err := w.report(err); err != nil {
		return nil, err
	}
	if err != nil && w.cfg.OnForeignExtend != "serve" {
		return nil, err
	}
	answer, mine := w.answer(rd, s.Log)
	if answer == nil {
		return nil, fmt.Errorf("the application has changed keys; there is evidence for %d of them already", maxWorkerEvidence)
	}
	if mine {
		// Not with the caller's ctx: whoever comes next must not pay for his leaving.
		go w.make(context.WithoutCancel(ctx), answer, rd, c)
	}
	select {
	case <-answer.done:
		return answer.ev, answer.err
	case <-ctx.Done():
		return nil, fmt.Errorf("evidence for the application's key: %w", ctx.Err())
	}
}

// answer returns the answer for rd, and whether it is the caller's to make.
func (w *workerGuest) answer(rd measure.ReportData, rtmr3 measure.Digest) (a *workerAnswer, mine bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.answers == nil || w.rtmr3 != rtmr3 {
		w.rtmr3, w.answers = rtmr3, map[measure.ReportData]*workerAnswer{}
	}
	if a = w.answers[rd]; a != nil && !a.expired() {
		return a, false
	}
	if a == nil && len(w.answers) >= maxWorkerEvidence {
		return nil, false
	}
	a = &workerAnswer{done: make(chan struct{})}
	w.answers[rd] = a
	return a, true
}

// expired tells whether it is time to try again after a failure.
func (a *workerAnswer) expired() bool {
	select {
	case <-a.done:
		return a.err != nil && time.Now().After(a.expires)
	default:
		return false
	}
}

func (w *workerGuest) make(ctx context.Context, a *workerAnswer, rd measure.ReportData, c guestapi.Caller) {
	defer close(a.done)
	a.ev, a.err = w.daemon.Evidence(ctx, rd, c)
	a.expires = time.Now().Add(workerRetry)
}
