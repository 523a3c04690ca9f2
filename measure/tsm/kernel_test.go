package tsm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// These tests run against the interfaces of a real kernel, in the test bed's machine:
// they extend registers and turn the knobs of its module.
var onKernel = flag.Bool("kernel", false, "run the tests that need (and change) a kernel with TDX guest interfaces")

const knobs = "/sys/module/ktdx/parameters"

func needKernel(t *testing.T) {
	t.Helper()
	if !*onKernel {
		t.Skip("needs the test bed's machine: run with -kernel there")
	}
}

// knob sets a parameter of the test bed's module until the test ends.
func knob(t *testing.T, name, value string) {
	t.Helper()
	path := filepath.Join(knobs, name)
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(path, old, 0) })
}

func needReports(t *testing.T) *Reports {
	t.Helper()
	needKernel(t)
	r, err := OpenReports(ReportsConfig{})
	if unsupported := (*measure.UnsupportedError)(nil); errors.As(err, &unsupported) {
		t.Skipf("this kernel makes no quotes: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	knob(t, "quote_len", "5000") // the module's own quote is shorter than a real one
	return r
}

func TestKernelReports(t *testing.T) {
	r := needReports(t)
	for i := range 5 {
		rd := measure.ReportData{byte(i)}
		quote, err := r.Quote(t.Context(), rd)
		if err != nil {
			t.Fatal(err)
		}
		if got := measure.ReportData(quote[568:632]); got != rd {
			t.Errorf("quote %d is for %s", i, got)
		}
	}
	if _, err := OpenReports(ReportsConfig{}); err != nil {
		t.Errorf("an entry that is there already: %v", err)
	}
}

// The same report data again must give the registers as they are now.
func TestKernelQuoteAfterExtend(t *testing.T) {
	r := needReports(t)
	k, err := Detect(Paths{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if !k.CanExtend {
		t.Skip("this kernel extends nothing")
	}
	for i := range 3 {
		quote, err := r.Quote(t.Context(), measure.ReportData{9})
		if err != nil {
			t.Fatal(err)
		}
		regs, err := k.Registers.Registers()
		if err != nil {
			t.Fatal(err)
		}
		if got := measure.Digest(quote[520:568]); got != regs.RTMR[3] {
			t.Errorf("the quote has RTMR3 %s, the register is %s", got, regs.RTMR[3])
		}
		if err := k.Registers.Extend(3, measure.Digest{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKernelQuoteErrors(t *testing.T) {
	for _, c := range []struct {
		knob, value string
		errno       syscall.Errno // 0: the kernel reports success
		reason      string
	}{
		{"quote_errno", fmt.Sprint(int(syscall.EIO)), syscall.EIO, "the host answered with an error"},
		{"quote_errno", fmt.Sprint(int(syscall.ETIMEDOUT)), syscall.ETIMEDOUT, "too late"},
		{"quote_len", "131049", syscall.EFBIG, "longer than the kernel takes"},
		{"quote_empty", "Y", 0, "no bytes"},
		{"quote_len", "1019", 0, "1019 bytes"},
	} {
		t.Run(c.knob+"="+c.value, func(t *testing.T) {
			r := needReports(t)
			knob(t, c.knob, c.value)
			_, err := r.Quote(t.Context(), measure.ReportData{1})
			var q *QuoteError
			if !errors.As(err, &q) || q.Errno != c.errno || !strings.Contains(q.Reason, c.reason) {
				t.Errorf("got %v, want errno %v and %q", err, c.errno, c.reason)
			}
			if c.errno != 0 && !errors.Is(err, c.errno) {
				t.Errorf("the errno is lost in %v", err)
			}
		})
	}
	r := needReports(t)
	if _, err := r.Quote(t.Context(), measure.ReportData{1}); err != nil {
		t.Errorf("after the failures: %v", err)
	}
}

func TestKernelLongestQuote(t *testing.T) {
	r := needReports(t)
	knob(t, "quote_len", "131048")
	if q, err := r.Quote(t.Context(), measure.ReportData{1}); err != nil || len(q) != 131048 {
		t.Errorf("got %d bytes, %v", len(q), err)
	}
}

// worker tells which thread reads quotes, and counts what signals did to it.
type worker struct {
	Client
	thread      atomic.Int64
	interrupted atomic.Int64
}

func (c *worker) ReadFile(name string) ([]byte, error) {
	c.thread.Store(int64(unix.Gettid()))
	b, err := c.Client.ReadFile(name)
	if errors.Is(err, syscall.EINTR) {
		c.interrupted.Add(1)
	}
	return b, err
}

// Signals do not reach the worker, even when they are aimed at its thread.
func TestKernelSignalStorm(t *testing.T) {
	needReports(t)
	knob(t, "quote_delay_ms", "300")
	c := &worker{Client: NewClient("")}
	r, err := OpenReports(ReportsConfig{Client: c})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				if thread := c.thread.Load(); thread != 0 {
					unix.Tgkill(os.Getpid(), int(thread), unix.SIGURG)
				}
			}
		}
	})
	for range 5 {
		if _, err := r.Quote(t.Context(), measure.ReportData{2}); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	storm.Wait()
	if n := c.interrupted.Load(); n != 0 {
		t.Errorf("signals interrupted %d reads", n)
	}
}

// An interrupted quote of another program keeps the kernel busy.
func TestKernelBusy(t *testing.T) {
	r := needReports(t)
	knob(t, "timeout_ms", "100")
	knob(t, "quote_delay_ms", "1500")
	if _, err := r.Quote(t.Context(), measure.ReportData{3}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a silent host: got %v, want EIO", err)
	}
	knob(t, "timeout_ms", "30000")
	knob(t, "quote_delay_ms", "0")
	start := time.Now()
	if _, err := r.Quote(t.Context(), measure.ReportData{4}); err != nil {
		t.Fatal(err)
	}
	t.Logf("quote after %s of a busy kernel", time.Since(start).Round(10*time.Millisecond))
}

func TestKernelAbandonedQuote(t *testing.T) {
	r := needReports(t)
	knob(t, "quote_delay_ms", "500")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Quote(ctx, measure.ReportData{5}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if q, err := r.Quote(t.Context(), measure.ReportData{6}); err != nil || q[568] != 6 {
		t.Errorf("the next quote: %v", err)
	}
}

// Two writers on one entry: each gets quotes for its own data only.
func TestKernelSharedEntry(t *testing.T) {
	a, b := needReports(t), needReports(t)
	var all sync.WaitGroup
	for i, r := range []*Reports{a, b} {
		all.Go(func() {
			for n := range 50 {
				rd := measure.ReportData{byte(i), byte(n)}
				quote, err := r.Quote(t.Context(), rd)
				if err == nil && measure.ReportData(quote[568:632]) != rd {
					t.Errorf("writer %d got the other's quote", i)
				}
				if err != nil && !isForeign(err) {
					t.Errorf("writer %d: %v", i, err)
				}
			}
		})
	}
	all.Wait()
}

func TestKernelEntryRemoved(t *testing.T) {
	r := needReports(t)
	if err := NewClient("").RemoveAll(reportPath + "/tdx-agent"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Quote(t.Context(), measure.ReportData{7}); err != nil {
		t.Error(err)
	}
}
