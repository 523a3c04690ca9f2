package tsm

import (
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"tdx-agent/measure"
)

// Bounds of a quote, in bytes. minQuote is what dstack and go-tdx-guest ask for;
// maxQuote is what the kernel's driver can carry, 128 KiB less its header.
const (
	minQuote = 1020
	maxQuote = 131048
)

// QuoteError says why there is no quote.
type QuoteError struct {
	Errno  syscall.Errno // the kernel's answer; 0 if the kernel did answer with a quote, or was not asked
	Reason string        // what it means and what to do
	Err    error         // the failed call; may be nil
}

func (e *QuoteError) Error() string {
	if e.Err == nil {
		return "no quote: " + e.Reason
	}
	return fmt.Sprintf("no quote: %s (%v)", e.Reason, e.Err)
}

// Unwrap returns the errno and the failed call.
func (e *QuoteError) Unwrap() []error {
	var errs []error
	if e.Errno != 0 {
		errs = append(errs, e.Errno)
	}
	if e.Err != nil {
		errs = append(errs, e.Err)
	}
	return errs
}

// reasons explains the errno of a quote, Linux 7.3's drivers/virt/coco/tdx-guest.
var reasons = map[syscall.Errno]string{
	syscall.EINVAL:    "the report data in the entry is not 64 bytes, so another program writes to our entry; find it, or give the agent an entry of its own",
	syscall.EAGAIN:    "another program holds the lock of the entry; give the agent an entry of its own",
	syscall.EBUSY:     "another quote of this TD stayed in flight for too long; try again later",
	syscall.EINTR:     "signals interrupted it again and again; find what sends them, then try again",
	syscall.EIO:       "the host answered with an error, or not at all for 30 s; look at the host's quote generation service (QGS), then try again",
	syscall.ETIMEDOUT: "the host answered too late; look at the host's quote generation service (QGS), then try again",
	syscall.EFBIG:     fmt.Sprintf("the host's quote is longer than the kernel takes (%d bytes); look at the host's quote generation service (QGS)", maxQuote),
	syscall.ENXIO:     "the kernel's quote provider has gone; remove the entries under " + reportPath + ", load the module tdx_guest, and start the agent again",
	syscall.ENOENT:    "the entry has gone; run kernel-setup as root, or start the agent again",
	syscall.EACCES:    "the agent may not use the entry; run kernel-setup as root, which gives it to the agent's user",
	syscall.EPERM:     "the agent may not use the entry; run kernel-setup as root, which gives it to the agent's user",
	syscall.EROFS:     "configfs is mounted read-only for the agent; allow " + reportPath + " in ReadWritePaths= of its unit",
}

func newQuoteError(err error) *QuoteError {
	e := &QuoteError{Err: err, Reason: "the kernel refused it"}
	if errors.As(err, &e.Errno) && reasons[e.Errno] != "" {
		e.Reason = reasons[e.Errno]
	}
	return e
}

// badQuote is a quote that must not be used. The kernel of Linux 6.12 hands over
// whatever the host left in the buffer, also nothing.
func badQuote(format string, args ...any) *QuoteError {
	return &QuoteError{Reason: fmt.Sprintf(format, args...) + "; look at the host's quote generation service (QGS)"}
}

// foreignDataError is a quote for somebody else's report data. Under configfs that
// happens when another program writes to our entry; trying again helps.
type foreignDataError struct{ got []byte }

func (e *foreignDataError) Error() string { return fmt.Sprintf("it has %x", e.got) }

// The layout of a quote (Intel TDX DCAP quote format, versions 4 and 5).
const (
	quoteHeader      = 48
	bodyHeader       = 6 // version 5 only: u16 type, u32 size
	bodySize         = 584
	bodySize15       = 648
	bodyType10       = 2
	bodyType15       = 3
	bodyReportData   = 520
	teeTypeTDX       = 0x81
	quoteReportDataN = len(measure.ReportData{})
)

// checkQuote reports whether quote has the form of a TDX quote, version 4 or 5, that
// carries rd. It looks at nothing else: not at the signature, not at the registers.
func checkQuote(quote []byte, rd measure.ReportData) error {
	switch {
	case len(quote) == 0:
		return badQuote("the host gave a quote of no bytes")
	case len(quote) < minQuote:
		return badQuote("the host gave a quote of %d bytes, want at least %d", len(quote), minQuote)
	case len(quote) > maxQuote:
		return badQuote("the host gave a quote of %d bytes, want at most %d", len(quote), maxQuote)
	}
	if tee := binary.LittleEndian.Uint32(quote[4:]); tee != teeTypeTDX {
		return badQuote("the quote's TEE type is %#x, want %#x (TDX)", tee, teeTypeTDX)
	}
	body, err := quoteBody(quote)
	if err != nil {
		return err
	}
	got := body[bodyReportData : bodyReportData+quoteReportDataN]
	if subtle.ConstantTimeCompare(got, rd[:]) != 1 {
		return &QuoteError{
			Reason: fmt.Sprintf("the quote is for other report data than %s; another program may write to our entry", rd),
			Err:    &foreignDataError{got: got},
		}
	}
	return nil
}

// quoteBody returns the TD report body. The caller has checked the quote's length
// against minQuote, which is more than any header and body.
func quoteBody(quote []byte) ([]byte, error) {
	switch v := binary.LittleEndian.Uint16(quote); v {
	case 4:
		return quote[quoteHeader:][:bodySize], nil
	case 5:
	default:
		return nil, badQuote("the quote's version is %d, want 4 or 5", v)
	}
	kind := binary.LittleEndian.Uint16(quote[quoteHeader:])
	size := binary.LittleEndian.Uint32(quote[quoteHeader+2:])
	body := quote[quoteHeader+bodyHeader:]
	switch {
	case kind == bodyType10 && size == bodySize:
		return body[:bodySize], nil
	case kind == bodyType15 && size == bodySize15:
		return body[:bodySize15], nil
	}
	return nil, badQuote("the quote's body has type %d and %d bytes, want type %d (%d bytes) or %d (%d bytes)",
		kind, size, bodyType10, bodySize, bodyType15, bodySize15)
}
