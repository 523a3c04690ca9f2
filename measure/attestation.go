package measure

import (
	"crypto/sha512"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

// maxAttestationSize is dstack's own bound. An event can be as short as three bytes
// in the blob and is a hundred in memory, so each list is bounded as a log is.
const (
	maxAttestationSize   = 10 << 20
	maxAttestationEvents = maxEventLogEvents
)

// The stacks of dstack that attestations come from.
const (
	stackDstack = "dstack"
	stackPod    = "dstack-pod"
)

// The encodings of a versioned attestation.
const (
	AttestationV0 = 0 // SCALE
	AttestationV1 = 1 // MessagePack; knows version 2 events
)

// Attestation is dstack's versioned attestation: Evidence in one blob, as Attest
// answers with it and as certificates carry it. All of it is untrusted; that
// ReportData is the quote's is for the verifier to check.
type Attestation struct {
	Version int // AttestationV0 or AttestationV1
	Quote   []byte
	Events  []Event // the whole log, or what a certificate keeps of it
	// RuntimeEvents are the RTMR3 events, which stand in the blob a second time.
	// They must replay to the quote's RTMR3; Events need not be complete.
	RuntimeEvents []Event
	ReportData    ReportData
	VMConfig      string // "config" in the blob
	Stack         string // "dstack" or "dstack-pod"; version 0 knows the first only
	// Payload is the text that report data was made from: not nil for dstack-pod, nil
	// otherwise. That it gives ReportData is for the verifier to check.
	Payload []byte
}

// check demands what both directions do: lists within bounds, text that is UTF-8, and
// a payload for dstack-pod alone.
func (a *Attestation) check() error {
	if n := max(len(a.Events), len(a.RuntimeEvents)); n > maxAttestationEvents {
		return fmt.Errorf("%d events, want at most %d", n, maxAttestationEvents)
	}
	if !utf8.ValidString(a.VMConfig) || !utf8.Valid(a.Payload) {
		return errors.New("config or report_data_payload is not UTF-8")
	}
	switch {
	case a.Stack != stackDstack && a.Stack != stackPod:
		return fmt.Errorf("stack is %q, want %s or %s", a.Stack, stackDstack, stackPod)
	case a.Stack == stackDstack && a.Payload != nil:
		return fmt.Errorf("stack %s has a report_data_payload, which is for %s", stackDstack, stackPod)
	case a.Stack == stackPod && a.Payload == nil:
		return fmt.Errorf("stack %s has no report_data_payload", stackPod)
	}
	return nil
}

// PlatformError says that an attestation is of another platform than TDX.
type PlatformError struct{ Platform string }

func (e *PlatformError) Error() string {
	return fmt.Sprintf("attestation is of platform %q, want tdx", e.Platform)
}

// NewAttestation returns the attestation that carries ev, in version 0 unless an
// event needs version 1.
func NewAttestation(ev *Evidence, rd ReportData) *Attestation {
	a := &Attestation{Version: AttestationV0, Quote: ev.Quote, Events: ev.Events, ReportData: rd, VMConfig: ev.VMConfig, Stack: stackDstack}
	n := 0
	for i := range ev.Events {
		if ev.Events[i].IsRuntime() {
			n++
		}
	}
	a.RuntimeEvents = slices.Grow(a.RuntimeEvents, n)
	for i := range ev.Events {
		e := &ev.Events[i]
		if !e.IsRuntime() {
			continue
		}
		a.RuntimeEvents = append(a.RuntimeEvents, *e)
		if e.Version == EventV2 {
			a.Version = AttestationV1
		}
	}
	return a
}

// EncodeAttestation is the bytes of [NewAttestation].
func EncodeAttestation(ev *Evidence, rd ReportData) ([]byte, error) {
	return NewAttestation(ev, rd).Marshal()
}

// Evidence returns the attestation's content as Evidence. What stands in an
// attestation twice must agree, or it is an error: the RTMR3 events of the two lists,
// of which dstack replays one and shows the other; the report data and the quote's;
// and with dstack-pod the text that report data were made from.
func (a *Attestation) Evidence() (*Evidence, error) {
	var runtime []Event
	for i := range a.Events {
		if a.Events[i].IMR == RTMR3 {
			runtime = append(runtime, a.Events[i])
		}
	}
	if len(runtime) != len(a.RuntimeEvents) {
		return nil, fmt.Errorf("attestation: %d events of RTMR3 in one list, %d in the other", len(runtime), len(a.RuntimeEvents))
	}
	for i := range runtime {
		if runtime[i].Digest != a.RuntimeEvents[i].Digest || !runtime[i].IsRuntime() {
			return nil, fmt.Errorf("attestation: event %d of RTMR3, %q, is %q in the other list", i, runtime[i].Name, a.RuntimeEvents[i].Name)
		}
	}
	q, err := ParseQuote(a.Quote)
	if err != nil {
		return nil, fmt.Errorf("attestation: %w", err)
	}
	if subtle.ConstantTimeCompare(q.Body.ReportData[:], a.ReportData[:]) != 1 {
		return nil, fmt.Errorf("attestation: report data is %s, but the quote's is %s", a.ReportData, q.Body.ReportData)
	}
	if want := sha512.Sum512(append([]byte("app-data:"), a.Payload...)); a.Payload != nil && want != a.ReportData {
		return nil, fmt.Errorf("attestation: report_data_payload gives the report data %x, but the quote's is %s", want, a.ReportData)
	}
	return &Evidence{Quote: a.Quote, Events: a.Events, VMConfig: a.VMConfig}, nil
}

// Marshal encodes the attestation in its version. It is an error if a list has more
// than 4096 events, or if the version cannot carry what the attestation holds.
func (a *Attestation) Marshal() ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, fmt.Errorf("attestation: %w", err)
	}
	switch a.Version {
	case AttestationV0:
		if a.Stack != stackDstack {
			return nil, fmt.Errorf("attestation version 0 cannot carry stack %q", a.Stack)
		}
		v2 := func(e Event) bool { return e.IsRuntime() && e.Version == EventV2 }
		if slices.ContainsFunc(a.Events, v2) || slices.ContainsFunc(a.RuntimeEvents, v2) {
			return nil, fmt.Errorf("attestation version 0 cannot carry version 2 events")
		}
		return a.appendV0(make([]byte, 0, a.sizeV0())), nil
	case AttestationV1:
		return a.marshalV1()
	}
	return nil, fmt.Errorf("attestation version is %d, want 0 or 1", a.Version)
}

// ParseAttestation parses either version, of at most 10 MiB and 4096 events in each
// list, and demands that every byte belongs to it. Runtime events' digests are computed where they are blank and
// must be right where they are not. Another platform is a [*PlatformError].
func ParseAttestation(b []byte) (*Attestation, error) {
	if len(b) > maxAttestationSize {
		return nil, fmt.Errorf("attestation has %d bytes, want at most %d", len(b), maxAttestationSize)
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("attestation is empty")
	}
	var a *Attestation
	var err error
	switch c := b[0]; {
	case c == 0:
		a, err = parseV0(b)
	case c >= 0x80 && c <= 0x8f, c == 0xde, c == 0xdf: // a MessagePack map
		a, err = parseV1(b)
	default:
		return nil, fmt.Errorf("attestation starts with %#x, want 0 (SCALE) or a MessagePack map", c)
	}
	if err == nil {
		err = a.check()
	}
	if err != nil {
		return nil, fmt.Errorf("attestation: %w", err)
	}
	return a, nil
}
