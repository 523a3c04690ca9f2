package measure

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Bounds of an event log in JSON. A peer's log may be larger than ours.
const (
	maxEventLogSize   = 10 << 20
	maxEventLogEvents = 4096
)

// acpiMarker is the payload of the three events that measure ACPI tables. Readers
// find them by it, so it survives stripping.
const (
	acpiMarker     = "ACPI DATA"
	acpiMarkerType = 0x0a // EV_PLATFORM_CONFIG_FLAGS
)

// FormatEventLog returns the events as dstack's JSON: an array of objects with imr,
// event_type, digest, event and event_payload, and for version 2 also version and
// preimage. It is compact, pure ASCII, and every digest is filled. With strip the
// payloads of boot events are blank, as in GetQuote's answer, but for the marker of
// the ACPI tables.
func FormatEventLog(events []Event, strip bool) ([]byte, error) {
	b := append(make([]byte, 0, 300*len(events)+2), '[')
	for i := range events {
		e := &events[i]
		if !utf8.ValidString(e.Name) {
			return nil, fmt.Errorf("event %d: name %q is not UTF-8", i, e.Name)
		}
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(append(b, `{"imr":`...), int64(e.IMR), 10)
		b = strconv.AppendUint(append(b, `,"event_type":`...), uint64(e.Type), 10)
		b = append(b, `,"digest":"`...)
		b = hex.AppendEncode(b, e.Digest[:])
		b = append(b, `","event":"`...)
		b = appendASCII(b, e.Name)
		b = append(b, `","event_payload":"`...)
		if !strip || e.IMR == RTMR3 || e.MeasuresACPI() {
			b = hex.AppendEncode(b, e.Payload)
		}
		b = append(b, '"')
		if e.IsRuntime() && e.Version == EventV2 {
			b = append(b, `,"version":2,"preimage":"`...)
			b = hex.AppendEncode(b, e.Preimage())
			b = append(b, '"')
		}
		b = append(b, '}')
	}
	return append(b, ']'), nil
}

// MeasuresACPI reports whether e has the form of the three RTMR0 events by which a
// dstack guest's firmware measures QEMU's ACPI tables, and which alone of the boot log
// stay in a certificate.
func (e *Event) MeasuresACPI() bool {
	return e.IMR == 0 && e.Type == acpiMarkerType && string(e.Payload) == acpiMarker
}

// appendASCII appends valid UTF-8 as the inside of a JSON string in ASCII.
func appendASCII(b []byte, s string) []byte {
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r >= 0x20 && r < 0x7f:
			b = append(b, byte(r))
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			b = fmt.Appendf(b, `\u%04x\u%04x`, hi, lo)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return b
}

// ParseEventLog parses dstack's JSON form of an event log, at most 10 MiB and 4096
// events: the array, or the array as a JSON string, as GetQuote's answer has it.
// Hexadecimal values may be of either case and start with 0x.
//
// A runtime event may lack its digest (dstack 0.5.6 and later blank it): then it is
// computed. A digest or preimage that is there must follow from name and payload. A
// boot event must have a digest, and a preimage of it must hash to that. Duplicate members are refused, unknown ones ignored.
// What is returned is consistent in itself, and not trusted.
func ParseEventLog(b []byte) ([]Event, error) {
	if len(b) > maxEventLogSize {
		return nil, fmt.Errorf("event log has %d bytes, want at most %d", len(b), maxEventLogSize)
	}
	if b = bytes.TrimSpace(b); len(b) > 0 && b[0] == '"' {
		if !utf8.Valid(b) { // json.Unmarshal would replace what is not
			return nil, fmt.Errorf("event log is not valid UTF-8")
		}
		var inner string
		if err := json.Unmarshal(b, &inner); err != nil {
			return nil, fmt.Errorf("event log: %v", err)
		}
		b = []byte(inner)
	}
	if b = bytes.TrimSpace(b); len(b) == 0 || b[0] != '[' {
		return nil, fmt.Errorf("event log: want a JSON array of events")
	}
	return parseEventArray(json.NewDecoder(bytes.NewReader(b)))
}

// parseEventArray reads one event at a time, so that a log of too many small values
// is refused before memory is spent on each.
func parseEventArray(dec *json.Decoder) ([]Event, error) {
	if _, err := dec.Token(); err != nil { // the bracket
		return nil, fmt.Errorf("event log: %v", err)
	}
	var events []Event
	for dec.More() {
		if len(events) == maxEventLogEvents {
			return nil, fmt.Errorf("event log has more events than %d", maxEventLogEvents)
		}
		var doc json.RawMessage
		if err := dec.Decode(&doc); err != nil {
			return nil, fmt.Errorf("event log: %v", err)
		}
		e, err := parseEventJSON(doc)
		if err != nil {
			return nil, fmt.Errorf("event %d: %w", len(events), err)
		}
		events = append(events, e)
	}
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("event log: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("event log: something follows the array")
	}
	return events, nil
}

func parseEventJSON(doc []byte) (Event, error) {
	o, err := parseGuestObject(doc)
	if err != nil {
		return Event{}, err
	}
	var e Event
	var imr uint32
	var digest, payload, preimage string
	for _, m := range []struct {
		name string
		dst  any
		must bool
	}{{"imr", &imr, true}, {"event_type", &e.Type, true}, {"digest", &digest, true}, {"event", &e.Name, true},
		{"event_payload", &payload, true}, {"version", &e.Version, false}, {"preimage", &preimage, false}} {
		read := o.optional
		if m.must {
			read = o.member
		}
		if err := read(m.name, m.dst); err != nil {
			return Event{}, err
		}
	}
	if imr > 3 {
		return Event{}, fmt.Errorf("imr is %d, want 0 to 3", imr)
	}
	e.IMR = int(imr)
	if e.Payload, err = unhexEvent(payload); err != nil {
		return Event{}, fmt.Errorf("event_payload: %w", err)
	}
	digestBytes, err := unhexEvent(digest)
	if err != nil {
		return Event{}, fmt.Errorf("digest: %w", err)
	}
	preimageBytes, err := unhexEvent(preimage)
	if err != nil {
		return Event{}, fmt.Errorf("preimage: %w", err)
	}
	return completeEvent(e, digestBytes, preimageBytes)
}

func unhexEvent(s string) ([]byte, error) {
	for strings.HasPrefix(s, "0x") {
		s = s[2:]
	}
	return hex.DecodeString(s)
}

// completeEvent sets the digest of an event that was received with digest and
// preimage, either of which may be missing.
func completeEvent(e Event, digest, preimage []byte) (Event, error) {
	if !e.IsRuntime() {
		if len(digest) != len(e.Digest) {
			return Event{}, fmt.Errorf("digest of a boot event has %d bytes, want %d", len(digest), len(e.Digest))
		}
		e.Digest, e.Version = Digest(digest), 0
		if sum := sha512.Sum384(preimage); len(preimage) > 0 && sum != e.Digest {
			return Event{}, fmt.Errorf("preimage of a boot event hashes to %x, but its digest is %s", sum, e.Digest)
		}
		return e, nil
	}
	if e.Version < 0 {
		return Event{}, fmt.Errorf("event %q: digest version %d, want %d or %d", e.Name, e.Version, EventV1, EventV2)
	}
	want, err := NewRuntimeEvent(e.Name, e.Payload, max(e.Version, EventV1))
	if err != nil {
		return Event{}, err
	}
	if len(digest) > 0 && !bytes.Equal(digest, want.Digest[:]) {
		return Event{}, fmt.Errorf("event %q: digest is %x, but its name and payload give %s", e.Name, digest, want.Digest)
	}
	if sum := sha512.Sum384(preimage); len(preimage) > 0 && sum != want.Digest {
		return Event{}, fmt.Errorf("event %q: preimage hashes to %x, but its name and payload give %s", e.Name, sum, want.Digest)
	}
	return want, nil
}
