package collateral_test

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"tdx-agent/remote/dcap"
)

// pccs is a PCCS with one set, over a real connection, that can be told to misbehave.
type pccs struct {
	*httptest.Server

	mu       sync.Mutex
	bundle   dcap.Bundle
	hexCRLs  bool
	tcbChain string // the header's name
	escape   func(string) string
	// instead answers for a document: "tcb", "identity", "pckcrl" or "rootcacrl"; ""
	// is every document without an entry of its own.
	instead  map[string]http.HandlerFunc
	requests []string // URLs
}

func newPCCS(t testing.TB, bundle []byte) *pccs { return startPCCS(t, bundle, httptest.NewServer) }

func startPCCS(t testing.TB, bundle []byte, start func(http.Handler) *httptest.Server) *pccs {
	t.Helper()
	p := &pccs{tcbChain: "TCB-Info-Issuer-Chain", escape: url.PathEscape, instead: make(map[string]http.HandlerFunc)}
	p.serve(t, bundle)
	p.Server = start(p)
	t.Cleanup(p.Close)
	return p
}

// serve changes the set.
func (p *pccs) serve(t testing.TB, bundle []byte) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := json.Unmarshal(bundle, &p.bundle); err != nil {
		t.Fatal(err)
	}
}

// set changes the server.
func (p *pccs) set(change func(*pccs)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p)
}

// taken returns the requests since the last call.
func (p *pccs) taken() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.requests
	p.requests = nil
	return r
}

func (p *pccs) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.requests = append(p.requests, r.URL.String())
	b, name := p.bundle, strings.TrimSuffix(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:], ".der")
	if name == "IntelSGXRootCA" {
		name = "rootcacrl"
	}
	instead := p.instead[name]
	if instead == nil {
		instead = p.instead[""]
	}
	tcbChain, escape, hexCRLs := p.tcbChain, p.escape, p.hexCRLs
	p.mu.Unlock()
	if instead != nil {
		instead(w, r)
		return
	}
	crl := func(digits string) {
		if hexCRLs {
			_, _ = w.Write([]byte(digits + "\n"))
			return
		}
		der, _ := hex.DecodeString(digits)
		_, _ = w.Write(der)
	}
	chain := func(name, pem string) { w.Header()[name] = []string{escape(pem)} } // this spelling on the wire
	switch name {
	case "tcb":
		chain(tcbChain, b.TCBInfoIssuerChain)
		_, _ = w.Write([]byte(`{"tcbInfo":` + b.TCBInfo + `,"signature":"` + b.TCBInfoSignature + `"}`))
	case "identity":
		chain("SGX-Enclave-Identity-Issuer-Chain", b.QEIdentityIssuerChain)
		_, _ = w.Write([]byte(`{"enclaveIdentity":` + b.QEIdentity + `,"signature":"` + b.QEIdentitySignature + `"}`))
	case "pckcrl":
		chain("SGX-PCK-CRL-Issuer-Chain", b.PCKCRLIssuerChain)
		crl(b.PCKCRL)
	case "rootcacrl":
		crl(b.RootCACRL)
	default:
		http.NotFound(w, r)
	}
}
