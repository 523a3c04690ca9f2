package tdxsim

import (
	"errors"
	"syscall"
	"time"

	"tdx-agent/measure"
)

// HostBehaviour is how the host, and the hardware, of a simulated TD behave. The
// zero value is a host that answers at once. It holds for one TD value in one
// process; other processes that have the TD open keep their own.
type HostBehaviour struct {
	// How long the host takes over a quote. The kernel looks for the answer at once
	// and then every Poll, Polls times (zero: 1 s and 30, as Linux does).
	Delay time.Duration
	Poll  time.Duration
	Polls int
	// Hold, if set, makes the host answer when it is closed, instead of after
	// Delay. The kernel is then woken at once.
	Hold <-chan struct{}
	// Silent is a host that does not answer: EIO after the last poll, then EBUSY
	// until SetHost is called.
	Silent bool
	// Asked, if set, is called when the host has been asked for a quote and before
	// it answers. It must not use the Client, which waits for this quote.
	Asked func()

	Errno syscall.Errno // quotes fail with it
	Empty bool          // quotes have no bytes (old kernels do so when the host fails)
	// Length cuts the quote or fills it up with zeros to this many bytes (zero: as
	// it is). More than the driver's buffer of 131,048 bytes is EFBIG.
	Length            int
	ForeignReportData bool // quotes are good ones, but of other report data
	BadVersion        bool // quotes say version 3
	Busy              bool // somebody else's quote is in flight: EBUSY
	NoProvider        bool // the driver is not loaded: ENXIO

	ExtendErrno syscall.Errno // extends fail with it
	ExtendMoves bool          // with ExtendErrno: but the register has moved
}

// Limits of the Linux driver.
const (
	pollInterval = time.Second
	pollCount    = 30
	quoteMax     = 128<<10 - 24 // the shared buffer without its header
)

const errNoFile = syscall.ENOENT

// request is a quote that the host was asked for.
type request struct {
	due    time.Time
	hold   <-chan struct{} // if not nil, instead of due
	silent bool
}

// pending reports whether the host still owns the buffer.
func (r *request) pending() bool {
	switch {
	case r == nil:
		return false
	case r.silent:
		return true
	case r.hold != nil:
		select {
		case <-r.hold:
			return false
		default:
			return true
		}
	}
	return time.Now().Before(r.due)
}

// SetHost changes how the host behaves from the next quote and extend on. A quote
// that the host is silent about is answered by it.
func (td *TD) SetHost(h HostBehaviour) {
	td.hostMu.Lock()
	defer td.hostMu.Unlock()
	td.host = h
	if td.request != nil {
		td.request.silent = false
	}
}

// Interrupt delivers a signal to the call that waits for a quote: it fails with
// EINTR while the host goes on, and further reads fail with EBUSY until the host
// has answered. When no call waits, nothing happens.
func (td *TD) Interrupt() {
	select {
	case td.interrupted <- struct{}{}:
	default:
	}
}

func (td *TD) behaviour() HostBehaviour {
	td.hostMu.Lock()
	defer td.hostMu.Unlock()
	return td.host
}

// inFlight reports whether the host still works on a quote.
func (td *TD) inFlight() bool {
	td.hostMu.Lock()
	defer td.hostMu.Unlock()
	return td.request.pending()
}

// hostQuote asks the host for a quote, as the driver does. The caller holds the
// configfs lock.
func (td *TD) hostQuote(inblob []byte) ([]byte, error) {
	h := td.behaviour()
	if h.Busy || td.inFlight() {
		return nil, syscall.EBUSY
	}
	if len(inblob) != inblobMax {
		return nil, syscall.EINVAL
	}
	rd := measure.ReportData(inblob)
	regs, err := td.Registers() // the TD report is made before the host is asked
	if err != nil {
		return nil, errors.Join(syscall.EIO, err)
	}
	td.ask(&h)
	if err := td.await(&h); err != nil {
		return nil, err
	}
	if h.Errno != 0 {
		return nil, h.Errno
	}
	return td.answer(&h, &regs, rd)
}

func (td *TD) ask(h *HostBehaviour) {
	select {
	case <-td.interrupted: // meant for an earlier call
	default:
	}
	td.hostMu.Lock()
	td.request = &request{due: time.Now().Add(h.Delay), hold: h.Hold, silent: h.Silent}
	td.hostMu.Unlock()
	if h.Asked != nil {
		h.Asked()
	}
}

// await polls as the driver does.
func (td *TD) await(h *HostBehaviour) error {
	poll, left := h.Poll, h.Polls
	if poll == 0 {
		poll = pollInterval
	}
	if left == 0 {
		left = pollCount
	}
	hold := h.Hold
	if h.Silent {
		hold = nil // which never comes
	}
	for ; td.inFlight(); left-- {
		if left == 0 {
			return syscall.EIO
		}
		select {
		case <-time.After(poll):
		case <-hold:
		case <-td.interrupted:
			return syscall.EINTR
		case <-td.closed:
			return syscall.EINTR
		}
	}
	return nil
}

// answer makes the quote and distorts it as told.
func (td *TD) answer(h *HostBehaviour, regs *measure.Registers, rd measure.ReportData) ([]byte, error) {
	if h.Empty {
		return []byte{}, nil
	}
	if h.ForeignReportData {
		rd[0] ^= 0xff
	}
	quote, err := td.platform.quote(regs, rd)
	if err != nil {
		return nil, errors.Join(syscall.EIO, err)
	}
	if h.BadVersion {
		quote[0] = 3
	}
	switch {
	case h.Length > quoteMax:
		return nil, syscall.EFBIG
	case h.Length > len(quote):
		quote = append(quote, make([]byte, h.Length-len(quote))...)
	case h.Length > 0:
		quote = quote[:h.Length]
	}
	return quote, nil
}
