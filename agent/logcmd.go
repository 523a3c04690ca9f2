package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/measure"
)

func newLog(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "log", Short: "Show, replay or export the event log; verify the audit record", Args: cobra.NoArgs, RunE: needsSubcommand}
	show := &cobra.Command{
		Use: "show", Short: "Show the RTMR3 log, one event a line", Args: cobra.NoArgs, Example: "  tdx-agent log show",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withLog(cmd, g, func(doc *logDocument, raw []byte) error {
				if wantJSON(cmd) {
					if _, err := cmd.OutOrStdout().Write(raw); err != nil {
						return err
					}
					return doc.problem()
				}
				return showLog(cmd.OutOrStdout(), doc)
			})
		},
	}
	jsonFlag(show)
	replay := &cobra.Command{
		Use:   "replay [FILE]",
		Short: "Replay an event log and compare it with the registers",
		Long: `Replay the running agent's log and compare it with its registers. With FILE, an
answer of GetQuote, replay the log in it and compare it with the registers of the
quote in it. This checks no signature: whether the quote is genuine is not known.
Exit status 7 when the agent's log and registers differ, 6 when those of FILE do.`,
		Example: "  tdx-agent log replay\n  tdx-agent log replay quote.json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return replayFile(cmd, args[0])
			}
			return withLog(cmd, g, func(doc *logDocument, _ []byte) error { return replayLive(cmd, doc) })
		},
	}
	jsonFlag(replay)
	export := &cobra.Command{
		Use: "export", Short: "Print the whole event log in dstack's JSON form", Args: cobra.NoArgs, Example: "  tdx-agent log export > eventlog.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withLog(cmd, g, func(doc *logDocument, _ []byte) error {
				var all []json.RawMessage
				for _, part := range []json.RawMessage{doc.Boot, doc.Events} {
					var events []json.RawMessage
					if err := json.Unmarshal(part, &events); err != nil {
						return err
					}
					all = append(all, events...)
				}
				if err := json.NewEncoder(cmd.OutOrStdout()).Encode(all); err != nil {
					return err
				}
				return doc.problem()
			})
		},
	}
	cmd.AddCommand(show, replay, export, newAudit(g))
	return cmd
}

func withLog(cmd *cobra.Command, g *globals, f func(*logDocument, []byte) error) error {
	return withAgent(cmd, g, 10*time.Second, func(ctx context.Context, dir runtimeDir) error {
		raw, err := call(ctx, dir.agentSocket(), "GET", "/v1/log", nil)
		if err != nil {
			return err
		}
		var doc logDocument
		if err := json.Unmarshal(raw, &doc); err != nil {
			return fmt.Errorf("the agent's answer: %w", err)
		}
		return f(&doc, raw)
	})
}

func showLog(out io.Writer, doc *logDocument) error {
	if doc.Simulated {
		fmt.Fprintln(out, "*** SIMULATED TD ***")
	}
	fmt.Fprintf(out, "%4s  %-20s %-16s  %-8s -> %-8s  %-20s %s\n", "NR", "TIME", "DIGEST", "PREV", "NEXT", "NAME", "SOURCE")
	for _, r := range doc.Records {
		fmt.Fprintf(out, "%4d  %-20s %.16s  %.8s -> %.8s  %-20s %s\n", r.Seq, r.Time.Format(time.RFC3339), r.Digest, r.Prev, r.Next, cell(r.Name), quoted(r.Caller))
	}
	return verdictLine(out, doc)
}

// quoted keeps a name that an application has chosen from steering the terminal.
func quoted(s string) string {
	q := fmt.Sprintf("%q", s)
	return q[1 : len(q)-1]
}

// cell is quoted for a table: a name with spaces keeps its quotes, so that what it says
// cannot look like the next columns.
func cell(s string) string {
	if strings.Contains(s, " ") {
		return `"` + quoted(s) + `"`
	}
	return quoted(s)
}

// problem is the divergence that the agent has found, or nil.
func (doc *logDocument) problem() error {
	if doc.Problem == "" {
		return nil
	}
	return exitf(exitDiverged, "%s", doc.Problem)
}

func verdictLine(out io.Writer, doc *logDocument) error {
	if err := doc.problem(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "replayed = register: RTMR3 %s\n", doc.Replayed[measure.RTMR3])
	return err
}

// replayReply is log replay's JSON form.
type replayReply struct {
	Schema    string          `json:"schema"`
	Simulated bool            `json:"simulated"`
	Match     bool            `json:"match"`
	Registers []replayedValue `json:"registers"`
}

type replayedValue struct {
	Name     string `json:"name"`
	Replayed string `json:"replayed"`
	Register string `json:"register"`
	Match    bool   `json:"match"`
}

// replayLive recomputes everything here from the events, not from what the agent
// says of them.
func replayLive(cmd *cobra.Command, doc *logDocument) error {
	boot, err := measure.ParseEventLog(doc.Boot)
	if err != nil {
		return err
	}
	events, err := measure.ParseEventLog(doc.Events)
	if err != nil {
		return err
	}
	var regs [4]measure.Digest
	for i, r := range doc.Registers {
		if r == "" {
			return exitf(exitUnsupported, "RTMR%d is not readable here without a quote; replay a quote instead: tdx-agent quote | tdx-agent log replay /dev/stdin", i)
		}
		if err := regs[i].UnmarshalText([]byte(r)); err != nil {
			return err
		}
	}
	return replayAgainst(cmd, append(boot, events...), regs, doc.Simulated, exitDiverged)
}

func replayFile(cmd *cobra.Command, path string) error {
	b, err := readInput(path)
	if err != nil {
		return err
	}
	ev, err := parseEvidence(b)
	if err == nil && len(ev.Events) == 0 {
		err = errors.New("no event_log in it; want an answer of GetQuote")
	}
	if err != nil {
		return withExit(exitEvidence, fmt.Errorf("%s: %w", path, err))
	}
	quote, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		return withExit(exitEvidence, fmt.Errorf("%s: %w", path, err))
	}
	return replayAgainst(cmd, ev.Events, quote.Body.RTMR, false, exitEvidence)
}

func replayAgainst(cmd *cobra.Command, events []measure.Event, regs [4]measure.Digest, simulated bool, code int) error {
	replayed, err := measure.Replay(events)
	if err != nil {
		return withExit(code, err)
	}
	r := replayReply{Schema: "tdx-agent/replay/v1", Simulated: simulated, Match: true}
	var differ []string
	for i := range regs {
		v := replayedValue{Name: fmt.Sprintf("RTMR%d", i), Replayed: replayed[i].String(), Register: regs[i].String(), Match: replayed[i] == regs[i]}
		if !v.Match {
			r.Match, differ = false, append(differ, v.Name)
		}
		r.Registers = append(r.Registers, v)
	}
	if err := printReplay(cmd, r); err != nil {
		return err
	}
	if !r.Match {
		return exitf(code, "the log does not replay to %s", strings.Join(differ, ", "))
	}
	return nil
}

func printReplay(cmd *cobra.Command, r replayReply) error {
	out := cmd.OutOrStdout()
	if wantJSON(cmd) {
		return json.NewEncoder(out).Encode(r)
	}
	for _, v := range r.Registers {
		if v.Match {
			fmt.Fprintf(out, "%s%s match     %s\n", banner(r.Simulated), v.Name, v.Replayed)
		} else {
			fmt.Fprintf(out, "%s%s MISMATCH  replayed %s\n                 register %s\n", banner(r.Simulated), v.Name, v.Replayed, v.Register)
		}
	}
	return nil
}
