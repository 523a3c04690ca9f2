package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

// pccs serves bundles as Intel's PCCS does, that for TDs and perhaps that for enclaves of a
// platform, and counts the requests.
func pccs(t *testing.T, bundles ...[]byte) (address string, asked *atomic.Int64) {
	t.Helper()
	var b dcap.Bundle
	asked = new(atomic.Int64)
	answer := func(chainHeader, chain, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			asked.Add(1)
			if chainHeader != "" {
				w.Header().Set(chainHeader, url.PathEscape(chain))
			}
			fmt.Fprint(w, body)
		}
	}
	mux := http.NewServeMux()
	for i, bundle := range bundles {
		if err := json.Unmarshal(bundle, &b); err != nil {
			t.Fatal(err)
		}
		of := []string{"tdx", "sgx"}[i]
		mux.HandleFunc("GET /"+of+"/certification/v4/tcb", answer("TCB-Info-Issuer-Chain", b.TCBInfoIssuerChain, `{"tcbInfo":`+b.TCBInfo+`,"signature":"`+b.TCBInfoSignature+`"}`))
		mux.HandleFunc("GET /"+of+"/certification/v4/qe/identity", answer("SGX-Enclave-Identity-Issuer-Chain", b.QEIdentityIssuerChain, `{"enclaveIdentity":`+b.QEIdentity+`,"signature":"`+b.QEIdentitySignature+`"}`))
	}
	mux.HandleFunc("GET /sgx/certification/v4/pckcrl", answer("SGX-PCK-CRL-Issuer-Chain", b.PCKCRLIssuerChain, b.PCKCRL))
	mux.HandleFunc("GET /sgx/certification/v4/rootcacrl", answer("", "", b.RootCACRL))
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL, asked
}

// TestCollateralFetch fetches a platform's collateral by command, judges a quote by it,
// and lets verify fetch it by itself: once, then from the state folder.
func TestCollateralFetch(t *testing.T) {
	dir := t.TempDir()
	td, err := tdxsim.New(filepath.Join(dir, "td"), tdxsim.Config{FMSPC: [6]byte{1, 2, 3, 4}})
	if err != nil {
		t.Fatal(err)
	}
	defer td.Close()
	bundle, err := td.Collateral()
	if err != nil {
		t.Fatal(err)
	}
	address, asked := pccs(t, bundle)
	root, quote, file := filepath.Join(dir, "root.pem"), filepath.Join(dir, "quote.bin"), filepath.Join(dir, "collateral.json")
	client := td.Client()
	const entry = "/sys/kernel/config/tsm/report/x"
	if err := client.Mkdir(entry); err != nil {
		t.Fatal(err)
	}
	if err := client.WriteFile(entry+"/inblob", make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	raw, err := client.ReadFile(entry + "/outblob")
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{root: td.RootPEM(), quote: raw} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	try := func(want int, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		var out bytes.Buffer
		if status := run(ctx, args, &out, &out); status != want {
			t.Fatalf("%q ends with %d, want %d: %s", args, status, want, &out)
		}
		return out.String()
	}
	state := filepath.Join(dir, "state")
	try(0, "collateral", "fetch", "--fmspc", "010203040000", "--root", root, "--pccs", address, "--state-dir", state, "-o", file)
	if n := asked.Swap(0); n != 4 {
		t.Errorf("%d requests for a set, want 4", n)
	}
	if text := try(0, "collateral", "show", file, "--root", root); !strings.Contains(text, "FMSPC "+hex.EncodeToString([]byte{1, 2, 3, 4, 0, 0})) {
		t.Error(text)
	}
	try(0, "verify", "--quote", quote, "--root", root, "--collateral", file)
	try(0, "collateral", "fetch", "--quote", quote, "--root", root, "--pccs", address, "--state-dir", state, "-o", file)
	try(0, "verify", "--quote", quote, "--root", root, "--pccs", address, "--state-dir", state)
	if n := asked.Swap(0); n != 0 {
		t.Errorf("%d requests for a set that is there", n)
	}
	raw[600] ^= 1
	if err := os.WriteFile(quote, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	try(exitEvidence, "collateral", "fetch", "--quote", quote, "--root", root, "--pccs", address, "--state-dir", filepath.Join(dir, "other"))
	try(exitEvidence, "verify", "--quote", quote, "--root", root, "--pccs", address, "--state-dir", filepath.Join(dir, "other"))
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests for a quote that is not genuine", n)
	}
	try(exitUsage, "collateral", "fetch", "--root", root, "--pccs", address)
	try(exitUsage, "collateral", "fetch", "--fmspc", "01", "--root", root, "--pccs", address)
	try(exitFailure, "collateral", "fetch", "--fmspc", "ffffffffffff", "--root", root, "--pccs", address, "--state-dir", filepath.Join(dir, "other"))
}

// TestEnclaveCollateralFetch fetches what the local key provider's quotes are judged by, of
// the machine that a TD's own quote names.
func TestEnclaveCollateralFetch(t *testing.T) {
	dir := t.TempDir()
	td, err := tdxsim.New(filepath.Join(dir, "td"), tdxsim.Config{FMSPC: [6]byte{1, 2, 3, 4}})
	check(t, err)
	defer td.Close()
	ofTD, err := td.Collateral()
	check(t, err)
	ofEnclave, err := td.EnclaveCollateral()
	check(t, err)
	regs, err := td.Registers()
	check(t, err)
	raw, err := td.QuoteOf(&regs, measure.ReportData{})
	check(t, err)
	root, quote, file := filepath.Join(dir, "root.pem"), filepath.Join(dir, "quote.bin"), filepath.Join(dir, "sgx.json")
	check(t, os.WriteFile(root, td.RootPEM(), 0o600))
	check(t, os.WriteFile(quote, raw, 0o600))
	try := func(want int, args ...string) string {
		t.Helper()
		var out bytes.Buffer
		if status := run(t.Context(), append(args, "--root", root), &out, &out); status != want {
			t.Fatalf("%q ends with %d, want %d: %s", args, status, want, &out)
		}
		return out.String()
	}
	address, asked := pccs(t, ofTD, ofEnclave)
	fetch := []string{"collateral", "fetch", "--quote", quote, "--pccs", address, "--state-dir", filepath.Join(dir, "state"), "-o", file}
	try(0, fetch...) // the same folder holds both
	try(exitEvidence, "collateral", "show", file, "--sgx")
	asked.Store(0)
	try(0, append(fetch, "--sgx")...)
	if n := asked.Load(); n != 4 {
		t.Errorf("%d requests for a set, want 4", n)
	}
	try(0, append(fetch, "--sgx")...)
	if n := asked.Load(); n != 4 {
		t.Errorf("%d requests for a set that is there", n-4)
	}
	if text := try(0, "collateral", "show", file, "--sgx"); !strings.Contains(text, "FMSPC 010203040000") {
		t.Error(text)
	}
	try(exitEvidence, "collateral", "show", file)
	try(0, append(fetch, "-o", filepath.Join(dir, "td.json"))...)
	if n := asked.Load(); n != 4 {
		t.Errorf("%d requests for the TDs' set, which is there too", n-4)
	}

	// It is what a provider's quote is judged by.
	pin, err := readRoot(root)
	check(t, err)
	roots, err := dcap.PinnedRoots(pin)
	check(t, err)
	b, err := os.ReadFile(file)
	check(t, err)
	c, err := dcap.ParseEnclaveCollateral(b, roots)
	check(t, err)
	sgx, err := td.EnclaveQuote(tdxsim.Enclave{MREnclave: [32]byte{7}}, [64]byte{})
	check(t, err)
	if r, err := dcap.NewVerifier(dcap.Config{Roots: roots}).VerifyEnclave(sgx, c, time.Now()); err != nil || r.MREnclave != [32]byte{7} || r.Merged.Status != dcap.UpToDate {
		t.Errorf("%+v, %v", r, err)
	}

	// A server that gives TDs' documents for enclaves' is not believed.
	wrong, _ := pccs(t, ofTD, ofTD)
	if text := try(exitFailure, "collateral", "fetch", "--sgx", "--quote", quote, "--pccs", wrong, "--state-dir", filepath.Join(dir, "other")); !strings.Contains(text, `not genuine`) || !strings.Contains(text, `id is "TDX", want "SGX"`) {
		t.Error(text)
	}
}
