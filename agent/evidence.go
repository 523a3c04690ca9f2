package main

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// maxEvidence bounds a file of evidence: dstack's own bound of an attestation, in
// hexadecimal.
const maxEvidence = 21 << 20

// evidenceFlags say where evidence is.
type evidenceFlags struct {
	quote, eventLog, vmConfig, attestation, cert string

	chain []*x509.Certificate // of cert, once read
}

func (f *evidenceFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.quote, "quote", "", "file with the quote: binary, hexadecimal, or JSON that holds it, as GetQuote's answer (- is standard input)")
	cmd.Flags().StringVar(&f.eventLog, "event-log", "", "file with the event log: dstack's JSON or a binary CCEL (default: the one in --quote)")
	cmd.Flags().StringVar(&f.vmConfig, "vm-config", "", "file with the vm_config (default: the one in --quote)")
	cmd.Flags().StringVar(&f.attestation, "attestation", "", "file with a versioned attestation instead of all these: binary, hexadecimal, or JSON of Attest")
	cmd.Flags().StringVar(&f.cert, "cert", "", "PEM file with a dstack RA-TLS certificate instead of all these: the quote must be bound to its key; it says nothing of freshness")
}

// read reads the evidence. What is no evidence has the exit status of that.
func (f *evidenceFlags) read() (*measure.Evidence, error) {
	given := 0
	for _, path := range []string{f.quote, f.attestation, f.cert} {
		if path != "" {
			given++
		}
	}
	if given != 1 {
		return nil, exitf(exitUsage, "give one of --quote, --attestation and --cert")
	}
	if f.quote == "" && (f.eventLog != "" || f.vmConfig != "") {
		return nil, exitf(exitUsage, "--attestation and --cert hold event log and vm_config: give no others")
	}
	path := f.quote + f.attestation + f.cert
	b, err := readInput(path)
	if err != nil {
		return nil, err
	}
	parse := parseEvidence
	switch {
	case f.attestation != "":
		parse = parseAttestation
	case f.cert != "":
		parse = f.parseCertificate
	}
	ev, err := parse(b)
	if err != nil {
		return nil, withExit(exitEvidence, fmt.Errorf("%s: %w", path, err))
	}
	return ev, f.override(ev)
}

// override replaces what came with the quote by what was given apart.
func (f *evidenceFlags) override(ev *measure.Evidence) error {
	if f.eventLog != "" {
		b, err := readInput(f.eventLog)
		if err != nil {
			return err
		}
		if ev.Events, err = parseEvents(b); err != nil {
			return withExit(exitEvidence, fmt.Errorf("%s: %w", f.eventLog, err))
		}
		if len(ev.Events) == 0 {
			return exitf(exitEvidence, "%s: an event log without events", f.eventLog)
		}
	}
	if f.vmConfig != "" {
		b, err := readInput(f.vmConfig)
		if err != nil {
			return err
		}
		ev.VMConfig = string(b)
	}
	return nil
}

// readInput reads a file, or standard input. One that is too large is no evidence.
func readInput(path string) ([]byte, error) {
	in := os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	} else {
		path = "standard input"
	}
	b, err := readLimited(in, path, maxEvidence)
	if len(b) > maxEvidence {
		err = withExit(exitEvidence, err)
	}
	return b, err
}

// parseEvidence finds a quote, and with it an event log and a vm_config, in a file of
// any form in use.
func parseEvidence(b []byte) (*measure.Evidence, error) {
	text := bytes.TrimSpace(b)
	if len(text) == 0 {
		return nil, errors.New("the file is empty")
	}
	switch text[0] {
	case '{':
		return evidenceOf(text)
	case '[':
		quote, err := byteArray(text)
		return &measure.Evidence{Quote: quote}, err
	}
	quote, err := unhexIfText(b)
	return &measure.Evidence{Quote: quote}, err
}

// unhexIfText decodes hexadecimal digits, and leaves binary data as they are. No quote
// and no attestation is text by chance: both have zeros among their first bytes.
func unhexIfText(b []byte) ([]byte, error) {
	isBinary := func(r rune) bool { return r < ' ' && r != '\n' && r != '\r' && r != '\t' || r > '~' }
	if bytes.ContainsFunc(b, isBinary) {
		return b, nil
	}
	decoded, err := hexText(string(bytes.TrimSpace(b)))
	if err != nil {
		return nil, fmt.Errorf("text that is not hexadecimal, %v; want one line of digits, JSON or binary data", err)
	}
	return decoded, nil
}

// object reads a JSON object. A member that is there twice is an error, since other
// readers of the same file may take the other one.
func object(text []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	if open, err := d.Token(); err != nil {
		return nil, err
	} else if open != json.Delim('{') {
		return nil, errors.New("no JSON object")
	}
	doc := map[string]json.RawMessage{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		name, _ := token.(string)
		if _, isTwice := doc[name]; isTwice {
			return nil, fmt.Errorf("member %.80q is there twice", name)
		}
		doc[name] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the JSON object")
	}
	return doc, nil
}

func byteArray(text []byte) ([]byte, error) {
	var list []uint8Number
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("no array of bytes, %v; want an answer of GetQuote, or a quote", err)
	}
	b := make([]byte, len(list))
	for i, n := range list {
		b[i] = byte(n)
	}
	return b, nil
}

// uint8Number keeps encoding/json from reading an array of bytes as base64.
type uint8Number uint8

// evidenceOf reads an answer of GetQuote, or a report of an application that carries
// quote and log under one of the names in use.
func evidenceOf(text []byte) (*measure.Evidence, error) {
	doc, err := object(text)
	if err != nil {
		return nil, fmt.Errorf("%v; want an answer of GetQuote", err)
	}
	if azure, ok := doc["td_quote"]; ok {
		var s string
		if err := json.Unmarshal(azure, &s); err != nil {
			return nil, fmt.Errorf("td_quote: %v", err)
		}
		quote, err := base64.URLEncoding.DecodeString(s)
		if err != nil {
			return nil, fmt.Errorf("td_quote: %v", err)
		}
		return &measure.Evidence{Quote: quote}, nil
	}
	raw := either(doc, "quote", "intel_quote")
	if raw == nil {
		if doc["attestation"] != nil {
			return parseAttestation(text)
		}
		return nil, errors.New("no quote in it; want an answer of GetQuote")
	}
	quote, err := hexString(raw)
	if err != nil {
		return nil, fmt.Errorf("quote: %v", err)
	}
	ev := &measure.Evidence{Quote: quote}
	if log := either(doc, "event_log", "eventLog"); log != nil && string(log) != `""` {
		if ev.Events, err = measure.ParseEventLog(log); err != nil {
			return nil, err
		}
	}
	if config := doc["vm_config"]; config != nil {
		if err := json.Unmarshal(config, &ev.VMConfig); err != nil {
			return nil, fmt.Errorf("vm_config: %v", err)
		}
	}
	return ev, nil
}

func hexString(raw json.RawMessage) ([]byte, error) {
	var s *string
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, err
	}
	if s == nil {
		return nil, errors.New("got null, want hexadecimal digits")
	}
	return hexText(*s)
}

func hexText(s string) ([]byte, error) { return hex.DecodeString(strings.TrimPrefix(s, "0x")) }

func either(doc map[string]json.RawMessage, names ...string) json.RawMessage {
	for _, n := range names {
		if v, ok := doc[n]; ok {
			return v
		}
	}
	return nil
}

// parseAttestation reads a versioned attestation.
func parseAttestation(b []byte) (*measure.Evidence, error) {
	if text := bytes.TrimSpace(b); len(text) > 0 && text[0] == '{' {
		doc, err := object(text)
		if err != nil {
			return nil, fmt.Errorf("%v; want an answer of Attest", err)
		}
		if doc["attestation"] == nil {
			return nil, errors.New("no attestation in it; want an answer of Attest")
		}
		if b, err = hexString(doc["attestation"]); err != nil {
			return nil, fmt.Errorf("attestation: %v", err)
		}
	} else {
		var err error
		if b, err = unhexIfText(b); err != nil {
			return nil, err
		}
	}
	a, err := measure.ParseAttestation(b)
	if err != nil {
		return nil, err
	}
	return a.Evidence()
}

// maxChain bounds the certificates of a PEM file.
const maxChain = 16

// parseCertificate reads the attestation in the first certificate of a PEM file. It
// must be bound to the certificate's key. Those that follow may be its issuers.
func (f *evidenceFlags) parseCertificate(b []byte) (*measure.Evidence, error) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(f.chain)+1, err)
		}
		if f.chain = append(f.chain, cert); len(f.chain) > maxChain {
			return nil, fmt.Errorf("more than %d certificates", maxChain)
		}
	}
	if len(f.chain) == 0 {
		return nil, errors.New("no PEM certificate")
	}
	a, err := ratls.Parse(f.chain[0])
	if err != nil {
		return nil, err
	}
	return a.Evidence, nil
}

// checkChain checks dates and signature of the certificate that was read. An issuer that
// the file does not hold is told of: nothing here rests on what issuers say.
func (f *evidenceFlags) checkChain(at time.Time, out io.Writer) error {
	if len(f.chain) == 0 {
		return nil
	}
	err := ratls.CheckLeaf(f.chain, at)
	if errors.Is(err, ratls.ErrNoIssuer) {
		fmt.Fprintf(out, "certificate's signature: NOT CHECKED (its issuer is not in %s): its dates may be anybody's\n", f.cert)
		return nil
	}
	return withExit(exitEvidence, err)
}

// parseEvents reads an event log: dstack's JSON, a document that holds it, or a CCEL.
func parseEvents(b []byte) ([]measure.Event, error) {
	text := bytes.TrimSpace(b)
	if len(text) == 0 {
		return nil, errors.New("the file is empty")
	}
	switch text[0] {
	case '[', '"':
		return measure.ParseEventLog(text)
	case '{':
		doc, err := object(text)
		if err != nil {
			return nil, err
		}
		log := either(doc, "event_log", "eventLog")
		if log == nil {
			return nil, errors.New("no event_log in it")
		}
		return measure.ParseEventLog(log)
	}
	return measure.ParseCCEL(b)
}
