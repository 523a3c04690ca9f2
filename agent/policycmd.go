package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

func newPolicy() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Check, explain or start an appraisal policy", Args: cobra.NoArgs, RunE: needsSubcommand}
	cmd.AddCommand(newPolicyCheck(), newPolicyExplain(), newPolicyFromEvidence())
	return cmd
}

// policyCheck is policy check's JSON form.
type policyCheck struct {
	Schema   string   `json:"schema"`
	ID       string   `json:"id"`
	Entries  []string `json:"entries"`
	Loosened []string `json:"loosened"`
}

func newPolicyCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use: "check FILE", Short: "Check a policy file, and list every term that accepts any value", Args: cobra.ExactArgs(1), Example: "  tdx-agent policy check policy.toml",
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := readPolicy(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			c := policyCheck{Schema: "tdx-agent/policy-check/v1", ID: p.ID, Entries: []string{}, Loosened: p.Loosened()}
			for i := range p.Entries {
				c.Entries = append(c.Entries, p.Entries[i].Name)
			}
			if wantJSON(cmd) {
				c.Loosened = listed(c.Loosened)
				return printJSON(cmd, c)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "ok: policy %s, %d entries\n", c.ID, len(c.Entries))
			for _, n := range c.Loosened {
				fmt.Fprintln(cmd.OutOrStdout(), "note:", quoted(n))
			}
			return nil
		},
	}
	jsonFlag(cmd)
	return cmd
}

// policyExplain is policy explain's JSON form.
type policyExplain struct {
	Schema  string               `json:"schema"`
	Policy  string               `json:"policy"`
	Entries []remote.EntryChecks `json:"entries"`
}

func newPolicyExplain() *cobra.Command {
	var in evidenceFlags
	var f verifierFlags
	var reportData, compose, mrConfig string
	cmd := &cobra.Command{
		Use:   "explain [FILE]",
		Short: "Judge evidence by every entry of a policy and show every check",
		Long: `Judge evidence by every entry of a policy, or of the built-in one, and show of every
check what was there and what was wanted. Exit status 5 if no entry accepts it, 6 if
it is not genuine.`,
		Example: "  tdx-agent policy explain policy.toml --quote quote.json --collateral bundle.json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				f.policy = args[0]
			}
			x, err := readExpect(cmd, reportData, compose, mrConfig)
			if err != nil {
				return err
			}
			r, err := judge(cmd, &in, &f, x)
			if err != nil {
				return err
			}
			e := policyExplain{Schema: "tdx-agent/policy-explain/v1", Policy: r.Policy, Entries: r.Explain()}
			if wantJSON(cmd) {
				err = printJSON(cmd, e)
			} else {
				writeExplain(cmd.OutOrStdout(), &e)
			}
			if err != nil {
				return err
			}
			return verdictExit(r)
		},
	}
	in.add(cmd)
	f.addSources(cmd)
	addExpect(cmd, &reportData, &compose, &mrConfig)
	jsonFlag(cmd)
	return cmd
}

// judge appraises the evidence that the flags name.
func judge(cmd *cobra.Command, in *evidenceFlags, f *verifierFlags, x remote.Expect) (*remote.Result, error) {
	ev, err := in.read()
	if err != nil {
		return nil, err
	}
	now, err := f.clock()
	if err != nil {
		return nil, err
	}
	if err := in.checkChain(now(), cmd.ErrOrStderr()); err != nil {
		return nil, err
	}
	if len(in.chain) > 0 {
		x.CertificateLife = in.chain[0].NotAfter.Sub(in.chain[0].NotBefore)
	}
	v, _, err := f.verifier(cmd.Context(), warnings(cmd.ErrOrStderr()))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), verifyTimeout)
	defer cancel()
	r, err := appraise(ctx, v, ev, x)
	if err == nil && r.Claims.Report != nil && r.Claims.Report.Root != dcap.IntelRoot() {
		// Not every form on standard output has a place for it.
		fmt.Fprintf(cmd.ErrOrStderr(), "SIMULATED: %s; this proves nothing about hardware\n", dcap.RootName(r.Claims.Report.Root))
	}
	return r, err
}

// warnings is a log of what needs attention.
func warnings(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func writeExplain(out io.Writer, e *policyExplain) {
	for _, entry := range e.Entries {
		answer := "refuses"
		if entry.Accepted {
			answer = "accepts"
		}
		fmt.Fprintf(out, "entry %q %s\n", entry.Entry, answer)
		for _, c := range entry.Checks {
			text := c.Got
			if c.Want != "" {
				text += "; want " + c.Want
			}
			if c.Hint != "" {
				text = strings.TrimPrefix(text+" ("+c.Hint+")", " ")
			}
			fmt.Fprintf(out, "  %-11s  %-20s  %s\n", strings.ReplaceAll(c.Outcome.String(), "_", " "), c.Name, quoted(text))
		}
	}
}

func newPolicyFromEvidence() *cobra.Command {
	var in evidenceFlags
	var f verifierFlags
	cmd := &cobra.Command{
		Use:     "from-evidence",
		Short:   "Write a policy that accepts this evidence, to edit",
		Long:    "Write a policy that accepts this evidence. Nothing in it is proven: check every value against its source. The evidence must be genuine.",
		Example: "  tdx-agent policy from-evidence --quote quote.json > policy.toml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := judge(cmd, &in, &f, remote.Expect{AnyReportData: true})
			if err != nil {
				return err
			}
			if !r.Genuine() {
				return verdictExit(r)
			}
			text, err := r.Claims.Skeleton()
			if err != nil {
				return err
			}
			_, err = io.WriteString(cmd.OutOrStdout(), text)
			return err
		},
	}
	in.add(cmd)
	f.addSources(cmd)
	return cmd
}
