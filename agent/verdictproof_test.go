package main

import (
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

// TestVerdictShowsProofAlone has a valid verdict whose evidence proves less than it
// says: the members that others authorise by are not filled from it.
func TestVerdictShowsProofAlone(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	q := new(measure.Quote)
	result := func(passed ...string) *remote.Result {
		r := &remote.Result{Accepted: true, Claims: &remote.Claims{Quote: q, Report: &dcap.Report{Quote: q}, HasLog: true,
			Identity: measure.Identity{AppID: make([]byte, 20)}, VMConfig: `{"os_image_hash":"` + hash + `"}`}}
		for _, name := range passed {
			r.Checks = append(r.Checks, remote.Check{Name: name, Outcome: remote.Passed})
		}
		return r
	}
	if d := makeDetails(result("event_log")); d.AppInfo != nil || d.BootInfo != nil {
		t.Errorf("a log without system-ready names the application %+v", d.AppInfo)
	}
	d := makeDetails(result("event_log", "identity"))
	if d.AppInfo == nil || d.BootInfo == nil || d.BootInfo.OSImageHash != "" || d.AppInfo.OSImageHash != hash {
		t.Errorf("an image that nothing proves: %+v, %+v", d.AppInfo, d.BootInfo)
	}
	d = makeDetails(result("event_log", "identity", "mrtd", "rtmr1", "rtmr2", "os_image_hash"))
	if !d.OSImageHashVerified || d.BootInfo == nil || d.BootInfo.OSImageHash != hash {
		t.Errorf("an image that a policy proves: %+v", d.BootInfo)
	}
}

// TestNoLevelHasNoDate has a platform that no TCB level matches.
func TestNoLevelHasNoDate(t *testing.T) {
	text := tcbProof(&remote.Claims{Report: &dcap.Report{Merged: dcap.TCB{Status: dcap.NotSupported}}})
	if !strings.Contains(text, "no TCB level matches") || strings.Contains(text, "TCB of") {
		t.Errorf("got %q", text)
	}
}
