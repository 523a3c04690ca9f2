package measure_test

import (
	"errors"
	"strings"
	"testing"

	"tdx-agent/measure"
)

// TestIdentityOfHidden has logs that replay as the true one does, in which an event of
// the boot is no longer read as what it is.
func TestIdentityOfHidden(t *testing.T) {
	opaque := func(e measure.Event) measure.Event {
		return measure.Event{IMR: measure.RTMR3, Type: 1, Digest: e.Digest, Name: "x"}
	}
	true1 := []measure.Event{bootEvent(t, measure.EventAppID, make([]byte, 20)), bootEvent(t, measure.EventSystemReady, nil)}
	provider := measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: []byte{1}}
	joined := measure.Event{IMR: measure.RTMR3, Type: measure.RuntimeEventType, Digest: bootEvent(t, measure.EventKeyProvider, provider.Payload()).Digest,
		Name: `key-provider:{"name"`, Payload: []byte(`"kms","id":"01"}`), Version: measure.EventV1}
	if err := joined.Check(); err != nil {
		t.Fatalf("the two readings have one digest: %v", err)
	}
	for name, log := range map[string][]measure.Event{
		"an application's own boot behind the true one": {opaque(true1[0]), opaque(true1[1]), bootEvent(t, measure.EventAppID, []byte("another--20-bytes---")), true1[1]},
		"opaque after system-ready":                     append(true1[:2:2], opaque(true1[0])),
		"joined by a colon":                             {true1[0], joined, true1[1]},
	} {
		var bad *measure.IdentityError
		if _, err := measure.IdentityOf(log); !errors.As(err, &bad) || !strings.Contains(err.Error(), "event") {
			t.Errorf("%s: got %v, want an *IdentityError", name, err)
		}
	}
	// A log that is none of dstack's claims nothing.
	if id, err := measure.IdentityOf([]measure.Event{opaque(true1[0]), opaque(true1[1])}); err != nil || id.Ready || id.AppID != nil {
		t.Errorf("a log of other types: got %+v, %v", id, err)
	}
	// What an application calls its events is its own affair, and version 2 is not ambiguous.
	v2, err := measure.NewRuntimeEvent("app-id:1", nil, measure.EventV2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := measure.IdentityOf([]measure.Event{v2, true1[0], bootEvent(t, "my:event", nil), true1[1], bootEvent(t, "app-id:2", nil)}); err != nil {
		t.Error(err)
	}
}
