package measure_test

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"testing"

	"tdx-agent/measure"
)

// TestBootSequenceOfRealLogs gives BootSequence the inputs that a real machine had
// and expects that machine's events.
func TestBootSequenceOfRealLogs(t *testing.T) {
	tcbInfo := func(name string, path ...string) func(t *testing.T) []byte {
		return func(t *testing.T) []byte {
			doc := bootFixture(t, name)
			for _, key := range path {
				var o map[string]json.RawMessage
				if err := json.Unmarshal(doc, &o); err != nil {
					t.Fatal(err)
				}
				var s string
				if json.Unmarshal(o[key], &s) == nil {
					doc = []byte(s)
				} else {
					doc = o[key]
				}
			}
			return doc
		}
	}
	for _, c := range []struct {
		file    string
		path    []string
		era     measure.Era
		compose func(*testing.T) []byte // nil: not published, compare names only
		differs []string                // payloads that cannot be recomputed
	}{
		{"eventlogs/nm-2511-tcbinfo.json", []string{"event_log"}, measure.Era042, tcbInfo("eventlogs/nm-2511-appcompose.json"), nil},
		{"eventlogs/nm-mr-release.json", []string{"event_log"}, measure.Era0511, tcbInfo("eventlogs/nm-mr-release.json", "app_compose"), nil},
		{"attestations/dx-report.json", []string{"event_log"}, measure.Era040, tcbInfo("eventlogs/dx-appcompose.json"), nil},
		{"attestations/nr-gateway-report.json", []string{"event_log"}, measure.Era051,
			tcbInfo("attestations/nr-gateway-report.json", "info", "tcb_info", "app_compose"), []string{measure.EventInstanceID}},
		{"attestations/zk-livy.json", []string{"eventLog"}, measure.Era03, nil, nil},
		{"eventlogs/ph-sim-eventlog.json", nil, measure.Era042, nil, nil},
	} {
		t.Run(filepath.Base(c.file), func(t *testing.T) {
			want := bootFixtureSequence(bootFixtureEvents(t, c.file, c.path...))
			in := bootInputFor(t, c.era, want)
			if c.compose != nil {
				in.Files.AppCompose = c.compose(t)
				compose, err := measure.ParseAppCompose(in.Files.AppCompose)
				if err != nil {
					t.Fatal(err)
				}
				in.Files.Compose = compose
			}
			got, err := measure.BootSequence(in)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(want) {
				t.Fatalf("got %d events %v, want %d", len(got), got, len(want))
			}
			for i := range got {
				if got[i].Name != want[i].Name {
					t.Errorf("event %d is %s, want %s", i, got[i].Name, want[i].Name)
				} else if c.compose != nil && !slices.Contains(c.differs, got[i].Name) && !bytes.Equal(got[i].Payload, want[i].Payload) {
					t.Errorf("payload of %s is %x, want %x", got[i].Name, got[i].Payload, want[i].Payload)
				}
			}
		})
	}
}

// TestBootSequencePreRelease compares with a 0.6.0 pre-release, which did not
// measure the GPU policy yet and is otherwise of era 0.6.
func TestBootSequencePreRelease(t *testing.T) {
	want := bootFixtureSequence(bootFixtureEvents(t, "attestations/dk-lite-getquote.json", "event_log"))
	got, err := measure.BootSequence(bootInputFor(t, measure.Era06, want))
	if err != nil {
		t.Fatal(err)
	}
	got = slices.DeleteFunc(got, func(e measure.BootEvent) bool { return e.Name == measure.EventGPUPolicyHash })
	if bootNames(got) != bootNames(want) {
		t.Errorf("got %s, want %s", bootNames(got), bootNames(want))
	}
}

// bootInputFor takes from a measured sequence what the guest would have been given.
func bootInputFor(t *testing.T, era measure.Era, seq []measure.BootEvent) measure.BootInput {
	t.Helper()
	files := measure.GuestFiles{AppCompose: []byte(`{}`)}
	files.Compose.KeyProvider = measure.KeyProviderKMS
	if p := bootPayload(seq, measure.EventKeyProvider); p != nil {
		provider, err := measure.ParseKeyProvider(p)
		if err != nil {
			t.Fatal(err)
		}
		files.Compose.KeyProvider = provider.Kind
		files.AppKeys = &measure.AppKeysInfo{KeyProvider: provider}
	}
	files.Instance.AppID = bootPayload(seq, measure.EventAppID)
	files.Instance.InstanceID = bootPayload(seq, measure.EventInstanceID)
	return measure.BootInput{
		Files: &files, Era: era,
		OSImageHash: bootPayload(seq, measure.EventOSImageHash),
		RootFSHash:  bootPayload(seq, measure.EventRootFSHash),
		CACertHash:  bootPayload(seq, measure.EventCACertHash),
		MRKMS:       bootPayload(seq, measure.EventMRKMS),
		StorageFS:   string(bootPayload(seq, measure.EventStorageFS)),
		Rand:        bytes.NewReader(make([]byte, 20)),
	}
}
