package dcap_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

var enclaveTime = time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)

// enclaveCase is a machine with an enclave on it.
type enclaveCase struct {
	td         *tdxsim.TD
	roots      *dcap.Roots
	enclave    tdxsim.Enclave
	reportData [64]byte
}

func newEnclave(t testing.TB, cfg tdxsim.Config) *enclaveCase {
	t.Helper()
	cfg.Now = func() time.Time { return enclaveTime }
	if cfg.Seed == nil {
		cfg.Seed = []byte("enclave")
	}
	td, err := tdxsim.New(t.TempDir(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	roots, err := dcap.NewRoots(td.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	return &enclaveCase{td: td, roots: roots, enclave: tdxsim.Enclave{MREnclave: [32]byte{1, 2}, MRSigner: [32]byte{3}}, reportData: [64]byte{9: 9, 63: 7}}
}

func (e *enclaveCase) quote(t testing.TB) []byte {
	t.Helper()
	q, err := e.td.EnclaveQuote(e.enclave, e.reportData)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func (e *enclaveCase) bundle(t testing.TB) []byte {
	t.Helper()
	b, err := e.td.EnclaveCollateral()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (e *enclaveCase) verify(t testing.TB, quote []byte, at time.Time) (*dcap.EnclaveReport, error) {
	t.Helper()
	c, err := dcap.ParseEnclaveCollateral(e.bundle(t), e.roots)
	if err != nil {
		t.Fatal(err)
	}
	return dcap.NewVerifier(dcap.Config{Roots: e.roots}).VerifyEnclave(quote, c, at)
}

func TestEnclave(t *testing.T) {
	for _, debug := range []bool{false, true} {
		e := newEnclave(t, tdxsim.Config{})
		e.enclave.Debug = debug
		r, err := e.verify(t, e.quote(t), enclaveTime)
		if err != nil {
			t.Fatal(err)
		}
		if r.MREnclave != e.enclave.MREnclave || r.MRSigner != e.enclave.MRSigner || r.ReportData != e.reportData || r.Debug != debug || r.Merged.Status != dcap.UpToDate || r.Root != e.roots.Pins()[0] {
			t.Errorf("%+v", r)
		}
	}
}

func TestEnclaveTCB(t *testing.T) {
	for _, c := range []struct {
		cfg  tdxsim.Config
		want dcap.Status
	}{
		{tdxsim.Config{TCBStatus: "OutOfDate"}, dcap.OutOfDate},
		{tdxsim.Config{TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}}, dcap.SWHardeningNeeded},
		{tdxsim.Config{QEStatus: "OutOfDate"}, dcap.OutOfDate},
		{tdxsim.Config{QEStatus: "Revoked"}, dcap.Revoked},
		{tdxsim.Config{ModuleStatus: "OutOfDate"}, dcap.UpToDate}, // no part of an enclave's TCB
	} {
		e := newEnclave(t, c.cfg)
		r, err := e.verify(t, e.quote(t), enclaveTime)
		if err != nil || r.Merged.Status != c.want || len(r.Merged.Advisories) != len(c.cfg.Advisories) {
			t.Errorf("%+v: %+v (%v), want %s", c.cfg, r, err, c.want)
		}
	}
}

// TestEnclaveRefused has one vector for each way in which an SGX quote can be wrong.
func TestEnclaveRefused(t *testing.T) {
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[at] ^= 1; return b }
	}
	const body, signature = 48, 436
	for name, c := range map[string]struct {
		cfg  tdxsim.Config
		edit func([]byte) []byte
		at   time.Time
		code string
	}{
		"another enclave":     {edit: flip(body + 64), code: "quote_signature"},
		"no debug any more":   {edit: flip(body + 48), code: "quote_signature"},
		"another report data": {edit: flip(body + 320), code: "quote_signature"},
		"header":              {edit: flip(8), code: "quote_signature"},
		"signature":           {edit: flip(signature + 5), code: "quote_signature"},
		"attestation key":     {edit: func(b []byte) []byte { copy(b[signature+64:], b[signature+64+384:signature+64+384+64]); return b }, code: "attestation_key"},
		"QE report":           {edit: flip(signature + 128 + 64), code: "qe_report_signature"},
		"QE binding":          {edit: flip(signature + 128 + 320), code: "qe_binding"},
		"QE signature":        {edit: flip(signature + 128 + 384 + 3), code: "qe_report_signature"},
		"vendor":              {edit: flip(12), code: "qe_vendor"},
		"a TDX version":       {edit: func(b []byte) []byte { b[0] = 4; return b }, code: "not_sgx"},
		"a TDX quote":         {edit: func(b []byte) []byte { b[4] = 0x81; return b }, code: "not_sgx"},
		"key type":            {edit: func(b []byte) []byte { b[2] = 3; return b }, code: "quote_key_type"},
		"too short":           {edit: func(b []byte) []byte { return b[:435] }, code: "quote_size"},
		"a byte less":         {edit: func(b []byte) []byte { return b[:len(b)-1] }, code: "quote_size"},
		"a byte more":         {edit: func(b []byte) []byte { return append(b, 0) }, code: "quote_size"},
		"certification type":  {edit: flip(signature + 128 + 384 + 64 + 2 + 32), code: "certification_format"},
		"too late":            {at: enclaveTime.AddDate(0, 2, 0), code: "pck_crl_expired"},
		"too early":           {at: enclaveTime.AddDate(-1, 0, 0), code: "pck_not_yet_valid"},
		"revoked":             {cfg: tdxsim.Config{Revoked: true}, code: "pck_revoked"},
		"revoked CA":          {cfg: tdxsim.Config{RevokedCA: true}, code: "pck_ca_revoked"},
		"debug QE":            {cfg: tdxsim.Config{QEDebug: true}, code: "qe_attributes"},
		"another QE":          {cfg: tdxsim.Config{EditQEIdentity: func(s string) string { return strings.Replace(s, `"isvprodid":2`, `"isvprodid":1`, 1) }}, code: "qe_product"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnclave(t, c.cfg)
			quote := e.quote(t)
			if c.edit != nil {
				quote = c.edit(quote)
			}
			at := enclaveTime
			if !c.at.IsZero() {
				at = c.at
			}
			r, err := e.verify(t, quote, at)
			var fault *dcap.Error
			if r != nil || !errors.As(err, &fault) || fault.Code != c.code {
				t.Errorf("%+v, %v, want %s", r, err, c.code)
			}
		})
	}
	e := newEnclave(t, tdxsim.Config{})
	other := newEnclave(t, tdxsim.Config{Seed: []byte("other")})
	if _, err := e.verify(t, other.quote(t), enclaveTime); err == nil || !strings.Contains(err.Error(), "root") {
		t.Errorf("another root: %v", err)
	}
}

// TestTechnologiesDoNotMix gives each verifier the other's collateral.
func TestTechnologiesDoNotMix(t *testing.T) {
	e := newEnclave(t, tdxsim.Config{})
	td, err := e.td.Collateral()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dcap.ParseCollateral(e.bundle(t), e.roots); err == nil {
		t.Error("SGX collateral is taken for TDX")
	}
	if _, err := dcap.ParseEnclaveCollateral(td, e.roots); err == nil {
		t.Error("TDX collateral is taken for SGX")
	}
	forTD, err := dcap.ParseCollateral(td, e.roots)
	if err != nil {
		t.Fatal(err)
	}
	forEnclave, err := dcap.ParseEnclaveCollateral(e.bundle(t), e.roots)
	if err != nil {
		t.Fatal(err)
	}
	v := dcap.NewVerifier(dcap.Config{Roots: e.roots})
	var fault *dcap.Error
	if _, err := v.VerifyEnclave(e.quote(t), forTD, enclaveTime); !errors.As(err, &fault) || fault.Code != "collateral_technology" {
		t.Errorf("TDX collateral for an enclave: %v", err)
	}
	if _, err := v.Verify(t.Context(), e.quote(t), forEnclave, enclaveTime); !errors.As(err, &fault) || fault.Code != "collateral_technology" {
		t.Errorf("SGX collateral for a TD: %v", err)
	}
	if _, err := v.Verify(t.Context(), e.quote(t), forTD, enclaveTime); !errors.As(err, &fault) || fault.Code != "not_tdx" {
		t.Errorf("an SGX quote for a TD's: %v", err)
	}
	if _, err := v.VerifyEnclave(e.quote(t), nil, enclaveTime); !errors.As(err, &fault) || fault.Code != "no_collateral" {
		t.Errorf("no collateral: %v", err)
	}
}

// FuzzEnclaveQuote changes quotes: only the one that was signed is genuine.
func FuzzEnclaveQuote(f *testing.F) {
	e := newEnclave(f, tdxsim.Config{})
	c, err := dcap.ParseEnclaveCollateral(e.bundle(f), e.roots)
	if err != nil {
		f.Fatal(err)
	}
	quote := e.quote(f)
	f.Add(quote)
	f.Add(quote[:500])
	v := dcap.NewVerifier(dcap.Config{Roots: e.roots})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := v.VerifyEnclave(b, c, enclaveTime); err == nil && (!bytes.Equal(b[:432], quote[:432]) || r.MREnclave != e.enclave.MREnclave) {
			t.Errorf("a changed quote is genuine: %x", b)
		}
	})
}
