package status

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"

	"tdx-agent/remote"
)

// WriteText writes the form for people. What peers or other processes have a say in is
// quoted if it is more than printable text: it must not steer a terminal.
func (p *Peers) WriteText(w io.Writer) error {
	b := &strings.Builder{}
	if len(p.Processes) == 0 {
		b.WriteString("no process with attested channels (endpoint, connect --listen) answers here\n")
	}
	for i := range p.Processes {
		p.Processes[i].write(b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (p *PeerProcess) write(b *strings.Builder) {
	fmt.Fprintf(b, "%s  pid %d since %s  policy %s (generation %d)  %d open, %d accepted, %d refused\n", plain(p.Name), p.PID, stamp(p.Started), plain(p.Policy), p.Generation,
		len(p.Peers), p.Accepted, p.Refused)
	for i := range p.Peers {
		p.Peers[i].write(b)
	}
	if len(p.Failures) > 0 {
		fmt.Fprintf(b, "  refused, the latest first:\n")
	}
	for i := range p.Failures {
		p.Failures[i].write(b)
	}
}

func (p *Peer) write(b *strings.Builder) {
	how := "attested by " + plain(p.Assurance)
	switch {
	case p.Assurance == "none":
		how = "PROVES NOTHING"
	case p.Simulated:
		how += ", SIMULATED"
	}
	if p.Assurance == "certificate" {
		how += " (RA-TLS: how old the quote is, nobody knows)"
	}
	fmt.Fprintf(b, "  %s %s  service %s  %s", arrow(p.Direction), plain(p.Address), plain(p.Service), how)
	if p.Entry != "" {
		fmt.Fprintf(b, "  entry %s", plain(p.Entry))
	}
	fmt.Fprintf(b, "  ref %s\n     opened %s, ends %s", plain(p.Ref), stamp(p.Opened), stamp(p.Expires))
	if p.Draining {
		b.WriteString(" (ended, finishing)")
	}
	fmt.Fprintf(b, "; %d bytes in, %d out\n", p.BytesIn, p.BytesOut)
	if p.Assurance == "none" {
		return
	}
	fmt.Fprintf(b, "     quote accepted %s; tcb %s, advisories %s\n", stamp(p.VerifiedAt), plain(p.TCBStatus), plain(cmp.Or(strings.Join(p.Advisories, " "), "none")))
	for _, f := range []struct{ name, value string }{{"app-id", p.AppID}, {"instance", p.InstanceID}, {"compose", p.ComposeHash},
		{"key-provider", p.KeyProvider}, {"image", p.Image}, {"mrtd", p.MRTD}, {"agent-key", p.AgentKey}, {"quote", p.QuoteSHA256}} {
		if f.value != "" {
			fmt.Fprintf(b, "     %-12s %s\n", f.name, plain(f.value))
		}
	}
}

func (f *PeerFailure) write(b *strings.Builder) {
	fmt.Fprintf(b, "  %s %s %s  service %s  ", stamp(f.Time), arrow(f.Direction), plain(f.Address), plain(cmp.Or(f.Service, "-")))
	f.writeReason(b)
	b.WriteByte('\n')
	for i := range f.Checks {
		fmt.Fprintf(b, "       %s\n", plain(f.Checks[i].line()))
	}
}

// writeReason says in one line what failed.
func (f *PeerFailure) writeReason(b *strings.Builder) {
	if f.ByPeer {
		fmt.Fprintf(b, "the peer refused: %s; its log has the reason", plain(f.Code))
	} else {
		fmt.Fprintf(b, "%s: %s", plain(f.Step), plain(f.Code))
		if f.Error != "" {
			fmt.Fprintf(b, ": %s", plain(f.Error))
		}
	}
	if f.Entry != "" {
		fmt.Fprintf(b, ", closest entry %s", plain(f.Entry))
	}
	if f.Ref != "" {
		fmt.Fprintf(b, "  ref %s", plain(f.Ref))
	}
}

func (s *PeersSummary) write(b *strings.Builder) {
	fmt.Fprintf(b, "  peers   %d open; %d accepted, %d refused", s.Open, s.Accepted, s.Refused)
	if f := s.Last; f != nil {
		fmt.Fprintf(b, " (last %s %s ", stamp(f.Time), arrow(f.Direction)+" "+plain(f.Address))
		f.writeReason(b)
		b.WriteByte(')')
		if first := firstCheck(f.Checks); first != "" {
			fmt.Fprintf(b, "\n          %s", plain(first))
		}
	}
	b.WriteByte('\n')
}

func firstCheck(checks []FailedCheck) string {
	if len(checks) == 0 {
		return ""
	}
	return checks[0].line()
}

func (c *FailedCheck) line() string {
	same := remote.Check{Name: c.Name, Code: c.Code, Got: c.Got, Want: c.Want, Hint: c.Hint}
	return same.String()
}

func arrow(direction string) string {
	if direction == "out" {
		return "->"
	}
	return "<-"
}

func stamp(t Time) string { return t.UTC().Format(time.RFC3339) }

// plain quotes text that is not printable, or too long for a line.
func plain(s string) string {
	const most = 1 << 10
	if len(s) > most {
		return strconv.Quote(s[:most]) + "..."
	}
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return strconv.Quote(s)
	}
	return s
}
