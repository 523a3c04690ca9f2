package status

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// WriteText writes the one-screen form: facts first, words beside marks.
func (s *Status) WriteText(w io.Writer) error {
	b := &strings.Builder{}
	if s.Simulated {
		fmt.Fprintf(b, "*** SIMULATED TD: nothing below proves anything ***\n")
	}
	state := "ready"
	if !s.Ready {
		state = "NOT READY"
	}
	fmt.Fprintf(b, "tdx-agent %s  %s  since %s  backend quotes=%s registers=%s\n", s.Version, state,
		s.Started.Format(time.RFC3339), s.Backend.Quotes, s.Backend.Registers)
	s.writeIdentity(b)
	fmt.Fprintf(b, "  %-6s %-9s %6s  %s\n", "REG", "LOG", "EVENTS", "VALUE")
	for _, r := range s.Registers {
		fmt.Fprintf(b, "  %-6s %-9s %6d  %s\n", r.Name, short(r.Verdict), r.Events, r.Value)
		if r.Replayed != "" {
			fmt.Fprintf(b, "  %-6s %-9s %6s  %s\n", "", "", "log:", r.Replayed)
		}
	}
	s.writeLog(b)
	q := s.Quotes
	fmt.Fprintf(b, "  quotes  %d ok, %d failed", q.OK, q.Failed)
	if !q.LastFailure.IsZero() {
		fmt.Fprintf(b, " (last %s)", q.LastFailure.Format(time.RFC3339))
	}
	if q.Busy > 0 {
		fmt.Fprintf(b, ", %d refused as too many", q.Busy)
	}
	fmt.Fprintf(b, ", %d callers waiting", q.Waiting)
	if !q.LastSuccess.IsZero() {
		fmt.Fprintf(b, "; last %s took %d ms", q.LastSuccess.Format(time.RFC3339), q.LastMillis)
	}
	b.WriteByte('\n')
	if q.LastError != "" {
		fmt.Fprintf(b, "  the last quote failed: %s\n", q.LastError)
	}
	if s.Peers != nil {
		s.Peers.write(b)
	}
	for _, a := range s.Access {
		a.writeText(b)
	}
	s.writeAudit(b)
	s.writeProblems(b)
	_, err := io.WriteString(w, b.String())
	return err
}

func (a *Access) writeText(b *strings.Builder) {
	fmt.Fprintf(b, "  socket  %s gives %s", a.Socket, strings.Join(a.Grants, ", "))
	if len(a.UIDs) > 0 {
		fmt.Fprintf(b, "; only to uid %s", strings.Trim(fmt.Sprint(a.UIDs), "[]"))
	}
	b.WriteByte('\n')
}

func short(verdict string) string {
	switch verdict {
	case Match:
		return "match"
	case Mismatch:
		return "MISMATCH"
	case Constant:
		return "-"
	}
	return verdict
}

func (s *Status) writeIdentity(b *strings.Builder) {
	id := s.Identity
	if !id.Measured {
		fmt.Fprintf(b, "  identity  NOT MEASURED: run tdx-agent measure\n")
	}
	for _, f := range []struct{ name, value string }{{"app", id.App}, {"app-id", id.AppID}, {"compose", id.ComposeHash},
		{"instance", id.InstanceID}, {"key-provider", id.KeyProvider}, {"agent-key", id.AgentKey},
		{"mr-aggregated", id.MRAggregated}, {"  at boot-mr-done", id.MRAggregatedBoot}} {
		if f.value != "" {
			fmt.Fprintf(b, "  %-16s %s\n", f.name, f.value)
		}
	}
}

func (s *Status) writeLog(b *strings.Builder) {
	fmt.Fprintf(b, "  log     %d of at most %d events in RTMR3, replay: %s", s.Log.Events, s.Log.MaxEvents, short(s.Log.Verdict))
	if s.Log.Last != "" {
		fmt.Fprintf(b, "; last %s %s", s.Log.Last, s.Log.LastTime.Format(time.RFC3339))
	}
	b.WriteByte('\n')
	if s.Log.Problem != "" {
		fmt.Fprintf(b, "  PROBLEM %s\n", s.Log.Problem)
	}
	for _, p := range s.Log.Parts {
		fmt.Fprintf(b, "          %s: %d of at most %d events, %d of %d bytes", p.Owner, p.Events, p.MaxEvents, p.Bytes, p.MaxBytes)
		if p.Full {
			b.WriteString("; FULL until a reboot")
		}
		b.WriteByte('\n')
	}
}

func (s *Status) writeAudit(b *strings.Builder) {
	fmt.Fprintf(b, "  audit   line %d, head %s\n", s.Audit.Seq, s.Audit.Head)
	if s.Audit.Problem != "" {
		fmt.Fprintf(b, "  PROBLEM the audit record cannot be written, so keys are not given; %d lines are lost: %s\n", s.Audit.Lost, s.Audit.Problem)
	}
	if s.Audit.Damage != "" {
		fmt.Fprintf(b, "  PROBLEM somebody else has changed the audit record; log audit says what is left of it: %s\n", s.Audit.Damage)
	}
}

// Setting is the value of a setting for people: as JSON, so that [""], every name, is not
// taken for none, and no value moves the cursor.
func Setting(value any) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		return fmt.Sprintf("%q", fmt.Sprint(value))
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func (s *Status) writeProblems(b *strings.Builder) {
	names := make([]string, 0, len(s.Loosened))
	for name := range s.Loosened {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(b, "  LOOSENED %s = %s (measured as agent-config)\n", name, Setting(s.Loosened[name]))
	}
	for _, n := range s.NotReady {
		fmt.Fprintf(b, "  not ready: %s\n", n)
	}
	for _, n := range s.Notes {
		fmt.Fprintf(b, "  note: %s\n", n)
	}
}
