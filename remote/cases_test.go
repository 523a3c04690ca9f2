package remote_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

// realCase is a case of the folder of real evidence: who must be accepted when, by
// which collateral.
type realCase struct {
	ID, Quote  string
	Collateral json.RawMessage
	Time       time.Time
	Mode       string
	Expect     struct {
		Accept   *bool
		Reasons  []string
		Status   *dcap.Status
		Advisory []string `json:"advisory_ids"`
	}
}

// realEvidence is that folder, or the test is skipped.
func realEvidence(t testing.TB) (dir string, paths map[string]string, cases []realCase) {
	t.Helper()
	if dir = os.Getenv("TDX_AGENT_FIXTURES"); dir == "" {
		dir = filepath.Join("..", "..", "shared", "fixtures")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no real evidence: set TDX_AGENT_FIXTURES to its folder (%v)", err)
	}
	var manifest struct{ Items []struct{ ID, Path string } }
	var list struct{ Cases []realCase }
	for name, into := range map[string]any{"manifest.json": &manifest, "cases.json": &list} {
		if err := json.Unmarshal(readFile(t, filepath.Join(dir, name)), into); err != nil {
			t.Fatal(err)
		}
	}
	paths = map[string]string{}
	for _, i := range manifest.Items {
		paths[i.ID] = filepath.Join(dir, i.Path)
	}
	return dir, paths, list.Cases
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// reasonOf tells which of the cases' reasons a failed check is.
func reasonOf(c remote.Check, status dcap.Status) string {
	switch {
	case c.Name == "tcb_status" && status == dcap.NotSupported:
		return "tcb_not_supported"
	case c.Name == "tcb_status" && status == dcap.OutOfDate:
		return "tcb_out_of_date"
	case c.Code == "collateral_no_source":
		return "fmspc_mismatch" // there is a bundle, of another platform
	}
	return c.Code
}

// TestRealCases appraises by the built-in policy what the cases hold in bundles and in
// quotes that stand alone, and wants their answers. Package dcap has all the cases.
func TestRealCases(t *testing.T) {
	_, paths, cases := realEvidence(t)
	seen := map[string]int{}
	for _, tc := range cases {
		var bundle string
		if tc.Mode != "full" || json.Unmarshal(tc.Collateral, &bundle) != nil || !strings.HasPrefix(filepath.Base(filepath.Dir(paths[tc.Quote])), "quotes") && !strings.HasSuffix(paths[tc.Quote], ".bin") {
			continue
		}
		quote := readFile(t, paths[tc.Quote])
		if b, err := hex.DecodeString(strings.TrimSpace(string(quote))); err == nil {
			quote = b
		}
		if quote[0] == '[' {
			var list []int
			if err := json.Unmarshal(quote, &list); err != nil {
				t.Fatal(err)
			}
			quote = quote[:0]
			for _, n := range list {
				quote = append(quote, byte(n))
			}
		}
		t.Run(tc.ID, func(t *testing.T) {
			now := func() time.Time { return tc.Time }
			p := remote.BuiltinPolicy()
			v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: newStore(t, p, readFile(t, paths[bundle]), now), Now: now})
			if err != nil {
				t.Fatal(err)
			}
			r, err := v.Appraise(context.Background(), &measure.Evidence{Quote: quote}, anyData)
			if (err == nil) != *tc.Expect.Accept {
				t.Fatalf("%s by %s: got %v, want accepted %v", tc.Quote, bundle, err, *tc.Expect.Accept)
			}
			rejection, isRejected := errors.AsType[*remote.Rejection](err)
			if isRejected {
				r = rejection.Result
				c := r.Failed()[0]
				var status dcap.Status
				if r.Claims.Report != nil {
					status = r.Claims.Report.Merged.Status
				}
				reason := reasonOf(c, status)
				if !slices.Contains(tc.Expect.Reasons, reason) {
					t.Errorf("%s by %s: refused by %s (%s), want one of %v", tc.Quote, bundle, c.Name, c.Code, tc.Expect.Reasons)
				}
				seen[reason]++
			} else {
				seen["accepted"]++
			}
			if report := r.Claims.Report; report != nil && (report.Merged.Status != *tc.Expect.Status || !slices.Equal(slices.Sorted(slices.Values(report.Merged.Advisories)), slices.Sorted(slices.Values(tc.Expect.Advisory)))) {
				t.Errorf("got %+v, want %s %v", report.Merged, *tc.Expect.Status, tc.Expect.Advisory)
			}
		})
	}
	for _, want := range []string{"accepted", "tcb_not_supported", "pck_not_yet_valid", "collateral_expired", "collateral_not_yet_valid", "fmspc_mismatch"} {
		if seen[want] == 0 {
			t.Errorf("no case was %s: %v", want, seen)
		}
	}
}

// TestRealAttestation takes RTMR3's log from an envelope whose boot log was cut.
func TestRealAttestation(t *testing.T) {
	_, paths, _ := realEvidence(t)
	var doc struct{ Attestation string }
	if err := json.Unmarshal(readFile(t, paths["dk-lite-attestation"]), &doc); err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(doc.Attestation)
	if err != nil {
		t.Fatal(err)
	}
	a, err := measure.ParseAttestation(b)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := a.Evidence()
	if err != nil {
		t.Fatal(err)
	}
	p := remote.BuiltinPolicy()
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: newStore(t, p, nil, nil)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Appraise(context.Background(), ev, anyData)
	wantRefused(t, err, "collateral", "collateral_no_source", true)
	rejection, _ := errors.AsType[*remote.Rejection](err)
	r := rejection.Result
	if outcome(r, "boot_log") != remote.NotChecked || outcome(r, "event_log") != remote.Passed || outcome(r, "identity") != remote.Passed || outcome(r, "mr_config_id") != remote.Passed {
		t.Errorf("got %+v", r.Checks)
	}
	if len(r.Claims.Identity.AppID) != 20 || bytes.Equal(r.Claims.Identity.AppID, make([]byte, 20)) {
		t.Errorf("app-id is %x", r.Claims.Identity.AppID)
	}
	ev.Events = ev.Events[:len(ev.Events)-1]
	_, err = v.Appraise(context.Background(), ev, anyData)
	rejection, _ = errors.AsType[*remote.Rejection](err)
	if rejection == nil || outcome(rejection.Result, "event_log") != remote.Failed || rejection.Genuine() {
		t.Errorf("a cut log: %v", err)
	}
}
