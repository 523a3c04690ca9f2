package tdxsim_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

type level struct {
	TCB    json.RawMessage
	Status string   `json:"tcbStatus"`
	IDs    []string `json:"advisoryIDs"`
}

// collateral is a bundle after its signatures were verified to the TD's root.
type collateral struct {
	raw             map[string]string
	rootCRL, pckCRL *x509.RevocationList
	tcb             struct {
		FMSPC                 string
		IssueDate, NextUpdate time.Time
		Number                int `json:"tcbEvaluationDataNumber"`
		Modules               []struct {
			ID     string
			Levels []level `json:"tcbLevels"`
		} `json:"tdxModuleIdentities"`
		Levels []level `json:"tcbLevels"`
	}
	qe struct {
		MRSigner              string
		IssueDate, NextUpdate time.Time
		Number                int     `json:"tcbEvaluationDataNumber"`
		Levels                []level `json:"tcbLevels"`
	}
}

func readCollateral(t testing.TB, td *tdxsim.TD) *collateral {
	t.Helper()
	b, err := td.Collateral()
	if err != nil {
		t.Fatal(err)
	}
	c := new(collateral)
	if err := json.Unmarshal(b, &c.raw); err != nil {
		t.Fatal(err)
	}
	if len(c.raw) != 10 {
		t.Errorf("bundle has %d keys, want 10", len(c.raw))
	}
	c.rootCRL = readCRL(t, td, c.raw["root_ca_crl"], certificates(t, td.RootPEM()))
	c.pckCRL = readCRL(t, td, c.raw["pck_crl"], certificates(t, []byte(c.raw["pck_crl_issuer_chain"])))
	for name, into := range map[string]any{"tcb_info": &c.tcb, "qe_identity": &c.qe} {
		chain := certificates(t, []byte(c.raw[name+"_issuer_chain"]))
		checkChain(t, td, chain...)
		verifyRaw(t, name, chain[0].PublicKey.(*ecdsa.PublicKey), []byte(c.raw[name]), unhex(t, c.raw[name+"_signature"]))
		if err := json.Unmarshal([]byte(c.raw[name]), into); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readCRL(t testing.TB, td *tdxsim.TD, der string, chain []*x509.Certificate) *x509.RevocationList {
	t.Helper()
	checkChain(t, td, append(chain, certificates(t, td.RootPEM())...)...)
	list, err := x509.ParseRevocationList(unhex(t, der))
	if err != nil {
		t.Fatal(err)
	}
	if err := list.CheckSignatureFrom(chain[0]); err != nil {
		t.Error(err)
	}
	return list
}

func TestCollateral(t *testing.T) {
	td := newTD(t, tdxsim.Config{Now: func() time.Time { return testTime }})
	q := makeQuote(t, td, measure.ReportData{})
	body, pck := verifyQuote(t, td, q)
	c := readCollateral(t, td)
	if want := strings.ToUpper(hex.EncodeToString(sgxExtension(t, pck)["1.2.840.113741.1.13.1.4"])); c.tcb.FMSPC != want {
		t.Errorf("FMSPC %s, want %s", c.tcb.FMSPC, want)
	}
	if c.tcb.Levels[0].Status != "UpToDate" || c.tcb.Modules[0].Levels[0].Status != "UpToDate" || c.qe.Levels[0].Status != "UpToDate" {
		t.Error("the newest levels are not UpToDate")
	}
	if c.tcb.Modules[0].ID != "TDX_01" || body[1] != 1 {
		t.Errorf("module %s, version %d", c.tcb.Modules[0].ID, body[1])
	}
	var newest struct {
		SGX    []struct{ SVN byte } `json:"sgxtcbcomponents"`
		TDX    []struct{ SVN byte } `json:"tdxtcbcomponents"`
		PCESVN int
	}
	if err := json.Unmarshal(c.tcb.Levels[0].TCB, &newest); err != nil || len(newest.SGX) != 16 || len(newest.TDX) != 16 {
		t.Fatalf("level: %v, %+v", err, newest)
	}
	for i, comp := range newest.TDX {
		if body[i] < comp.SVN {
			t.Errorf("TDX component %d: platform has %d, level wants %d", i, body[i], comp.SVN)
		}
	}
	if len(c.rootCRL.RevokedCertificateEntries)+len(c.pckCRL.RevokedCertificateEntries) != 0 {
		t.Error("something is revoked")
	}
	day := testTime.Truncate(24 * time.Hour)
	for _, w := range [][2]time.Time{{c.tcb.IssueDate, c.tcb.NextUpdate}, {c.qe.IssueDate, c.qe.NextUpdate}, {c.pckCRL.ThisUpdate, c.pckCRL.NextUpdate}} {
		if !w[0].Equal(day) || !w[1].Equal(day.AddDate(0, 0, 30)) {
			t.Errorf("window %v", w)
		}
	}
	again, err := td.Collateral()
	if err != nil {
		t.Fatal(err)
	}
	if first, _ := td.Collateral(); !bytes.Equal(first, again) {
		t.Error("the collateral of one day differs")
	}
	if !strings.Contains(string(q), strings.TrimSpace(c.raw["pck_certificate_chain"])) {
		t.Error("pck_certificate_chain is not the quote's")
	}
	if got := strings.ToLower(c.qe.MRSigner); !bytes.Contains(q, unhex(t, got)) {
		t.Error("the quote has no QE of this signer")
	}
}

func TestCollateralStatus(t *testing.T) {
	window := tdxsim.Window{From: testTime, Until: testTime.Add(time.Hour)}
	td := newTD(t, tdxsim.Config{
		Now:       func() time.Time { return testTime },
		TCBStatus: "OutOfDate", Advisories: []string{"INTEL-SA-00001"},
		ModuleStatus: "Revoked", ModuleAdvisories: []string{"INTEL-SA-00002"},
		QEStatus: "SWHardeningNeeded", QEAdvisories: []string{"INTEL-SA-00003"},
		EvaluationNumber: 21, QEEvaluationNumber: 19,
		Revoked: true, RevokedCA: true, RevokedSigner: true,
		TCBInfo: window, PCKCRL: window, CRLNumber: 57,
		FMSPC: [6]byte{0xab, 0xcd},
	})
	c := readCollateral(t, td)
	for _, l := range []struct {
		list             []level
		at               int
		status, advisory string
	}{
		{c.tcb.Levels, 1, "OutOfDate", "INTEL-SA-00001"},
		{c.tcb.Modules[0].Levels, 1, "Revoked", "INTEL-SA-00002"},
		{c.qe.Levels, 0, "SWHardeningNeeded", "INTEL-SA-00003"},
	} {
		got := l.list[l.at]
		if got.Status != l.status || len(got.IDs) != 1 || got.IDs[0] != l.advisory {
			t.Errorf("level %+v, want %s, %s", got, l.status, l.advisory)
		}
		if l.at == 1 && l.list[0].Status != "UpToDate" {
			t.Errorf("newest level is %s", l.list[0].Status)
		}
	}
	if c.rootCRL.Number.Int64() != 57 || c.pckCRL.Number.Int64() != 57 {
		t.Errorf("CRL numbers %v, %v", c.rootCRL.Number, c.pckCRL.Number)
	}
	if c.tcb.Number != 21 || c.qe.Number != 19 || c.tcb.FMSPC != "ABCD00000000" {
		t.Errorf("numbers %d, %d, FMSPC %s", c.tcb.Number, c.qe.Number, c.tcb.FMSPC)
	}
	if !c.tcb.NextUpdate.Equal(window.Until) || !c.pckCRL.NextUpdate.Equal(window.Until) {
		t.Errorf("windows end at %v, %v", c.tcb.NextUpdate, c.pckCRL.NextUpdate)
	}
	_, pck := verifyQuote(t, td, makeQuote(t, td, measure.ReportData{}))
	revoked := c.pckCRL.RevokedCertificateEntries
	if len(revoked) != 1 || revoked[0].SerialNumber.Cmp(pck.SerialNumber) != 0 {
		t.Errorf("PCK CRL: %v", revoked)
	}
	if n := len(c.rootCRL.RevokedCertificateEntries); n != 2 {
		t.Errorf("root CRL has %d entries, want 2", n)
	}
}

// TestOtherProcessSameCollateral opens what New made: the configuration is kept.
func TestOtherProcessSameCollateral(t *testing.T) {
	dir := t.TempDir()
	a, err := tdxsim.New(dir, tdxsim.Config{TCBStatus: "OutOfDate", QuoteVersion: 5})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b := openTD(t, dir)
	if got := readCollateral(t, b).tcb.Levels[1].Status; got != "OutOfDate" {
		t.Errorf("status is %s", got)
	}
	if q := makeQuote(t, b, measure.ReportData{}); q[0] != 5 {
		t.Errorf("quote version %d", q[0])
	}
}

// TestDishonestIssuer signs what no honest issuer would, with good signatures.
func TestDishonestIssuer(t *testing.T) {
	td := newTD(t, tdxsim.Config{
		EditTCBInfo:    func(s string) string { return strings.Replace(s, `"id":"TDX"`, `"id":"SGX"`, 1) },
		EditQEIdentity: func(s string) string { return strings.Replace(s, `"isvprodid":2`, `"isvprodid":3`, 1) },
		SEAMAttributes: 1, QEDebug: true,
	})
	c := readCollateral(t, td)
	if !strings.Contains(c.raw["tcb_info"], `"id":"SGX"`) || !strings.Contains(c.raw["qe_identity"], `"isvprodid":3`) {
		t.Error("the documents are not edited")
	}
	q := makeQuote(t, td, measure.ReportData{})
	if body, _ := verifyQuote(t, td, q); body[112] != 1 {
		t.Errorf("SEAM attributes %x", body[112:120])
	}
	if flags := q[636+134+48]; flags&2 == 0 {
		t.Errorf("QE attributes %#x", flags)
	}
}
