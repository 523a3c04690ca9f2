package guestapi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"tdx-agent/measure"
)

// ExitHeader is the response header, on errors only, that carries the exit status
// with which a command-line client should end. An error from a [Guest] chooses it
// with a method ExitCode() int; one with a method RetryAfter() time.Duration is
// answered with status 429 and Retry-After instead of 400.
const ExitHeader = "Tdx-Agent-Exit"

// The program's exit statuses that this package sets by itself.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitUnsupported = 3
	exitDenied      = 8
	exitThrottled   = 9
	exitTimeout     = 10
)

// requestError is an answer of status 400 whose cause is the request itself.
type requestError struct {
	text string
	exit int
}

func (e *requestError) Error() string { return e.text }

// ExitCode is the program's exit status for this error.
func (e *requestError) ExitCode() int { return e.exit }

func badRequest(format string, args ...any) error {
	return &requestError{text: fmt.Sprintf(format, args...), exit: exitUsage}
}

func denied(format string, args ...any) error {
	return &requestError{text: fmt.Sprintf(format, args...), exit: exitDenied}
}

// outcome is how an error is told to the caller.
type outcome struct {
	status int
	exit   int
	text   string
	retry  time.Duration // 0: no Retry-After
}

// outcomeOf maps errors to status and exit status, for every method. dstack knows
// status 400 only; 429 is the one exception, for callers that can wait.
func outcomeOf(err error) outcome {
	o := outcome{status: http.StatusBadRequest, exit: exitFailure, text: err.Error()}
	var (
		busy interface{ RetryAfter() time.Duration }
		exit interface{ ExitCode() int }
		lack *measure.UnsupportedError
	)
	switch {
	case errors.As(err, &busy):
		o.status, o.exit = http.StatusTooManyRequests, exitThrottled
		o.retry = max(busy.RetryAfter(), time.Second)
		if errors.As(err, &exit) {
			o.exit = exit.ExitCode()
		}
	case errors.As(err, &exit):
		o.exit = exit.ExitCode()
	case errors.Is(err, context.DeadlineExceeded):
		o.exit = exitTimeout
		o.text = "no answer in time: " + o.text
	case errors.As(err, &lack):
		o.exit = exitUnsupported
	}
	if o.text == "" {
		o.text = "failed, and the error says nothing more"
	}
	return o
}

// answer writes the outcome in the encoding of the request.
func (o *outcome) answer(enc encoding) response {
	r := response{status: o.status, exit: o.exit, text: o.text}
	if o.retry > 0 {
		r.retry = strconv.Itoa(int(math.Ceil(o.retry.Seconds())))
	}
	if enc == encodingProtobuf {
		r.media = mediaProtobuf
		r.body = message{{"message", 1, &o.text}}.appendProto(nil)
		return r
	}
	r.media = mediaJSON
	r.body = append(appendQuoted([]byte("{\n  \"error\": "), o.text), "\n}"...)
	return r
}

// clip shortens text that a caller sent before it is sent back.
func clip(s string) string {
	const limit = 100
	if len(s) <= limit {
		return s
	}
	cut := limit
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}
