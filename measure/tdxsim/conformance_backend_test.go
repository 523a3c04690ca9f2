package tdxsim_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"golang.org/x/sys/unix"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/measure/tsm"
)

// With -kernel the table is put to Linux instead of the simulator: as root, with
// the test bed's module ktdx loaded.
var kernel = flag.Bool("kernel", false, "run TestConformance against this machine's kernel (needs the test bed's module)")

const (
	reports      = "/sys/kernel/config/tsm/report"
	measurements = "/sys/devices/virtual/misc/tdx_guest/measurements"
	knobs        = "/sys/module/ktdx/parameters/"
)

// backend is one implementation of the two seams, with its knobs.
type backend struct {
	client interface {
		configfsi.Client
		Mkdir(name string) error
	}
	bank measure.RegisterBank
	// set changes the host: Delay, Poll, Polls, Errno, Empty, Length, ExtendErrno.
	set func(testing.TB, tdxsim.HostBehaviour)
	// interrupted calls read and delivers a signal to it after a while.
	interrupted func(while time.Duration, read func() error) error
}

func simulated(t testing.TB) *backend {
	td := openTD(t, t.TempDir())
	return &backend{
		client: td.Client(), bank: td,
		set: func(_ testing.TB, h tdxsim.HostBehaviour) { td.SetHost(h) },
		interrupted: func(while time.Duration, read func() error) error {
			time.AfterFunc(while, td.Interrupt)
			return read()
		},
	}
}

func linux(t testing.TB) *backend {
	t.Helper()
	bank, err := tsm.OpenRegisterFiles(measurements)
	if err != nil {
		t.Fatal(err)
	}
	return &backend{client: tsm.NewClient(""), bank: bank, set: turnKnobs, interrupted: signalled}
}

func turnKnobs(t testing.TB, h tdxsim.HostBehaviour) {
	t.Helper()
	poll, polls := h.Poll, h.Polls
	if poll == 0 {
		poll = time.Second
	}
	if polls == 0 {
		polls = 30
	}
	for name, value := range map[string]any{
		"quote_delay_ms": h.Delay.Milliseconds(), "poll_ms": poll.Milliseconds(), "timeout_ms": poll.Milliseconds() * int64(polls),
		"quote_errno": int(h.Errno), "quote_empty": h.Empty, "quote_len": h.Length, "extend_errno": int(h.ExtendErrno),
	} {
		text := strings.NewReplacer("true", "Y", "false", "N").Replace(fmt.Sprint(value))
		if err := os.WriteFile(knobs+name, []byte(text), 0); err != nil {
			t.Fatalf("is the module ktdx loaded? %v", err)
		}
	}
}

// signalled sends SIGURG, which Go's runtime ignores, to the thread that reads.
func signalled(while time.Duration, read func() error) error {
	thread, result := make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		result <- read()
	}()
	id := <-thread
	time.Sleep(while)
	if err := unix.Tgkill(os.Getpid(), id, unix.SIGURG); err != nil {
		return err
	}
	return <-result
}

// fast is a poll interval that hardly delays a test in the virtual machine.
const fast = 10 * time.Millisecond

// entry makes an entry that goes with the test.
func (b *backend) entry(t *testing.T, name string) string {
	t.Helper()
	d := reports + "/" + name
	if err := b.client.Mkdir(d); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.client.RemoveAll(d) }) // the test may have removed it
	return d
}

func (b *backend) generation(t *testing.T, d string) string {
	t.Helper()
	g, err := b.client.ReadFile(d + "/generation")
	if err != nil {
		t.Fatal(err)
	}
	return string(g)
}

func (b *backend) write(t *testing.T, d string, fill byte) {
	t.Helper()
	if err := b.client.WriteFile(d+"/inblob", bytes.Repeat([]byte{fill}, 64)); err != nil {
		t.Fatal(err)
	}
}

func (b *backend) registers(t *testing.T) measure.Registers {
	t.Helper()
	r, err := b.bank.Registers()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// outblob reads a quote and wants this errno.
func (b *backend) outblob(t *testing.T, d string, want syscall.Errno) []byte {
	t.Helper()
	q, err := b.client.ReadFile(d + "/outblob")
	if (err != nil) != (want != 0) {
		t.Fatalf("outblob: %v, want errno %d", err, want)
	}
	if want != 0 {
		wantErrno(t, "outblob", err, want)
	}
	return q
}

func wantErrno(t *testing.T, what string, err error, want syscall.Errno) {
	t.Helper()
	var p *fs.PathError
	if !errors.Is(err, want) || !errors.As(err, &p) {
		t.Errorf("%s: %v, want a PathError of %s", what, err, unix.ErrnoName(want))
	}
}

// wantQuote checks the body of a version 4 quote.
func wantQuote(t *testing.T, q []byte, fill byte, r measure.Registers) {
	t.Helper()
	if len(q) < 636 {
		t.Fatalf("quote has %d bytes", len(q))
	}
	if got := q[568:632]; !bytes.Equal(got, bytes.Repeat([]byte{fill}, 64)) {
		t.Errorf("report data %x, want %02x...", got, fill)
	}
	var want []byte
	for _, d := range []measure.Digest{r.MRTD, r.MRConfigID, r.MROwner, r.MROwnerConfig, r.RTMR[0], r.RTMR[1], r.RTMR[2], r.RTMR[3]} {
		want = append(want, d[:]...)
	}
	if got := q[184:568]; !bytes.Equal(got, want) {
		t.Errorf("registers %x, want %x", got, want)
	}
}
