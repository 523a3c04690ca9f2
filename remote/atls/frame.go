package atls

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
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
	return frameOf(kind, body, limit)
}

// frameOf puts a header before a body.
func frameOf(kind byte, body []byte, limit int) ([]byte, error) {
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

// decode reads a frame's message.
func decode(frame []byte, message any) error {
	if _, err := members(frame[4:]); err != nil {
		return err
	}
	if err := json.Unmarshal(frame[4:], message); err != nil {
		return &formError{err.Error()}
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
