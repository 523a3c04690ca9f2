package measure

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// Version 1 is a MessagePack map, as the Rust types of dstack write it: structures
// as maps by field name, plain byte vectors as arrays of integers, and the fields
// that dstack marks as bytes (digest, event_payload, payload) as bin.

func (a *Attestation) marshalV1() ([]byte, error) {
	var buf bytes.Buffer
	w := &packWriter{enc: msgpack.NewEncoder(&buf)}
	w.enc.UseCompactInts(true)
	w.fields(3)
	w.name("version").uint(1)
	w.name("platform").fields(2)
	w.name("kind").text("tdx")
	w.name("data").fields(2)
	w.name("quote").integers(a.Quote)
	w.name("event_log").array(len(a.Events))
	for i := range a.Events {
		w.event(&a.Events[i])
	}
	w.name("stack").fields(2)
	w.name("kind").text(a.Stack)
	n := 3
	if a.Payload != nil {
		n = 4
	}
	w.name("data").fields(n)
	w.name("report_data").integers(a.ReportData[:])
	w.name("runtime_events").array(len(a.RuntimeEvents))
	for i := range a.RuntimeEvents {
		w.runtimeEvent(&a.RuntimeEvents[i])
	}
	w.name("config").text(a.VMConfig)
	if a.Payload != nil {
		w.name("report_data_payload").text(string(a.Payload))
	}
	return buf.Bytes(), w.err
}

// packWriter writes MessagePack and keeps the first error.
type packWriter struct {
	enc *msgpack.Encoder
	err error
}

func (w *packWriter) do(err error) *packWriter {
	w.err = errors.Join(w.err, err)
	return w
}

func (w *packWriter) fields(n int)              { w.do(w.enc.EncodeMapLen(n)) }
func (w *packWriter) array(n int)               { w.do(w.enc.EncodeArrayLen(n)) }
func (w *packWriter) text(s string)             { w.do(w.enc.EncodeString(s)) }
func (w *packWriter) uint(n uint64)             { w.do(w.enc.EncodeUint(n)) }
func (w *packWriter) bin(b []byte)              { w.do(w.enc.EncodeBytes(notNil(b))) }
func (w *packWriter) name(s string) *packWriter { return w.do(w.enc.EncodeString(s)) }

func (w *packWriter) integers(b []byte) {
	w.array(len(b))
	for _, c := range b {
		w.uint(uint64(c))
	}
}

// notNil keeps the encoder from writing nil for an empty value.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

func (w *packWriter) event(e *Event) {
	v2 := e.IsRuntime() && e.Version == EventV2
	n := 5
	if v2 {
		n = 7
	}
	w.fields(n)
	w.name("imr").uint(uint64(e.IMR))
	w.name("event_type").uint(uint64(e.Type))
	w.name("digest").bin(e.Digest[:])
	w.name("event").text(e.Name)
	w.name("event_payload").bin(e.Payload)
	if v2 {
		w.name("version").uint(EventV2)
		w.name("preimage").bin(e.Preimage())
	}
}

func (w *packWriter) runtimeEvent(e *Event) {
	v2 := e.Version == EventV2
	n := 2
	if v2 {
		n = 3
	}
	w.fields(n)
	w.name("event").text(e.Name)
	w.name("payload").bin(e.Payload)
	if v2 {
		w.name("version").uint(EventV2)
	}
}

// packReader reads MessagePack from memory. After an error it reads zero values and
// keeps the error.
type packReader struct {
	src *bytes.Reader
	dec *msgpack.Decoder
	err error
}

func parseV1(b []byte) (*Attestation, error) {
	src := bytes.NewReader(b)
	r := &packReader{src: src, dec: msgpack.NewDecoder(src)}
	a := &Attestation{Version: AttestationV1}
	var version uint64
	r.object(map[string]func(){
		"version":  func() { version = r.uint(1) },
		"platform": func() { r.platform(a) },
		"stack":    func() { r.stack(a) },
	}, "version", "platform", "stack")
	if r.err == nil && version != 1 {
		r.fail(fmt.Errorf("version is %d, want 1", version))
	}
	if r.err == nil && src.Len() > 0 {
		r.fail(fmt.Errorf("%d bytes follow it", src.Len()))
	}
	if r.err != nil {
		return nil, r.err
	}
	return a, nil
}

func (r *packReader) fail(err error) {
	if r.err == nil && err != nil {
		r.err = err
	}
}

// object reads a map with text keys, each at most once; required ones must be there.
// Unknown members are refused: what is signed over nowhere should not hide anything.
func (r *packReader) object(members map[string]func(), required ...string) {
	seen := map[string]bool{}
	for range r.length(r.dec.DecodeMapLen, 2) {
		key := r.text()
		read := members[key]
		switch {
		case r.err != nil:
			return
		case read == nil:
			r.fail(fmt.Errorf("unknown member %q", key))
		case seen[key]:
			r.fail(fmt.Errorf("member %q is there twice", key))
		default:
			seen[key] = true
			if read(); r.err != nil {
				r.err = fmt.Errorf("%s: %w", key, r.err)
			}
		}
		if r.err != nil {
			return
		}
	}
	for _, key := range required {
		if !seen[key] {
			r.fail(fmt.Errorf("member %q is missing", key))
		}
	}
}

// length reads the length of a map or array whose elements have at least unit bytes.
func (r *packReader) length(read func() (int, error), unit int) int {
	if r.err != nil {
		return 0
	}
	n, err := read()
	if err == nil && n < 0 {
		err = errors.New("nil, want a value")
	}
	if err == nil && n > r.src.Len()/unit {
		err = fmt.Errorf("a length says %d, but only %d bytes are left", n, r.src.Len())
	}
	if err != nil {
		r.fail(err)
		return 0
	}
	return n
}

func (r *packReader) code(ok func(byte) bool, want string) bool {
	if r.err != nil {
		return false
	}
	c, err := r.dec.PeekCode()
	if err == nil && !ok(c) {
		err = fmt.Errorf("code %#x, want %s", c, want)
	}
	r.fail(err)
	return r.err == nil
}

func (r *packReader) text() string {
	if !r.code(msgpcode.IsString, "text") {
		return ""
	}
	b := make([]byte, r.length(r.dec.DecodeBytesLen, 1))
	if r.full(b); r.err == nil && !utf8.Valid(b) {
		r.fail(errors.New("a text is not UTF-8"))
	}
	return string(b)
}

func (r *packReader) bin() []byte {
	if !r.code(msgpcode.IsBin, "bytes") {
		return nil
	}
	b := make([]byte, r.length(r.dec.DecodeBytesLen, 1))
	r.full(b)
	return b
}

func (r *packReader) full(b []byte) {
	if r.err == nil {
		r.fail(r.dec.ReadFull(b))
	}
}

func (r *packReader) uint(limit uint64) uint64 {
	if !r.code(func(c byte) bool { return c <= msgpcode.PosFixedNumHigh || c >= msgpcode.Uint8 && c <= msgpcode.Uint64 }, "an unsigned integer") {
		return 0
	}
	n, err := r.dec.DecodeUint64()
	if err == nil && n > limit {
		err = fmt.Errorf("%d, want at most %d", n, limit)
	}
	r.fail(err)
	return n
}

// integers reads bytes written as an array of integers.
func (r *packReader) integers() []byte {
	b := make([]byte, r.length(r.dec.DecodeArrayLen, 1))
	for i := range b {
		if b[i] = byte(r.uint(0xff)); r.err != nil {
			return nil
		}
	}
	return b
}

func (r *packReader) platform(a *Attestation) {
	r.object(map[string]func(){
		"kind": func() {
			if kind := r.text(); r.err == nil && kind != "tdx" {
				r.fail(&PlatformError{kind})
			}
		},
		"data": func() {
			r.object(map[string]func(){
				"quote":     func() { a.Quote = r.integers() },
				"event_log": func() { a.Events = r.events(r.event, 11) },
			}, "quote", "event_log")
		},
	}, "kind", "data")
}

func (r *packReader) stack(a *Attestation) {
	r.object(map[string]func(){
		"kind": func() {
			a.Stack = r.text()
		},
		"data": func() {
			r.object(map[string]func(){
				"report_data": func() {
					b := r.integers()
					if r.err == nil && len(b) != len(a.ReportData) {
						r.fail(fmt.Errorf("%d bytes, want %d", len(b), len(a.ReportData)))
					}
					copy(a.ReportData[:], b)
				},
				"runtime_events":      func() { a.RuntimeEvents = r.events(r.runtimeEvent, 3) },
				"config":              func() { a.VMConfig = r.text() },
				"report_data_payload": func() { a.Payload = []byte(r.text()) },
			}, "report_data", "runtime_events", "config")
		},
	}, "kind", "data")
}

func (r *packReader) events(read func() Event, unit int) (events []Event) {
	n := r.length(r.dec.DecodeArrayLen, unit)
	if n > maxAttestationEvents {
		r.fail(fmt.Errorf("%d events, want at most %d", n, maxAttestationEvents))
		return nil
	}
	for i := range n {
		e := read()
		if r.err != nil {
			r.err = fmt.Errorf("event %d: %w", i, r.err)
			return nil
		}
		events = append(events, e)
	}
	return events
}

func (r *packReader) event() Event {
	var e Event
	var digest, preimage []byte
	r.object(map[string]func(){
		"imr":           func() { e.IMR = int(r.uint(3)) },
		"event_type":    func() { e.Type = uint32(r.uint(1<<32 - 1)) },
		"digest":        func() { digest = r.bin() },
		"event":         func() { e.Name = r.text() },
		"event_payload": func() { e.Payload = r.bin() },
		"version":       func() { e.Version = int(r.uint(EventV2)) },
		"preimage":      func() { preimage = r.bin() },
	}, "imr", "event_type", "digest", "event", "event_payload")
	if r.err != nil {
		return e
	}
	e, err := completeEvent(e, digest, preimage)
	r.fail(err)
	return e
}

func (r *packReader) runtimeEvent() Event {
	e := Event{Version: EventV1}
	r.object(map[string]func(){
		"event":   func() { e.Name = r.text() },
		"payload": func() { e.Payload = r.bin() },
		"version": func() { e.Version = int(r.uint(EventV2)) },
	}, "event", "payload")
	if r.err != nil {
		return e
	}
	e, err := NewRuntimeEvent(e.Name, e.Payload, max(e.Version, EventV1))
	r.fail(err)
	return e
}
