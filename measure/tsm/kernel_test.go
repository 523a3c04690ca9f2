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
	"syscall"
	"testing"
	"time"

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

// interruptions counts what signals did to reads.
type interruptions struct {
	Client
	n int // the worker's
}

func (c *interruptions) ReadFile(name string) ([]byte, error) {
	b, err := c.Client.ReadFile(name)
	if errors.Is(err, syscall.EINTR) {
		c.n++
	}
	return b, err
}

// A signal for the process must not reach the worker.
func TestKernelSignalStorm(t *testing.T) {
	needReports(t)
	knob(t, "quote_delay_ms", "300")
	c := &interruptions{Client: NewClient("")}
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
				syscall.Kill(os.Getpid(), syscall.SIGURG)
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
	if c.n != 0 {
		t.Errorf("signals interrupted %d reads", c.n)
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

func TestKernelRegisterFiles(t *testing.T) {
	needKernel(t)
	f, err := OpenRegisterFiles(Paths{}.orDefaults().Measurements)
	if unsupported := (*measure.UnsupportedError)(nil); errors.As(err, &unsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	extendsAll(t, f)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.EBUSY} {
		before := registersOf(t, f)
		old, _ := os.ReadFile(knobs + "/extend_errno")
		os.WriteFile(knobs+"/extend_errno", fmt.Appendf(nil, "%d", errno), 0)
		if err := f.Extend(3, measure.Digest{8}); !errors.Is(err, errno) {
			t.Errorf("got %v, want %v", err, errno)
		}
		os.WriteFile(knobs+"/extend_errno", old, 0)
		if registersOf(t, f) != before {
			t.Error("a refused extend moved a register")
		}
	}
	want := registersOf(t, f).RTMR[3]
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 10 {
				if err := f.Extend(3, measure.Digest{1}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for range 80 {
		want = want.Extend(measure.Digest{1})
	}
	if got := registersOf(t, f).RTMR[3]; got != want {
		t.Errorf("after 80 extends by 8 goroutines: got %s, want %s", got, want)
	}
}

func TestKernelDevice(t *testing.T) {
	needKernel(t)
	d, err := OpenDevice("/dev/tdx_guest")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	tdr, err := d.TDReport(measure.ReportData{1, 2, 3})
	if err != nil || tdr[128] != 1 {
		t.Errorf("TD report: %v", err)
	}
	if f, err := OpenRegisterFiles(Paths{}.orDefaults().Measurements); err == nil {
		if registersOf(t, f) != registersOf(t, d) {
			t.Error("sysfs and the TD report differ")
		}
	}
	if !d.CanExtend() {
		var unsupported *measure.UnsupportedError
		if err := d.Extend(3, measure.Digest{1}); !errors.As(err, &unsupported) {
			t.Errorf("got %v, want an UnsupportedError", err)
		}
		return
	}
	extendsAll(t, d)
	knob(t, "extend_errno", fmt.Sprint(int(syscall.EIO)))
	if err := d.Extend(3, measure.Digest{8}); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
}

func registersOf(t *testing.T, b measure.RegisterBank) measure.Registers {
	t.Helper()
	r, err := b.Registers()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// extendsAll extends each RTMR and looks at all registers.
func extendsAll(t *testing.T, b measure.RegisterBank) {
	t.Helper()
	for i := range 4 {
		want := registersOf(t, b)
		d := measure.Digest{byte(i + 1), 47: 0xff}
		want.RTMR[i] = want.RTMR[i].Extend(d)
		if err := b.Extend(i, d); err != nil {
			t.Fatal(err)
		}
		if got := registersOf(t, b); got != want {
			t.Errorf("after the extend of RTMR%d: got %v, want %v", i, got, want)
		}
	}
	for _, i := range []int{-1, 4} {
		if err := b.Extend(i, measure.Digest{}); err == nil {
			t.Errorf("RTMR%d was extended", i)
		}
	}
}

func TestKernelDetect(t *testing.T) {
	needKernel(t)
	if !Present(Paths{}) {
		t.Error("the TDX guest was not noticed")
	}
	k, err := Detect(Paths{})
	if err != nil {
		// dstack 0.5's shape: quotes only through QGS.
		conf := filepath.Join(t.TempDir(), "tdx-attest.conf")
		if err := os.WriteFile(conf, []byte("port = 4050\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Logf("without %s: %v", conf, err)
		if k, err = Detect(Paths{AttestConf: conf}); err != nil {
			t.Fatal(err)
		}
	}
	defer k.Close()
	t.Logf("quotes %s, registers %s, extends %t, notes %q", k.QuoteSource, k.RegisterSource, k.CanExtend, k.Notes)
	registersOf(t, k.Registers)
	err = k.Registers.Extend(3, measure.Digest{})
	if unsupported := (*measure.UnsupportedError)(nil); (err == nil) != k.CanExtend || err != nil && !errors.As(err, &unsupported) {
		t.Errorf("extend: %v", err)
	}
}

func TestKernelSetup(t *testing.T) {
	needKernel(t)
	notes, err := Setup(Paths{}, Owner{UID: 1000, GID: 1000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Setup(Paths{}, Owner{}) })
	t.Log(strings.Join(notes, "\n"))
	for _, path := range []string{"/sys/kernel/config/tsm/report/tdx-agent/inblob", "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"} {
		st, err := os.Stat(path)
		if err != nil {
			continue // a machine without it
		}
		if uid := st.Sys().(*syscall.Stat_t).Uid; uid != 1000 {
			t.Errorf("%s belongs to %d", path, uid)
		}
	}
}
