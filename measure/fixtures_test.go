package measure_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure"
)

// fixture is an item of the manifest of real evidence.
type fixture struct {
	ID, Path, Kind string
	Related        struct{ Quote string } // the fixture that holds its quote
	Expect         struct {
		Quote       json.RawMessage
		EventLog    *expectedLog   `json:"event_log"`
		PerMR       map[int]int    `json:"events_per_mr"` // from 1: register index of the TCG log
		RuntimeList []string       `json:"runtime_events_list"`
		Inner       *expectedInner `json:"attestation"`
		expectedLog                // kinds event-log and ccel have its members here
	}
	raw []byte
}

type expectedLog struct {
	PerIMR   [4]int                           `json:"per_imr"`
	Replayed [4]measure.Digest                `json:"replayed_rtmr"`
	Runtime  []struct{ Name, Payload string } `json:"runtime_events"`
	Matches  *[4]bool                         `json:"matches_quote"`
}

// expectedInner is what an attestation beside a quote and its log holds.
type expectedInner struct {
	Events int `json:"boot_and_runtime_events"`
}

type expectedQuote struct {
	SHA256        string
	Length        int
	TrailingBytes int `json:"trailing_bytes"`
	Version       uint16
	KeyType       uint16            `json:"att_key_type"`
	TEEType       uint32            `json:"tee_type"`
	BodyType      *uint16           `json:"body_type"`
	UserData      string            `json:"header_user_data"`
	TEETCBSVN     string            `json:"tee_tcb_svn"`
	MRSEAM        measure.Digest    `json:"mr_seam"`
	MRSignerSEAM  measure.Digest    `json:"mr_signer_seam"`
	SEAMAttr      string            `json:"seam_attributes"`
	TDAttr        string            `json:"td_attributes"`
	XFAM          string            `json:"xfam"`
	MRTD          measure.Digest    `json:"mrtd"`
	MRConfigID    measure.Digest    `json:"mr_config_id"`
	MROwner       measure.Digest    `json:"mr_owner"`
	MROwnerConfig measure.Digest    `json:"mr_owner_config"`
	RTMR          [4]measure.Digest `json:"rtmr"`
	ReportData    string            `json:"report_data"`
	SVN2          string            `json:"tee_tcb_svn2"`
	MRServiceTD   *measure.Digest   `json:"mr_service_td"`
	Debug         bool
}

// fixtures reads the manifest, or skips the test where there is none.
func fixtures(t *testing.T) []fixture {
	t.Helper()
	dir := os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = filepath.Join("..", "..", "shared", "fixtures")
	}
	b, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		t.Skipf("no real evidence: set TDX_AGENT_FIXTURES to its folder (%v)", err)
	}
	var m struct{ Items []fixture }
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	for i := range m.Items {
		if m.Items[i].raw, err = os.ReadFile(filepath.Join(dir, m.Items[i].Path)); err != nil {
			t.Fatal(err)
		}
	}
	return m.Items
}

// member finds a member of a JSON document under one of its names.
func member(t *testing.T, doc []byte, names ...string) json.RawMessage {
	t.Helper()
	var o map[string]json.RawMessage
	if err := json.Unmarshal(doc, &o); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if v, ok := o[n]; ok {
			return v
		}
	}
	return nil
}

func text(t *testing.T, v json.RawMessage) string {
	t.Helper()
	var s string
	if err := json.Unmarshal(v, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// quote returns the quote in a fixture, in whichever form it has.
func (f *fixture) quote(t *testing.T) []byte {
	t.Helper()
	var b []byte
	var err error
	switch {
	case strings.HasSuffix(f.Path, ".hex"):
		b, err = hex.DecodeString(strings.TrimSpace(string(f.raw)))
	case f.Kind == "quote" && strings.HasSuffix(f.Path, ".json"):
		var numbers []byte
		var list []int
		err = json.Unmarshal(f.raw, &list)
		for _, n := range list {
			numbers = append(numbers, byte(n))
		}
		b = numbers
	case f.Kind == "attestation":
		b = f.attestation(t).Quote
	case f.Kind == "azure-evidence":
		b, err = base64.URLEncoding.DecodeString(text(t, member(t, f.raw, "quote", "td_quote")))
	case strings.HasSuffix(f.Path, ".json"):
		b, err = hex.DecodeString(strings.TrimPrefix(text(t, member(t, f.raw, "quote", "intel_quote")), "0x"))
	default:
		b = f.raw
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (f *fixture) attestation(t *testing.T) *measure.Attestation {
	t.Helper()
	b, err := hex.DecodeString(text(t, member(t, f.raw, "attestation")))
	if err != nil {
		t.Fatal(err)
	}
	a, err := measure.ParseAttestation(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestRealQuotes compares every field of every real quote with what two other
// programs have read from it.
func TestRealQuotes(t *testing.T) {
	seen := 0
	for _, f := range fixtures(t) {
		var want expectedQuote
		if len(f.Expect.Quote) == 0 || f.Expect.Quote[0] != '{' {
			continue
		}
		t.Run(f.ID, func(t *testing.T) {
			if err := json.Unmarshal(f.Expect.Quote, &want); err != nil {
				t.Fatal(err)
			}
			raw := f.quote(t)
			q, err := measure.ParseQuote(raw)
			if err != nil {
				t.Fatal(err)
			}
			compareQuote(t, q, raw, &want)
		})
		seen++
	}
	if seen < 15 {
		t.Errorf("only %d quotes in the manifest", seen)
	}
}

func compareQuote(t *testing.T, q *measure.Quote, raw []byte, want *expectedQuote) {
	t.Helper()
	eq := func(name string, got, want any) {
		t.Helper()
		if got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	sum := sha256.Sum256(raw[:len(raw)-len(q.Trailing)])
	eq("SHA-256 without trailing bytes", hex.EncodeToString(sum[:]), want.SHA256)
	eq("length", len(raw)-len(q.Trailing), want.Length)
	eq("trailing bytes", len(q.Trailing), want.TrailingBytes)
	eq("version", q.Version, want.Version)
	eq("key type", q.AttestationKeyType, want.KeyType)
	eq("TEE type", q.TEEType, want.TEEType)
	body := uint16(measure.BodyTD10)
	if want.BodyType != nil {
		body = *want.BodyType
	}
	eq("body type", q.BodyType, body)
	b := &q.Body
	for _, f := range []struct {
		name string
		got  []byte
		want string
	}{{"user data", q.UserData[:], want.UserData}, {"TEE_TCB_SVN", b.TEETCBSVN[:], want.TEETCBSVN}, {"SEAM attributes", b.SEAMAttributes[:], want.SEAMAttr},
		{"TD attributes", b.TDAttributes[:], want.TDAttr}, {"XFAM", b.XFAM[:], want.XFAM}, {"report data", b.ReportData[:], want.ReportData}} {
		eq(f.name, hex.EncodeToString(f.got), f.want)
	}
	eq("MRSEAM", b.MRSEAM, want.MRSEAM)
	eq("MRSIGNERSEAM", b.MRSignerSEAM, want.MRSignerSEAM)
	eq("registers", b.Registers, measure.Registers{MRTD: want.MRTD, MRConfigID: want.MRConfigID, MROwner: want.MROwner, MROwnerConfig: want.MROwnerConfig, RTMR: want.RTMR})
	eq("debug", b.Debug(), want.Debug)
	if want.MRServiceTD != nil {
		eq("TEE_TCB_SVN_2", hex.EncodeToString(b.TEETCBSVN2[:]), want.SVN2)
		eq("MR_SERVICETD", b.MRServiceTD, *want.MRServiceTD)
	}
}

// quoteOf returns the parsed quote that belongs to f, its own or the related one's.
func quoteOf(t *testing.T, all []fixture, f *fixture) *measure.Quote {
	t.Helper()
	if i := slices.IndexFunc(all, func(o fixture) bool { return o.ID == f.Related.Quote }); i >= 0 {
		f = &all[i]
	}
	q, err := measure.ParseQuote(f.quote(t))
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// compareLog replays events and compares them with the manifest, and with the quote
// where the manifest says which registers match.
func compareLog(t *testing.T, events []measure.Event, want *expectedLog, q func() *measure.Quote) {
	t.Helper()
	rtmr, err := measure.Replay(events)
	if err != nil || rtmr != want.Replayed {
		t.Errorf("replays to %v, want %v (%v)", rtmr, want.Replayed, err)
	}
	var runtime []struct{ Name, Payload string }
	for _, e := range events {
		if e.IsRuntime() {
			runtime = append(runtime, struct{ Name, Payload string }{e.Name, hex.EncodeToString(e.Payload)})
		}
	}
	if !slices.Equal(runtime, want.Runtime) {
		t.Errorf("runtime events are %v, want %v", runtime, want.Runtime)
	}
	if want.Matches == nil {
		return
	}
	quote := q()
	for i, match := range want.Matches {
		if (rtmr[i] == quote.Body.RTMR[i]) != match {
			t.Errorf("RTMR%d matches the quote: got %v, want %v", i, !match, match)
		}
	}
}

// eventLog returns the events of a fixture.
func (f *fixture) eventLog(t *testing.T) []measure.Event {
	t.Helper()
	if f.Kind == "attestation" {
		return f.attestation(t).Events
	}
	doc := json.RawMessage(f.raw)
	if f.Kind != "event-log" {
		doc = member(t, f.raw, "event_log", "eventLog")
	}
	events, err := measure.ParseEventLog(doc)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// TestRealEventLogs replays every real log, and compares it with its quote where the
// manifest says whether they belong together.
func TestRealEventLogs(t *testing.T) {
	all := fixtures(t)
	logs, matched := 0, 0
	for _, f := range all {
		want := f.Expect.EventLog
		if f.Kind == "event-log" {
			want = &f.Expect.expectedLog
		}
		if want == nil {
			continue
		}
		logs++
		if want.Matches != nil {
			matched++
		}
		t.Run(f.ID, func(t *testing.T) {
			events := f.eventLog(t)
			var per [4]int
			for _, e := range events {
				per[e.IMR]++
			}
			if per != want.PerIMR {
				t.Errorf("events per register: got %v, want %v", per, want.PerIMR)
			}
			compareLog(t, events, want, func() *measure.Quote { return quoteOf(t, all, &f) })
		})
	}
	if logs != 9 || matched != 8 {
		t.Errorf("%d event logs, %d with a quote; want 9 and 8", logs, matched)
	}
}

func TestRealCCELs(t *testing.T) {
	all := fixtures(t)
	seen := 0
	for _, f := range all {
		if f.Kind != "ccel" {
			continue
		}
		seen++
		t.Run(f.ID, func(t *testing.T) {
			events, err := measure.ParseCCEL(f.raw)
			if err != nil {
				t.Fatal(err)
			}
			per := map[int]int{}
			for _, e := range events {
				per[e.IMR+1]++
			}
			if !maps.Equal(per, f.Expect.PerMR) {
				t.Errorf("events per register index: got %v, want %v", per, f.Expect.PerMR)
			}
			compareLog(t, events, &f.Expect.expectedLog, func() *measure.Quote { return quoteOf(t, all, &f) })
		})
	}
	if seen != 3 {
		t.Errorf("%d CCELs, want 3", seen)
	}
}

// TestBadEvidence refuses each file for its reason.
func TestBadEvidence(t *testing.T) {
	for _, f := range fixtures(t) {
		switch f.ID {
		case "dq-sgx-quote", "gtg-tdreport":
			_, err := measure.ParseQuote(f.raw)
			var parse *measure.QuoteParseError
			if !errors.As(err, &parse) || parse.Field != "TEE type" && f.ID == "dq-sgx-quote" {
				t.Errorf("%s: got %v, want a QuoteParseError", f.ID, err)
			}
		case "dk-nitro-attestation":
			var platform *measure.PlatformError
			if _, err := measure.ParseAttestation(f.raw); !errors.As(err, &platform) || platform.Platform != "nitro" {
				t.Errorf("%s: got %v, want a PlatformError for nitro", f.ID, err)
			}
		}
	}
}
