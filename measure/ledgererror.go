package measure

import "fmt"

// ConflictError says that an entry contradicts what is already measured.
type ConflictError struct {
	Name   string
	Reason string
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("event %q is already measured in this boot: %s", e.Name, e.Reason)
}

// FullError says that an entry would take the log, or its owner's part of it, over one of
// its bounds.
type FullError struct {
	Owner     string // "": the log itself is full
	What      string
	Got, Want int
}

func (e *FullError) Error() string {
	if e.Owner != "" {
		return fmt.Sprintf("the RTMR3 log has no more room for %s: %d %s, at most %d; the log travels with every quote, and only a reboot empties it", e.Owner, e.Got, e.What, e.Want)
	}
	return fmt.Sprintf("the RTMR3 log is full: %d %s, at most %d; the log travels with every quote, and only a reboot empties it", e.Got, e.What, e.Want)
}

// DivergenceError says that the log and the register no longer agree: RTMR3 was
// extended by somebody who left no record, or the log is damaged. It cannot be
// repaired, only explained; the cure is a reboot.
type DivergenceError struct {
	// Boot is "RTMR0", "RTMR1" or "RTMR2" when it is the boot event log that does not
	// explain that register, and "" for RTMR3.
	Boot     string
	Log      Digest // what the log replays to
	Register Digest // what the register is
	Err      error  // damage of the log, or nil
}

func (e *DivergenceError) Error() string {
	switch {
	case e.Boot != "":
		return fmt.Sprintf("%s is %s but the boot event log (CCEL) replays to %s: what was measured into it is not in the log", e.Boot, e.Register, e.Log)
	case e.Err != nil:
		return fmt.Sprintf("the RTMR3 log is damaged: %v (RTMR3 is %s)", e.Err, e.Register)
	case e.Log.IsZero():
		return fmt.Sprintf("RTMR3 is %s but its log is empty: the log was removed, or RTMR3 was extended without a record (foreign extend); a reboot is the only cure", e.Register)
	}
	return fmt.Sprintf("RTMR3 is %s but its log replays to %s: RTMR3 was extended without a record (foreign extend); a reboot is the only cure", e.Register, e.Log)
}

func (e *DivergenceError) Unwrap() error { return e.Err }

// ExitCode is the program's exit status for this error.
func (e *DivergenceError) ExitCode() int { return 7 }
