package measure

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// The platforms of a version 0 attestation, by their number in it.
var scalePlatforms = []string{"tdx", "gcp-tdx", "nitro", "sev-snp", "aws"}

// appendV0 writes SCALE: version 0, platform 0 (TDX), quote, log, runtime events,
// report data, config. Lengths are SCALE compact integers.
func (a *Attestation) appendV0(b []byte) []byte {
	b = append(b, 0, 0)
	b = appendScaleBytes(b, a.Quote)
	b = appendCompact(b, len(a.Events))
	for i := range a.Events {
		e := &a.Events[i]
		b = binary.LittleEndian.AppendUint32(b, uint32(e.IMR))
		b = binary.LittleEndian.AppendUint32(b, e.Type)
		b = appendScaleBytes(b, e.Digest[:])
		b = appendScaleBytes(b, []byte(e.Name))
		b = appendScaleBytes(b, e.Payload)
	}
	b = appendCompact(b, len(a.RuntimeEvents))
	for i := range a.RuntimeEvents {
		b = appendScaleBytes(b, []byte(a.RuntimeEvents[i].Name))
		b = appendScaleBytes(b, a.RuntimeEvents[i].Payload)
	}
	b = append(b, a.ReportData[:]...)
	return appendScaleBytes(b, []byte(a.VMConfig))
}

// sizeV0 bounds the size of what appendV0 writes.
func (a *Attestation) sizeV0() int {
	const lengths = 4 // bytes of the longest compact integer
	n := 2 + 4*lengths + len(a.Quote) + len(a.ReportData) + len(a.VMConfig)
	for i := range a.Events {
		n += 8 + 3*lengths + len(Digest{}) + len(a.Events[i].Name) + len(a.Events[i].Payload)
	}
	for i := range a.RuntimeEvents {
		n += 2*lengths + len(a.RuntimeEvents[i].Name) + len(a.RuntimeEvents[i].Payload)
	}
	return n
}

func appendScaleBytes(b, v []byte) []byte { return append(appendCompact(b, len(v)), v...) }

// appendCompact writes a SCALE compact integer below 2^30, which bounds everything
// an attestation can hold.
func appendCompact(b []byte, n int) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n)<<2)
	case n < 1<<14:
		return binary.LittleEndian.AppendUint16(b, uint16(n)<<2|1)
	}
	return binary.LittleEndian.AppendUint32(b, uint32(n)<<2|2)
}

var errScaleShort = errors.New("it ends in the middle of a value")

// scaleReader reads SCALE. After an error it reads zero values and keeps the error.
type scaleReader struct {
	b   []byte
	err error
}

func (r *scaleReader) fail(err error) {
	if r.err == nil {
		r.err, r.b = err, nil
	}
}

func (r *scaleReader) take(n int) []byte {
	if n > len(r.b) {
		r.fail(errScaleShort)
		return nil
	}
	part := r.b[:n:n]
	r.b = r.b[n:]
	return part
}

func (r *scaleReader) uint32() uint32 {
	if part := r.take(4); part != nil {
		return binary.LittleEndian.Uint32(part)
	}
	return 0
}

// compact reads a length in its shortest form, as SCALE demands. It is checked
// against what is left, so that nothing is allocated for a length that cannot be true.
func (r *scaleReader) compact(unit int) int {
	if len(r.b) == 0 {
		r.fail(errScaleShort)
		return 0
	}
	var n int
	switch r.b[0] & 3 {
	case 0:
		n = int(r.take(1)[0]) >> 2
	case 1:
		if part := r.take(2); part != nil {
			n = int(binary.LittleEndian.Uint16(part)) >> 2
		}
		if n < 1<<6 {
			r.fail(errors.New("a length is not in its shortest form"))
		}
	case 2:
		n = int(r.uint32() >> 2)
		if n < 1<<14 {
			r.fail(errors.New("a length is not in its shortest form"))
		}
	default:
		r.fail(errors.New("a length is larger than any attestation"))
	}
	if n*unit > len(r.b) {
		r.fail(fmt.Errorf("a length says %d, but only %d bytes are left", n, len(r.b)))
		return 0
	}
	return n
}

// count reads how many events follow, each of at least unit bytes.
func (r *scaleReader) count(unit int) int {
	n := r.compact(unit)
	if n > maxAttestationEvents {
		r.fail(fmt.Errorf("%d events, want at most %d", n, maxAttestationEvents))
		return 0
	}
	return n
}

func (r *scaleReader) bytes() []byte { return r.take(r.compact(1)) }

func (r *scaleReader) text() string {
	s := string(r.bytes())
	if !utf8.ValidString(s) {
		r.fail(errors.New("a text is not UTF-8"))
	}
	return s
}

func parseV0(b []byte) (*Attestation, error) {
	r := &scaleReader{b: b[1:]}
	platform := r.take(1)
	if platform == nil {
		return nil, r.err
	}
	if p := int(platform[0]); p >= len(scalePlatforms) {
		return nil, &PlatformError{fmt.Sprintf("number %d", p)}
	} else if p != 0 {
		return nil, &PlatformError{scalePlatforms[p]}
	}
	a := &Attestation{Version: AttestationV0, Stack: stackDstack}
	a.Quote = r.bytes()
	for range r.count(11) { // the shortest event has 11 bytes
		a.Events = append(a.Events, r.event())
		if r.err != nil {
			return nil, fmt.Errorf("event %d: %w", len(a.Events)-1, r.err)
		}
	}
	for range r.count(2) {
		e, err := NewRuntimeEvent(r.text(), r.bytes(), EventV1)
		if err = errors.Join(r.err, err); err != nil {
			return nil, fmt.Errorf("runtime event %d: %w", len(a.RuntimeEvents), err)
		}
		a.RuntimeEvents = append(a.RuntimeEvents, e)
	}
	copy(a.ReportData[:], r.take(len(a.ReportData)))
	a.VMConfig = r.text()
	if len(r.b) > 0 {
		r.fail(fmt.Errorf("%d bytes follow it", len(r.b)))
	}
	if r.err != nil {
		return nil, r.err
	}
	return a, nil
}

func (r *scaleReader) event() Event {
	imr := r.uint32()
	e := Event{Type: r.uint32()}
	digest := r.bytes()
	e.Name, e.Payload = r.text(), r.bytes()
	if r.err != nil {
		return e
	}
	if imr > 3 {
		r.fail(fmt.Errorf("imr is %d, want 0 to 3", imr))
		return e
	}
	e.IMR = int(imr)
	e, err := completeEvent(e, digest, nil)
	if err != nil {
		r.fail(err)
	}
	return e
}
