package dcap_test

import (
	"encoding/json"
	"slices"
	"testing"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

// convergence is Intel's table: what a platform's status becomes with a component
// that is OutOfDate. UpToDate leaves it, Revoked revokes it.
var convergence = map[dcap.Status]dcap.Status{
	dcap.UpToDate:                          dcap.OutOfDate,
	dcap.SWHardeningNeeded:                 dcap.OutOfDate,
	dcap.ConfigurationNeeded:               dcap.OutOfDateConfigurationNeeded,
	dcap.ConfigurationAndSWHardeningNeeded: dcap.OutOfDateConfigurationNeeded,
	dcap.OutOfDate:                         dcap.OutOfDate,
	dcap.OutOfDateConfigurationNeeded:      dcap.OutOfDateConfigurationNeeded,
	dcap.Revoked:                           dcap.Revoked,
}

// TestConvergence puts the table through whole verifications, for module and QE.
// go-tdx-guest looks at the module alone, dcap-qvl before 0.6 takes the greater of
// the two: both miss OutOfDateConfigurationNeeded.
func TestConvergence(t *testing.T) {
	for platform, outOfDate := range convergence {
		for component, want := range map[dcap.Status]dcap.Status{dcap.UpToDate: platform, dcap.OutOfDate: outOfDate, dcap.Revoked: dcap.Revoked} {
			module := simulate(t, tdxsim.Config{TCBStatus: string(platform), ModuleStatus: string(component)}).mustVerify(t)
			qe := simulate(t, tdxsim.Config{TCBStatus: string(platform), QEStatus: string(component)}).mustVerify(t)
			if module.Merged.Status != want || qe.Merged.Status != want {
				t.Errorf("platform %s with %s: module gives %s, QE %s; want %s", platform, component, module.Merged.Status, qe.Merged.Status, want)
			}
			if module.Platform.Status != platform || module.Module.Status != component || qe.QEStatus.Status != component {
				t.Errorf("parts of %s with %s: %v, %v, %v", platform, component, module.Platform, module.Module, qe.QEStatus)
			}
		}
	}
}

// TestConvergeUnknown shows that what the table lacks is never lost.
func TestConvergeUnknown(t *testing.T) {
	known := []dcap.Status{dcap.UpToDate, dcap.SWHardeningNeeded, dcap.OutOfDate, dcap.TDRelaunchAdvised, dcap.ConfigurationNeeded}
	for _, bad := range []dcap.Status{dcap.Unrecognized, dcap.NotSupported, dcap.Revoked} {
		for _, s := range known {
			if dcap.Converge(s, bad) != bad || dcap.Converge(bad, s) != bad {
				t.Errorf("%s with %s: %s and %s", s, bad, dcap.Converge(s, bad), dcap.Converge(bad, s))
			}
		}
	}
	if got := dcap.Converge(dcap.Unrecognized, dcap.Revoked); got != dcap.Revoked {
		t.Error(got)
	}
}

// TestUnknownStatus shows that a status nobody knows yet spoils its level only.
func TestUnknownStatus(t *testing.T) {
	for _, cfg := range []tdxsim.Config{{TCBStatus: "Excellent"}, {ModuleStatus: "uptodate"}, {QEStatus: ""}, {QEStatus: "TDRelaunchAdvised"}, {TCBStatus: "NotSupported"}} {
		want := dcap.Unrecognized
		if cfg.TCBStatus+cfg.ModuleStatus+cfg.QEStatus == "" {
			want = dcap.UpToDate
		}
		if r := simulate(t, cfg).mustVerify(t); r.Merged.Status != want {
			t.Errorf("%+v: %s, want %s", cfg, r.Merged.Status, want)
		}
	}
	other := editLevels(t, func(levels []any) []any {
		levels[1].(map[string]any)["tcbStatus"] = "Excellent"
		return levels
	})
	if r := simulate(t, tdxsim.Config{EditTCBInfo: other}).mustVerify(t); r.Merged.Status != dcap.UpToDate {
		t.Errorf("an unknown status of an older level gives %s", r.Merged.Status)
	}
}

// editLevels changes the platform's TCB levels.
func editLevels(t *testing.T, edit func([]any) []any) func(string) string {
	return func(text string) string {
		var doc map[string]any
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			t.Fatal(err)
		}
		doc["tcbLevels"] = edit(doc["tcbLevels"].([]any))
		b, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// components returns a side of a level's TCB.
func components(level any, side string) []any {
	return level.(map[string]any)["tcb"].(map[string]any)[side].([]any)
}

func setSVN(level any, side string, i, svn int) {
	components(level, side)[i].(map[string]any)["svn"] = svn
}

func TestUnsortedLevels(t *testing.T) {
	reversed := editLevels(t, func(levels []any) []any { slices.Reverse(levels); return levels })
	r := simulate(t, tdxsim.Config{EditTCBInfo: reversed}).mustVerify(t)
	if r.Merged.Status != dcap.UpToDate {
		t.Errorf("an older level in front gives %s", r.Merged.Status)
	}
	r = simulate(t, tdxsim.Config{TCBStatus: "OutOfDate", EditTCBInfo: reversed}).mustVerify(t)
	if r.Merged.Status != dcap.OutOfDate || r.NewestTCBDate.Year() != 2026 || r.Merged.Date.Year() != 2025 {
		t.Errorf("%v, newest level of %v", r.Merged, r.NewestTCBDate)
	}
	if want := []dcap.ShortSVN{{Component: "TDX component 2 (TDX Late Microcode Update)", Got: 4, Want: 5}}; !slices.Equal(r.ShortSVNs, want) {
		t.Errorf("short SVNs %v, want %v", r.ShortSVNs, want)
	}
}

func TestNotSupported(t *testing.T) {
	for name, c := range map[string]struct {
		side string
		i    int
	}{"SGX component": {"sgxtcbcomponents", 15}, "TDX component": {"tdxtcbcomponents", 15}} {
		edit := editLevels(t, func(levels []any) []any {
			for _, l := range levels {
				setSVN(l, c.side, c.i, 200)
			}
			return levels
		})
		// A launch long ago on a platform of today is no reason to advise a relaunch.
		r := simulate(t, tdxsim.Config{QuoteVersion: 5, ModuleStatus: "OutOfDate", TEETCBSVN2: [16]byte{9, 1, 9}, EditTCBInfo: edit}).mustVerify(t)
		if r.Platform.Status != dcap.NotSupported || r.Merged.Status != dcap.NotSupported || len(r.Merged.Advisories) != 0 || !r.Merged.Date.IsZero() {
			t.Errorf("%s: platform %v, merged %v", name, r.Platform, r.Merged)
		}
	}
}

// TestModuleComponents shows that TDX components 0 and 1 count for modules without an
// identity only. dcap-qvl compares them always and finds no level.
func TestModuleComponents(t *testing.T) {
	high := editLevels(t, func(levels []any) []any {
		for _, l := range levels {
			setSVN(l, "tdxtcbcomponents", 0, 200)
		}
		return levels
	})
	if r := simulate(t, tdxsim.Config{EditTCBInfo: high}).mustVerify(t); r.Merged.Status != dcap.UpToDate {
		t.Errorf("module 1: %s", r.Merged.Status)
	}
	if r := simulate(t, tdxsim.Config{TEETCBSVN: [16]byte{5, 0, 4}, EditTCBInfo: high}).mustVerify(t); r.Merged.Status != dcap.NotSupported {
		t.Errorf("module 0: %s", r.Merged.Status)
	}
}

// TestPlatformOutOfDate is where go-tdx-guest says UpToDate: the module is, the
// platform is not.
func TestPlatformOutOfDate(t *testing.T) {
	r := simulate(t, tdxsim.Config{TCBStatus: "OutOfDate", Advisories: []string{"INTEL-SA-1", "INTEL-SA-2"},
		ModuleStatus: "OutOfDate", ModuleAdvisories: []string{"INTEL-SA-2", "INTEL-SA-3"}, QEAdvisories: []string{"INTEL-SA-4", "INTEL-SA-1"}}).mustVerify(t)
	if want := []string{"INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3", "INTEL-SA-4"}; !slices.Equal(r.Merged.Advisories, want) {
		t.Errorf("advisories %v, want %v", r.Merged.Advisories, want)
	}
	r = simulate(t, tdxsim.Config{TCBStatus: "OutOfDate"}).mustVerify(t)
	if r.Module.Status != dcap.UpToDate || r.Platform.Status != dcap.OutOfDate || r.Merged.Status != dcap.OutOfDate {
		t.Errorf("platform %v, module %v, merged %v", r.Platform, r.Module, r.Merged)
	}
}

func TestRelaunch(t *testing.T) {
	now := [16]byte{8, 1, 4} // the module has been updated under the TD
	newerSGX := editLevels(t, func(levels []any) []any {
		setSVN(levels[0], "sgxtcbcomponents", 0, 5)
		return levels
	})
	for name, c := range map[string]struct {
		cfg  tdxsim.Config
		want dcap.Status
	}{
		"advised":                   {tdxsim.Config{TEETCBSVN2: now}, dcap.TDRelaunchAdvised},
		"hardening":                 {tdxsim.Config{TEETCBSVN2: now, TCBStatus: "SWHardeningNeeded"}, dcap.TDRelaunchAdvised},
		"configuration":             {tdxsim.Config{TEETCBSVN2: now, TCBStatus: "ConfigurationNeeded"}, dcap.TDRelaunchAdvisedConfigurationNeeded},
		"configuration, hardening":  {tdxsim.Config{TEETCBSVN2: now, TCBStatus: "ConfigurationAndSWHardeningNeeded"}, dcap.TDRelaunchAdvisedConfigurationNeeded},
		"module 0 by now":           {tdxsim.Config{TEETCBSVN2: [16]byte{5, 0, 4}}, dcap.TDRelaunchAdvised},
		"older module 0 by now":     {tdxsim.Config{TEETCBSVN2: [16]byte{4, 0, 4}}, dcap.OutOfDate},
		"module as at launch":       {tdxsim.Config{}, dcap.OutOfDate},
		"microcode older than that": {tdxsim.Config{TEETCBSVN2: [16]byte{8, 1, 3}}, dcap.OutOfDate},
		"unknown module by now":     {tdxsim.Config{TEETCBSVN2: [16]byte{8, 7, 4}}, dcap.OutOfDate},
		"body type 2":               {tdxsim.Config{TEETCBSVN2: now, BodyType: 2}, dcap.OutOfDate},
		"microcode was older too":   {tdxsim.Config{TEETCBSVN2: [16]byte{8, 1, 5}, TCBStatus: "OutOfDate"}, dcap.TDRelaunchAdvised},
		"SGX side out of date":      {tdxsim.Config{TEETCBSVN2: [16]byte{8, 1, 5}, TCBStatus: "OutOfDate", EditTCBInfo: newerSGX}, dcap.OutOfDate},
		"QE out of date":            {tdxsim.Config{TEETCBSVN2: now, QEStatus: "OutOfDate"}, dcap.OutOfDate},
		"QE revoked":                {tdxsim.Config{TEETCBSVN2: now, QEStatus: "Revoked"}, dcap.Revoked},
		"QE unknown":                {tdxsim.Config{TEETCBSVN2: now, QEStatus: "Excellent"}, dcap.Unrecognized},
	} {
		t.Run(name, func(t *testing.T) {
			c.cfg.QuoteVersion, c.cfg.ModuleStatus = 5, "OutOfDate"
			if r := simulate(t, c.cfg).mustVerify(t); r.Merged.Status != c.want {
				t.Errorf("got %s, want %s", r.Merged.Status, c.want)
			}
		})
	}
}

// TestNotIntels lists what is wrong about a module or an enclave as such.
func TestNotIntels(t *testing.T) {
	replace := func(old, with string) func(string) string { return replacer(t, old, with) }
	for code, cfg := range map[string]tdxsim.Config{
		"tdx_module_mismatch": {EditTCBInfo: replace(`"id":"TDX_01"`, `"id":"TDX_02"`)},
		"seam_signer":         {EditTCBInfo: replace(`"id":"TDX_01","mrsigner":"00`, `"id":"TDX_01","mrsigner":"01`)},
		"seam_attributes":     {SEAMAttributes: 1},
		"qe_signer":           {EditQEIdentity: replace(`"mrsigner":"`, `"mrsigner":"00`)},
		"qe_product":          {EditQEIdentity: replace(`"isvprodid":2`, `"isvprodid":1`)},
		"qe_miscselect":       {EditQEIdentity: replace(`"miscselect":"00000000"`, `"miscselect":"00000001"`)},
		"qe_attributes":       {QEDebug: true},
		"fmspc_mismatch":      {EditTCBInfo: replace(`"fmspc":"`, `"fmspc":"AB`)},
		"pceid_mismatch":      {EditTCBInfo: replace(`"pceId":"0000"`, `"pceId":"0100"`)},
	} {
		t.Run(code, func(t *testing.T) {
			_, err := simulate(t, cfg).verify(t)
			wantCode(t, err, code)
		})
	}
	// A module identity replaces the base module's signer.
	base := replace(`"tdxModule":{"mrsigner":"00`, `"tdxModule":{"mrsigner":"01`)
	simulate(t, tdxsim.Config{EditTCBInfo: base}).mustVerify(t)
	_, err := simulate(t, tdxsim.Config{EditTCBInfo: base, TEETCBSVN: [16]byte{5, 0, 4}}).verify(t)
	wantCode(t, err, "seam_signer")
	r := simulate(t, tdxsim.Config{EditQEIdentity: editLevels(t, func(levels []any) []any { return levels[:0:0] })})
	if _, err := dcap.ParseCollateral(r.bundle, r.roots); err == nil {
		t.Error("a QE identity without levels is accepted")
	}
}
