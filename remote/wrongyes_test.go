package remote_test

import (
	"context"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// TestHiddenBoot has an application that measures the boot of another behind its own,
// and a log that shows the true one as events of an unknown type: it replays.
func TestHiddenBoot(t *testing.T) {
	evil := []measure.Event{event(t, measure.EventAppID, make([]byte, 20)), event(t, measure.EventComposeHash, make([]byte, 32)), event(t, measure.EventSystemReady, nil)}
	a := newAttester(t, tdxsim.Config{}, append(evil, bootEvents(t)...))
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	ev := a.evidence(t, measure.ReportData{})
	for i, hidden := len(ev.Events)-len(bootEvents(t))-len(evil), 0; hidden < len(evil); i, hidden = i+1, hidden+1 {
		ev.Events[i] = measure.Event{IMR: measure.RTMR3, Type: 1, Digest: ev.Events[i].Digest}
	}
	_, err := v.Appraise(context.Background(), ev, anyData)
	wantRefused(t, err, "identity", "identity_events", false)
}
