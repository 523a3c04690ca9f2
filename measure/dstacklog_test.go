package measure_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/measure"
)

// dstackLogFull writes events as dstack 0.5.5 did.
func dstackLogFull(t *testing.T, events []measure.Event) string {
	t.Helper()
	var b strings.Builder
	for _, e := range events {
		if e.IsRuntime() {
			fmt.Fprintf(&b, `{"imr":3,"event_type":134217729,"digest":"%s","event":"%s","event_payload":"%x"}`+"\n", e.Digest, e.Name, e.Payload)
		}
	}
	return b.String()
}

// dstackLogShort writes events as dstack 0.5.6 does.
func dstackLogShort(t *testing.T, events []measure.Event) string {
	t.Helper()
	var b strings.Builder
	for _, e := range events {
		if !e.IsRuntime() {
			continue
		}
		line := map[string]any{"event": e.Name, "payload": base64.StdEncoding.EncodeToString(e.Payload)}
		if e.Version == measure.EventV2 {
			line["version"] = 2
		}
		text, err := json.Marshal(line)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(append(text, '\n'))
	}
	return b.String()
}

// TestParseDstackLogReplays writes real RTMR3 logs in both forms and expects the
// registers of the machines they come from.
func TestParseDstackLogReplays(t *testing.T) {
	for _, file := range []string{"eventlogs/nm-2511-tcbinfo.json", "eventlogs/nm-mr-release.json"} {
		var doc struct{ RTMR3 measure.Digest }
		if err := json.Unmarshal(bootFixture(t, file), &doc); err != nil {
			t.Fatal(err)
		}
		events := bootFixtureEvents(t, file, "event_log")
		for _, text := range []string{dstackLogFull(t, events), dstackLogShort(t, events)} {
			got, err := measure.ParseDstackLog([]byte(text), measure.EventV1)
			if err != nil {
				t.Fatal(err)
			}
			if r := identityReplay(t, got); r != doc.RTMR3 {
				t.Errorf("%s: RTMR3 is %s, want %s", file, r, doc.RTMR3)
			}
		}
	}
}

func TestParseDstackLogV2(t *testing.T) {
	got, err := measure.ParseDstackLog([]byte(`{"event":"compose-hash","payload":"q80=","version":2}`), measure.EventV2)
	if err != nil || len(got) != 1 {
		t.Fatalf("got %v, %v", got, err)
	}
	const want = "9dde1673f544faa94b921825209593ddde08d0baf9cd6990175dffaf3081f1bb10311d56de189491feb33842a050ad7b"
	if got[0].Digest.String() != want || got[0].Version != measure.EventV2 {
		t.Errorf("got %+v, want digest %s", got[0], want)
	}
}

func TestParseDstackLogRefuses(t *testing.T) {
	const good = `{"event":"a","payload":""}` + "\n"
	full := strings.TrimSuffix(dstackLogFull(t, []measure.Event{bootEvent(t, "a", []byte{1})}), "\n")
	for _, c := range []struct {
		name, text string
		version    int
		want       string
	}{
		{"empty line", good + "\n", 1, "line 2: not valid JSON"},
		{"half a line in the middle", `{"event":"a"` + "\n" + good, 1, "line 1: not valid JSON"},
		{"two objects", good[:len(good)-1] + good, 1, "not valid JSON"},
		{"array", "[]\n", 1, "want a JSON object"},
		{"duplicate", `{"event":"a","event":"b","payload":""}`, 1, "twice"},
		{"unknown member", `{"event":"a","payload":"","imr":3}`, 1, `unknown member "imr"`},
		{"odd member", `{"event":"a","payload":"","event payload":""}`, 1, "unknown member"},
		{"no name", `{"payload":""}`, 1, "event is missing"},
		{"empty name", `{"event":"","payload":""}`, 1, "non-empty"},
		{"no payload", `{"event":"a"}`, 1, "payload is missing"},
		{"null payload", `{"event":"a","payload":null}`, 1, "payload is null"},
		{"bad base64", `{"event":"a","payload":"YQ"}`, 1, "payload"},
		{"loose base64", `{"event":"a","payload":"YR=="}`, 1, "payload"},
		{"base64 with a break", `{"event":"a","payload":"YQ==\n"}`, 1, "line break"},
		{"version 2 in 1", `{"event":"a","payload":"","version":2}`, 1, "version 2 in a log of version 1"},
		{"version 1 in 2", good, 2, "version 1 in a log of version 2"},
		{"version 0", `{"event":"a","payload":"","version":0}`, 1, "version 0"},
		{"unknown version", `{"event":"a","payload":"","version":3}`, 3, "version 3"},
		{"mixed forms", good + full, 1, "another form"},
		{"bad hex", strings.Replace(full, `"event_payload":"01"`, `"event_payload":"0"`, 1), 1, "event_payload"},
		{"other register", strings.Replace(full, `"imr":3`, `"imr":2`, 1), 1, "register 2"},
		{"negative register", strings.Replace(full, `"imr":3`, `"imr":-1`, 1), 1, "imr"},
		{"other type", strings.Replace(full, "134217729", "4", 1), 1, "type 0x4"},
		{"other payload", strings.Replace(full, `"event_payload":"01"`, `"event_payload":"02"`, 1), 1, "its name and payload give"},
		{"other preimage", strings.Replace(full, `"imr"`, `"preimage":"00","imr"`, 1), 1, "preimage"},
		{"too many", strings.Repeat(good, 513), 1, "more than 512 events"},
		{"too long", strings.Repeat(" ", 1<<20+1), 1, "at most 1048576"},
	} {
		got, err := measure.ParseDstackLog([]byte(c.text), c.version)
		if err == nil || !strings.Contains(err.Error(), c.want) || got != nil {
			t.Errorf("%s: got %v, %v, want %q", c.name, got, err, c.want)
		}
		var torn *measure.TornLineError
		if errors.As(err, &torn) {
			t.Errorf("%s: reported as a torn line", c.name)
		}
	}
}

func TestParseDstackLogTornLine(t *testing.T) {
	const good = `{"event":"a","payload":""}`
	for cut := 1; cut < len(good); cut++ {
		got, err := measure.ParseDstackLog([]byte(good+"\n"+good[:cut]), measure.EventV1)
		var torn *measure.TornLineError
		if !errors.As(err, &torn) || torn.Line != 2 || len(got) != 1 {
			t.Fatalf("cut after %d bytes: got %d events, %v", cut, len(got), err)
		}
	}
	if got, err := measure.ParseDstackLog([]byte(good+"\n"+good), measure.EventV1); err != nil || len(got) != 2 {
		t.Errorf("whole last line without newline: got %d events, %v", len(got), err)
	}
	if got, err := measure.ParseDstackLog(nil, measure.EventV1); err != nil || got != nil {
		t.Errorf("empty log: got %v, %v", got, err)
	}
}

func TestReadDstackLog(t *testing.T) {
	const v1 = `{"event":"a","payload":""}` + "\n"
	const v2 = `{"event":"a","payload":"","version":2}` + "\n"
	const short, old, pin = "dstack/runtime_events.log", "tdx_mr3/tdx_events.log", "dstack/runtime_event_version"
	for _, c := range []struct {
		name  string
		files map[string]string
		n     int
		want  string
	}{
		{"short", map[string]string{short: v1}, 1, ""},
		{"short, pinned", map[string]string{short: v2 + v2, pin: "2\n"}, 2, ""},
		{"full", map[string]string{old: dstackLogFull(t, []measure.Event{bootEvent(t, "a", nil)})}, 1, ""},
		{"pin says otherwise", map[string]string{short: v1, pin: "2"}, 0, "version 1 in a log of version 2"},
		{"bad pin", map[string]string{short: v1, pin: "3"}, 0, "want 1 or 2"},
		{"long pin", map[string]string{short: v1, pin: strings.Repeat("1", 17)}, 0, "at most 16"},
		{"both", map[string]string{short: v1, old: ""}, 0, "both there"},
		{"torn", map[string]string{short: v1 + "{"}, 1, "cut off"},
	} {
		dir := t.TempDir()
		for name, text := range c.files {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := measure.ReadDstackLog(dir)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) || len(got) != c.n {
			t.Errorf("%s: got %d events, %v, want %d, %q", c.name, len(got), err, c.n, c.want)
		}
	}
	if _, err := measure.ReadDstackLog(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no log: %v", err)
	}
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "dstack"), 0o700), os.Symlink("/etc/hostname", filepath.Join(dir, short))); err != nil {
		t.Fatal(err)
	}
	if _, err := measure.ReadDstackLog(dir); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("symlink: %v", err)
	}
}

func FuzzParseDstackLog(f *testing.F) {
	f.Add([]byte(`{"event":"a","payload":"YQ=="}`+"\n"+`{"event":"b","payload":""}`), 1)
	f.Add([]byte(`{"event":"a","payload":"","version":2}`+"\n{"), 2)
	f.Add([]byte(`{"imr":3,"event_type":134217729,"digest":"","event":"a","event_payload":"00","preimage":""}`+"\n"), 1)
	f.Fuzz(func(t *testing.T, b []byte, version int) {
		events, err := measure.ParseDstackLog(b, version)
		if err != nil {
			return
		}
		if _, err := measure.Replay(events); err != nil {
			t.Errorf("accepted a log that does not replay: %v", err)
		}
		measure.IdentityOf(events)
		if _, err := measure.ParseDstackLog([]byte(dstackLogShort(t, events)), version); err != nil {
			t.Errorf("does not parse when written again: %v", err)
		}
	})
}
