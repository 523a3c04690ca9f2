package remote_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
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

// TestForgedPassesNothing has a quote that says what the policy wants, and is forged.
func TestForgedPassesNothing(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	ev := a.evidence(t, measure.ReportData{})
	ev.Quote[len(measureQuote(t, ev.Quote).Signed)+4] ^= 1 // the signature
	_, err := v.Appraise(context.Background(), ev, remote.Expect{})
	wantRefused(t, err, "signature", "quote_signature", false)
	rejection, _ := errors.AsType[*remote.Rejection](err)
	for _, c := range rejection.Result.Checks {
		if c.Outcome == remote.Passed {
			t.Errorf("%s passed", c.Name)
		}
	}
	for _, e := range rejection.Result.Explain() {
		for _, c := range e.Checks {
			if c.Outcome == remote.Passed {
				t.Errorf("%s is explained as passed", c.Name)
			}
		}
	}
}

func measureQuote(t *testing.T, b []byte) *measure.Quote {
	t.Helper()
	q, err := measure.ParseQuote(b)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// TestBuiltinSimulated trusts a simulator's root beside Intel's, in either order.
func TestBuiltinSimulated(t *testing.T) {
	for _, roots := range [][][32]byte{{dcap.IntelRoot(), {1}}, {{1}, dcap.IntelRoot()}} {
		if p := remote.BuiltinPolicy(roots...); len(p.Simulated()) != 1 {
			t.Errorf("%x: simulated entries are %q", roots, p.Simulated())
		}
	}
	if p := remote.BuiltinPolicy(); len(p.Simulated()) != 0 {
		t.Errorf("Intel's root alone: simulated entries are %q", p.Simulated())
	}
}

// TestGraceHasBegun refuses a grace of a date that is still to come.
func TestGraceHasBegun(t *testing.T) {
	a := newAttester(t, tdxsim.Config{TCBStatus: "OutOfDate"}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", `tcb_grace = "5000h"`, "")), a.bundle)
	r, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
	if err != nil {
		t.Fatal(err)
	}
	r.Claims.Report.NewestTCBDate = testTime.Add(time.Second)
	if e := r.Explain()[0]; e.Accepted {
		t.Errorf("judged anew it is %+v", e)
	}
}

// TestDeniedAdvisoryOfAnyCase denies an advisory whose letters the policy writes small.
func TestDeniedAdvisoryOfAnyCase(t *testing.T) {
	a := newAttester(t, tdxsim.Config{TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "tcb_status = [\"SWHardeningNeeded\"]\nallow_any_advisory = true\nadvisories_deny = [\"intel-sa-1\"]", "")), a.bundle)
	_, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
	wantRefused(t, err, "advisories", "advisories", true)
}

// TestPartialBootLog leaves out every event of a register: what is left replays.
func TestPartialBootLog(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	ev := a.evidence(t, measure.ReportData{})
	ev.Events = slices.DeleteFunc(ev.Events, func(e measure.Event) bool { return e.IMR == 2 })
	r, err := v.Appraise(context.Background(), ev, anyData)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Unchecked() {
		if c.Name == "boot_log" && strings.Contains(c.Hint, "RTMR2") {
			return
		}
	}
	t.Errorf("boot_log is %v, want not checked: nothing explains RTMR2", outcome(r, "boot_log"))
}

// TestMRConfigGiven compares a document that is given, and does not pass it over where
// there is nothing to compare it with.
func TestMRConfigGiven(t *testing.T) {
	document := fmt.Sprintf(`{"version":3,"compose_hash":"%x","key_provider":"kms","key_provider_id":"010203"}`, composeHash())
	for _, tc := range []struct {
		name     string
		id       measure.Digest
		document string
		noLog    bool
		want     remote.Outcome
	}{
		{"the document", measure.MRConfigIDV3(document), document, false, remote.Passed},
		{"no document", measure.MRConfigIDV3(document), "", false, remote.NotChecked},
		{"another document", measure.MRConfigIDV3(document), document + " ", false, remote.Failed},
		{"a TD without", measure.Digest{}, document, false, remote.Failed},
		{"a TD by its compose hash", measure.MRConfigIDV1([32]byte(composeHash())), document, false, remote.Failed},
		{"no log", measure.MRConfigIDV3(document), document, true, remote.Failed},
	} {
		a := newAttester(t, tdxsim.Config{MRConfigID: tc.id}, nil)
		v := newVerifier(t, remote.BuiltinPolicy(a.root), a.bundle)
		ev := a.evidence(t, measure.ReportData{})
		if tc.noLog {
			ev.Events = nil
		}
		r, err := v.Appraise(context.Background(), ev, remote.Expect{AnyReportData: true, MRConfig: tc.document})
		if rejection, ok := errors.AsType[*remote.Rejection](err); ok {
			r = rejection.Result
		} else if err != nil {
			t.Fatal(err)
		}
		if got := outcome(r, "mr_config_id"); got != tc.want || r.Accepted != (tc.want != remote.Failed) {
			t.Errorf("%s: got %v, want %v (%v)", tc.name, got, tc.want, err)
		}
	}
}

// TestBootLogAlone has a CCEL and no runtime events, and says what is missing.
func TestBootLogAlone(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	ev := a.evidence(t, measure.ReportData{})
	ev.Events = slices.DeleteFunc(ev.Events, func(e measure.Event) bool { return e.IMR == measure.RTMR3 })
	_, err := v.Appraise(context.Background(), ev, anyData)
	wantRefused(t, err, "event_log", "event_log", false)
	if !strings.Contains(err.Error(), "a CCEL has none of RTMR3") {
		t.Errorf("got %v", err)
	}
}

// TestImagesOfEqualRegisters has two images of the same registers, which differ in what they
// say of the platform: the one that fits counts, in either order.
func TestImagesOfEqualRegisters(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	text := a.policyText(t, "", "", "")
	other := strings.Replace(text[strings.Index(text, "[image.test]"):], "[image.test]", "[image.other]", 1) + "min_tee_tcb_svn = \"ff\"\n"
	for _, images := range []string{`["test", "other"]`, `["other", "test"]`} {
		p := parsePolicy(t, strings.Replace(text, `image = ["test"]`, "image = "+images, 1)+other)
		if _, err := newVerifier(t, p, a.bundle).Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData); err != nil {
			t.Errorf("%s: %v", images, err)
		}
	}
}

// TestSkeletonOfContradictions writes no application into a policy that the log's own
// events contradict.
func TestSkeletonOfContradictions(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, append(bootEvents(t), event(t, measure.EventAppID, make([]byte, 20))))
	v := newVerifier(t, remote.BuiltinPolicy(a.root), a.bundle)
	_, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
	wantRefused(t, err, "identity", "identity_events", false)
	rejection, _ := errors.AsType[*remote.Rejection](err)
	text, err := rejection.Result.Claims.Skeleton()
	if err != nil || strings.Contains(text, "\napp_id") || !strings.Contains(text, "allow_any_app = true") {
		t.Errorf("got %s, %v", text, err)
	}
}
