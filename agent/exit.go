package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"

	"tdx-agent/measure"
	"tdx-agent/remote/forward"
)

// Exit statuses. They are part of the interface: never renumber them.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitUnsupported = 3 // not in a supported TEE
	exitUnreachable = 4 // the agent does not answer
	exitPolicy      = 5
	exitEvidence    = 6 // signature or form of evidence
	exitDiverged    = 7 // log and register
	exitDenied      = 8
	exitThrottled   = 9
	exitTimeout     = 10
	exitConfig      = 78 // configuration that can never work; systemd does not restart
)

// exitError gives an error its exit status.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }
func (e *exitError) ExitCode() int { return e.code }

func withExit(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code, err}
}

func exitf(code int, format string, a ...any) error {
	return &exitError{code, fmt.Errorf(format, a...)}
}

// exitCode is the one place where an error becomes a status.
func exitCode(err error) int {
	var coded interface{ ExitCode() int }
	switch {
	case err == nil:
		return 0
	case errors.As(err, &coded):
		return coded.ExitCode()
	case errors.As(err, new(*measure.UnsupportedError)):
		return exitUnsupported
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	}
	if e, ok := errors.AsType[*forward.EgressError](err); ok {
		switch {
		case e.Status == http.StatusForbidden:
			return exitDenied
		case e.Timeout():
			return exitTimeout
		}
	}
	return exitFailure
}

// readLimited reads at most limit bytes; more is an error.
func readLimited(r io.Reader, name string, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", name, limit)
	}
	return b, err
}

// hash32 decodes a configured hash; "" is none.
func hash32(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		return nil, fmt.Errorf("got %q, want 64 hexadecimal digits", s)
	}
	return b, nil
}
