package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/status"
)

const auditSchema = "tdx-agent/audit/v1"

// auditReply is log audit's JSON form.
type auditReply struct {
	Schema    string `json:"schema"`
	Simulated bool   `json:"simulated"`
	// Verified tells whether the lines follow one another; HeadChecked, whether they
	// reach the head that the running agent or the caller knows.
	Verified    bool          `json:"verified"`
	HeadChecked bool          `json:"head_checked"`
	Seq         uint64        `json:"seq"`
	Head        string        `json:"head"`
	Problem     string        `json:"problem,omitempty"`
	Lines       []audit.Entry `json:"lines"`
}

func newAudit(g *globals) *cobra.Command {
	var head string
	cmd := &cobra.Command{
		Use:   "audit [DIR]",
		Short: "Verify the audit record and show it",
		Long: `Verify that the lines of the audit record follow one another, that the running agent
knows the last of them, and show them. There is a line for every call that takes a key,
a quote or an event; of those that fail every caller has 200 at once and 10 a second, so
that a flood does not push out what others did. What is older than about 8 MB is dropped.

The files are in log/ of the runtime directory and belong to the agent's user. With DIR
they are a copy, and no agent is asked. The chain shows every change but one: that it was
cut, or written anew as a whole. The agent knows its last line while it runs, and logs its
hash, the head, when it starts and stops: --head wants a line with such a hash.

Exit status 6 when the record is not what the agent has written.`,
		Example: "  tdx-agent log audit\n  tdx-agent log audit --json\n  tdx-agent log audit ./copy --head 7079467617c1...",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return showAudit(cmd, args[0], nil, head)
			}
			return withAgent(cmd, g, 30*time.Second, func(ctx context.Context, dir runtimeDir) error {
				return showAudit(cmd, dir.log(), func() (status.Audit, error) {
					var s status.Status
					err := callJSON(ctx, dir.agentSocket(), "/v1/status", &s)
					return s.Audit, err
				}, head)
			})
		},
	}
	cmd.Flags().StringVar(&head, "head", "", "hash of a line that must be there, from the agent's log or status")
	jsonFlag(cmd)
	return cmd
}

// showAudit verifies the record in dir, and that it ends as the agent says, whom ask asks
// unless it is nil, and holds the head, if one is given.
func showAudit(cmd *cobra.Command, dir string, ask func() (status.Audit, error), head string) error {
	chain, asked, err := verifyAudit(cmd, dir, ask)
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
	if err == nil && head != "" {
		err = chain.Holds(head)
	}
	r := auditReply{Schema: auditSchema, Verified: err == nil, HeadChecked: (asked || head != "") && err == nil, Lines: chain.Entries}
	if r.Seq, r.Head = chain.Head(); r.Lines == nil {
		r.Lines = []audit.Entry{}
	}
	r.Simulated = slices.ContainsFunc(r.Lines, func(e audit.Entry) bool { return e.Simulated })
	if err != nil {
		r.Problem = err.Error()
	}
	if err := printAudit(cmd, r); err != nil {
		return err
	}
	if chain.Torn > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "the last line broke off after %d bytes and does not count\n", chain.Torn)
	}
	if err != nil {
		return withExit(exitEvidence, fmt.Errorf("audit record: %w", err))
	}
	return nil
}

// verifyAudit asks the agent before and after: meanwhile the record may grow, and no more.
func verifyAudit(cmd *cobra.Command, dir string, ask func() (status.Audit, error)) (chain *audit.Chain, asked bool, err error) {
	var before, after status.Audit
	if ask != nil {
		before, err = ask()
		if asked = err == nil; !asked {
			fmt.Fprintf(cmd.ErrOrStderr(), "the head was compared with nothing: %v\n", err)
		}
	}
	chain, err = audit.Verify(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && before.Seq > 0:
		return nil, asked, &audit.BrokenError{File: dir, Reason: fmt.Sprintf("has no record, and the agent has written %d lines: it was removed", before.Seq)}
	case err != nil || !asked:
		return chain, asked, err
	}
	if after, err = ask(); err != nil {
		return nil, asked, err
	}
	if after.Problem != "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "%d lines after the last could not be written: %s\n", after.Lost, after.Problem)
	}
	return chain, asked, chain.Between(before.Seq, before.Head, after.Seq)
}

func printAudit(cmd *cobra.Command, r auditReply) error {
	out := cmd.OutOrStdout()
	if wantJSON(cmd) {
		return json.NewEncoder(out).Encode(r)
	}
	if r.Simulated {
		fmt.Fprintln(out, "*** SIMULATED TD ***")
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
		confirmed = ", as expected"
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
