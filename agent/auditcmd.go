package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/status"
)

const auditSchema = "tdx-agent/audit/v1"

// auditReply is log audit's JSON form.
type auditReply struct {
	Schema string `json:"schema"`
	// Verified tells whether the lines follow one another; HeadChecked, whether the
	// running agent has confirmed the last.
	Verified    bool          `json:"verified"`
	HeadChecked bool          `json:"head_checked"`
	Seq         uint64        `json:"seq"`
	Head        string        `json:"head"`
	Problem     string        `json:"problem,omitempty"`
	Lines       []audit.Entry `json:"lines"`
}

func newAudit(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Verify the audit record and show it",
		Long: `Verify that the lines of the audit record follow one another, that the running agent
knows the last of them, and show them. There is a line for every call that takes a key,
a quote or an event; of those that fail every caller has 200 at once and 10 a second, so
that a flood does not push out what others did. What is older than about 8 MB is dropped. The files are in log/ of
the runtime directory and belong to the agent's user. Where no agent answers, the last
line is compared with nothing: compare the head with what the agent has logged when it
stopped. Exit status 6 when the record is not what the agent has written.`,
		Example: "  tdx-agent log audit\n  tdx-agent log audit --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withAgent(cmd, g, 30*time.Second, func(ctx context.Context, dir runtimeDir) error { return showAudit(ctx, cmd, dir) })
		},
	}
	jsonFlag(cmd)
	return cmd
}

func showAudit(ctx context.Context, cmd *cobra.Command, dir runtimeDir) error {
	// The agent is asked first: the record may grow before it is read, but not shrink.
	var s status.Status
	asked := callJSON(ctx, dir.agentSocket(), "/v1/status", &s)
	chain, err := audit.Verify(dir.log())
	switch {
	case errors.Is(err, fs.ErrPermission):
		return exitf(exitDenied, "%v: the audit record is for root and the agent's user", err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: no agent has served from here", err)
	case chain == nil && errors.As(err, new(*audit.BrokenError)):
		return withExit(exitEvidence, fmt.Errorf("audit record: %w", err))
	case chain == nil:
		return err
	}
	if asked == nil && err == nil {
		err = chain.Reaches(s.Audit.Seq, s.Audit.Head)
	}
	r := auditReply{Schema: auditSchema, Verified: err == nil, HeadChecked: asked == nil && err == nil, Lines: chain.Entries}
	if r.Seq, r.Head = chain.Head(); r.Lines == nil {
		r.Lines = []audit.Entry{}
	}
	if err != nil {
		r.Problem = err.Error()
	}
	if err := printAudit(cmd, r); err != nil {
		return err
	}
	if chain.Torn > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "the last line broke off after %d bytes and does not count\n", chain.Torn)
	}
	if asked != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "the head was compared with nothing: %v\n", asked)
	}
	if err != nil {
		return withExit(exitEvidence, fmt.Errorf("audit record: %w", err))
	}
	return nil
}

func printAudit(cmd *cobra.Command, r auditReply) error {
	out := cmd.OutOrStdout()
	if wantJSON(cmd) {
		return json.NewEncoder(out).Encode(r)
	}
	fmt.Fprintf(out, "%6s  %-20s %-10s %-9s %-14s %-22s %s\n", "NR", "TIME", "SOCKET", "RESULT", "METHOD", "NAME", "CALLER")
	for i := range r.Lines {
		writeAuditLine(out, &r.Lines[i])
	}
	if !r.Verified {
		return nil // the error says what is wrong
	}
	confirmed := ""
	if r.HeadChecked {
		confirmed = ", as the agent says"
	}
	_, err := fmt.Fprintf(out, "chain intact: line %d has the hash %s%s\n", r.Seq, r.Head, confirmed)
	return err
}

func writeAuditLine(out io.Writer, e *audit.Entry) {
	at := e.Time.Format(time.RFC3339)
	if e.Kind == audit.KindStart {
		fmt.Fprintf(out, "%6d  %-20s agent %s starts", e.Seq, at, quoted(e.Version))
		if e.Torn > 0 {
			fmt.Fprintf(out, "; %d bytes of a line that broke off were removed", e.Torn)
		}
	} else {
		fmt.Fprintf(out, "%6d  %-20s %-10s %-9s %-14s %-22s %s", e.Seq, at, quoted(e.Socket), quoted(e.Result), quoted(e.Method), quoted(e.Name), auditCaller(e.Caller))
	}
	if e.Missed > 0 {
		fmt.Fprintf(out, "; %d calls that failed before it have no line", e.Missed)
	}
	if e.Lost > 0 {
		fmt.Fprintf(out, "; %d lines before it could not be written", e.Lost)
	}
	fmt.Fprintln(out)
}

func auditCaller(c *audit.Caller) string {
	if c == nil {
		return "unknown"
	}
	text := fmt.Sprintf("uid %d gid %d pid %d", c.UID, c.GID, c.PID)
	switch {
	case c.Container != "":
		text += " container " + quoted(c.Container)
	case c.Cgroup != "":
		text += " cgroup " + quoted(c.Cgroup)
	}
	return text
}
