package measure_test

import (
	"bytes"
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
	})
}
