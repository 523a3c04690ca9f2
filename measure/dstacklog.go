package measure

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
)

// The caps of a log that dstack's own tools wrote.
const (
	maxDstackLog       = 1 << 20
	maxDstackLogEvents = 512
)

// TornLineError says that a log ends in a line that was not written to its end, as
// after a crash. dstack writes the line before it extends the register, so whether
// the event was measured can only be told from the register.
type TornLineError struct {
	Line int // from 1
	Err  error
}

func (e *TornLineError) Error() string {
	return fmt.Sprintf("line %d, the last one, is cut off: %v", e.Line, e.Err)
}

// ReadDstackLog reads the runtime event log of dstack's own tools below dir, which
// is /run/log on a dstack system: dstack/runtime_events.log, whose format
// dstack/runtime_event_version pins (missing: EventV1), or tdx_mr3/tdx_events.log of
// 0.5.5 and before. It is an error if both are there; if neither is, the error
// satisfies errors.Is(err, fs.ErrNotExist). For what the events are worth and for
// *TornLineError see [ParseDstackLog].
func ReadDstackLog(dir string) ([]Event, error) {
	path := filepath.Join(dir, "dstack", "runtime_events.log")
	oldPath := filepath.Join(dir, "tdx_mr3", "tdx_events.log")
	version := EventV1
	b, err := ReadGuestFile(path, maxDstackLog)
	old, oldErr := ReadGuestFile(oldPath, maxDstackLog)
	switch {
	case err == nil && !errors.Is(oldErr, fs.ErrNotExist):
		return nil, fmt.Errorf("%s and %s are both there: remove the one that does not give RTMR3", path, oldPath)
	case err == nil:
		version, err = readDstackLogVersion(filepath.Join(dir, "dstack", "runtime_event_version"))
	case errors.Is(err, fs.ErrNotExist):
		path, b, err = oldPath, old, oldErr
	}
	if err != nil {
		return nil, err
	}
	events, err := ParseDstackLog(b, version)
	if err != nil {
		return events, fmt.Errorf("%s: %w", path, err)
	}
	return events, nil
}

func readDstackLogVersion(path string) (int, error) {
	b, err := ReadGuestFile(path, 16)
	if errors.Is(err, fs.ErrNotExist) {
		return EventV1, nil
	}
	if err != nil {
		return 0, err
	}
	switch strings.TrimSpace(string(b)) {
	case "1":
		return EventV1, nil
	case "2":
		return EventV2, nil
	}
	return 0, fmt.Errorf("%s: %q, want 1 or 2", path, b)
}

// ParseDstackLog parses dstack's own runtime event log: one JSON object a line,
// either {event, payload (base64), version} (0.5.6 and later) or a whole event
// {imr, event_type, digest, event, event_payload (hex), ...} (before), never both in
// one log. Every event must be of the given digest version and have the digest that
// its name and payload give; digests that the log lacks are computed. At most 512
// events and 1 MiB. Nothing of it is trusted until it replays to RTMR3.
//
// If only the last line is cut off (no newline, not valid JSON), the events before
// it are returned together with a *TornLineError.
func ParseDstackLog(b []byte, version int) ([]Event, error) {
	if len(b) > maxDstackLog {
		return nil, fmt.Errorf("log has %d bytes, want at most %d", len(b), maxDstackLog)
	}
	var events []Event
	var form dstackLogForm
	for n := 1; len(b) > 0; n++ {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		b = rest
		if !whole && !json.Valid(line) {
			return events, &TornLineError{n, errors.New("no newline, and not valid JSON")}
		}
		if len(events) == maxDstackLogEvents {
			return nil, fmt.Errorf("log has more than %d events", maxDstackLogEvents)
		}
		e, f, err := parseDstackLine(line, version)
		if err == nil && n > 1 && f != form {
			err = errors.New("has another form than the lines before it")
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %v", n, err)
		}
		form = f
		events = append(events, e)
	}
	return events, nil
}

type dstackLogForm int

const (
	dstackLogShort dstackLogForm = iota // 0.5.6 and later
	dstackLogFull                       // 0.5.5 and before
)

func parseDstackLine(line []byte, version int) (Event, dstackLogForm, error) {
	o, err := parseGuestObject(line)
	if err != nil {
		return Event{}, 0, err
	}
	form, known := dstackLogShort, "event payload version"
	if _, ok := o["event_payload"]; ok {
		form, known = dstackLogFull, "imr event_type digest event event_payload version preimage"
	}
	for name := range o {
		if strings.Contains(name, " ") || !strings.Contains(" "+known+" ", " "+name+" ") {
			return Event{}, 0, fmt.Errorf("unknown member %q", name)
		}
	}
	got := EventV1
	if err := o.optional("version", &got); err != nil {
		return Event{}, 0, err
	}
	if got != version {
		return Event{}, 0, fmt.Errorf("event of version %d in a log of version %d", got, version)
	}
	var name string
	if err := o.member("event", &name); err != nil {
		return Event{}, 0, err
	}
	payload, err := dstackLinePayload(o, form)
	if err != nil {
		return Event{}, 0, err
	}
	e, err := NewRuntimeEvent(name, payload, version)
	if err == nil && form == dstackLogFull {
		err = checkDstackFullLine(o, &e)
	}
	return e, form, err
}

func dstackLinePayload(o guestObject, form dstackLogForm) ([]byte, error) {
	var s string
	if form == dstackLogFull {
		if err := o.member("event_payload", &s); err != nil {
			return nil, err
		}
		p, err := hex.DecodeString(s)
		if err != nil {
			return nil, fmt.Errorf("event_payload: %v", err)
		}
		return p, nil
	}
	if err := o.member("payload", &s); err != nil {
		return nil, err
	}
	if strings.ContainsAny(s, "\r\n") { // which the decoder would skip
		return nil, errors.New("payload: line break in base64")
	}
	p, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("payload: %v", err)
	}
	return p, nil
}

// checkDstackFullLine compares what a full line says twice.
func checkDstackFullLine(o guestObject, e *Event) error {
	var imr, typ uint32
	if err := o.member("imr", &imr); err != nil {
		return err
	}
	if err := o.member("event_type", &typ); err != nil {
		return err
	}
	if imr != RTMR3 || typ != RuntimeEventType {
		return fmt.Errorf("event of register %d and type %#x, want %d and %#x", imr, typ, RTMR3, RuntimeEventType)
	}
	digest, err := o.hexMember("digest")
	if err != nil {
		return err
	}
	if len(digest) > 0 && !bytes.Equal(digest, e.Digest[:]) {
		return fmt.Errorf("event %q: digest is %x, but its name and payload give %s", e.Name, digest, e.Digest)
	}
	preimage, err := o.hexMember("preimage")
	if err != nil {
		return err
	}
	if len(preimage) > 0 && !bytes.Equal(preimage, e.Preimage()) {
		return fmt.Errorf("event %q: preimage does not follow from its name and payload", e.Name)
	}
	return nil
}
