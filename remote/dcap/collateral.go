package dcap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// maxBundle bounds a bundle: two CRLs in hexadecimal, two documents, the chains.
const maxBundle = 4*maxCRL + 4*maxDocument

// Bundle is collateral as dcap-qvl's QuoteCollateralV3 has it, whose JSON this is.
// Nothing in it is trusted: [ParseCollateral] checks it.
type Bundle struct {
	PCKCRLIssuerChain     string `json:"pck_crl_issuer_chain"`     // PEM: CA of the PCK certificates, root
	RootCACRL             string `json:"root_ca_crl"`              // hexadecimal digits of the DER
	PCKCRL                string `json:"pck_crl"`                  // hexadecimal digits of the DER
	TCBInfoIssuerChain    string `json:"tcb_info_issuer_chain"`    // PEM: TCB signer, root
	TCBInfo               string `json:"tcb_info"`                 // exactly what was signed
	TCBInfoSignature      string `json:"tcb_info_signature"`       // 128 hexadecimal digits
	QEIdentityIssuerChain string `json:"qe_identity_issuer_chain"` // PEM: TCB signer, root
	QEIdentity            string `json:"qe_identity"`              // exactly what was signed
	QEIdentitySignature   string `json:"qe_identity_signature"`    // 128 hexadecimal digits
	// PCKCertificateChain is not used here: quotes carry their chains.
	PCKCertificateChain string `json:"pck_certificate_chain,omitempty"`
}

var bundleMembers = &members{what: "collateral", closed: true, optional: []string{"pck_certificate_chain"}, required: []string{
	"pck_crl_issuer_chain", "root_ca_crl", "pck_crl", "tcb_info_issuer_chain", "tcb_info", "tcb_info_signature",
	"qe_identity_issuer_chain", "qe_identity", "qe_identity_signature"}}

// Collateral is what a platform is judged by: TCB info, QE identity and CRLs, with
// every signature checked. It is immutable and for many goroutines. When it holds is
// checked at each use.
type Collateral struct {
	of     technology
	sha256 [32]byte
	pin    [32]byte          // SHA-256 of root
	root   *x509.Certificate // where every chain ended
	ca     string
	issuer *x509.Certificate // of the PCK CRL

	tcb             *tcbInfo
	qe              *qeIdentity
	rootCRL, pckCRL *crl

	windows     []window
	from, until time.Time
}

// ParseCollateral reads a bundle, the JSON of a [Bundle], of at most 5 MiB and checks
// every chain and signature against roots. It does not look at the time. The error is
// an [*Error].
func ParseCollateral(bundle []byte, roots *Roots) (*Collateral, error) {
	return parseCollateral(bundle, roots, ofTD)
}

func parseCollateral(bundle []byte, roots *Roots, of technology) (*Collateral, error) {
	if roots == nil || len(roots.pins) == 0 {
		return nil, &Error{Code: "no_roots", Stage: stageSetup, Hint: "give IntelRoots or NewRoots"}
	}
	if len(bundle) > maxBundle {
		return nil, &Error{Code: "collateral_size", Stage: stageCollateral, Got: fmt.Sprint(len(bundle), " bytes"), Want: fmt.Sprint("at most ", maxBundle)}
	}
	b, err := readBundle(bundle)
	if err != nil {
		return nil, collateralError("collateral_format", err)
	}
	c := &Collateral{of: of, sha256: sha256.Sum256(bundle)}
	if err := c.load(b, roots); err != nil {
		return nil, err
	}
	c.from, c.until = c.windows[0].from, c.windows[0].until
	for _, w := range c.windows {
		if w.from.After(c.from) {
			c.from = w.from
		}
		if w.until.Before(c.until) {
			c.until = w.until
		}
	}
	return c, nil
}

// collateralError keeps the code of a cause that has one.
func collateralError(code string, err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return &Error{Code: e.Code, Stage: stageCollateral, Got: e.Got, Want: e.Want, Hint: e.Hint, Err: e.Err}
	}
	return &Error{Code: code, Stage: stageCollateral, Err: err, Hint: "fetch the collateral again"}
}

func readBundle(text []byte) (*Bundle, error) {
	b, s := new(Bundle), newScanner(text)
	fields := map[string]*string{
		"pck_crl_issuer_chain": &b.PCKCRLIssuerChain, "root_ca_crl": &b.RootCACRL, "pck_crl": &b.PCKCRL,
		"tcb_info_issuer_chain": &b.TCBInfoIssuerChain, "tcb_info": &b.TCBInfo, "tcb_info_signature": &b.TCBInfoSignature,
		"qe_identity_issuer_chain": &b.QEIdentityIssuerChain, "qe_identity": &b.QEIdentity, "qe_identity_signature": &b.QEIdentitySignature,
		"pck_certificate_chain": &b.PCKCertificateChain,
	}
	s.object(bundleMembers, func(key string) {
		if key == "pck_certificate_chain" && s.peek() == 'n' {
			s.literal() // null: dcap-qvl's optional chain
			return
		}
		*fields[key] = s.string()
	})
	return b, s.end()
}

// load checks the parts of a bundle, each before what depends on it.
func (c *Collateral) load(b *Bundle, roots *Roots) error {
	issuer, err := c.issuerChain([]byte(b.PCKCRLIssuerChain), roots)
	if err != nil {
		return collateralError("pck_crl_chain", err)
	}
	if c.ca, err = caOf(issuer); err != nil {
		return collateralError("pck_crl_chain", err)
	}
	c.issuer = issuer
	if c.rootCRL, err = readCRL(b.RootCACRL, c.root); err != nil {
		return crlError("root_crl", err)
	}
	if c.pckCRL, err = readCRL(b.PCKCRL, issuer); err != nil {
		return crlError("pck_crl", err)
	}
	signer, err := c.documentSigner(b.TCBInfoIssuerChain, roots, "tcb_info", "tcb_signer")
	if err != nil {
		return err
	}
	qeSigner := signer
	if b.QEIdentityIssuerChain != b.TCBInfoIssuerChain {
		if qeSigner, err = c.documentSigner(b.QEIdentityIssuerChain, roots, "qe_identity", "qe_signer"); err != nil {
			return err
		}
	}
	if err := c.readTCBInfo(b, signer); err != nil {
		return err
	}
	if err := c.readQEIdentity(b, qeSigner); err != nil {
		return err
	}
	c.windows = append(c.windows,
		window{"root_crl", c.rootCRL.issued, c.rootCRL.next, true},
		window{"pck_crl", c.pckCRL.issued, c.pckCRL.next, true},
		window{"tcb_info", c.tcb.issued, c.tcb.next, true},
		window{"qe_identity", c.qe.issued, c.qe.next, true},
		certificateWindow("pck_crl_issuer", issuer),
		certificateWindow("root", c.root))
	return nil
}

// issuerChain verifies a chain of two certificates, the second of which is a root.
func (c *Collateral) issuerChain(text []byte, roots *Roots) (issuer *x509.Certificate, err error) {
	chain, err := decodePEM(text)
	if err != nil {
		return nil, err
	}
	if len(chain) != 2 {
		return nil, fmt.Errorf("chain of %d certificates, want 2", len(chain))
	}
	root, pin, err := pinnedRoot(chain[1], roots, c.root)
	if err != nil {
		return nil, err
	}
	if c.root != nil && c.pin != pin {
		return nil, errors.New("the chains end in different roots")
	}
	c.root, c.pin = root, pin
	if issuer, err = parseCertificate(chain[0]); err != nil {
		return nil, err
	}
	return issuer, checkIssued(issuer, root)
}

// documentSigner verifies the chain of a document. document and signer are the
// beginnings of codes.
func (c *Collateral) documentSigner(chain string, roots *Roots, document, signer string) (*x509.Certificate, error) {
	s, err := c.issuerChain([]byte(chain), roots)
	if err != nil {
		return nil, collateralError(document+"_chain", err)
	}
	if s.Subject.CommonName != nameSigner || s.IsCA || s.KeyUsage != 0 && s.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, collateralError(document+"_chain", fmt.Errorf("certificate %q is no TCB signing certificate", s.Subject.CommonName))
	}
	if c.rootCRL.revoked.has(s) {
		return nil, &Error{Code: signer + "_revoked", Stage: stageCollateral, Got: fmt.Sprintf("serial number %x in the root CRL", s.SerialNumber), Hint: "fetch the collateral again"}
	}
	c.windows = append(c.windows, certificateWindow(signer, s))
	return s, nil
}

// readCRL decodes the hexadecimal digits of a CRL, or of those digits.
func readCRL(text string, issuer *x509.Certificate) (*crl, error) {
	body, err := hex.DecodeString(text)
	if err != nil {
		return nil, err
	}
	der, err := CRLBytes(body)
	if err != nil {
		return nil, err
	}
	return parseCRL(der, issuer)
}

func crlError(name string, err error) *Error {
	if _, unsigned := errors.AsType[*signatureError](err); unsigned {
		return collateralError(name+"_signature", err)
	}
	return collateralError(name+"_format", err)
}

func (c *Collateral) readTCBInfo(b *Bundle, signer *x509.Certificate) (err error) {
	if err = checkDocument(b.TCBInfo, b.TCBInfoSignature, signer); err != nil {
		return collateralError("tcb_info_signature", err)
	}
	if c.tcb, err = parseTCBInfo([]byte(b.TCBInfo), c.of); err != nil {
		return collateralError("tcb_info_format", err)
	}
	return nil
}

func (c *Collateral) readQEIdentity(b *Bundle, signer *x509.Certificate) (err error) {
	if err = checkDocument(b.QEIdentity, b.QEIdentitySignature, signer); err != nil {
		return collateralError("qe_identity_signature", err)
	}
	if c.qe, err = parseQEIdentity([]byte(b.QEIdentity), c.of); err != nil {
		return collateralError("qe_identity_format", err)
	}
	return nil
}

// checkDocument checks the signature of a document, byte for byte as it came.
func checkDocument(text, signature string, signer *x509.Certificate) error {
	if len(text) > maxDocument {
		return fmt.Errorf("document of %d bytes, want at most %d", len(text), maxDocument)
	}
	raw, err := hex.DecodeString(signature)
	if err != nil || len(raw) != 64 {
		return fmt.Errorf("signature of %d characters, want 128 hexadecimal digits", len(signature))
	}
	if !verifyRaw(signer.PublicKey.(*ecdsa.PublicKey), []byte(text), raw) {
		return fmt.Errorf("the signature is not that of %q over this text", signer.Subject.CommonName)
	}
	return nil
}

// FMSPC returns the platform type that the TCB info is about.
func (c *Collateral) FMSPC() [6]byte { return c.tcb.fmspc }

// CA returns the CA of the PCK certificates that the PCK CRL is about.
func (c *Collateral) CA() string { return c.ca }

// SHA256 returns the hash of the bundle.
func (c *Collateral) SHA256() [32]byte { return c.sha256 }

// ValidFrom returns when the youngest part began to hold: the latest issueDate,
// thisUpdate or notBefore.
func (c *Collateral) ValidFrom() time.Time { return c.from }

// ValidUntil returns when the first part ends to hold: the earliest nextUpdate or
// notAfter.
func (c *Collateral) ValidUntil() time.Time { return c.until }

// oldest returns the earliest date of issue of what is issued every month.
func (c *Collateral) oldest() time.Time {
	t := c.tcb.issued
	for _, other := range []time.Time{c.qe.issued, c.pckCRL.issued} {
		if other.Before(t) {
			t = other
		}
	}
	return t
}

// UsableUntil returns the last moment at which a [Verifier] of this StaleGrace uses
// the collateral: certificates get no grace.
func (c *Collateral) UsableUntil(grace time.Duration) time.Time {
	grace = min(max(grace, 0), MaxStaleGrace)
	var until time.Time
	for _, w := range c.windows {
		end := w.until
		if w.document {
			end = end.Add(grace)
		}
		if until.IsZero() || end.Before(until) {
			until = end
		}
	}
	return until
}

// EvaluationNumbers returns tcbEvaluationDataNumber of the TCB info and of the QE
// identity. They may differ in a genuine bundle.
func (c *Collateral) EvaluationNumbers() (tcb, qe int) { return c.tcb.evaluation, c.qe.evaluation }

// Document is a dated part of a bundle.
type Document struct {
	Name          string // "tcb_info", "qe_identity", "pck_crl" or "root_crl"
	Issued, Until time.Time
	Number        uint64 // evaluation number, or number of the CRL
}

// Documents returns the TCB info, the QE identity, the PCK CRL and the root CRL, in
// this order: what a guard against older collateral compares.
func (c *Collateral) Documents() [4]Document {
	return [4]Document{
		{"tcb_info", c.tcb.issued, c.tcb.next, uint64(c.tcb.evaluation)},
		{"qe_identity", c.qe.issued, c.qe.next, uint64(c.qe.evaluation)},
		{"pck_crl", c.pckCRL.issued, c.pckCRL.next, c.pckCRL.number},
		{"root_crl", c.rootCRL.issued, c.rootCRL.next, c.rootCRL.number},
	}
}

// checkTime checks every window at this time. Documents may be used for grace after
// they ended: then the result is when the first of them did.
func (c *Collateral) checkTime(at time.Time, grace time.Duration) (stale time.Time, failed *Error) {
	if !at.Before(c.from) && !at.After(c.until) {
		return time.Time{}, nil
	}
	for i := range c.windows {
		w := c.windows[i]
		if w.document && at.After(w.until) && !at.After(w.until.Add(grace)) {
			if stale.IsZero() || w.until.Before(stale) {
				stale = w.until
			}
			continue
		}
		if err := w.check(stageCollateral, at, "fetch newer collateral, and check the clock"); err != nil {
			return time.Time{}, err
		}
	}
	return stale, nil
}

func (w *window) check(stage string, at time.Time, hint string) *Error {
	switch {
	case at.Before(w.from):
		return &Error{Code: w.what + "_not_yet_valid", Stage: stage, Got: at.UTC().Format(time.RFC3339), Want: "not before " + w.from.UTC().Format(time.RFC3339), Hint: hint}
	case at.After(w.until):
		return &Error{Code: w.what + "_expired", Stage: stage, Got: at.UTC().Format(time.RFC3339), Want: "not after " + w.until.UTC().Format(time.RFC3339), Hint: hint}
	}
	return nil
}

// SignedDocument takes the signed document and its signature out of a response of
// Intel's PCS or a PCCS: {"<name>":{...},"signature":"<128 hex>"}, where name is
// "tcbInfo" or "enclaveIdentity". document is a part of body. Neither is checked.
func SignedDocument(body []byte, name string) (document []byte, signature string, err error) {
	if len(body) > maxDocument+1024 {
		return nil, "", fmt.Errorf("dcap: %s: response of %d bytes, want at most %d", name, len(body), maxDocument+1024)
	}
	s := newScanner(body)
	s.object(&members{what: name + " response", required: []string{name, "signature"}, closed: true}, func(key string) {
		if key == "signature" {
			signature = s.string()
			return
		}
		s.peek()
		start := s.at
		s.skip(maxDepth)
		document = bytes.TrimSpace(body[start:s.at])
	})
	if err := s.end(); err != nil {
		return nil, "", fmt.Errorf("dcap: %s: %w", name, err)
	}
	return document, signature, nil
}
