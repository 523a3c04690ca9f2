package measure_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vmihailenco/msgpack/v5"

	"tdx-agent/measure"
)

func someAttestation(tb testing.TB, version int) *measure.Attestation {
	tb.Helper()
	events := someEvents(tb)
	if version == measure.AttestationV0 {
		events = slices.DeleteFunc(events, func(e measure.Event) bool { return e.Version == measure.EventV2 })
	}
	return measure.NewAttestation(&measure.Evidence{Quote: bytes.Repeat([]byte{4, 0xff, 0}, 40), Events: events, VMConfig: `{"cpu_count":1}`}, measure.ReportData{1, 2})
}

func TestAttestationRoundTrip(t *testing.T) {
	for _, version := range []int{measure.AttestationV0, measure.AttestationV1} {
		a := someAttestation(t, version)
		if a.Version != version {
			t.Fatalf("version is %d, want %d", a.Version, version)
		}
		b, err := a.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := measure.ParseAttestation(b)
		if err != nil {
			t.Fatalf("version %d: %v", version, err)
		}
		if diff := cmp.Diff(a, got, sameEvents); diff != "" {
			t.Errorf("version %d, written and read again:\n%s", version, diff)
		}
		for n := range b {
			if _, err := measure.ParseAttestation(b[:n]); err == nil {
				t.Fatalf("version %d cut to %d of %d bytes is accepted", version, n, len(b))
			}
		}
		if _, err := measure.ParseAttestation(append(b[:len(b):len(b)], 0)); err == nil {
			t.Errorf("version %d: a trailing byte is accepted", version)
		}
	}
}

// TestAttestationV0Bytes is the layout, written by hand.
func TestAttestationV0Bytes(t *testing.T) {
	e, err := measure.NewRuntimeEvent("n", []byte{0xaa}, measure.EventV1)
	if err != nil {
		t.Fatal(err)
	}
	a := measure.NewAttestation(&measure.Evidence{Quote: []byte{1, 2, 3}, Events: []measure.Event{e}, VMConfig: "{}"}, measure.ReportData{9})
	got, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	want := "0000" + "0c010203" + "04" + "03000000" + "01000008" + "c0" + e.Digest.String() + "046e" + "04aa" + "04" + "046e" + "04aa" +
		"09" + strings.Repeat("00", 63) + "087b7d"
	if hex.EncodeToString(got) != want {
		t.Errorf("got  %x\nwant %s", got, want)
	}
}

// TestAttestationV1Form reads what we write with a general decoder.
func TestAttestationV1Form(t *testing.T) {
	a := someAttestation(t, measure.AttestationV1)
	b, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := msgpack.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	data := m["platform"].(map[string]any)["data"].(map[string]any)
	if q := data["quote"].([]any); len(q) != len(a.Quote) {
		t.Errorf("quote is an array of %d, want %d integers", len(q), len(a.Quote))
	}
	last := data["event_log"].([]any)[len(a.Events)-2].(map[string]any) // the version 2 event
	if _, ok := last["digest"].([]byte); !ok || last["event"] != a.Events[len(a.Events)-2].Name || last["version"] == nil || last["preimage"] == nil {
		t.Errorf("event is %v", last)
	}
	stack := m["stack"].(map[string]any)
	if stack["kind"] != "dstack" || stack["data"].(map[string]any)["config"] != a.VMConfig {
		t.Errorf("stack is %v", stack)
	}
}

func TestAttestationIsRefused(t *testing.T) {
	v0, err := someAttestation(t, 0).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	pack := func(edit func(m map[string]any)) []byte {
		b, err := someAttestation(t, 1).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := msgpack.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		edit(m)
		var buf bytes.Buffer
		enc := msgpack.NewEncoder(&buf)
		enc.UseCompactInts(true)
		if err := enc.Encode(m); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	platform := func(m map[string]any) map[string]any { return m["platform"].(map[string]any) }
	stack := func(m map[string]any) map[string]any { return m["stack"].(map[string]any)["data"].(map[string]any) }
	for _, tc := range []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "empty"},
		{"text", []byte("{}"), "starts with"},
		{"another platform", append([]byte{0, 3}, v0[2:]...), `platform "sev-snp"`},
		{"unknown platform", append([]byte{0, 77}, v0[2:]...), `platform "number 77"`},
		{"quote of 1 GiB", []byte{0, 0, 0xfe, 0xff, 0xff, 0xff}, "bytes are left"},
		{"length with more than four bytes", []byte{0, 0, 0x03, 0, 0, 0, 1}, "larger than any"},
		{"length not in its shortest form", append([]byte{0, 0, 0x01, 0x00}, v0[2:]...), "shortest form"},
		{"version 2", pack(func(m map[string]any) { m["version"] = uint8(2) }), "version"},
		{"unknown member", pack(func(m map[string]any) { m["more"] = 1 }), "unknown member"},
		{"missing member", pack(func(m map[string]any) { delete(m, "stack") }), "missing"},
		{"nil", pack(func(m map[string]any) { m["platform"] = nil }), "platform"},
		{"snp", pack(func(m map[string]any) { platform(m)["kind"] = "snp" }), "kind"},
		{"number above a byte", pack(func(m map[string]any) { platform(m)["data"].(map[string]any)["quote"] = []any{uint16(256)} }), "quote"},
		{"text for bytes", pack(func(m map[string]any) { platform(m)["data"].(map[string]any)["quote"] = "x" }), "quote"},
		{"short report data", pack(func(m map[string]any) { stack(m)["report_data"] = []any{uint8(1)} }), "report_data"},
		{"duplicate member", []byte{0x82, 0xa7, 'v', 'e', 'r', 's', 'i', 'o', 'n', 1, 0xa7, 'v', 'e', 'r', 's', 'i', 'o', 'n', 1}, "twice"},
		{"config not UTF-8", pack(func(m map[string]any) { stack(m)["config"] = "\xff" }), "UTF-8"},
		{"another stack", pack(func(m map[string]any) { m["stack"].(map[string]any)["kind"] = "x" }), "stack"},
		{"payload without a pod", pack(func(m map[string]any) { stack(m)["report_data_payload"] = "x" }), "report_data_payload"},
		{"payload that is no text", pack(func(m map[string]any) { stack(m)["report_data_payload"] = []byte("x") }), "report_data_payload"},
		{"pod without a payload", pack(func(m map[string]any) { m["stack"].(map[string]any)["kind"] = "dstack-pod" }), "no report_data_payload"},
		{"too many runtime events", manyRuntimeEvents(1 << 14), "at most 4096"},
		{"too many runtime events in version 1", pack(func(m map[string]any) {
			one := map[string]any{"event": "x", "payload": []byte{}}
			stack(m)["runtime_events"] = slices.Repeat([]any{one}, 4097)
		}), "at most 4096"},
		{"map of 4 GiB", []byte{0xdf, 0xff, 0xff, 0xff, 0xff}, "bytes are left"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := measure.ParseAttestation(tc.b); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
	var platformErr *measure.PlatformError
	if _, err := measure.ParseAttestation(pack(func(m map[string]any) { platform(m)["kind"] = "snp" })); !errors.As(err, &platformErr) {
		t.Errorf("got %v, want a PlatformError", err)
	}
}

// manyRuntimeEvents is a version 0 attestation of nothing but n of the shortest events, 2^14 or more.
func manyRuntimeEvents(n uint32) []byte {
	b := binary.LittleEndian.AppendUint32([]byte{0, 0, 0, 0}, n<<2|2)
	b = append(b, bytes.Repeat([]byte{4, 'x', 0}, int(n))...)
	return append(b, make([]byte, 65)...)
}

// TestAttestationOfSmallEvents: what is refused for its count costs no memory first.
func TestAttestationOfSmallEvents(t *testing.T) {
	b := manyRuntimeEvents(3 << 20)
	if got := allocated(func() {
		if _, err := measure.ParseAttestation(b); err == nil {
			t.Error("accepted")
		}
	}); got > uint64(len(b)) {
		t.Errorf("%d bytes made the parser allocate %d", len(b), got)
	}
}

// TestAttestationOfPod carries the text that report data was made from.
func TestAttestationOfPod(t *testing.T) {
	for _, payload := range []string{"", `{"hello":"wörld"}`} {
		a := someAttestation(t, measure.AttestationV1)
		a.Stack, a.Payload = "dstack-pod", []byte(payload)
		b, err := a.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := measure.ParseAttestation(b)
		if err != nil || got.Stack != a.Stack || got.Payload == nil || string(got.Payload) != payload {
			t.Errorf("payload %q comes back as %+v (%v)", payload, got, err)
		}
	}
}

// TestAttestationIsNotWritten: nothing is written that would not be read.
func TestAttestationIsNotWritten(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		edit       func(a *measure.Attestation)
	}{
		{"version 2", "want 0 or 1", func(a *measure.Attestation) { a.Version = 2 }},
		{"version 2 event in version 0", "version 2 events", func(a *measure.Attestation) { a.Version = 0 }},
		{"version 2 event in the log alone", "version 2 events", func(a *measure.Attestation) { a.Version, a.RuntimeEvents = 0, nil }},
		{"pod in version 0", "cannot carry stack", func(a *measure.Attestation) {
			*a = *someAttestation(t, 0)
			a.Stack, a.Payload = "dstack-pod", []byte("x")
		}},
		{"no stack", "stack is", func(a *measure.Attestation) { a.Stack = "" }},
		{"payload without a pod", "is for dstack-pod", func(a *measure.Attestation) { a.Payload = []byte("x") }},
		{"pod without a payload", "no report_data_payload", func(a *measure.Attestation) { a.Stack = "dstack-pod" }},
		{"config not UTF-8", "UTF-8", func(a *measure.Attestation) { a.VMConfig = "\xff" }},
		{"too many events", "at most 4096", func(a *measure.Attestation) { a.Events = make([]measure.Event, 4097) }},
	} {
		a := someAttestation(t, measure.AttestationV1)
		tc.edit(a)
		if b, err := a.Marshal(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %d bytes and %v, want %q in the error", tc.name, len(b), err, tc.want)
		}
	}
}

// TestEncodeAttestation gives back the Evidence, in the version that its events need.
func TestEncodeAttestation(t *testing.T) {
	for _, version := range []int{measure.AttestationV0, measure.AttestationV1} {
		want := someAttestation(t, version)
		b, err := measure.EncodeAttestation(contents(want), want.ReportData)
		if err != nil {
			t.Fatal(err)
		}
		got, err := measure.ParseAttestation(b)
		if err != nil || got.Version != version || got.ReportData != want.ReportData {
			t.Fatalf("got %+v (%v), want version %d", got, err, version)
		}
		if diff := cmp.Diff(contents(want), contents(got), sameEvents); diff != "" {
			t.Error(diff)
		}
	}
}

// contents is Evidence of what stands in an attestation, agreeing or not.
func contents(a *measure.Attestation) *measure.Evidence {
	return &measure.Evidence{Quote: a.Quote, Events: a.Events, VMConfig: a.VMConfig}
}

// TestAttestationEvidence demands that what an attestation holds twice agrees.
func TestAttestationEvidence(t *testing.T) {
	real := func(t *testing.T) *measure.Attestation {
		a := someAttestation(t, measure.AttestationV1)
		a.Quote = simulatedQuotes(t)["v4"]
		q, err := measure.ParseQuote(a.Quote)
		if err != nil {
			t.Fatal(err)
		}
		a.ReportData = q.Body.ReportData
		return a
	}
	if ev, err := real(t).Evidence(); err != nil || len(ev.Events) == 0 || len(ev.Quote) == 0 {
		t.Fatalf("an honest attestation: %v", err)
	}
	for name, tc := range map[string]struct {
		want string
		edit func(*measure.Attestation)
	}{
		"fewer in one list":   {"in the other", func(a *measure.Attestation) { a.RuntimeEvents = a.RuntimeEvents[1:] }},
		"another event":       {"in the other list", func(a *measure.Attestation) { a.RuntimeEvents[0].Digest[0] ^= 1 }},
		"another report data": {"report data is", func(a *measure.Attestation) { a.ReportData[63] ^= 1 }},
		"another payload":     {"report_data_payload", func(a *measure.Attestation) { a.Stack, a.Payload = "dstack-pod", []byte("x") }},
		"no quote":            {"attestation", func(a *measure.Attestation) { a.Quote = nil }},
		"an event of no type": {"in the other list", func(a *measure.Attestation) { retype(a) }},
	} {
		a := real(t)
		tc.edit(a)
		if _, err := a.Evidence(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %q in the error", name, err, tc.want)
		}
	}
}

// retype makes the first RTMR3 event of the list that is shown one of another type.
func retype(a *measure.Attestation) {
	for i := range a.Events {
		if a.Events[i].IMR == measure.RTMR3 {
			a.Events[i].Type = 1
			return
		}
	}
}

// TestRealAttestations reads the real SCALE envelopes and writes them back: byte for
// byte, or where their digests are blank, with these filled.
func TestRealAttestations(t *testing.T) {
	seen := 0
	for _, f := range fixtures(t) {
		if f.Expect.RuntimeList == nil && f.Expect.Inner == nil {
			continue
		}
		seen++
		t.Run(f.ID, func(t *testing.T) { checkAttestation(t, &f) })
	}
	if seen != 2 {
		t.Errorf("%d attestations, want 2", seen)
	}
}

func checkAttestation(t *testing.T, f *fixture) {
	a := f.attestation(t)
	q, err := measure.ParseQuote(a.Quote)
	if err != nil {
		t.Fatal(err)
	}
	rtmr, err := measure.Replay(a.RuntimeEvents)
	if err != nil || rtmr[measure.RTMR3] != q.Body.RTMR[measure.RTMR3] || a.ReportData != q.Body.ReportData {
		t.Errorf("runtime events replay to %s, report data %s (%v)", rtmr[measure.RTMR3], a.ReportData, err)
	}
	var names []string
	for _, e := range a.RuntimeEvents {
		names = append(names, e.Name)
	}
	if want := f.Expect.RuntimeList; want != nil && !slices.Equal(names, want) {
		t.Errorf("runtime events are %q, want %q", names, want)
	}
	if inner := f.Expect.Inner; inner != nil {
		if rtmr, err := measure.Replay(a.Events); err != nil || rtmr != q.Body.RTMR || len(a.Events) != inner.Events {
			t.Errorf("%d events replay to %v (%v), want %d and the quote's", len(a.Events), rtmr, err, inner.Events)
		}
		if !bytes.Equal(a.Quote, f.quote(t)) {
			t.Error("the quote inside is not the one beside it")
		}
	}
	if _, err := a.Evidence(); err != nil {
		t.Error(err)
	}
	b, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := measure.ParseAttestation(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, again, sameEvents); diff != "" {
		t.Errorf("written and read again:\n%s", diff)
	}
	raw, err := hex.DecodeString(text(t, member(t, f.raw, "attestation")))
	if err != nil {
		t.Fatal(err)
	}
	blank := len(raw) + len(measure.Digest{})*len(a.RuntimeEvents)
	if !bytes.Equal(b, raw) && len(b) != blank {
		t.Errorf("%d bytes are written back as %d, want the same bytes or %d", len(raw), len(b), blank)
	}
}

// FuzzParseAttestation: what is read is written so that it reads the same.
func FuzzParseAttestation(f *testing.F) {
	for _, version := range []int{0, 1} {
		b, err := someAttestation(f, version).Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := measure.ParseAttestation(b)
		if err != nil {
			return
		}
		out, err := a.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := measure.ParseAttestation(out)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(a, again, sameEvents); diff != "" {
			t.Error(diff)
		}
		// Version 0 has one form. Only a digest that was blank makes it longer.
		if a.Version == measure.AttestationV0 && (len(out) < len(b) || len(out) == len(b) && !bytes.Equal(out, b)) {
			t.Errorf("%x is written back as %x", b, out)
		}
	})
}
