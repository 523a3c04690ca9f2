package dcap_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tdx-agent/remote/dcap"
)

// evidence is real evidence: its manifest, and the cases with their answers.
type evidence struct {
	dir   string
	items map[string]item
	cases []realCase
}

type item struct {
	ID, Path, Kind string
	Expect         struct {
		Quote json.RawMessage // an object in items that hold a quote
	}
}

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
		TCB      *struct {
			Status               dcap.Status
			Advisory             []string `json:"advisory_ids"`
			Platform, Module, QE *expectedTCB
			EvaluationTCB        int `json:"tcb_info_evaluation"`
			EvaluationQE         int `json:"qe_identity_evaluation"`
		}
		Guest map[string]string `json:"go_tdx_guest"` // answers by version
	}
}

type expectedTCB struct {
	Status   dcap.Status
	Date     *time.Time `json:"tcb_date"`
	Advisory []string   `json:"advisory_ids"`
}

// loadEvidence reads the real evidence, or skips the test where there is none.
func loadEvidence(t testing.TB) *evidence {
	t.Helper()
	e := &evidence{dir: os.Getenv("TDX_AGENT_FIXTURES"), items: make(map[string]item)}
	if e.dir == "" {
		e.dir = filepath.Join("..", "..", "..", "shared", "fixtures")
	}
	if _, err := os.Stat(e.dir); err != nil {
		t.Skipf("no real evidence: set TDX_AGENT_FIXTURES to its folder (%v)", err)
	}
	var manifest struct{ Items []item }
	e.unmarshal(t, "manifest.json", &manifest)
	for _, i := range manifest.Items {
		e.items[i.ID] = i
	}
	var cases struct{ Cases []realCase }
	e.unmarshal(t, "cases.json", &cases)
	e.cases = cases.Cases
	return e
}

func (e *evidence) unmarshal(t testing.TB, path string, into any) {
	t.Helper()
	if err := json.Unmarshal(e.read(t, path), into); err != nil {
		t.Fatal(err)
	}
}

func (e *evidence) read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(e.dir, path))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (e *evidence) raw(t testing.TB, id string) []byte { return e.read(t, e.items[id].Path) }

// quote returns the quote in an item, in whichever form it has.
func (e *evidence) quote(t testing.TB, id string) []byte {
	t.Helper()
	b, kind := e.raw(t, id), e.items[id].Kind
	var err error
	switch path := e.items[id].Path; {
	case kind == "ratls-chain":
		block, _ := pem.Decode(b)
		var leaf *x509.Certificate
		if leaf, err = x509.ParseCertificate(block.Bytes); err != nil {
			break
		}
		for _, ext := range leaf.Extensions {
			if bytes.Contains(ext.Value, []byte{4, 0, 2, 0, 0x81, 0, 0, 0, 0, 0, 0, 0, 0x93, 0x9a}) {
				_, err = asn1.Unmarshal(ext.Value, &b)
			}
		}
	case strings.HasSuffix(path, ".hex"):
		b, err = hex.DecodeString(strings.TrimSpace(string(b)))
	case kind == "quote" && strings.HasSuffix(path, ".json"):
		var list []int
		err = json.Unmarshal(b, &list)
		b = b[:0]
		for _, n := range list {
			b = append(b, byte(n))
		}
	case strings.HasSuffix(path, ".json"):
		var o struct {
			Quote       string
			IntelQuote  string `json:"intel_quote"`
			TDQuote     string `json:"td_quote"`
			Attestation string
		}
		if err = json.Unmarshal(b, &o); err != nil {
			break
		}
		if o.TDQuote != "" {
			b, err = base64.URLEncoding.DecodeString(o.TDQuote)
			break
		}
		b, err = hex.DecodeString(strings.TrimPrefix(o.Quote+o.IntelQuote, "0x"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// bundle returns the collateral of a case: a bundle, or one with documents replaced.
// Without a base, only the documents are there.
func (e *evidence) bundle(t testing.TB, c *realCase) []byte {
	t.Helper()
	var id string
	if json.Unmarshal(c.Collateral, &id) == nil {
		return e.raw(t, id)
	}
	var parts struct {
		Base       string
		TCBInfo    string `json:"tcb_info"`
		QEIdentity string `json:"qe_identity"`
	}
	if err := json.Unmarshal(c.Collateral, &parts); err != nil {
		t.Fatal(err)
	}
	var b dcap.Bundle
	if parts.Base != "" {
		e.unmarshal(t, e.items[parts.Base].Path, &b)
	}
	document := func(id, name string) (string, string) {
		d, signature, err := dcap.SignedDocument(e.raw(t, id), name)
		if err != nil {
			t.Fatal(err)
		}
		return string(d), signature
	}
	b.TCBInfo, b.TCBInfoSignature = document(parts.TCBInfo, "tcbInfo")
	b.QEIdentity, b.QEIdentitySignature = document(parts.QEIdentity, "enclaveIdentity")
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// class is the reason in the cases that the code of an error belongs to.
func class(err error) string {
	e, ok := errors.AsType[*dcap.Error](err)
	switch {
	case !ok:
		return "not a *dcap.Error"
	case e.Code == "pck_not_yet_valid" || e.Code == "pck_expired":
		return e.Code
	case strings.HasSuffix(e.Code, "_not_yet_valid"):
		return "collateral_not_yet_valid"
	case strings.HasSuffix(e.Code, "_expired"):
		return "collateral_expired"
	}
	return e.Code
}

// statusReason is the reason for which a strict policy refuses a status.
var statusReason = map[dcap.Status]string{dcap.NotSupported: "tcb_not_supported", dcap.OutOfDate: "tcb_out_of_date"}

// TestRealCases puts every case to one verifier, so that its caches are tested too,
// and to a new one. go-tdx-guest answers some otherwise: it judges a platform by its
// TDX module alone, which Intel's rule does not (case-019, -020, -061), and does not
// look when collateral begins to be valid.
func TestRealCases(t *testing.T) {
	e := loadEvidence(t)
	shared := dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots(), SecondOpinion: true})
	for i := range e.cases {
		c := &e.cases[i]
		t.Run(c.ID, func(t *testing.T) {
			if c.Mode == "rule" {
				checkRule(t, e, c)
				return
			}
			checkCase(t, e, c, shared)
			checkCase(t, e, c, shared)
			checkCase(t, e, c, dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots()}))
		})
	}
	if len(e.cases) < 60 {
		t.Errorf("only %d cases", len(e.cases))
	}
}

func checkCase(t *testing.T, e *evidence, c *realCase, v *dcap.Verifier) {
	t.Helper()
	collateral, err := dcap.ParseCollateral(e.bundle(t, c), dcap.IntelRoots())
	if err != nil {
		t.Fatal(err)
	}
	r, err := v.Verify(context.Background(), e.quote(t, c.Quote), collateral, c.Time)
	if err != nil {
		if c.Expect.Status != nil || !slices.Contains(c.Expect.Reasons, class(err)) {
			t.Errorf("refused: %v; want status %v, reasons %v", err, c.Expect.Status, c.Expect.Reasons)
		}
		return
	}
	if c.Expect.Status == nil {
		t.Fatalf("status %s, want an error of %v", r.Merged.Status, c.Expect.Reasons)
	}
	if r.Merged.Status != *c.Expect.Status || !slices.Equal(r.Merged.Advisories, nonNil(c.Expect.Advisory)) {
		t.Errorf("status %s, advisories %v; want %s, %v", r.Merged.Status, r.Merged.Advisories, *c.Expect.Status, c.Expect.Advisory)
	}
	if accept := r.Merged.Status == dcap.UpToDate; accept != *c.Expect.Accept {
		t.Errorf("UpToDate is %v, accept %v", accept, *c.Expect.Accept)
	}
	if reason := statusReason[r.Merged.Status]; reason != "" && !slices.Contains(c.Expect.Reasons, reason) {
		t.Errorf("reason %s, want %v", reason, c.Expect.Reasons)
	}
	checkParts(t, c, r.Platform, r.Module, r.QEStatus, r.Merged)
	if w := c.Expect.TCB; r.EvaluationTCB != w.EvaluationTCB || r.EvaluationQE != w.EvaluationQE {
		t.Errorf("evaluation numbers %d and %d, want %d and %d", r.EvaluationTCB, r.EvaluationQE, w.EvaluationTCB, w.EvaluationQE)
	}
	checkReport(t, e, c.Quote, r)
}

// TestGuestAccepts runs go-tdx-guest on the cases that it accepts and that are to be
// refused. It takes the level of the TDX module for the platform's, and does not look
// at lower ends: not at issueDate and not at thisUpdate.
func TestGuestAccepts(t *testing.T) {
	e := loadEvidence(t)
	seen := make(map[string]int)
	for i := range e.cases {
		c := &e.cases[i]
		if c.Expect.Guest["v0.3.2-0.20260305110651-91f9a52f36c7"] != "accept" || *c.Expect.Accept {
			continue
		}
		seen[c.Expect.Reasons[0]]++
		if err := newGuestGetter(t, e.bundle(t, c)).verify(e.quote(t, c.Quote), c.Time); err != nil {
			t.Errorf("%s: go-tdx-guest refuses it by now: %v", c.ID, err)
		}
		if c.Expect.Reasons[0] == "tcb_out_of_date" && c.Expect.TCB.Module.Status != dcap.UpToDate {
			t.Errorf("%s: the module is %s", c.ID, c.Expect.TCB.Module.Status)
		}
	}
	if seen["tcb_out_of_date"] != 3 || seen["collateral_not_yet_valid"] == 0 {
		t.Errorf("cases by reason: %v", seen)
	}
}

func nonNil(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return list
}

func checkParts(t *testing.T, c *realCase, platform, module, qe, merged dcap.TCB) {
	t.Helper()
	w := c.Expect.TCB
	for name, p := range map[string]struct {
		got  dcap.TCB
		want *expectedTCB
	}{"platform": {platform, w.Platform}, "module": {module, w.Module}, "QE": {qe, w.QE}} {
		want := dcap.TCB{}
		if p.want != nil {
			want.Status, want.Advisories = p.want.Status, nonNil(p.want.Advisory)
			if p.want.Date != nil {
				want.Date = *p.want.Date
			}
		}
		if p.got.Status != want.Status || !p.got.Date.Equal(want.Date) || !slices.Equal(p.got.Advisories, want.Advisories) {
			t.Errorf("%s: got %v, want %v", name, p.got, want)
		}
	}
	if merged.Status != w.Status || !slices.Equal(merged.Advisories, nonNil(w.Advisory)) {
		t.Errorf("merged: got %v, want %v", merged, w)
	}
}

func checkRule(t *testing.T, e *evidence, c *realCase) {
	t.Helper()
	var b dcap.Bundle
	if err := json.Unmarshal(e.bundle(t, c), &b); err != nil {
		t.Fatal(err)
	}
	platform, module, qe, merged, err := dcap.Judge(e.quote(t, c.Quote), []byte(b.TCBInfo), []byte(b.QEIdentity))
	if err != nil {
		t.Fatal(err)
	}
	checkParts(t, c, platform, module, qe, merged)
}

// checkReport compares what the report repeats of the quote with the manifest.
func checkReport(t *testing.T, e *evidence, id string, r *dcap.Report) {
	t.Helper()
	var want struct {
		SHA256   string
		Trailing int `json:"trailing_bytes"`
		QE       struct {
			MRSigner   string `json:"mr_signer"`
			ProductID  uint16 `json:"isv_prod_id"`
			SVN        uint16 `json:"isv_svn"`
			Attributes string
			MiscSelect string `json:"misc_select"`
		}
		PCK struct {
			PPID, CPUSVN, PCEID, FMSPC, Serial string
			PCESVN                             uint16
			NotBefore                          time.Time `json:"not_before"`
			NotAfter                           time.Time `json:"not_after"`
		}
	}
	if raw := e.items[id].Expect.Quote; len(raw) == 0 || raw[0] != '{' {
		return
	} else if err := json.Unmarshal(raw, &want); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string][2]string{
		"SHA-256":       {hex.EncodeToString(r.QuoteSHA256[:]), want.SHA256},
		"QE MRSIGNER":   {hex.EncodeToString(r.QE.MRSigner[:]), want.QE.MRSigner},
		"QE attributes": {hex.EncodeToString(r.QE.Attributes[:]), want.QE.Attributes},
		"QE MISCSELECT": {hex.EncodeToString(r.QE.MiscSelect[:]), want.QE.MiscSelect},
		"PPID":          {hex.EncodeToString(r.PCK.PPID[:]), want.PCK.PPID},
		"CPUSVN":        {hex.EncodeToString(r.PCK.CPUSVN[:]), want.PCK.CPUSVN},
		"PCEID":         {hex.EncodeToString(r.PCK.PCEID[:]), want.PCK.PCEID},
		"FMSPC":         {hex.EncodeToString(r.PCK.FMSPC[:]), want.PCK.FMSPC},
		"serial":        {strings.TrimLeft(r.PCK.Serial, "0"), strings.TrimLeft(want.PCK.Serial, "0")},
	} {
		if p[0] != p[1] {
			t.Errorf("%s: got %s, want %s", name, p[0], p[1])
		}
	}
	if r.TrailingBytes != want.Trailing && e.items[id].Kind != "ratls-chain" || r.QE.ISVProdID != want.QE.ProductID || r.QE.ISVSVN != want.QE.SVN ||
		r.PCK.PCESVN != want.PCK.PCESVN || !r.PCK.NotBefore.Equal(want.PCK.NotBefore) || !r.PCK.NotAfter.Equal(want.PCK.NotAfter) {
		t.Errorf("got %+v, want %+v", r, want)
	}
}

// TestRealQuotes checks that every genuine quote's signatures hold.
func TestRealQuotes(t *testing.T) {
	e := loadEvidence(t)
	v := dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots()})
	seen := 0
	for id, i := range e.items {
		if !bytes.Contains(i.Expect.Quote, []byte(`"genuine"`)) || i.Kind == "attestation" {
			continue
		}
		seen++
		fmspc, ca, err := v.Signatures(e.quote(t, id))
		if err != nil || ca != dcap.CAPlatform {
			t.Errorf("%s: %v, CA %q", id, err, ca)
		}
		if !bytes.Contains(i.Expect.Quote, []byte(hex.EncodeToString(fmspc[:]))) {
			t.Errorf("%s: FMSPC %x", id, fmspc)
		}
	}
	if seen < 15 {
		t.Errorf("only %d genuine quotes", seen)
	}
}
