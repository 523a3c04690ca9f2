package collateral

import (
	"errors"
	"strings"
)

// Error says why there is no collateral. The codes are:
//
//   - config: New's configuration is wrong
//   - file: a bundle file cannot be read, or is not genuine
//   - state: the state folder cannot be read or written
//   - floor: the rollback floor's file is damaged; floor_full: it has no room
//   - clock: the clock is before the date of a document that was accepted already
//   - no_source: nothing is configured that could have it
//   - fetch_budget: too many fetches in a minute, or at the same time
//   - transport, timeout, redirect, status, not_found, body_size, header, response:
//     a source did not answer, or not as Intel's PCS API says
//   - not_genuine: [dcap.ParseCollateral] refused, Err is its [dcap.Error]
//   - wrong_platform: genuine, but not of the FMSPC and CA that were asked for
//   - rolled_back: genuine, but older than what was seen before
//   - not_yet_valid, expired: genuine, but not at this time
//   - canceled: the caller's context ended
type Error struct {
	Code   string
	Source string // "pccs https://host", "intel pcs", "file NAME", "peer", or ""
	Got    string // may be empty, as may Want and Hint
	Want   string
	Hint   string // what to do
	Err    error  // the cause, or nil
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("collateral: " + strings.ReplaceAll(e.Code, "_", " "))
	if e.Source != "" {
		b.WriteString(": " + e.Source)
	}
	if e.Got != "" {
		b.WriteString(": got " + e.Got)
	}
	if e.Want != "" {
		b.WriteString(": want " + e.Want)
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// join makes one error of those of several sources, in the order they were asked. The
// code is the first one's, unless a source was caught rolling back.
func join(failures []*Error) *Error {
	if len(failures) == 1 {
		return failures[0]
	}
	all := &Error{Code: failures[0].Code}
	for _, f := range failures {
		if f.Code == "rolled_back" {
			all.Code = f.Code
		}
		all.Err = errors.Join(all.Err, f)
	}
	return all
}
