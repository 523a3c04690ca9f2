package atls

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"tdx-agent/remote"
)

// Code is what a peer is told of a handshake's end. Nothing finer goes over the wire, and
// CodeClosed does not either.
type Code string

// The codes.
const (
	CodeOK                    Code = "ok"
	CodeUnsupported           Code = "unsupported"
	CodeBadFrame              Code = "bad_frame"
	CodeEvidenceInvalid       Code = "evidence_invalid"
	CodeBindingMismatch       Code = "binding_mismatch"
	CodeCollateralUnavailable Code = "collateral_unavailable"
	CodePolicyDenied          Code = "policy_denied"
	CodeReattest              Code = "reattest" // key mode does not do: dial again with a quote
	CodeBusy                  Code = "busy"
	CodeTimeout               Code = "timeout"
	CodeClosed                Code = "closed" // the connection was
	CodeInternal              Code = "internal"
)

// Step is where a handshake ended.
type Step string

// The steps.
const (
	StepTLS          Step = "tls"
	StepHello        Step = "hello"
	StepWaitEvidence Step = "wait_evidence"
	StepVerify       Step = "verify"
	StepSendEvidence Step = "send_evidence"
	StepWaitResult   Step = "wait_result"
	StepOpen         Step = "open"
)

// Error is a handshake that failed. Remote says that the peer refused; Err then is nil,
// because a peer tells no more than its Code. A [*remote.Rejection] in Err has every
// check that failed.
type Error struct {
	Step       Step
	Code       Code
	Remote     bool
	Ref        string        // the same on both ends, for their logs; "" before the hellos
	RetryAfter time.Duration // with CodeBusy
	Err        error
}

func (e *Error) Error() string {
	text := fmt.Sprintf("atls: %s: %s", e.Step, e.Code)
	if e.Remote {
		text = fmt.Sprintf("atls: the peer refused: %s", e.Code)
		if means := meanings[e.Code]; means != "" {
			text += ": " + means
		}
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	if e.Ref != "" {
		text += " (ref " + e.Ref + ")"
	}
	return text
}

// meanings are what codes of a peer may come from.
var meanings = map[Code]string{
	CodeUnsupported:           "it offers no service of this name, or not to clients that prove nothing, or not this form of the protocol",
	CodePolicyDenied:          "no entry of its policy accepts us for this service; its log says why",
	CodeEvidenceInvalid:       "our evidence is not genuine to it; its log says why",
	CodeBindingMismatch:       "our evidence is not of the connection that it has: somebody may be in between",
	CodeCollateralUnavailable: "it has no current collateral for this platform",
	CodeInternal:              "a fault of its own; its log says which",
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// codeOf maps a cause to what the peer is told.
func codeOf(err error) Code {
	if rejection, ok := errors.AsType[*remote.Rejection](err); ok {
		return rejectionCode(rejection)
	}
	var timeout net.Error
	switch {
	case errors.As(err, new(*formError)), errors.As(err, new(tls.RecordHeaderError)):
		return CodeBadFrame
	case errors.As(err, new(*unsupportedError)):
		return CodeUnsupported
	case errors.As(err, new(*evidenceError)):
		return CodeEvidenceInvalid
	case errors.As(err, new(*bindingError)):
		return CodeBindingMismatch
	case errors.As(err, new(*reattestError)):
		return CodeReattest
	case errors.As(err, new(waiter)):
		return CodeBusy
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return CodeTimeout
	case errors.As(err, new(*ownError)):
		return CodeInternal
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return CodeClosed
	}
	return CodeInternal
}

// closedError says that the peer closed the connection, and what that may come from.
type closedError struct {
	text string
	err  error
}

func (e *closedError) Error() string { return e.text + " (" + e.err.Error() + ")" }
func (e *closedError) Unwrap() error { return e.err }

// closed explains the end of the connection. A [Listener] that has no room for us closes
// it before TLS, where nothing can be said yet.
func (h *handshake) closed(err error) error {
	text := "the peer closed the connection"
	switch {
	case h.role == Client && h.step == StepTLS && h.cfg.RATLS != nil:
		text = "the peer closed the connection before it said anything: it may be full, or not speak RA-TLS"
	case h.role == Client && h.step == StepTLS:
		text = "the peer closed the connection before it said anything: it may be full, or not speak " + ALPN
	case h.role == Client && h.step == StepHello:
		text = "the peer closed the connection before its hello"
	}
	return &closedError{text, err}
}

// ownError is a failure on our side of the channel, such as of an Attester whose own
// connection has ended.
type ownError struct{ err error }

func (e *ownError) Error() string { return e.err.Error() }
func (e *ownError) Unwrap() error { return e.err }

func rejectionCode(r *remote.Rejection) Code {
	if !r.Genuine() {
		return CodeEvidenceInvalid
	}
	for _, c := range r.Result.Failed() {
		switch c.Name {
		case "report_data":
			return CodeBindingMismatch
		case "collateral":
			return CodeCollateralUnavailable
		}
	}
	return CodePolicyDenied
}

// bindingError says that a statement belongs to another channel.
type bindingError struct{ text string }

func (e *bindingError) Error() string { return "binding: " + e.text }

// reattestError says that key mode does not do.
type reattestError struct{ text string }

func (e *reattestError) Error() string { return "a quote is needed: " + e.text }

// busyError says that there is no room.
type busyError struct{ retryAfter time.Duration }

func (e *busyError) Error() string             { return fmt.Sprintf("busy, try again in %v", e.retryAfter) }
func (e *busyError) RetryAfter() time.Duration { return e.retryAfter }

// waiter is an error that ends by itself: ours, or an Attester's.
type waiter interface{ RetryAfter() time.Duration }

// ref names a handshake on both ends.
func ref(transcript [32]byte) string { return hex.EncodeToString(transcript[:8]) }
