package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

func newImageExplain() *cobra.Command {
	var machine machineFlags
	var files imageFlags
	var eventLog, quote string
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Judge every event of a real log",
		Long: `Judge every event of RTMR0 to RTMR2 of a real event log: match, mismatch, opaque
(nothing known determines it) or needs-image; and name the input that would have to
differ. The log is dstack's JSON, an answer of GetQuote, or a CCEL. A vm_config and
a quote in the same file are used unless others are given. Without them, and without
the image, what can be calculated is judged all the same.

This checks no signature: whether the quote is genuine is not known.`,
		Example: `  tdx-agent image explain --event-log quote.json
  tdx-agent image explain --event-log log.json --vm-config vm_config.json --metadata metadata.json --quote quote.bin`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if eventLog == "" {
				return exitf(exitUsage, "want --event-log")
			}
			o, embedded, err := readObservation(eventLog, quote)
			if err != nil {
				return err
			}
			c, notes, err := machine.observed(&o, embedded)
			if err != nil {
				return err
			}
			img, note, err := files.measurement(cmd, c)
			if err != nil {
				return usageIfUnmodelled(err)
			}
			o.Image = img
			for _, n := range []string{note, unknownMembers(c)} {
				if n != "" {
					notes = append(notes, n)
				}
			}
			x, err := image.Explain(o)
			if err != nil {
				return usageUnlessCoded(err)
			}
			return printExplanation(cmd, x, notes)
		},
	}
	cmd.Flags().StringVar(&eventLog, "event-log", "", "the event log")
	cmd.Flags().StringVar(&quote, "quote", "", "the quote that belongs to it: binary, hexadecimal or JSON")
	machine.register(cmd)
	files.register(cmd)
	jsonFlag(cmd)
	return cmd
}

// observed sets the machine: as described by flags, else as embedded beside the log, else
// none. One that is not modelled is left out, and notes say so: the rest of the log can be
// judged all the same.
func (f *machineFlags) observed(o *image.Observation, embedded string) (c *image.VMConfig, notes []string, err error) {
	var m image.Machine
	switch {
	case f.vmConfig != "" || f.cpu != 0:
		m, c, err = f.machine()
	case embedded != "":
		if c, err = image.ParseVMConfig([]byte(embedded)); err == nil {
			m, err = c.Machine()
		}
		if err == nil {
			err = f.refine(&m)
		}
	default:
		return nil, nil, nil
	}
	if errors.As(err, new(*image.UnmodelledError)) {
		return c, []string{err.Error()}, nil
	}
	o.Machine = &m
	return c, nil, usageUnlessCoded(err)
}

// readObservation reads the event log, the quote, and a vm_config that is with the log.
func readObservation(path, quote string) (o image.Observation, vmConfig string, err error) {
	b, err := readCapped(path, maxReply)
	if err != nil {
		return o, "", err
	}
	text := bytes.TrimSpace(b)
	var raw string
	switch {
	case len(text) > 0 && text[0] == '{':
		o.Events, raw, vmConfig, err = parseReport(text)
	case len(text) > 0 && (text[0] == '[' || text[0] == '"'):
		o.Events, err = measure.ParseEventLog(text)
	default:
		o.Events, err = measure.ParseCCEL(b)
	}
	if err != nil {
		return o, "", withExit(exitEvidence, fmt.Errorf("%s: %w", path, err))
	}
	if quote != "" {
		o.Registers, err = readQuoteRegisters(quote)
	} else if raw != "" {
		o.Registers, err = quoteRegisters([]byte(raw))
	}
	return o, vmConfig, withExit(exitEvidence, err)
}

// parseReport finds event log, quote and vm_config in an answer of GetQuote, a tcb_info,
// or an application's report.
func parseReport(b []byte) (events []measure.Event, quote, vmConfig string, err error) {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, "", "", err
	}
	log := either(doc, "event_log", "eventLog")
	if log == nil {
		return nil, "", "", errors.New("no event_log in it")
	}
	text := func(v json.RawMessage) (s string) {
		if json.Unmarshal(v, &s) != nil {
			return ""
		}
		return s
	}
	var info map[string]json.RawMessage
	if json.Unmarshal(doc["info"], &info) == nil && doc["vm_config"] == nil {
		doc["vm_config"] = info["vm_config"]
	}
	events, err = measure.ParseEventLog(log)
	return events, text(either(doc, "quote", "intel_quote")), text(doc["vm_config"]), err
}

func readQuoteRegisters(path string) (*measure.Registers, error) {
	b, err := readCapped(path, maxReply)
	if err != nil {
		return nil, err
	}
	r, err := quoteRegisters(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// quoteRegisters reads a quote: binary, hexadecimal, or in an answer of GetQuote.
func quoteRegisters(b []byte) (*measure.Registers, error) {
	if text := bytes.TrimSpace(b); len(text) > 0 && text[0] == '{' {
		var doc map[string]json.RawMessage
		var s string
		if err := json.Unmarshal(text, &doc); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(either(doc, "quote", "intel_quote"), &s); err != nil {
			return nil, errors.New("no quote in it")
		}
		b = []byte(s)
	}
	if bin, err := hex.DecodeString(strings.TrimPrefix(string(bytes.TrimSpace(b)), "0x")); err == nil {
		b = bin
	}
	q, err := measure.ParseQuote(b)
	if err != nil {
		return nil, err
	}
	return &q.Body.Registers, nil
}

// explainReply is image explain's JSON form.
type explainReply struct {
	Schema    string             `json:"schema"`
	Match     bool               `json:"match"` // nothing diverges; see the verdicts for what was not judged
	Firmware  string             `json:"firmware"`
	Layout    string             `json:"layout,omitempty"`
	MemoryMiB uint64             `json:"memory_mib,omitempty"`
	Tables    string             `json:"acpi_tables,omitempty"`
	Notes     []string           `json:"notes,omitempty"`
	First     *explainedEvent    `json:"first_divergence"`
	Registers []explainedMeasure `json:"registers,omitempty"`
	Events    []explainedEvent   `json:"events"`
}

type explainedEvent struct {
	IMR     int    `json:"imr"`
	Index   int    `json:"index"`
	Name    string `json:"name"`
	Digest  string `json:"digest"`
	Want    string `json:"want,omitempty"`
	Verdict string `json:"verdict"`
	Hint    string `json:"hint"`
}

type explainedMeasure struct {
	Name    string `json:"name"`
	Quoted  string `json:"quoted"`
	Want    string `json:"want"`
	Verdict string `json:"verdict"`
	Hint    string `json:"hint"`
}

func newExplainReply(x *image.Explanation, notes []string) explainReply {
	r := explainReply{Schema: "tdx-agent/image-explain/v1", Match: x.OK(), Firmware: string(x.Firmware), Layout: x.Layout, MemoryMiB: x.Memory >> 20, Notes: notes, Events: []explainedEvent{}}
	if x.Tables != nil {
		r.Tables = x.Tables.String()
	}
	for i := range x.Findings {
		f := &x.Findings[i]
		e := explainedEvent{IMR: f.IMR, Index: f.Index, Name: f.Name, Digest: f.Digest.String(), Verdict: string(f.Verdict), Hint: f.Hint}
		if f.Want != nil {
			e.Want = f.Want.String()
		}
		r.Events = append(r.Events, e)
		if f == x.First() {
			r.First = &e
		}
	}
	for _, m := range x.Registers {
		r.Registers = append(r.Registers, explainedMeasure{m.Name, m.Quoted.String(), m.Want.String(), string(m.Verdict), m.Hint})
	}
	return r
}

func printExplanation(cmd *cobra.Command, x *image.Explanation, notes []string) error {
	r := newExplainReply(x, notes)
	var err error
	if wantJSON(cmd) {
		err = json.NewEncoder(cmd.OutOrStdout()).Encode(r)
	} else {
		showExplanation(cmd.OutOrStdout(), &r)
	}
	if err == nil && !r.Match {
		err = exitf(exitFailure, "%s", r.divergence())
	}
	return err
}

func (r *explainReply) divergence() string {
	if r.First != nil {
		return fmt.Sprintf("RTMR%d diverges at %s: %s", r.First.IMR, r.First.Name, r.First.Hint)
	}
	for _, m := range r.Registers {
		if m.Verdict == string(image.Mismatch) {
			return fmt.Sprintf("%s differs: %s", m.Name, m.Hint)
		}
	}
	return "something differs"
}

func showExplanation(out io.Writer, r *explainReply) {
	for _, e := range r.Events {
		index := fmt.Sprint(e.Index)
		if e.Index < 0 {
			index = "-"
		}
		fmt.Fprintf(out, "RTMR%d %2s  %-11s  %-42s %.16s  %s\n", e.IMR, index, e.Verdict, quoted(e.Name), e.Digest, e.Hint)
		if e.Want != "" {
			fmt.Fprintf(out, "%67s %.16s  is what follows from the configuration\n", "", e.Want)
		}
	}
	for _, m := range r.Registers {
		fmt.Fprintf(out, "%-8s  %-11s  %s  %s\n", m.Name, m.Verdict, m.Quoted, m.Hint)
	}
	if r.Tables != "" {
		fmt.Fprintln(out, r.Tables)
	}
	for _, n := range r.Notes {
		fmt.Fprintln(out, "note:", quoted(n))
	}
}

// parseDigest reads 96 hexadecimal digits.
func parseDigest(s string) (*measure.Digest, error) {
	var d measure.Digest
	return &d, d.UnmarshalText([]byte(s))
}
