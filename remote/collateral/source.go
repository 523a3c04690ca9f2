package collateral

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"tdx-agent/remote/dcap"
)

const (
	intelPCS = "https://api.trustedservices.intel.com"
	// intelRootCRL is the distribution point in Intel's SGX Root CA certificate. It is
	// written here, not read from the certificate: no input chooses where to connect.
	intelRootCRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
	pccsRootCRL  = "/sgx/certification/v4/rootcacrl"
)

// IntelURLs are where IntelPCS connects to.
func IntelURLs() []string { return []string{intelPCS, intelRootCRL} }

// source is a server with Intel's PCS API.
type source struct {
	name    string
	base    string // URL without the path
	rootCRL string // URL
}

// newSources checks the configuration of the network.
func newSources(cfg *Config) ([]source, error) {
	var sources []source
	for _, base := range cfg.PCCS {
		u, err := url.Parse(base)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, &Error{Code: "config", Want: "PCCS URLs like https://host:8081, without user, query or fragment", Hint: "correct the list of PCCS"}
		}
		base = strings.TrimRight(base, "/")
		base = strings.TrimSuffix(strings.TrimSuffix(base, "/sgx/certification/v4"), "/tdx/certification/v4") // as in Intel's sgx_default_qcnl.conf
		sources = append(sources, source{"pccs " + base, base, base + pccsRootCRL})
	}
	if cfg.IntelPCS {
		sources = append(sources, source{"intel pcs", intelPCS, intelRootCRL})
	}
	return sources, nil
}

// parts are the documents of a set, in the order they are asked for: what tells
// soonest that a source does not know the platform is first.
func (src *source) parts(p platform, channel string, enclaves bool, b *dcap.Bundle) []part {
	only, further := "", ""
	if channel != channelStandard { // standard is every server's default
		only, further = "?update="+channel, "&update="+channel
	}
	of := "/tdx/certification/v4/"
	if enclaves {
		of = "/sgx/certification/v4/"
	}
	return []part{
		{src.base + of + "tcb?fmspc=" + hex.EncodeToString(p.fmspc[:]) + further, maxDocumentBody, tcbInfoChains, &b.TCBInfoIssuerChain,
			readDocument("tcbInfo", &b.TCBInfo, &b.TCBInfoSignature)},
		{src.base + of + "qe/identity" + only, maxDocumentBody, qeIdentityChains, &b.QEIdentityIssuerChain,
			readDocument("enclaveIdentity", &b.QEIdentity, &b.QEIdentitySignature)},
		{src.base + "/sgx/certification/v4/pckcrl?ca=" + p.ca + "&encoding=der", maxCRLBody, pckCRLChains, &b.PCKCRLIssuerChain, readCRL(&b.PCKCRL)},
		{src.rootCRL, maxCRLBody, nil, nil, readCRL(&b.RootCACRL)},
	}
}

// Headers with the issuer chain, in any letter case. Intel's PCS names that of the
// TCB info in the first way, and so do most PCCS.
var (
	tcbInfoChains    = []string{"TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"}
	qeIdentityChains = []string{"SGX-Enclave-Identity-Issuer-Chain"}
	pckCRLChains     = []string{"SGX-PCK-CRL-Issuer-Chain"}
)

// part is one answer: where it is, how big it may be, and where its content goes.
type part struct {
	url     string
	limit   int64
	headers []string // one of which has the issuer chain
	chain   *string
	read    func(body []byte) error
}

func readDocument(name string, text, signature *string) func([]byte) error {
	return func(body []byte) error {
		document, sig, err := dcap.SignedDocument(body, name)
		*text, *signature = string(document), sig
		return err
	}
}

func readCRL(text *string) func([]byte) error {
	return func(body []byte) error {
		der, err := dcap.CRLBytes(body)
		*text = hex.EncodeToString(der)
		return err
	}
}

// bundle asks src for a set. Nothing in it is checked yet. The error has no Source.
func (s *Store) bundle(ctx context.Context, src *source, p platform) ([]byte, *Error) {
	b := new(dcap.Bundle)
	for _, part := range src.parts(p, s.cfg.UpdateChannel, s.cfg.Enclaves, b) {
		a, err := s.request(ctx, part.url, part.limit)
		if err != nil {
			return nil, err
		}
		if err := part.read(a.body); err != nil {
			return nil, &Error{Code: "response", Err: err, Hint: "the source is no PCCS, or is damaged"}
		}
		if part.chain == nil {
			continue
		}
		if *part.chain, err = issuerChain(a.header, part.headers); err != nil {
			return nil, err
		}
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(b); err != nil {
		return nil, &Error{Code: "response", Err: err}
	}
	return bytes.TrimSpace(text.Bytes()), nil
}

// issuerChain decodes the chain in the first of these headers that is there. It is PEM
// with %XX. Plus is a digit of base64 there, but some servers write it for a space.
func issuerChain(header http.Header, names []string) (string, *Error) {
	for _, name := range names {
		value := header.Get(name)
		if value == "" {
			continue
		}
		decode := url.PathUnescape
		if strings.Contains(value, "BEGIN+CERTIFICATE") {
			decode = url.QueryUnescape
		}
		chain, err := decode(value)
		if err != nil {
			return "", &Error{Code: "header", Err: fmt.Errorf("%s: %v", name, err)}
		}
		return chain, nil
	}
	return "", &Error{Code: "header", Err: errors.New("no header " + strings.Join(names, " or ")), Hint: "the source is no PCCS, or a proxy drops headers"}
}
