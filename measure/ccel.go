package measure

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Bounds of a boot event log. Firmware gives the area 64 KiB or a few times that.
const (
	maxCCELSize   = 16 << 20
	maxCCELEvents = 4096
)

const (
	eventNoAction = 3      // EV_NO_ACTION: recorded, never extended
	algorithmSHA  = 0x000c // TPM_ALG_SHA384
)

// ParseCCEL parses the area that the ACPI table CCEL points to: a TCG2 crypto-agile
// event log (TCG PC Client Platform Firmware Profile, section 10) with one SHA-384
// digest an event, whose register indices 1 to 4 are RTMR0 to RTMR3 (UEFI 2.10,
// section 38.4.1). The log ends with the area or where its padding begins. What was
// not extended (EV_NO_ACTION, index 0) is left out. At most 16 MiB and 4096 events.
//
// The log is the firmware's word: it proves something only when it replays to the
// RTMRs of a verified quote, and then only the digests are proved.
func ParseCCEL(b []byte) ([]Event, error) {
	if len(b) > maxCCELSize {
		return nil, fmt.Errorf("CCEL has %d bytes, want at most %d", len(b), maxCCELSize)
	}
	r := &ccelReader{b: b}
	if err := r.header(); err != nil {
		return nil, fmt.Errorf("CCEL header: %w", err)
	}
	var events []Event
	for n := 0; !r.padding(); n++ {
		if n >= maxCCELEvents {
			return nil, fmt.Errorf("CCEL has more than %d events", maxCCELEvents)
		}
		e, err := r.event()
		if err != nil {
			return nil, fmt.Errorf("CCEL event %d at byte %d: %w", n, r.at, err)
		}
		if e.IMR >= 0 && e.Type != eventNoAction {
			events = append(events, e)
		}
	}
	return events, nil
}

var errCCELShort = errors.New("the log ends in the middle of it")

// ccelReader reads little-endian fields; at is where it is.
type ccelReader struct {
	b  []byte
	at int
}

func (r *ccelReader) take(n uint64) ([]byte, error) {
	if n > uint64(len(r.b)-r.at) {
		return nil, errCCELShort
	}
	part := r.b[r.at : r.at+int(n)]
	r.at += int(n)
	return part, nil
}

func (r *ccelReader) uint32() (uint32, error) {
	part, err := r.take(4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(part), nil
}

// header reads the first event, which is in the old format and describes the rest.
func (r *ccelReader) header() error {
	fixed, err := r.take(28)
	if err != nil {
		return err
	}
	if t := binary.LittleEndian.Uint32(fixed[4:]); t != eventNoAction {
		return fmt.Errorf("event type is %d, want %d (EV_NO_ACTION)", t, eventNoAction)
	}
	size, err := r.uint32()
	if err != nil {
		return err
	}
	spec, err := r.take(uint64(size))
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(spec, []byte("Spec ID Event03\x00")) || len(spec) < 28 {
		return errors.New(`signature is not "Spec ID Event03"`)
	}
	algorithms := binary.LittleEndian.Uint32(spec[24:])
	if uint64(len(spec)) < 28+4*uint64(algorithms) {
		return fmt.Errorf("%d algorithms do not fit into %d bytes", algorithms, len(spec))
	}
	for i := range int(algorithms) {
		a := spec[28+4*i:]
		if binary.LittleEndian.Uint16(a) == algorithmSHA && binary.LittleEndian.Uint16(a[2:]) == uint16(len(Digest{})) {
			return nil
		}
	}
	return errors.New("the log does not use SHA-384")
}

// padding reports whether no event follows: the end, register index 0xffffffff or
// the part of it that the area has room for, or only zeros.
func (r *ccelReader) padding() bool {
	rest := r.b[r.at:]
	end := []byte{0xff, 0xff, 0xff, 0xff}
	n := min(len(rest), len(end))
	return bytes.Equal(rest[:n], end[:n]) || len(bytes.TrimLeft(rest, "\x00")) == 0
}

// event reads one TCG_PCR_EVENT2. IMR is -1 for register index 0, which is not an RTMR.
func (r *ccelReader) event() (Event, error) {
	fixed, err := r.take(12)
	if err != nil {
		return Event{}, err
	}
	index, count := binary.LittleEndian.Uint32(fixed), binary.LittleEndian.Uint32(fixed[8:])
	e := Event{IMR: int(index) - 1, Type: binary.LittleEndian.Uint32(fixed[4:])}
	if index > 4 {
		return e, fmt.Errorf("register index is %d, want 0 to 4", index)
	}
	if count != 1 {
		return e, fmt.Errorf("%d digests, want one", count)
	}
	digest, err := r.take(2 + uint64(len(e.Digest)))
	if err != nil {
		return e, err
	}
	if a := binary.LittleEndian.Uint16(digest); a != algorithmSHA {
		return e, fmt.Errorf("digest algorithm is %#x, want %#x (SHA-384)", a, algorithmSHA)
	}
	e.Digest = Digest(digest[2:])
	size, err := r.uint32()
	if err != nil {
		return e, err
	}
	data, err := r.take(uint64(size))
	e.Payload = bytes.Clone(data)
	return e, err
}
