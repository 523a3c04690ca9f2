package measure

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"time"
)

// Record is one line of the RTMR3 log: an event, and the register's value before
// and after it.
type Record struct {
	Seq     int       `json:"seq"` // 1 for the first event of the boot
	Time    time.Time `json:"time"`
	Name    string    `json:"name"`
	Payload string    `json:"payload"`           // lowercase hexadecimal
	Version int       `json:"version,omitempty"` // EventV2; absent means EventV1
	Digest  Digest    `json:"digest"`
	Prev    Digest    `json:"prev"`
	Next    Digest    `json:"next"`
	Caller  string    `json:"caller,omitempty"`
	Key     string    `json:"key,omitempty"`   // idempotency key
	Owner   string    `json:"owner,omitempty"` // whose part of the log it takes

	end     int64  // where its line ends in the file
	size    int    // of its event in the JSON form of the log
	payload []byte // Payload decoded, in a record of a Ledger
}

func newRecord(seq int, e Event, prev Digest) Record {
	r := Record{Seq: seq, Name: e.Name, Payload: hex.EncodeToString(e.Payload), Digest: e.Digest, Prev: prev, Next: prev.Extend(e.Digest)}
	if e.Version == EventV2 {
		r.Version = EventV2
	}
	return r
}

func (r *Record) version() int { return max(r.Version, EventV1) }

// event returns what was extended. The payload was checked when the record was read.
func (r *Record) event() Event {
	payload := r.payload
	if payload == nil {
		payload, _ = hex.DecodeString(r.Payload)
	}
	return Event{IMR: RTMR3, Type: RuntimeEventType, Digest: r.Digest, Name: r.Name, Payload: payload, Version: r.version()}
}

// eventSize bounds what the event adds to the JSON form of the log.
func eventSize(e Event) int {
	b, err := FormatEventLog([]Event{e}, false)
	if err != nil {
		return 2*len(e.Payload) + 6*len(e.Name) + 512
	}
	return len(b)
}

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// line is the stored form: CRC-32C of the JSON in eight hexadecimal digits, a
// space, the JSON, a newline. It is what tells a torn line from a whole one.
func (r *Record) line() ([]byte, error) {
	doc, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	b := fmt.Appendf(make([]byte, 0, len(doc)+10), "%08x ", crc32.Checksum(doc, crcTable))
	return append(append(b, doc...), '\n'), nil
}

// parseLine is the inverse of line, for a line without its newline, and checks that
// the record continues the chain.
func parseLine(b []byte, seq int, prev Digest) (Record, error) {
	var r Record
	if len(b) < 9 || b[8] != ' ' {
		return r, fmt.Errorf("record %d has no checksum", seq)
	}
	doc := b[9:]
	if want := fmt.Sprintf("%08x", crc32.Checksum(doc, crcTable)); string(b[:8]) != want {
		return r, fmt.Errorf("record %d: checksum is %q, its content gives %s", seq, b[:8], want)
	}
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields()
	err := dec.Decode(&r)
	if err != nil {
		return r, fmt.Errorf("record %d: %v", seq, err)
	}
	if r.payload, err = hex.DecodeString(r.Payload); err != nil {
		return r, fmt.Errorf("record %d: payload: %v", seq, err)
	}
	e, err := NewRuntimeEvent(r.Name, r.payload, r.version())
	if err != nil {
		return r, fmt.Errorf("record %d: %v", seq, err)
	}
	if want := newRecord(seq, e, prev); r.Seq != seq || r.Digest != want.Digest || r.Prev != want.Prev || r.Next != want.Next {
		return r, fmt.Errorf("record %d (%q) does not continue the log: got number %d, prev %s; want %s", seq, r.Name, r.Seq, r.Prev, prev)
	}
	return r, nil
}

// parseRecords reads a whole log. good is the length of the whole records at its
// beginning. What follows is either a torn last record, which is to be dropped, or
// damage, which is an error: a record that others were written after was once whole.
func parseRecords(b []byte) (records []Record, good int, err error) {
	var prev Digest
	for good < len(b) {
		end := bytes.IndexByte(b[good:], '\n')
		if end < 0 {
			return records, good, nil
		}
		r, err := parseLine(b[good:good+end], len(records)+1, prev)
		if err != nil {
			if good+end+1 == len(b) {
				return records, good, nil
			}
			return records, good, err
		}
		good += end + 1
		r.end = int64(good)
		records, prev = append(records, r), r.Next
	}
	return records, good, nil
}
