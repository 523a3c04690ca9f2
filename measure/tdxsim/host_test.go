package tdxsim_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/measure/tsm"
)

// outblobErrno writes inblob and reads outblob.
func outblobErrno(t testing.TB, td *tdxsim.TD) ([]byte, syscall.Errno) {
	t.Helper()
	c := td.Client()
	if err := c.Mkdir(entryPath); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	if err := c.WriteFile(entryPath+"/inblob", make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	q, err := c.ReadFile(entryPath + "/outblob")
	return q, errnoOf(err)
}

func TestSilentHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := openTD(t, t.TempDir())
		td.SetHost(tdxsim.HostBehaviour{Silent: true})
		start := time.Now()
		if _, errno := outblobErrno(t, td); errno != syscall.EIO {
			t.Errorf("errno %v, want EIO", errno)
		}
		if took := time.Since(start); took != 30*time.Second {
			t.Errorf("took %v, want 30 s", took)
		}
		if _, errno := outblobErrno(t, td); errno != syscall.EBUSY {
			t.Errorf("afterwards: errno %v, want EBUSY", errno)
		}
		td.SetHost(tdxsim.HostBehaviour{})
		verifyQuote(t, td, makeQuote(t, td, measure.ReportData{}))
	})
}

func TestHeldHost(t *testing.T) {
	td := openTD(t, t.TempDir())
	hold, asked := make(chan struct{}), make(chan struct{})
	td.SetHost(tdxsim.HostBehaviour{Hold: hold, Asked: func() { close(asked) }})
	done := make(chan []byte)
	go func() { done <- makeQuote(t, td, measure.ReportData{1}) }()
	<-asked
	if err := td.Extend(3, measure.Digest{1}); err != nil { // does not wait
		t.Fatal(err)
	}
	select {
	case <-done:
		t.Fatal("the quote did not wait for the host")
	default:
	}
	close(hold)
	q := <-done
	if rtmr3 := q[520:568]; !bytes.Equal(rtmr3, make([]byte, 48)) {
		t.Errorf("the quote has an RTMR3 of after the request: %x", rtmr3)
	}
}

func TestLyingHost(t *testing.T) {
	td := openTD(t, t.TempDir())
	td.SetHost(tdxsim.HostBehaviour{ForeignReportData: true})
	q := makeQuote(t, td, measure.ReportData{1})
	if body, _ := verifyQuote(t, td, q); body[520] == 1 {
		t.Error("report data is not foreign")
	}
	td.SetHost(tdxsim.HostBehaviour{BadVersion: true})
	if q := makeQuote(t, td, measure.ReportData{1}); q[0] != 3 {
		t.Errorf("version %d, want 3", q[0])
	}
	td.SetHost(tdxsim.HostBehaviour{Busy: true})
	if _, errno := outblobErrno(t, td); errno != syscall.EBUSY {
		t.Errorf("errno %v, want EBUSY", errno)
	}
	td.SetHost(tdxsim.HostBehaviour{NoProvider: true})
	if _, errno := outblobErrno(t, td); errno != syscall.ENXIO {
		t.Errorf("errno %v, want ENXIO", errno)
	}
	checkErrno(t, td.Client().Mkdir(reports+"/other"), syscall.ENXIO)
}

// TestBesideReport asks what package tsm's client does not let through to Linux.
func TestBesideReport(t *testing.T) {
	c := openTD(t, t.TempDir()).Client()
	checkErrno(t, c.Mkdir("/sys/kernel/config/tsm/x"), syscall.EPERM)
	checkErrno(t, c.Mkdir("/sys/kernel/config/tsm/reportx/y"), syscall.ENOENT)
	checkErrno(t, c.Mkdir(reports+"/../../x"), syscall.ENOENT)
	checkErrno(t, c.RemoveAll("/etc"), syscall.ENOENT)
	checkErrno(t, c.WriteFile("/etc/passwd", nil), syscall.ENOENT)
	_, err := c.ReadFile("/etc/passwd")
	checkErrno(t, err, syscall.ENOENT)
	_, err = c.ReadDir("/etc")
	checkErrno(t, err, syscall.ENOENT)
	checkErrno(t, c.Mkdir(reports+"/a\x00b"), syscall.EINVAL)
	checkErrno(t, c.Mkdir(""), syscall.ENOENT)
}

// TestQuoteHoldsUpOtherProcesses uses two TD values, whose locks are as separate as
// those of two processes.
func TestQuoteHoldsUpOtherProcesses(t *testing.T) {
	dir := t.TempDir()
	a, b := openTD(t, dir), openTD(t, dir)
	makeQuote(t, a, measure.ReportData{})
	hold, asked := make(chan struct{}), make(chan struct{})
	a.SetHost(tdxsim.HostBehaviour{Hold: hold, Asked: func() { close(asked) }})
	quoted, read := make(chan struct{}), make(chan struct{})
	go func() { makeQuote(t, a, measure.ReportData{1}); close(quoted) }()
	<-asked
	go func() { readGeneration(t, b); close(read) }()
	registers(t, b) // does not wait
	select {
	case <-read:
		t.Error("generation was read in the middle of a quote")
	case <-time.After(20 * time.Millisecond):
	}
	close(hold)
	<-quoted
	<-read
}

func TestCloseEndsAQuote(t *testing.T) {
	td := openTD(t, t.TempDir())
	asked := make(chan struct{})
	td.SetHost(tdxsim.HostBehaviour{Silent: true, Asked: func() { close(asked) }})
	errno := make(chan syscall.Errno)
	go func() {
		_, e := outblobErrno(t, td)
		errno <- e
	}()
	<-asked
	if err := td.Close(); err != nil {
		t.Error(err)
	}
	if e := <-errno; e != syscall.EINTR {
		t.Errorf("errno %v, want EINTR", e)
	}
}

// TestAgentQuotes puts the agent's own code on top.
func TestAgentQuotes(t *testing.T) {
	td := openTD(t, t.TempDir())
	reports, err := tsm.OpenReports(tsm.ReportsConfig{Client: td.Client()})
	if err != nil {
		t.Fatal(err)
	}
	defer reports.Close()
	for i := range byte(3) {
		rd := measure.ReportData{i}
		q, err := reports.Quote(context.Background(), rd)
		if err != nil {
			t.Fatal(err)
		}
		if body, _ := verifyQuote(t, td, q); !bytes.Equal(body[520:584], rd[:]) {
			t.Errorf("report data %x", body[520:584])
		}
	}
}

// TestKilledProcess kills processes that extend and quote all the time. RTMR3 must
// then be that of a whole number of extends, and entries must be readable.
func TestKilledProcess(t *testing.T) {
	dir := t.TempDir()
	td := openTD(t, dir)
	var known measure.Digest // RTMR3 while nobody extends
	for range 5 {
		child := exec.Command(os.Args[0], "-test.run=^TestBusyProcess$", "-test.v")
		child.Env = append(os.Environ(), busyDir+"="+dir)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, out, "busy")
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait() // says that it was killed
		got, steps := registers(t, td).RTMR[3], 0
		for ; known != got && steps < 1e6; steps++ {
			known = known.Extend(measure.Digest{1})
		}
		if known != got {
			t.Fatal("RTMR3 is no whole number of extends")
		}
		body, _ := verifyQuote(t, td, makeQuote(t, td, measure.ReportData{1}))
		if !bytes.Equal(body[472:520], got[:]) {
			t.Error("the quote has another RTMR3")
		}
	}
}

func waitFor(t *testing.T, r interface{ Read([]byte) (int, error) }, word string) {
	t.Helper()
	var seen strings.Builder
	b := make([]byte, 256)
	for !strings.Contains(seen.String(), word) {
		n, err := r.Read(b)
		if err != nil {
			t.Fatalf("child process: %v after %q", err, seen.String())
		}
		seen.Write(b[:n])
	}
}

const busyDir = "TDXSIM_TEST_BUSY"

func TestBusyProcess(t *testing.T) {
	dir := os.Getenv(busyDir)
	if dir == "" {
		t.Skip("runs in the child processes of TestKilledProcess")
	}
	td := openTD(t, dir)
	for i := 0; ; i++ {
		if err := td.Extend(3, measure.Digest{1}); err != nil {
			t.Fatal(err)
		}
		makeQuote(t, td, measure.ReportData{byte(i)})
		if i == 20 {
			if _, err := os.Stdout.WriteString("busy\n"); err != nil {
				t.Fatal(err)
			}
		}
	}
}
