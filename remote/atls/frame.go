package atls

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"

	"tdx-agent/measure"
)

// Frame types.
const (
	frameHelloClient = 1
	frameHelloServer = 2
	frameEvidence    = 3
	frameResult      = 4
)

// Caps of a frame's body.
const (
	maxHello           = 4 << 10
	maxResult          = 1 << 10
	maxEvidence        = 256 << 10
	defaultMaxEvidence = 192 << 10
)

// formatDstack is the one format of evidence: a quote, dstack's event log with every
// digest filled, and dstack's vm_config.
const formatDstack = "dstack-tdx/1"

// Ways to attest, in hellos.
const (
	modeQuote = "quote"
	modeKey   = "key"
	modeNone  = "none"

	attestSelf = "self"
	attestPeer = "peer"

	orderClientFirst = "client-first"
)

// Caps of lists and names in a hello.
const (
	maxList    = 16
	maxService = 64
)

type helloClient struct {
	Version     int      `json:"v"`
	Nonce       []byte   `json:"nonce"`
	Attest      []string `json:"attest"`
	Modes       []string `json:"modes"`
	Formats     []string `json:"formats"`
	Service     string   `json:"service"`
	MaxEvidence int      `json:"max_evidence"`
	AgentKey    []byte   `json:"agent_key"`
}

type helloServer struct {
	Version        int    `json:"v"`
	Nonce          []byte `json:"nonce"`
	ClientEvidence string `json:"client_evidence"`
	Format         string `json:"format"`
	Order          string `json:"order"`
	Service        string `json:"service"`
	MaxEvidence    int    `json:"max_evidence"`
	AgentKey       []byte `json:"agent_key"`
}

type evidenceFrame struct {
	Format         string          `json:"format"`
	Quote          []byte          `json:"quote,omitempty"`
	EventLog       json.RawMessage `json:"event_log,omitempty"`
	VMConfig       string          `json:"vm_config,omitempty"`
	Collateral     json.RawMessage `json:"collateral,omitempty"`
	AgentKey       []byte          `json:"agent_spki"`
	RTMR3          measure.Digest  `json:"rtmr3"`
	Signature      []byte          `json:"sig"`
	ServerEvidence string          `json:"server_evidence,omitempty"`
}

type resultFrame struct {
	OK         bool   `json:"ok"`
	Code       Code   `json:"code"`
	Ref        string `json:"ref"`
	TTLSeconds int    `json:"ttl_s"`
	RetryAfter int    `json:"retry_after_ms,omitempty"`
}

// encodeFrame returns header and body.
func encodeFrame(kind byte, message any, limit int) ([]byte, error) {
	body, err := json.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("frame %d: %v", kind, err)
	}
	if len(body) > limit {
		return nil, fmt.Errorf("frame %d has %d bytes, want at most %d", kind, len(body), limit)
	}
	n := len(body)
	return append([]byte{kind, byte(n >> 16), byte(n >> 8), byte(n)}, body...), nil
}

// readFrame reads one frame of this kind and not a byte more.
func readFrame(r io.Reader, kind byte, limit int) (frame []byte, err error) {
	var header [4]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	if header[0] == frameResult && kind != frameResult {
		kind, limit = frameResult, maxResult // a refusal may come in place of any frame
	}
	n := int(header[1])<<16 | int(header[2])<<8 | int(header[3])
	if header[0] != kind {
		return nil, &formError{fmt.Sprintf("got frame %d, want %d", header[0], kind)}
	}
	if n > limit {
		return nil, &formError{fmt.Sprintf("frame %d has %d bytes, want at most %d", kind, n, limit)}
	}
	frame = make([]byte, 4+n)
	copy(frame, header[:])
	_, err = io.ReadFull(r, frame[4:])
	return frame, err
}

// formError says that the peer does not speak the protocol.
type formError struct{ text string }

func (e *formError) Error() string { return "received malformed: " + e.text }

// decode reads a frame's message. No member may be there twice, in any case of its
// letters, among which encoding/json has the long s: it would take the last.
func decode(frame []byte, message any) error {
	body := frame[4:]
	if err := checkMembers(body); err != nil {
		return &formError{err.Error()}
	}
	if err := json.Unmarshal(body, message); err != nil {
		return &formError{err.Error()}
	}
	return nil
}

// checkMembers wants one JSON object whose members differ.
func checkMembers(body []byte) error {
	d := json.NewDecoder(bytes.NewReader(body))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return errors.New("no JSON object")
	}
	var seen []string
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return err
		}
		name := strings.ToLower(fmt.Sprint(t))
		if slices.Contains(seen, name) || name != t || strings.ContainsFunc(name, func(r rune) bool { return r > unicode.MaxASCII }) {
			return fmt.Errorf("member %.40q is there twice, or not in lower case ASCII", name)
		}
		if len(seen) == maxList {
			return errors.New("too many members")
		}
		seen = append(seen, name)
		var skip json.RawMessage
		if err := d.Decode(&skip); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the object")
	}
	return nil
}

func (h *helloClient) check() error {
	switch {
	case h.Version != 1:
		return &unsupportedError{fmt.Sprintf("version %d, want 1", h.Version)}
	case len(h.Nonce) != 32 || len(h.AgentKey) != 32:
		return &formError{fmt.Sprintf("nonce and agent_key have %d and %d bytes, want 32", len(h.Nonce), len(h.AgentKey))}
	case len(h.Attest) > maxList || len(h.Modes) > maxList || len(h.Formats) > maxList:
		return &formError{"a list is too long"}
	case h.Service == "" || len(h.Service) > maxService:
		return &formError{fmt.Sprintf("service has %d bytes, want 1 to %d", len(h.Service), maxService)}
	case h.MaxEvidence < 1:
		return &formError{"max_evidence is not positive"}
	case !slices.Contains(h.Formats, formatDstack):
		return &unsupportedError{"no format of evidence in common"}
	}
	return nil
}

func (h *helloServer) check(client *helloClient) error {
	switch {
	case h.Version != 1:
		return &unsupportedError{fmt.Sprintf("version %d, want 1", h.Version)}
	case len(h.Nonce) != 32 || len(h.AgentKey) != 32:
		return &formError{fmt.Sprintf("nonce and agent_key have %d and %d bytes, want 32", len(h.Nonce), len(h.AgentKey))}
	case h.Format != formatDstack || h.Order != orderClientFirst:
		return &unsupportedError{fmt.Sprintf("format %q in order %q, want %s, %s", h.Format, h.Order, formatDstack, orderClientFirst)}
	case h.Service != client.Service:
		return &formError{fmt.Sprintf("service is %q, want %q, which was asked for", h.Service, client.Service)}
	case h.MaxEvidence < 1:
		return &formError{"max_evidence is not positive"}
	case h.ClientEvidence != modeNone && !slices.Contains(client.Modes, h.ClientEvidence):
		return &formError{fmt.Sprintf("client_evidence is %q, want one of %q or none", h.ClientEvidence, client.Modes)}
	}
	return nil
}

// unsupportedError says that the peer speaks the protocol in a form that we do not.
type unsupportedError struct{ text string }

func (e *unsupportedError) Error() string { return "unsupported: " + e.text }

// encodeStatement is the EVIDENCE frame of a statement.
func encodeStatement(st *Statement, serverEvidence string, limit int) ([]byte, error) {
	e := evidenceFrame{Format: formatDstack, AgentKey: st.AgentKey, RTMR3: st.RTMR3, Signature: st.Signature, ServerEvidence: serverEvidence}
	if st.Evidence != nil {
		log, err := measure.FormatEventLog(st.Evidence.Events, true)
		if err != nil {
			return nil, err
		}
		e.Quote, e.EventLog, e.VMConfig = st.Evidence.Quote, log, st.Evidence.VMConfig
	}
	return encodeFrame(frameEvidence, &e, min(limit, maxEvidence))
}

// statement takes a statement out of an EVIDENCE frame.
func (e *evidenceFrame) statement(keyMode bool) (*Statement, error) {
	st := &Statement{AgentKey: e.AgentKey, RTMR3: e.RTMR3, Signature: e.Signature}
	switch {
	case e.Format != formatDstack:
		return nil, &unsupportedError{fmt.Sprintf("format %.40q", e.Format)}
	case len(e.AgentKey) > 256 || len(e.Signature) > 256:
		return nil, &formError{"agent_spki or sig is too long"}
	case keyMode && (e.Quote != nil || e.EventLog != nil || e.VMConfig != "" || e.Collateral != nil):
		return nil, &formError{"evidence in key mode"}
	case keyMode:
		return st, nil
	}
	events, err := measure.ParseEventLog(e.EventLog)
	if err != nil {
		return nil, &evidenceError{err}
	}
	st.Evidence = &measure.Evidence{Quote: e.Quote, Events: events, VMConfig: e.VMConfig}
	return st, nil
}

// evidenceError says that evidence cannot be read.
type evidenceError struct{ err error }

func (e *evidenceError) Error() string { return "evidence: " + e.err.Error() }
func (e *evidenceError) Unwrap() error { return e.err }
