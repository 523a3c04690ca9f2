package tsm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-configfs-tsm/report"
	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

const (
	defaultEntry    = "tdx-agent"
	dcapEntry       = "com.intel.dcap" // dstack's, and the only one its simulator has
	defaultProvider = "tdx_guest"

	// A quote that was interrupted keeps the kernel busy until the host is done with
	// it, which takes 30 polls of 1 s at the worst.
	defaultRetry = 33 * time.Second
	firstPause   = 20 * time.Millisecond
	maxPause     = time.Second

	maxForeignWrites = 8
)

var errClosed = errors.New("no quote: the agent is shutting down")

// ReportsConfig says how to make quotes through configfs-tsm. The zero value is the
// real configfs with every default.
type ReportsConfig struct {
	// Client reaches configfs; nil is NewClient("").
	Client Client
	// Entry is the name of the report entry, "tdx-agent" by default. The agent should
	// be the only program that writes to it.
	Entry string
	// Retry is for how long a quote is tried again while the kernel answers EBUSY or
	// EINTR. 0 is 33 s; less than 31 s gives up while another quote may still run.
	Retry time.Duration
	// Provider is what the entry's provider must begin with, "tdx_guest" by default.
	Provider string
}

// Reports makes quotes through one configfs-tsm entry, which lives as long as the
// machine does. It implements [measure.Quoter] and may be used by many goroutines,
// whose requests wait for each other here and not in the kernel: there, everything
// that touches any entry waits behind a running quote, deaf even to SIGKILL.
type Reports struct {
	cfg      ReportsConfig
	requests chan reportRequest
	closing  chan struct{}
	close    sync.Once

	entry     string // the worker's, once it runs
	conflicts atomic.Int64
}

// Conflicts is how often another program was seen to write to the entry.
func (r *Reports) Conflicts() int64 { return r.conflicts.Load() }

type reportRequest struct {
	ctx   context.Context
	rd    measure.ReportData
	reply chan<- reportReply // has room for the reply, so the worker never waits
}

type reportReply struct {
	quote []byte
	err   error
}

// OpenReports makes the entry, or takes the one that is there: an earlier run's, one
// that a privileged step prepared, or, where entries cannot be made at all (dstack's
// simulator), com.intel.dcap. It asks the host for nothing and reads nothing of the
// entry, because that can hang for 30 s. An [*measure.UnsupportedError] means that
// this kernel has no configfs-tsm, or no quote provider in it.
func OpenReports(cfg ReportsConfig) (*Reports, error) {
	if cfg.Client == nil {
		cfg.Client = NewClient("")
	}
	if cfg.Entry == "" {
		cfg.Entry = defaultEntry
	}
	if cfg.Retry == 0 {
		cfg.Retry = defaultRetry
	}
	if cfg.Provider == "" {
		cfg.Provider = defaultProvider
	}
	if e := cfg.Entry; e == "." || e == ".." || len(e) > 255 || strings.ContainsAny(e, "/\x00") {
		return nil, fmt.Errorf("report entry %q: want one file name", e)
	}
	r := &Reports{cfg: cfg, entry: cfg.Entry, requests: make(chan reportRequest), closing: make(chan struct{})}
	if err := r.makeEntry(); err != nil {
		return nil, err
	}
	go r.work() // ends by Close
	return r, nil
}

// Quote implements [measure.Quoter]. Its errors are a [*QuoteError] or ctx's.
func (r *Reports) Quote(ctx context.Context, rd measure.ReportData) ([]byte, error) {
	reply := make(chan reportReply, 1)
	select {
	case r.requests <- reportRequest{ctx, rd, reply}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-r.closing:
		return nil, errClosed
	}
	select {
	case a := <-reply:
		return a.quote, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-r.closing:
		return nil, errClosed
	}
}

// Close ends the worker and fails what waits for it. It does not wait for a quote
// that the kernel is making; the end of the process cuts that short. The entry stays,
// for the next run: to remove it would wait behind the quote, long enough for the
// service manager to kill the agent.
func (r *Reports) Close() error {
	r.close.Do(func() { close(r.closing) })
	return nil
}

func (r *Reports) makeEntry() error {
	err := r.cfg.Client.Mkdir(path.Join(reportPath, r.entry))
	switch {
	case err == nil, errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, syscall.ENXIO):
		return &measure.UnsupportedError{What: "make quotes through configfs-tsm", Needs: "a quote provider: the driver tdx_guest of Linux 6.7 or later, in a TDX guest", Err: err}
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return &measure.UnsupportedError{What: "make quotes through configfs-tsm", Needs: "Linux 6.7 or later with CONFIG_TSM_REPORTS, and configfs mounted", Err: err}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOSYS), errors.Is(err, syscall.EROFS):
		return r.findEntry(err)
	}
	return fmt.Errorf("make the report entry %q: %w", r.entry, err)
}

// findEntry is for a kernel that refused to make the entry: somebody else may have
// made it before.
func (r *Reports) findEntry(refused error) error {
	if _, err := r.cfg.Client.ReadDir(path.Join(reportPath, r.entry)); err == nil {
		return nil
	}
	if errors.Is(refused, syscall.ENOSYS) {
		if _, err := r.cfg.Client.ReadDir(path.Join(reportPath, dcapEntry)); err == nil {
			r.entry = dcapEntry
			return nil
		}
	}
	return fmt.Errorf("make the report entry %q: run kernel-setup as root first: %w", r.entry, refused)
}

// work owns the entry.
func (r *Reports) work() {
	for {
		select {
		case <-r.closing:
			return
		case q := <-r.requests:
			if q.ctx.Err() == nil {
				quote, err := r.undisturbed(q)
				q.reply <- reportReply{quote, err}
			}
		}
	}
}

// undisturbed makes a quote on a thread that takes no signals meanwhile: one would end
// the read of the quote, and the kernel would then answer EBUSY until the host is
// done. The thread is not kept for this goroutine between quotes, since to wake it
// takes as long as a tenth of a quote.
func (r *Reports) undisturbed(q reportRequest) ([]byte, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer blockSignals()()
	return r.quote(q.ctx, q.rd)
}

// blockSignals blocks what can be sent from outside on this thread, until restore.
// Left alone are the signals of a crash, which Go turns into a stack trace, and the
// two by which runtimes run a system call on all threads; neither comes by accident.
func blockSignals() (restore func()) {
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	for _, s := range []syscall.Signal{syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP, 32, 33} {
		all.Val[0] &^= 1 << (s - 1)
	}
	if unix.PthreadSigmask(unix.SIG_BLOCK, &all, &old) != nil {
		return func() {} // quotes still work, only signals can delay them
	}
	return func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }
}

// quote tries until there is a quote, until the failure is one that trying again does
// not cure, or until nobody waits any more.
func (r *Reports) quote(ctx context.Context, rd measure.ReportData) ([]byte, error) {
	var deadline time.Time // of the retries, once there are any
	foreign, remade := 0, false
	for attempt := 0; ; attempt++ {
		quote, err := r.once(rd)
		if err == nil {
			return quote, nil
		}
		if isForeign(err) {
			r.conflicts.Add(1)
		}
		switch {
		case isBusy(err):
			if deadline.IsZero() {
				deadline = time.Now().Add(r.cfg.Retry)
			}
			if !time.Now().Before(deadline) {
				return nil, err
			}
		case isForeign(err) && foreign < maxForeignWrites:
			foreign++
		case errors.Is(err, fs.ErrNotExist) && !remade:
			remade = true
			if err := r.makeEntry(); err != nil {
				return nil, newQuoteError(err)
			}
		default:
			return nil, err
		}
		if err := r.pause(ctx, attempt); err != nil {
			return nil, err
		}
	}
}

// isBusy: another quote is in flight, ours was interrupted, or the entry is locked.
func isBusy(err error) bool {
	return errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.EAGAIN)
}

// isForeign: somebody wrote to our entry between our write and our read. EINVAL is
// one of the ways to see it, since what we write is always 64 bytes.
func isForeign(err error) bool {
	var generation *report.GenerationErr
	var data *foreignDataError
	return errors.As(err, &generation) || errors.As(err, &data) || errors.Is(err, syscall.EINVAL)
}

func (r *Reports) pause(ctx context.Context, attempt int) error {
	d := min(firstPause<<min(attempt, 10), maxPause)
	t := time.NewTimer(d/2 + rand.N(d/2)) // so that two who wait do not meet again
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-r.closing:
		return errClosed
	}
}

// once makes one quote: report data in, quote out, and the entry's generation is one
// higher than before. The wrapper is made anew each time, because go-configfs-tsm's
// does not recover from an error. So is the report data written, also if it is the
// same: only that makes the kernel ask the host again.
func (r *Reports) once(rd measure.ReportData) ([]byte, error) {
	entry := path.Join(reportPath, r.entry)
	if c, ok := r.cfg.Client.(*dirClient); ok && r.entry == dcapEntry {
		unlock, err := c.lock(path.Join(entry, "inblob"))
		if err != nil {
			return nil, newQuoteError(err)
		}
		defer unlock()
	}
	c := &keptErrors{Client: r.cfg.Client}
	resp, err := get(c, entry, rd)
	if err != nil {
		return nil, c.explain(err)
	}
	if !strings.HasPrefix(resp.Provider, r.cfg.Provider) {
		return nil, &QuoteError{Reason: fmt.Sprintf("the kernel's quote provider is %q, want %q: this is not a TDX guest", strings.TrimSpace(resp.Provider), r.cfg.Provider)}
	}
	if err := checkQuote(resp.OutBlob, rd); err != nil {
		return nil, err
	}
	return resp.OutBlob, nil
}

func get(c *keptErrors, entry string, rd measure.ReportData) (*report.Response, error) {
	open, err := report.UnsafeWrap(c, entry)
	if err != nil {
		return nil, err
	}
	open.InBlob = rd[:]
	return open.Get()
}

// keptErrors keeps the error that go-configfs-tsm turns into text, and the entry that
// it would remove when it cannot read the generation.
type keptErrors struct {
	Client
	err error
}

func (c *keptErrors) ReadFile(name string) ([]byte, error) {
	b, err := c.Client.ReadFile(name)
	if err != nil {
		c.err = err
	}
	return b, err
}

func (c *keptErrors) WriteFile(name string, contents []byte) error {
	err := c.Client.WriteFile(name, contents)
	if err != nil {
		c.err = err
	}
	return err
}

func (c *keptErrors) RemoveAll(string) error { return nil }

// explain says why go-configfs-tsm returned err.
func (c *keptErrors) explain(err error) *QuoteError {
	if c.err != nil {
		return newQuoteError(c.err)
	}
	if g := report.GetGenerationErr(err); g != nil {
		return &QuoteError{Reason: "another program writes to our entry; find it, or give the agent an entry of its own", Err: g}
	}
	return &QuoteError{Reason: "the entry's files are not what the kernel writes", Err: err}
}
