package measure

import (
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// RuntimeEventType is the event type of every event that dstack, and this agent,
// extend into RTMR3 at run time.
const RuntimeEventType uint32 = 0x08000001

// RTMR3 is the index of the register that runtime events are extended into.
const RTMR3 = 3

// The ways in which the digest of a runtime event is computed. A version is
// chosen once for a boot and never changes within it.
const (
	EventV1 = 1 // SHA-384(LE32(type) || ":" || name || ":" || payload)
	EventV2 = 2 // SHA-384 of the RFC 8785 form of {name, payload, type}
)

// Event is one measured event: what a register was extended with, and why.
//
// A boot event (from the CCEL) has no Name; its Payload is the event data of the
// TCG log, which does not in general hash to Digest. A runtime event (IMR 3, Type
// RuntimeEventType) has a Name, and its Digest follows from Name, Payload and
// Version; [Event.Check] says whether it does. Nothing in an Event that came from
// somebody else is trusted until it was checked and replayed against a quote whose
// signature was verified.
type Event struct {
	IMR     int    // register index, 0 to 3 (RTMR0 to RTMR3)
	Type    uint32 // TCG event type, or RuntimeEventType
	Digest  Digest
	Name    string // "" for boot events
	Payload []byte
	Version int // EventV1 (also 0) or EventV2; meaningful for runtime events only
}

// NewRuntimeEvent returns the runtime event of this name and payload with its
// digest computed. The name must be valid UTF-8 and not empty; version is EventV1
// or EventV2. The payload is kept, not copied.
func NewRuntimeEvent(name string, payload []byte, version int) (Event, error) {
	if err := checkRuntime(name, version); err != nil {
		return Event{}, err
	}
	e := Event{IMR: RTMR3, Type: RuntimeEventType, Name: name, Payload: payload, Version: version}
	e.Digest = sha512.Sum384(e.Preimage())
	return e, nil
}

func checkRuntime(name string, version int) error {
	if name == "" || !utf8.ValidString(name) {
		return fmt.Errorf("event name %q: want non-empty UTF-8", name)
	}
	if version != EventV1 && version != EventV2 {
		return fmt.Errorf("event %q: digest version %d, want %d or %d", name, version, EventV1, EventV2)
	}
	return nil
}

// IsRuntime reports whether e claims to be a runtime event: RTMR3 and the type
// 0x08000001. An event of that type in another register is not one.
func (e *Event) IsRuntime() bool { return e.IMR == RTMR3 && e.Type == RuntimeEventType }

// Preimage returns the bytes whose SHA-384 is the digest of a runtime event of
// e's name, payload and version.
func (e *Event) Preimage() []byte { return e.appendPreimage(nil) }

func (e *Event) appendPreimage(b []byte) []byte {
	if e.Version == EventV2 {
		return e.appendPreimageV2(b)
	}
	b = binary.LittleEndian.AppendUint32(b, e.Type)
	b = append(b, ':')
	b = append(b, e.Name...)
	b = append(b, ':')
	return append(b, e.Payload...)
}

// appendPreimageV2 writes the RFC 8785 (JCS) form of the three members, which are in
// order already. Section 3.2.2.2 fixes how a string is escaped.
func (e *Event) appendPreimageV2(b []byte) []byte {
	b = append(b, `{"name":"`...)
	for _, c := range []byte(e.Name) {
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c == '\b':
			b = append(b, `\b`...)
		case c == '\t':
			b = append(b, `\t`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '\f':
			b = append(b, `\f`...)
		case c == '\r':
			b = append(b, `\r`...)
		case c < 0x20:
			b = fmt.Appendf(b, `\u%04x`, c)
		default:
			b = append(b, c)
		}
	}
	b = append(b, `","payload":"`...)
	b = hex.AppendEncode(b, e.Payload)
	b = append(b, `","type":`...)
	return append(strconv.AppendUint(b, uint64(e.Type), 10), '}')
}

// Check recomputes the digest of a runtime event from its name and payload, and
// says how it differs. Events that are not runtime events cannot be recomputed:
// for them Check returns nil.
func (e *Event) Check() error {
	if !e.IsRuntime() {
		return nil
	}
	return e.check(nil)
}

// check is Check of a runtime event; scratch is where the preimage is written.
func (e *Event) check(scratch []byte) error {
	if err := checkRuntime(e.Name, max(e.Version, EventV1)); err != nil {
		return err
	}
	if want := Digest(sha512.Sum384(e.appendPreimage(scratch))); e.Digest != want {
		return fmt.Errorf("event %q: digest is %s, but its name and payload give %s", e.Name, e.Digest, want)
	}
	return nil
}

// Replay extends every event's digest into four registers that start as zero, in
// log order, and returns them as RTMR0 to RTMR3. It is an error if an event names
// another register or if a runtime event's digest does not follow from its name
// and payload. The result proves something only when compared with the registers
// of a verified quote.
func Replay(events []Event) ([4]Digest, error) {
	var rtmr [4]Digest
	scratch := make([]byte, 0, 1024)
	for i := range events {
		e := &events[i]
		if e.IMR < 0 || e.IMR >= len(rtmr) {
			return rtmr, fmt.Errorf("event %d names register %d, want 0 to 3", i, e.IMR)
		}
		if e.IsRuntime() {
			if err := e.check(scratch); err != nil {
				return rtmr, fmt.Errorf("event %d: %w", i, err)
			}
		}
		rtmr[e.IMR] = rtmr[e.IMR].Extend(e.Digest)
	}
	return rtmr, nil
}
