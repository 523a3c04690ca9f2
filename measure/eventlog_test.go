package measure_test

import (
	"encoding/json"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gowebpki/jcs"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

func TestBadRuntimeEvents(t *testing.T) {
	for _, name := range []string{"", "\xff"} {
		if _, err := measure.NewRuntimeEvent(name, nil, 1); err == nil {
			t.Errorf("name %q is accepted", name)
		}
	}
	if _, err := measure.NewRuntimeEvent("x", nil, 3); err == nil {
		t.Error("version 3 is accepted")
	}
}

// TestPreimageIsRFC8785 holds our encoder to a library's, for names that need escapes.
func TestPreimageIsRFC8785(t *testing.T) {
	names := []string{"plain", `"\/`, "\b\f\n\r\t", "\x01\x1f\x7f", "grün", "\u2028\u2029", "𝄞", "</script>&", "a\x00b"}
	for _, name := range names {
		e, err := measure.NewRuntimeEvent(name, []byte{0xab}, measure.EventV2)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := json.Marshal(map[string]any{"type": 134217729, "payload": "ab", "name": name})
		if err != nil {
			t.Fatal(err)
		}
		want, err := jcs.Transform(doc)
		if err != nil {
			t.Fatal(err)
		}
		if got := e.Preimage(); string(got) != string(want) {
			t.Errorf("name %q: got %s, want %s", name, got, want)
		}
	}
}

// someEvents are a boot log and runtime events of both versions.
func someEvents(tb testing.TB) []measure.Event {
	tb.Helper()
	td, err := tdxsim.New(tb.TempDir(), tdxsim.Config{Seed: []byte("events")})
	if err != nil {
		tb.Fatal(err)
	}
	defer td.Close()
	events, err := measure.ParseCCEL(td.CCEL())
	if err != nil {
		tb.Fatal(err)
	}
	for i, name := range []string{"app-id", "ünïcode 𝄞 \"quoted\"", "compose-hash"} {
		e, err := measure.NewRuntimeEvent(name, []byte{byte(i)}, 1+i%2)
		if err != nil {
			tb.Fatal(err)
		}
		events = append(events, e)
	}
	return events
}

var sameEvents = cmp.Options{cmpopts.EquateEmpty()}

func TestEventLogRoundTrip(t *testing.T) {
	events := someEvents(t)
	b, err := measure.FormatEventLog(events, false)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range b {
		if c < 0x20 || c > 0x7e {
			t.Fatalf("byte %d is %#x, want ASCII only", i, c)
		}
	}
	quoted, err := json.Marshal(string(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, form := range [][]byte{b, quoted, []byte(" \n" + string(b) + "\n")} {
		got, err := measure.ParseEventLog(form)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(events, got, sameEvents); diff != "" {
			t.Errorf("written and read again:\n%s", diff)
		}
	}
}

func TestStrippedLog(t *testing.T) {
	events := someEvents(t)
	b, err := measure.FormatEventLog(events, true)
	if err != nil {
		t.Fatal(err)
	}
	got, err := measure.ParseEventLog(b)
	if err != nil {
		t.Fatal(err)
	}
	markers := 0
	for i, e := range got {
		switch {
		case e.Digest != events[i].Digest:
			t.Errorf("event %d has another digest", i)
		case e.IMR == measure.RTMR3 && !reflect.DeepEqual(e.Payload, events[i].Payload):
			t.Errorf("runtime event %d has lost its payload", i)
		case e.IMR != measure.RTMR3 && string(e.Payload) == "ACPI DATA":
			markers++
		case e.IMR != measure.RTMR3 && len(e.Payload) > 0:
			t.Errorf("boot event %d kept %x", i, e.Payload)
		}
	}
	if markers != 3 {
		t.Errorf("%d ACPI markers survive, want 3", markers)
	}
}

const ready = `{"imr":3,"event_type":134217729,"digest":"1a76b2a80a0be71eae59f80945d876351a7a3fb8e9fd1ff1cede5734aa84ea11fd72b4edfbb6f04e5a85edd114c751bd","event":"system-ready","event_payload":""}`

func TestEventLogAccepts(t *testing.T) {
	for name, doc := range map[string]string{
		"a good event":    ready,
		"a blank digest":  strings.Replace(ready, "1a76b2a80a0be71eae59f80945d876351a7a3fb8e9fd1ff1cede5734aa84ea11fd72b4edfbb6f04e5a85edd114c751bd", "", 1),
		"0x":              strings.Replace(ready, `"1a76`, `"0x0x1a76`, 1),
		"upper case":      strings.Replace(ready, "1a76b2a8", "1A76B2A8", 1),
		"unknown members": strings.Replace(ready, `"imr"`, `"more":[{"x":null}],"imr"`, 1),
	} {
		if events, err := measure.ParseEventLog([]byte("[" + doc + "]")); err != nil || events[0].Name != "system-ready" || events[0].Digest.IsZero() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEventLogIsRefused(t *testing.T) {
	for _, tc := range []struct{ name, doc, want string }{
		{"not an array", ready, "want a JSON array"},
		{"empty", "", "want a JSON array"},
		{"trailing data", "[" + ready + "]x", "follows the array"},
		{"two arrays", "[" + ready + "][]", "follows the array"},
		{"wrong digest", "[" + strings.Replace(ready, "1a76", "1a77", 1) + "]", "its name and payload give"},
		{"renamed event", "[" + strings.Replace(ready, "system-ready", "system-rEady", 1) + "]", "its name and payload give"},
		{"changed payload", "[" + strings.Replace(ready, `payload":""`, `payload":"00"`, 1) + "]", "its name and payload give"},
		{"wrong preimage", "[" + strings.Replace(ready, `{"imr"`, `{"preimage":"00","imr"`, 1) + "]", "preimage"},
		{"missing digest", "[" + strings.Replace(ready, `"digest"`, `"digits"`, 1) + "]", "digest is missing"},
		{"missing imr", "[" + strings.Replace(ready, `"imr"`, `"mri"`, 1) + "]", "imr is missing"},
		{"name in other case", "[" + strings.Replace(ready, `"imr"`, `"IMR"`, 1) + "]", "imr is missing"},
		{"duplicate member", "[" + strings.Replace(ready, `{`, `{"imr":3,`, 1) + "]", "twice"},
		{"register 4", "[" + strings.Replace(ready, `"imr":3`, `"imr":4`, 1) + "]", "want 0 to 3"},
		{"negative register", "[" + strings.Replace(ready, `"imr":3`, `"imr":-1`, 1) + "]", "imr"},
		{"boot event without digest", `[{"imr":0,"event_type":4,"digest":"","event":"","event_payload":""}]`, "digest of a boot event"},
		{"boot event with a short digest", `[{"imr":0,"event_type":4,"digest":"00","event":"","event_payload":""}]`, "digest of a boot event"},
		{"runtime type without digest in another register", `[{"imr":2,"event_type":134217729,"digest":"","event":"app-id","event_payload":""}]`, "digest of a boot event"},
		{"odd hexadecimal", "[" + strings.Replace(ready, `payload":""`, `payload":"0"`, 1) + "]", "event_payload"},
		{"no hexadecimal", "[" + strings.Replace(ready, `payload":""`, `payload":"zz"`, 1) + "]", "event_payload"},
		{"null", "[" + strings.Replace(ready, `payload":""`, `payload":null`, 1) + "]", "null"},
		{"digest version 3", "[" + strings.Replace(ready, `{`, `{"version":3,`, 1) + "]", "version"},
		{"digest version -5", "[" + strings.Replace(ready, `{`, `{"version":-5,`, 1) + "]", "version"},
		{"boot event with a wrong preimage", `[{"imr":0,"event_type":4,"digest":"` + strings.Repeat("00", 48) + `","event":"","event_payload":"","preimage":"01"}]`, "preimage"},
		{"cut", "[" + ready, "EOF"},
		{"comma at the end", "[" + ready + ",]", "invalid character"},
		{"no comma", "[" + ready + " " + ready + "]", "comma"},
		{"not UTF-8 within a string", `"[` + "\xff" + `]"`, "UTF-8"},
		{"not UTF-8", "[" + strings.Replace(ready, "system-ready", "\xff", 1) + "]", "UTF-8"},
		{"deep", strings.Repeat("[", 100000), "exceeded max depth"},
		{"too many events", "[" + strings.Repeat(ready+",", 4096) + "0]", "more events than 4096"},
		{"too long", `["` + strings.Repeat("x", 10<<20) + `"]`, "at most"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := measure.ParseEventLog([]byte(tc.doc)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %.200v, want %q in it", err, tc.want)
			}
		})
	}
}

// TestEventLogOfSmallValues: what is refused for its count costs no memory first.
func TestEventLogOfSmallValues(t *testing.T) {
	log := []byte("[" + strings.Repeat(ready+",", 4096) + strings.Repeat("0,", 4<<20) + "0]")
	if got := allocated(func() {
		if _, err := measure.ParseEventLog(log); err == nil {
			t.Error("accepted")
		}
	}); got > 4*uint64(len(log)) {
		t.Errorf("%d bytes made the parser allocate %d", len(log), got)
	}
}

// allocated is how many bytes f allocates, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestEventLogBitFlips changes every bit of a runtime log. Whatever is still read and
// replays to the same register holds the same runtime events.
func TestEventLogBitFlips(t *testing.T) {
	events := slices.DeleteFunc(someEvents(t), func(e measure.Event) bool { return !e.IsRuntime() })
	want, err := measure.Replay(events)
	if err != nil {
		t.Fatal(err)
	}
	log, err := measure.FormatEventLog(events, false)
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for bit := range 8 * len(log) {
		log[bit/8] ^= 1 << (bit % 8)
		got, err := measure.ParseEventLog(log)
		rtmr, replayErr := measure.Replay(got)
		switch {
		case err != nil:
			refused++
		case replayErr != nil || rtmr != want:
		default:
			for i, e := range got {
				if e.IsRuntime() && !cmp.Equal(e, events[i], sameEvents) {
					t.Fatalf("bit %d: event %d became %+v and replays to the same register", bit, i, e)
				}
			}
		}
		log[bit/8] ^= 1 << (bit % 8)
	}
	if refused < 4*len(log) {
		t.Errorf("only %d of %d flips are refused", refused, 8*len(log))
	}
}

func TestReplayIsRefused(t *testing.T) {
	good := someEvents(t)
	for name, edit := range map[string]func(e *measure.Event){
		"register 4":     func(e *measure.Event) { e.IMR = 4 },
		"register -1":    func(e *measure.Event) { e.IMR = -1 },
		"forged name":    func(e *measure.Event) { e.Name = "other" },
		"forged payload": func(e *measure.Event) { e.Payload = []byte("other") },
	} {
		events := append([]measure.Event(nil), good...)
		edit(&events[len(events)-1])
		if _, err := measure.Replay(events); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzParseEventLog: what is read is written so that it reads the same.
func FuzzParseEventLog(f *testing.F) {
	b, err := measure.FormatEventLog(someEvents(f), false)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("[" + ready + "]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		events, err := measure.ParseEventLog(b)
		if err != nil {
			return
		}
		out, err := measure.FormatEventLog(events, false)
		if err != nil {
			t.Fatal(err)
		}
		again, err := measure.ParseEventLog(out)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if diff := cmp.Diff(events, again, sameEvents); diff != "" {
			t.Error(diff)
		}
	})
}
