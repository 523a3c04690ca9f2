package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

// questions are verify's lines, in order. decisive are the checks without which a
// question is not answered; flags are what would answer it.
var questions = []struct {
	q        remote.Question
	label    string
	decisive []string
	flags    string
}{
	{remote.Hardware, "genuine hardware?", []string{"signature", "root"}, "--collateral"},
	{remote.TCB, "which TCB?", []string{"collateral", "tcb_status"}, "--collateral"},
	{remote.Boot, "which firmware, kernel, command line, initrd?", []string{"mrtd", "rtmr0", "rtmr1", "rtmr2"}, "--policy with an image, or --image"},
	{remote.Application, "which application?", nil, "--event-log and --policy or --compose"},
	{remote.Freshness, "fresh for me?", []string{"report_data"}, "--report-data"},
}

// applicationChecks answer the question about the application, each by itself.
var applicationChecks = []string{"app_id", "compose_hash", "compose"}

// writeVerdict answers the questions in order, a line each, with what proves the
// answer; what failed follows its line.
func writeVerdict(out io.Writer, r *remote.Result) {
	if report := r.Claims.Report; report != nil && report.Root != dcap.IntelRoot() {
		fmt.Fprintf(out, "*** SIMULATED: %s; this proves nothing about hardware ***\n", dcap.RootName(report.Root))
	}
	for _, line := range questions {
		var failed []remote.Check
		for _, c := range r.Failed() {
			if c.Question == line.q {
				failed = append(failed, c)
			}
		}
		answer := "yes"
		switch {
		case len(failed) > 0:
			answer = "NO"
		case !answered(r, line.q, line.decisive):
			answer = "NOT CHECKED (" + line.flags + ")"
		case line.q == remote.Hardware && r.Claims.Report.Root != dcap.IntelRoot():
			answer = "SIMULATED"
		}
		fmt.Fprintf(out, "%s %s: %s\n", line.label, answer, proof(r, line.q))
		for _, c := range failed {
			fmt.Fprintf(out, "  FAILED %s\n", quoted(c.String()))
		}
	}
	verdict, reason := "VALID", ""
	if !r.Accepted {
		verdict, reason = "NOT VALID", ": refused by the policy"
		if !r.Genuine() {
			reason = ": the evidence is not genuine"
		}
	}
	fmt.Fprintf(out, "verdict: %s%s (policy %s, entry %q, at %s)\n", verdict, reason, r.Policy, r.Entry, r.At.UTC().Format("2006-01-02T15:04:05Z"))
}

func answered(r *remote.Result, q remote.Question, decisive []string) bool {
	if q == remote.Application {
		return slices.ContainsFunc(applicationChecks, func(name string) bool { return passed(r, name) })
	}
	return passed(r, decisive...)
}

// proof is what the evidence shows on a question.
func proof(r *remote.Result, q remote.Question) string {
	c := r.Claims
	if c.Quote == nil {
		return "no quote could be read"
	}
	b := &c.Quote.Body
	switch q {
	case remote.Hardware:
		if c.SignatureErr != nil {
			return "no signature to rely on"
		}
		if c.Report == nil {
			return "the quote's signatures hold, up to its root"
		}
		return fmt.Sprintf("signed below %s, platform %x; go-tdx-guest %s", dcap.RootName(c.Report.Root), c.Report.PCK.FMSPC, c.Report.SecondOpinion)
	case remote.TCB:
		return tcbProof(c)
	case remote.Boot:
		return fmt.Sprintf("MRTD %.16s RTMR0 %.16s RTMR1 %.16s RTMR2 %.16s", b.MRTD, b.RTMR[0], b.RTMR[1], b.RTMR[2])
	case remote.Application:
		return applicationProof(c)
	}
	return "report data " + b.ReportData.String()
}

func tcbProof(c *remote.Claims) string {
	r := c.Report
	if r == nil {
		return "no collateral has judged the platform"
	}
	parts := []string{fmt.Sprintf("%s (platform %s, quoting enclave %s", r.Merged.Status, r.Platform.Status, r.QEStatus.Status)}
	if r.Module.Status != "" {
		parts[0] += ", TDX module " + string(r.Module.Status)
	}
	parts[0] += ")"
	if len(r.Merged.Advisories) > 0 {
		parts = append(parts, strings.Join(r.Merged.Advisories, " "))
	}
	level := "no TCB level matches"
	if !r.Merged.Date.IsZero() {
		level = "TCB of " + r.Merged.Date.UTC().Format("2006-01-02")
	}
	parts = append(parts, fmt.Sprintf("%s by evaluation %d, collateral until %s", level, r.EvaluationTCB, r.CollateralUntil.UTC().Format("2006-01-02")))
	return strings.Join(parts, "; ")
}

func applicationProof(c *remote.Claims) string {
	id := &c.Identity
	switch {
	case !c.HasLog:
		return fmt.Sprintf("RTMR3 %.16s, no event log", c.Quote.Body.RTMR[measure.RTMR3])
	case !c.Genuine():
		return "the event log proves nothing"
	case id.AppID == nil && id.ComposeHash == nil:
		return "the event log names none"
	}
	ready := ""
	if !id.Ready {
		ready = " (no system-ready: the application itself could have added these)"
	}
	return fmt.Sprintf("app-id %x compose-hash %x instance-id %x%s", id.AppID, id.ComposeHash, id.InstanceID, ready)
}
