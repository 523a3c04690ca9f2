package measure

import (
	"context"
	"fmt"
)

// Evidence is what an Attester says of itself (RFC 9334): a quote, the event log
// that explains its RTMRs, and the VM configuration. All of it is untrusted until
// appraised (package remote).
type Evidence struct {
	Quote    []byte  // as the kernel gave it; may carry trailing bytes
	Events   []Event // boot events (RTMR0 to RTMR2), then runtime events (RTMR3)
	VMConfig string  // dstack's vm_config, passed through to the byte; a claim of the host
}

// Quoter makes quotes. Its implementations reach the host through the kernel
// (package tsm). A Quoter serves one request at a time; callers queue in user
// space.
type Quoter interface {
	// Quote returns a quote that carries rd, checked for length, version, TEE type
	// and report data, but not for its signature. It takes a second or more on
	// real hosts and up to 31 s when the host is busy or silent. When ctx ends
	// first it returns ctx's error, and the quote in flight is dropped.
	Quote(ctx context.Context, rd ReportData) ([]byte, error)
}

// RegisterBank is this TD's measurement registers, as the kernel (package tsm) or a
// simulated TD offers them.
type RegisterBank interface {
	// Registers reads the live registers. It does not involve the host.
	Registers() (Registers, error)
	// Extend extends RTMR[index] with d. It is not idempotent: after an error the
	// register may or may not have moved, and the caller must read it to know.
	// An [*UnsupportedError] means that this kernel has no way to extend.
	Extend(index int, d Digest) error
}

// UnsupportedError says that the machine lacks something the agent needs.
type UnsupportedError struct {
	What  string // what cannot be done: "extend RTMR3"
	Needs string // what would make it possible, and since which version
	Err   error  // the kernel's answer, if there was one
}

func (e *UnsupportedError) Error() string {
	s := fmt.Sprintf("cannot %s here: it needs %s", e.What, e.Needs)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

func (e *UnsupportedError) Unwrap() error { return e.Err }
