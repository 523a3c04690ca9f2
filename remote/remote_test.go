package remote_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

var testTime = time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)

// attester is a simulated TD that has measured an application.
type attester struct {
	td     *tdxsim.TD
	root   [32]byte
	bundle []byte
	events []measure.Event
}

// application measures these events into RTMR3; nil is the default application.
func newAttester(t testing.TB, cfg tdxsim.Config, application []measure.Event) *attester {
	t.Helper()
	if cfg.Seed == nil {
		cfg.Seed = []byte("remote")
	}
	cfg.Now = func() time.Time { return testTime }
	td, err := tdxsim.New(t.TempDir(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	a := &attester{td: td}
	if a.bundle, err = td.Collateral(); err != nil {
		t.Fatal(err)
	}
	roots, err := dcap.NewRoots(td.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	a.root = roots.Pins()[0]
	if a.events, err = measure.ParseCCEL(td.CCEL()); err != nil {
		t.Fatal(err)
	}
	if application == nil {
		application = bootEvents(t)
	}
	for _, e := range application {
		a.emit(t, e)
	}
	return a
}

func (a *attester) emit(t testing.TB, e measure.Event) {
	t.Helper()
	if err := a.td.Extend(measure.RTMR3, e.Digest); err != nil {
		t.Fatal(err)
	}
	a.events = append(a.events, e)
}

func event(t testing.TB, name string, payload []byte) measure.Event {
	t.Helper()
	e, err := measure.NewRuntimeEvent(name, payload, measure.EventV1)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

var (
	testCompose  = []byte(`{"name":"test"}`)
	testProvider = measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: []byte{1, 2, 3}}
	testInstance = []byte("instance--20-bytes--")
)

func composeHash() []byte {
	h := measure.ComposeHash(testCompose)
	return h[:]
}

// bootEvents are the events of the default application.
func bootEvents(t testing.TB) []measure.Event {
	return []measure.Event{
		event(t, measure.EventSystemPreparing, nil), event(t, measure.EventAppID, composeHash()[:20]), event(t, measure.EventComposeHash, composeHash()),
		event(t, measure.EventInstanceID, testInstance), event(t, measure.EventBootMRDone, nil), event(t, measure.EventKeyProvider, testProvider.Payload()),
		event(t, measure.EventStorageFS, []byte("ext4")), event(t, measure.EventSystemReady, nil),
	}
}

// evidence makes Evidence that binds this report data.
func (a *attester) evidence(t testing.TB, rd measure.ReportData) *measure.Evidence {
	t.Helper()
	c := a.td.Client()
	dir, err := c.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteFile(dir+"/inblob", rd[:]); err != nil {
		t.Fatal(err)
	}
	quote, err := c.ReadFile(dir + "/outblob")
	if err != nil {
		t.Fatal(err)
	}
	events := append([]measure.Event(nil), a.events...)
	for i := range events {
		events[i].Payload = bytes.Clone(events[i].Payload)
	}
	return &measure.Evidence{Quote: quote, Events: events, VMConfig: `{"os_image_hash":"` + strings.Repeat("ab", 32) + `"}`}
}

// policyText accepts just this TD, with lines of an entry, of the defaults and of the
// image added.
func (a *attester) policyText(t testing.TB, entry, defaults, image string) string {
	t.Helper()
	q, err := measure.ParseQuote(a.evidence(t, measure.ReportData{}).Quote)
	if err != nil {
		t.Fatal(err)
	}
	b := &q.Body
	return fmt.Sprintf(`version = 1
[defaults]
%s
[[peer]]
name = "worker"
root = "sha256:%x"
allow_simulated = true
image = ["test"]
app_id = ["%x"]
compose_hash = ["%x"]
%s
[image.test]
mrtd = ["%s"]
rtmr0 = ["%s"]
rtmr1 = ["%s"]
rtmr2 = ["%s"]
%s
`, defaults, a.root, composeHash()[:20], composeHash(), entry, b.MRTD, b.RTMR[0], b.RTMR[1], b.RTMR[2], image)
}

func parsePolicy(t testing.TB, text string) *remote.Policy {
	t.Helper()
	p, err := remote.ParsePolicy("policy.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func newStore(t testing.TB, p *remote.Policy, bundle []byte, now func() time.Time) *collateral.Store {
	t.Helper()
	roots, err := p.Roots()
	if err != nil {
		t.Fatal(err)
	}
	cfg := collateral.Config{Roots: roots, Now: now}
	if bundle != nil {
		path := filepath.Join(t.TempDir(), "collateral.json")
		if err := os.WriteFile(path, bundle, 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.Files = []string{path}
	}
	s, err := collateral.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newVerifier(t testing.TB, p *remote.Policy, bundle []byte) *remote.Verifier {
	t.Helper()
	now := func() time.Time { return testTime }
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: newStore(t, p, bundle, now), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

var anyData = remote.Expect{AnyReportData: true}

// wantRefused wants a *Rejection whose first failed check is this, with this code.
func wantRefused(t testing.TB, err error, check, code string, isGenuine bool) {
	t.Helper()
	r, ok := errors.AsType[*remote.Rejection](err)
	if !ok {
		t.Fatalf("got %v, want a rejection by %s", err, check)
	}
	failed := r.Result.Failed()
	if len(failed) == 0 || failed[0].Name != check || failed[0].Code != code || r.Genuine() != isGenuine || r.Code() != code {
		t.Errorf("got %+v, genuine %v, want %s (%s), genuine %v", failed, r.Genuine(), check, code, isGenuine)
	}
	if len(failed) > 0 && (failed[0].Got == "" && failed[0].Hint == "") {
		t.Errorf("%s says neither what was there nor what to do", check)
	}
}

func TestAccepted(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	rd := measure.ReportData{1, 2, 3}
	for range 2 { // the second time from the caches
		r, err := v.Appraise(context.Background(), a.evidence(t, rd), remote.Expect{ReportData: rd, Compose: testCompose})
		if err != nil {
			t.Fatal(err)
		}
		if !r.Accepted || r.Entry != "worker" || len(r.Failed()) > 0 || !r.Genuine() || r.Claims.Report.SecondOpinion != "agrees" {
			t.Errorf("got %+v", r)
		}
		for _, name := range []string{"signature", "root", "collateral", "tcb_status", "advisories", "collateral_age", "debug", "sept_ve_disable", "service_td",
			"mrtd", "rtmr0", "rtmr1", "rtmr2", "boot_log", "event_log", "identity", "required_events", "app_id", "compose_hash", "compose", "report_data"} {
			if o := outcome(r, name); o != remote.Passed {
				t.Errorf("%s is %v, want passed", name, o)
			}
		}
		for _, name := range []string{"instance_id", "key_provider", "device_id", "mr_seam"} {
			if o := outcome(r, name); o != remote.NotChecked {
				t.Errorf("%s is %v, want not checked: nobody asked", name, o)
			}
		}
	}
}

func outcome(r *remote.Result, name string) remote.Outcome {
	for _, c := range r.Checks {
		if c.Name == name {
			return c.Outcome
		}
	}
	return -1
}

// TestRefused has one vector for each way in which evidence can be wrong.
func TestRefused(t *testing.T) {
	late := func(t *testing.T) []measure.Event {
		return append(bootEvents(t), event(t, measure.EventAppID, make([]byte, 20)))
	}
	twice := func(t *testing.T) []measure.Event {
		e := bootEvents(t)
		return append(e[:2:2], append([]measure.Event{event(t, measure.EventAppID, make([]byte, 20))}, e[2:]...)...)
	}
	for _, tc := range []struct {
		name        string
		cfg         tdxsim.Config
		app         func(*testing.T) []measure.Event
		edit        func(*measure.Evidence)
		expect      func(*remote.Expect)
		entry       string
		defaults    string
		image       string
		check, code string
		notGenuine  bool
	}{
		{name: "quote changed", edit: func(e *measure.Evidence) { e.Quote[600] ^= 1 }, check: "signature", code: "quote_signature", notGenuine: true},
		{name: "no quote", edit: func(e *measure.Evidence) { e.Quote = nil }, check: "signature", code: "quote_format", notGenuine: true},
		{name: "revoked", cfg: tdxsim.Config{Revoked: true}, check: "signature", code: "pck_revoked", notGenuine: true},
		{name: "out of date", cfg: tdxsim.Config{TCBStatus: "OutOfDate"}, check: "tcb_status", code: "tcb_status"},
		{name: "module out of date", cfg: tdxsim.Config{ModuleStatus: "OutOfDate"}, check: "tcb_status", code: "tcb_status"},
		{name: "unknown status", cfg: tdxsim.Config{TCBStatus: "Splendid"}, check: "tcb_status", code: "tcb_status"},
		{name: "revoked TCB", cfg: tdxsim.Config{TCBStatus: "Revoked"}, check: "tcb_status", code: "tcb_status"},
		{name: "advisory", cfg: tdxsim.Config{TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}}, defaults: `tcb_status = ["UpToDate", "SWHardeningNeeded"]`, check: "advisories", code: "advisories"},
		{name: "denied advisory", cfg: tdxsim.Config{TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}}, defaults: "tcb_status = [\"SWHardeningNeeded\"]\nallow_any_advisory = true\nadvisories_deny = [\"INTEL-SA-1\"]", check: "advisories", code: "advisories"},
		{name: "old TCB", defaults: "min_tcb_date = 2026-06-01T00:00:00Z", check: "tcb_date", code: "tcb_date"},
		{name: "old evaluation", defaults: "min_tcb_eval_number = 21", check: "tcb_evaluation", code: "tcb_evaluation"},
		{name: "old collateral", cfg: tdxsim.Config{TCBInfo: tdxsim.Window{From: testTime.AddDate(0, 0, -8), Until: testTime.AddDate(0, 0, 20)}}, check: "collateral_age", code: "collateral_age"},
		{name: "expired collateral", cfg: tdxsim.Config{TCBInfo: tdxsim.Window{From: testTime.AddDate(0, 0, -9), Until: testTime.AddDate(0, 0, -1)}}, check: "collateral", code: "collateral_expired"},
		{name: "another FMSPC", entry: `fmspc = ["000000000000"]`, check: "fmspc", code: "fmspc"},
		{name: "denied FMSPC", cfg: tdxsim.Config{FMSPC: [6]byte{1, 2, 3, 4}}, entry: `fmspc_deny = ["010203040000"]`, check: "fmspc", code: "fmspc"},
		{name: "low SVN", entry: `min_tee_tcb_svn = "0701ff"`, check: "svn", code: "svn"},
		{name: "low QE SVN", entry: `min_qe_svn = 9999`, check: "svn", code: "svn"},
		{name: "low PCE SVN", entry: `min_pce_svn = 9999`, check: "svn", code: "svn"},
		{name: "debug", cfg: tdxsim.Config{Debug: true}, check: "debug", code: "debug"},
		{name: "no SEPT_VE_DISABLE", cfg: tdxsim.Config{Attributes: 1 << 30}, check: "sept_ve_disable", code: "sept_ve_disable"},
		{name: "reserved attribute", cfg: tdxsim.Config{Attributes: 1<<28 | 1<<29}, check: "reserved_attributes", code: "reserved_attributes"},
		{name: "service TD", cfg: tdxsim.Config{QuoteVersion: 5, MRServiceTD: measure.Digest{1}}, check: "service_td", code: "service_td"},
		{name: "TD attributes", cfg: tdxsim.Config{Attributes: 1<<28 | 1<<30}, entry: `td_attributes = {mask = "0000004000000000", value = "0000000000000000"}`, check: "td_attributes", code: "td_attributes"},
		{name: "XFAM", entry: `xfam = {mask = "ffffffffffffffff", value = "0000000000000000"}`, check: "xfam", code: "xfam"},
		{name: "TDX module", entry: `mr_seam = ["` + strings.Repeat("00", 48) + `"]`, check: "mr_seam", code: "mr_seam"},
		{name: "image's TDX module", image: `mr_seam = ["` + strings.Repeat("00", 48) + `"]`, check: "image_mr_seam", code: "image_mr_seam"},
		{name: "image's SVN", image: `min_tee_tcb_svn = "ff"`, check: "image_svn", code: "image_svn"},
		{name: "image's XFAM", image: `xfam = {mask = "ffffffffffffffff", value = "0000000000000000"}`, check: "image_xfam", code: "image_xfam"},
		{name: "image hash", image: `os_image_hash = "` + strings.Repeat("cd", 32) + `"`, check: "os_image_hash", code: "os_image_hash"},
		{name: "no image hash", image: `os_image_hash = "` + strings.Repeat("ab", 32) + `"`, edit: func(e *measure.Evidence) { e.VMConfig = "" }, check: "os_image_hash", code: "os_image_hash"},
		{name: "boot log changed", edit: func(e *measure.Evidence) { e.Events[3].Digest[0] ^= 1 }, check: "boot_log", code: "boot_log", notGenuine: true},
		{name: "boot event missing", edit: func(e *measure.Evidence) { e.Events = e.Events[1:] }, check: "boot_log", code: "boot_log", notGenuine: true},
		{name: "runtime event missing", edit: func(e *measure.Evidence) { e.Events = e.Events[:len(e.Events)-1] }, check: "event_log", code: "event_log", notGenuine: true},
		{name: "event renamed", edit: func(e *measure.Evidence) { e.Events[len(e.Events)-1].Name = "x" }, check: "event_log", code: "event_log_format", notGenuine: true},
		{name: "event in no register", edit: func(e *measure.Evidence) { e.Events[0].IMR = 4 }, check: "event_log", code: "event_log_format", notGenuine: true},
		{name: "reserved event after system-ready", app: late, check: "identity", code: "identity_events", notGenuine: true},
		{name: "app-id twice", app: twice, check: "identity", code: "identity_events", notGenuine: true},
		{name: "no log", edit: func(e *measure.Evidence) { e.Events = nil }, check: "required_events", code: "required_events"},
		{name: "no system-ready", app: func(t *testing.T) []measure.Event { return bootEvents(t)[:7] }, check: "required_events", code: "required_events"},
		{name: "no compose-hash", app: func(t *testing.T) []measure.Event { e := bootEvents(t); return append(e[:2:2], e[3:]...) }, check: "required_events", code: "required_events"},
		{name: "required event", entry: `require_events = ["os-image-hash"]`, check: "required_events", code: "required_events"},
		{name: "another instance", entry: `instance_id = ["` + strings.Repeat("00", 20) + `"]`, check: "instance_id", code: "instance_id"},
		{name: "another device", entry: `device_id = ["` + strings.Repeat("00", 32) + `"]`, check: "device_id", code: "device_id"},
		{name: "another PPID", entry: `ppid = ["` + strings.Repeat("00", 16) + `"]`, check: "ppid", code: "ppid"},
		{name: "another KMS", entry: `key_provider = {kind = "kms", id = ["ff"]}`, check: "key_provider", code: "key_provider"},
		{name: "no KMS", entry: `key_provider = {kind = "none"}`, check: "key_provider", code: "key_provider"},
		{name: "another RTMR3", entry: `rtmr3 = ["` + strings.Repeat("00", 48) + `"]`, check: "rtmr3", code: "rtmr3"},
		{name: "MRCONFIGID of another application", cfg: tdxsim.Config{MRConfigID: measure.MRConfigIDV1([32]byte{1})}, check: "mr_config_id", code: "mr_config_id"},
		{name: "MRCONFIGID not the pinned one", entry: `mr_config_id = ["` + strings.Repeat("01", 48) + `"]`, check: "mr_config_id", code: "mr_config_id"},
		{name: "another compose file", expect: func(x *remote.Expect) { x.Compose = []byte("{}") }, check: "compose", code: "compose"},
		{name: "another nonce", expect: func(x *remote.Expect) { x.ReportData[63] = 1 }, check: "report_data", code: "report_data"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var app []measure.Event
			if tc.app != nil {
				app = tc.app(t)
			}
			a := newAttester(t, tc.cfg, app)
			v := newVerifier(t, parsePolicy(t, a.policyText(t, tc.entry, tc.defaults, tc.image)), a.bundle)
			ev, x := a.evidence(t, measure.ReportData{}), remote.Expect{}
			if tc.edit != nil {
				tc.edit(ev)
			}
			if tc.expect != nil {
				tc.expect(&x)
			}
			_, err := v.Appraise(context.Background(), ev, x)
			wantRefused(t, err, tc.check, tc.code, !tc.notGenuine)
		})
	}
}

// TestAcceptedOnRequest has the other side of the switches.
func TestAcceptedOnRequest(t *testing.T) {
	for _, tc := range []struct {
		name            string
		cfg             tdxsim.Config
		app             func(*testing.T) []measure.Event
		entry, defaults string
		image           string
	}{
		{name: "status and advisory", cfg: tdxsim.Config{TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}}, defaults: "tcb_status = [\"SWHardeningNeeded\"]\nadvisories_allow = [\"INTEL-SA-1\"]"},
		{name: "any advisory", cfg: tdxsim.Config{TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}}, defaults: "tcb_status = [\"SWHardeningNeeded\"]\nallow_any_advisory = true"},
		{name: "grace", cfg: tdxsim.Config{TCBStatus: "OutOfDate"}, defaults: `tcb_grace = "5000h"`},
		{name: "debug", cfg: tdxsim.Config{Debug: true}, entry: "allow_debug = true"},
		{name: "service TD", cfg: tdxsim.Config{QuoteVersion: 5, MRServiceTD: measure.Digest{1}}, entry: "allow_service_td = true"},
		{name: "no SEPT_VE_DISABLE", cfg: tdxsim.Config{Attributes: 1 << 30}, defaults: "require_sept_ve_disable = false"},
		{name: "an entry replaces a default", cfg: tdxsim.Config{TCBStatus: "SWHardeningNeeded"}, defaults: `tcb_status = ["UpToDate"]`, entry: `tcb_status = ["SWHardeningNeeded"]`},
		{name: "dstack 0.3", app: func(t *testing.T) []measure.Event { return bootEvents(t)[:7] }, entry: `era = "0.3"`},
		{name: "old collateral", cfg: tdxsim.Config{TCBInfo: tdxsim.Window{From: testTime.AddDate(0, 0, -8), Until: testTime.AddDate(0, 0, 20)}}, defaults: "allow_any_collateral_age = true"},
		{name: "MRCONFIGID", cfg: tdxsim.Config{MRConfigID: measure.MRConfigIDV1([32]byte(composeHash()))}},
		{name: "pins", entry: `instance_id = ["` + hex.EncodeToString(testInstance) + "\"]\nkey_provider = {kind = \"kms\", id = [\"010203\"]}\nrequire_events = [\"storage-fs\", \"boot-mr-done\"]", image: `os_image_hash = "` + strings.Repeat("ab", 32) + `"`},
		{name: "any KMS", entry: `key_provider = {kind = "kms", allow_any_id = true}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var app []measure.Event
			if tc.app != nil {
				app = tc.app(t)
			}
			a := newAttester(t, tc.cfg, app)
			v := newVerifier(t, parsePolicy(t, a.policyText(t, tc.entry, tc.defaults, tc.image)), a.bundle)
			if _, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), remote.Expect{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGraceEnds refuses one second after the grace.
func TestGraceEnds(t *testing.T) {
	a := newAttester(t, tdxsim.Config{TCBStatus: "OutOfDate"}, nil)
	newest := time.Date(2026, 5, 13, 0, 0, 0, 0, time.UTC) // the simulator's newest level
	for grace, isAccepted := range map[time.Duration]bool{testTime.Sub(newest): true, testTime.Sub(newest) - time.Second: false} {
		v := newVerifier(t, parsePolicy(t, a.policyText(t, "", fmt.Sprintf("tcb_grace = %q", grace), "")), a.bundle)
		_, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
		if (err == nil) != isAccepted {
			t.Errorf("grace %v: got %v, want accepted %v", grace, err, isAccepted)
		}
	}
}

// TestLogsAreNotMixedUp gives evidence with the log of another moment, after that log
// was remembered.
func TestLogsAreNotMixedUp(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	old := a.evidence(t, measure.ReportData{})
	if _, err := v.Appraise(context.Background(), old, anyData); err != nil {
		t.Fatal(err)
	}
	a.emit(t, event(t, "later", nil))
	ev := a.evidence(t, measure.ReportData{})
	ev.Events = old.Events
	_, err := v.Appraise(context.Background(), ev, anyData)
	wantRefused(t, err, "event_log", "event_log", false)
	// The caller's bytes are the caller's: what is remembered does not change with them.
	for i := range old.Events {
		for j := range old.Events[i].Payload {
			old.Events[i].Payload[j] ^= 0xff
		}
	}
	r, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
	if err != nil || hex.EncodeToString(r.Claims.Identity.ComposeHash) != hex.EncodeToString(composeHash()) {
		t.Errorf("got %v, %v", r, err)
	}
}

// TestEntries takes the entry that fits, of those that are expected.
func TestEntries(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	text := a.policyText(t, "", "", "")
	second := strings.NewReplacer("worker", "other").Replace(text[strings.Index(text, "[[peer]]"):strings.Index(text, "[image")])
	second = strings.Replace(second, hex.EncodeToString(composeHash()), strings.Repeat("00", 32), 1)
	p := parsePolicy(t, strings.Replace(text, "[[peer]]", second+"\n[[peer]]", 1))
	v := newVerifier(t, p, a.bundle)
	ev := a.evidence(t, measure.ReportData{})
	r, err := v.Appraise(context.Background(), ev, anyData)
	if err != nil || r.Entry != "worker" {
		t.Fatalf("got %+v, %v", r, err)
	}
	if all := r.Explain(); len(all) != 2 || all[0].Entry != "other" || all[0].Accepted || !all[1].Accepted {
		t.Errorf("explained as %+v", all)
	}
	_, err = v.Appraise(context.Background(), ev, remote.Expect{AnyReportData: true, Entries: []string{"other"}})
	wantRefused(t, err, "compose_hash", "compose_hash", true)
	if _, err = v.Appraise(context.Background(), ev, remote.Expect{AnyReportData: true, Entries: []string{"nobody"}}); err == nil {
		t.Error("an entry that is not there accepts")
	}
	if _, err = v.Appraise(context.Background(), ev, remote.Expect{AnyReportData: true, Entries: []string{}}); err == nil {
		t.Error("no entry accepts")
	}
}

// TestZeroDenies has the values that somebody might forget to fill.
func TestZeroDenies(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	p := remote.BuiltinPolicy(a.root)
	store := newStore(t, p, a.bundle, func() time.Time { return testTime })
	for name, cfg := range map[string]remote.Config{
		"nothing":                             {},
		"no policy":                           {Collateral: store},
		"empty policy":                        {Policy: new(remote.Policy), Collateral: store},
		"no collateral":                       {Policy: p},
		"simulated evidence on real hardware": {Policy: p, Collateral: store, RealHardware: true},
	} {
		if _, err := remote.NewVerifier(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	v := newVerifier(t, p, a.bundle)
	if _, err := v.Appraise(context.Background(), nil, anyData); err == nil {
		t.Error("no evidence is accepted")
	}
	_, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{1}), remote.Expect{})
	wantRefused(t, err, "report_data", "report_data", true)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := v.Appraise(ctx, a.evidence(t, measure.ReportData{}), anyData); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that has ended: %v", err)
	}
}

// TestOtherRoot refuses what another root signed, whatever else fits.
func TestOtherRoot(t *testing.T) {
	a, b := newAttester(t, tdxsim.Config{}, nil), newAttester(t, tdxsim.Config{Seed: []byte("other")}, nil)
	v := newVerifier(t, remote.BuiltinPolicy(a.root), a.bundle)
	_, err := v.Appraise(context.Background(), b.evidence(t, measure.ReportData{}), anyData)
	wantRefused(t, err, "signature", "root_not_trusted", false)
	v = newVerifier(t, remote.BuiltinPolicy(), nil)
	_, err = v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
	wantRefused(t, err, "signature", "root_not_trusted", false)

	// Two entries with a root each: a quote of one does not fit the other's entry.
	text := a.policyText(t, "", "", "")
	own := text[strings.Index(text, "[[peer]]"):strings.Index(text, "[image")]
	other := strings.NewReplacer("worker", "other", fmt.Sprintf("%x", a.root), fmt.Sprintf("%x", b.root)).Replace(own)
	v = newVerifier(t, parsePolicy(t, strings.Replace(text, "[[peer]]", other+"\n[[peer]]", 1)), a.bundle)
	r, err := v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), anyData)
	if err != nil || r.Entry != "worker" {
		t.Fatalf("got %+v, %v", r, err)
	}
	_, err = v.Appraise(context.Background(), a.evidence(t, measure.ReportData{}), remote.Expect{AnyReportData: true, Entries: []string{"other"}})
	wantRefused(t, err, "root", "root", true)
}

// TestCollateralOnlyForTheGenuine has a peer's own bundle, and quotes that are not
// worth one.
func TestCollateralOnlyForTheGenuine(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	p := remote.BuiltinPolicy(a.root)
	v := newVerifier(t, p, nil)
	ev := a.evidence(t, measure.ReportData{})
	_, err := v.Appraise(context.Background(), ev, anyData)
	r, ok := errors.AsType[*remote.Rejection](err)
	if !ok || r.Result.Failed()[0].Name != "collateral" || !r.Genuine() {
		t.Fatalf("without collateral: %v", err)
	}
	if _, err := v.Appraise(context.Background(), ev, remote.Expect{AnyReportData: true, Offered: a.bundle}); err != nil {
		t.Errorf("with the peer's bundle: %v", err)
	}
	if _, err := v.Appraise(context.Background(), ev, anyData); err == nil {
		t.Error("a peer's bundle was kept")
	}
	ev.Quote[600] ^= 1
	_, err = v.Appraise(context.Background(), ev, remote.Expect{AnyReportData: true, Offered: a.bundle})
	wantRefused(t, err, "signature", "quote_signature", false)
}

// TestSetPolicy judges by the policy of now, and keeps it where the next is none.
func TestSetPolicy(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	v := newVerifier(t, parsePolicy(t, a.policyText(t, "", "", "")), a.bundle)
	ev := a.evidence(t, measure.ReportData{})
	if _, err := v.Appraise(context.Background(), ev, anyData); err != nil {
		t.Fatal(err)
	}
	stricter := parsePolicy(t, a.policyText(t, "min_qe_svn = 9999", "", ""))
	if err := v.SetPolicy(stricter, newStore(t, stricter, a.bundle, func() time.Time { return testTime })); err != nil {
		t.Fatal(err)
	}
	_, err := v.Appraise(context.Background(), ev, anyData)
	wantRefused(t, err, "svn", "svn", true)
	if err := v.SetPolicy(nil, nil); err == nil || v.Policy() != stricter {
		t.Errorf("no policy: %v", err)
	}
}
