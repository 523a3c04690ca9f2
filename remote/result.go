package remote

import (
	"fmt"
	"strings"
	"time"
)

// Outcome is what a check came to. The zero value is NotChecked.
type Outcome int

// The outcomes of a check.
const (
	NotChecked Outcome = iota // nobody said what is expected, or what is needed for it was not given
	Passed
	Failed
)

// String returns the form that JSON has.
func (o Outcome) String() string {
	return [...]string{"not_checked", "passed", "failed"}[o]
}

// MarshalText implements encoding.TextMarshaler.
func (o Outcome) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// Question is what a reader of a verdict wants to know. They come in this order.
type Question string

// The questions.
const (
	Hardware    Question = "hardware"    // is it genuine hardware?
	TCB         Question = "tcb"         // at which TCB?
	Boot        Question = "boot"        // which firmware, kernel, command line, initrd?
	Application Question = "application" // which application?
	Freshness   Question = "freshness"   // was it made for me, now?
)

// Check is one of the checks of an appraisal.
type Check struct {
	Question Question `json:"question"`
	// Name is stable: "signature", "tcb_status", "mrtd", "event_log", "app_id" ...
	Name    string  `json:"name"`
	Outcome Outcome `json:"outcome"`
	// Code says more closely what failed, as "qe_binding" for signature. It is Name
	// where there is no more to say.
	Code string `json:"code,omitempty"`
	// Got, Want and Hint are filled if the check failed. If it was not checked, Hint
	// says what would check it. [Result.Explain] fills Got and Want of the rest.
	Got  string `json:"got,omitempty"`
	Want string `json:"want,omitempty"`
	Hint string `json:"hint,omitempty"`
}

func (c *Check) String() string {
	var b strings.Builder
	b.WriteString(strings.ReplaceAll(c.Name, "_", " "))
	if c.Code != "" && c.Code != c.Name {
		b.WriteString(" (" + strings.ReplaceAll(c.Code, "_", " ") + ")")
	}
	if c.Got != "" {
		b.WriteString(": got " + c.Got)
	}
	if c.Want != "" {
		b.WriteString(": want " + c.Want)
	}
	if c.Hint != "" {
		b.WriteString(" (" + c.Hint + ")")
	}
	return b.String()
}

// Result is an Attestation Result: every check in order, and what the evidence
// claims. What is in Claims is proven only as far as the checks say.
type Result struct {
	Accepted bool
	At       time.Time // the time that everything was judged at
	Policy   string    // Policy.ID
	// Entry is the policy entry that accepted the evidence, or if none did the one
	// that came closest.
	Entry  string
	Checks []Check
	Claims *Claims
	// Image is the one that the boot was compared with, nil if there was none.
	Image *Image

	policy *Policy
	expect *Expect
}

// Failed returns the checks that failed.
func (r *Result) Failed() []Check { return r.with(Failed) }

// Unchecked returns the checks that were not made.
func (r *Result) Unchecked() []Check { return r.with(NotChecked) }

func (r *Result) with(o Outcome) (list []Check) {
	for _, c := range r.Checks {
		if c.Outcome == o {
			list = append(list, c)
		}
	}
	return list
}

// Genuine reports whether the evidence is what it says it is, whoever may be wanted:
// its signatures hold, and nothing in it contradicts something else.
func (r *Result) Genuine() bool { return r.Claims.Genuine() }

// EntryChecks is how one policy entry judges the evidence.
type EntryChecks struct {
	Entry    string  `json:"entry"`
	Accepted bool    `json:"accepted"`
	Checks   []Check `json:"checks"`
}

// Explain judges the evidence anew by every entry of the policy and says of every
// check what was there and what was wanted.
func (r *Result) Explain() []EntryChecks {
	var all []EntryChecks
	for i := range r.policy.Entries {
		s := sheet{isVerbose: true}
		r.policy.Entries[i].judge(&s, r.Claims, r.expect, r.At)
		all = append(all, EntryChecks{Entry: r.policy.Entries[i].Name, Accepted: s.failed == 0, Checks: s.checks})
	}
	return all
}

// Rejection is the error of an appraisal that no policy entry accepts. Its Result
// lists every check that failed, by the entry that came closest.
type Rejection struct{ Result *Result }

func (e *Rejection) Error() string {
	var b strings.Builder
	what := "refused by policy " + e.Result.Policy
	if !e.Result.Genuine() {
		what = "evidence is not genuine"
	}
	if len(e.Result.policy.Entries) > 1 {
		what += fmt.Sprintf(", closest entry %q", e.Result.Entry)
	}
	b.WriteString(what)
	for _, c := range e.Result.Failed() {
		b.WriteString("; " + c.String())
	}
	return b.String()
}

// Genuine is [Result.Genuine]: true means that it is the policy that refuses.
func (e *Rejection) Genuine() bool { return e.Result.Genuine() }

// Code is the first failed check's Code.
func (e *Rejection) Code() string {
	for _, c := range e.Result.Checks {
		if c.Outcome == Failed {
			return c.Code
		}
	}
	return ""
}

// sheet collects checks. The details of one that passed are only asked for if it is
// verbose: they cost more than the checks. Once the quote is known to be forged what
// it says may still fail, but passes no more: it is not checked.
type sheet struct {
	isVerbose bool
	isForged  bool
	checks    []Check
	failed    int
	image     *Image // that the boot was compared with
}

func (s *sheet) check(q Question, name string, isOK bool, detail func() (got, want, hint string)) {
	if isOK && s.isForged {
		s.skip(q, name, "the quote is not genuine")
		return
	}
	c := Check{Question: q, Name: name, Outcome: Passed}
	if !isOK {
		c.Outcome, c.Code = Failed, name
		s.failed++
	}
	if !isOK || s.isVerbose {
		c.Got, c.Want, c.Hint = detail()
	}
	if isOK {
		c.Hint = ""
	}
	s.checks = append(s.checks, c)
}

// fail is a check that failed, with a code that says more than its name.
func (s *sheet) fail(q Question, name, code, got, want, hint string) {
	s.failed++
	s.checks = append(s.checks, Check{Question: q, Name: name, Outcome: Failed, Code: code, Got: got, Want: want, Hint: hint})
}

// skip is a check that is not made; hint says what would make it.
func (s *sheet) skip(q Question, name, hint string) {
	s.checks = append(s.checks, Check{Question: q, Name: name, Hint: hint})
}
