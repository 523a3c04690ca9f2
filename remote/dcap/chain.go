package dcap

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"time"
)

// chainText is a PCK chain as PEM, which spares decoding it. The chain's identity is
// its DER: more than one text may have the same.
type chainText struct {
	text  string
	chain *pckChain
}

// pckChain is a PCK chain whose signatures hold, up to a pinned root.
type pckChain struct {
	pck                      *PCK
	leaf, intermediate, root *x509.Certificate
	pin                      [32]byte // SHA-256 of root
	windows                  [3]window
	key                      *ecdsa.PublicKey
}

// chain verifies a PCK chain. The issuer of c's CRL counts as a known intermediate.
func (v *Verifier) chain(text []byte, c *Collateral) (*pckChain, *Error) {
	if t, ok := v.texts.Get(maphash.Bytes(v.seed, text)); ok && t.text == string(text) {
		return t.chain, nil
	}
	ders, err := decodePEM(text)
	if err == nil && len(ders) != 3 {
		err = fmt.Errorf("chain of %d certificates, want 3", len(ders))
	}
	if err != nil {
		return nil, &Error{Code: "pck_chain_format", Stage: stagePCK, Err: err}
	}
	h := sha256.New()
	for _, der := range ders {
		sum := sha256.Sum256(der) // so that the lengths count
		h.Write(sum[:])
	}
	id := [32]byte(h.Sum(nil))
	if known, ok := v.chains.Get(id); ok {
		return known, nil
	}
	chain, err := v.verifyChain(ders, c)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			return nil, e
		}
		return nil, &Error{Code: "pck_chain", Stage: stagePCK, Err: err}
	}
	v.chains.Add(id, chain)
	return chain, nil
}

func (v *Verifier) verifyChain(ders [][]byte, c *Collateral) (*pckChain, error) {
	var known *x509.Certificate
	if c != nil {
		known = c.root
	}
	root, pin, err := pinnedRoot(ders[2], v.cfg.Roots, known)
	if err != nil {
		return nil, err
	}
	intermediate, err := v.intermediate(ders[1], root, pin, c)
	if err != nil {
		return nil, err
	}
	leaf, err := parseCertificate(ders[0])
	if err != nil {
		return nil, err
	}
	if leaf.Subject.CommonName != namePCK || leaf.IsCA || leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, fmt.Errorf("certificate %q is no PCK certificate", leaf.Subject.CommonName)
	}
	if err := checkIssued(leaf, intermediate); err != nil {
		return nil, err
	}
	pck, err := parsePCK(leaf)
	if err != nil {
		return nil, &Error{Code: "pck_extension", Stage: stagePCK, Err: err}
	}
	if pck.CA, err = caOf(intermediate); err != nil {
		return nil, err
	}
	return &pckChain{
		pck: pck, leaf: leaf, intermediate: intermediate, root: root, pin: pin, key: leaf.PublicKey.(*ecdsa.PublicKey),
		windows: [3]window{certificateWindow("pck", leaf), certificateWindow("pck_ca", intermediate), certificateWindow("root", root)},
	}, nil
}

// intermediate verifies a CA certificate unless that was done before.
func (v *Verifier) intermediate(der []byte, root *x509.Certificate, pin [32]byte, c *Collateral) (*x509.Certificate, error) {
	if c != nil && c.pin == pin && string(c.issuer.Raw) == string(der) {
		return c.issuer, nil
	}
	id := sha256.Sum256(append(append(make([]byte, 0, len(der)+len(pin)), der...), pin[:]...))
	if known, ok := v.intermediates.Get(id); ok {
		return known, nil
	}
	ca, err := parseCertificate(der)
	if err != nil {
		return nil, err
	}
	if err := checkIssued(ca, root); err != nil {
		return nil, err
	}
	v.intermediates.Add(id, ca)
	return ca, nil
}

// applicable checks that c is about this platform, that everything is valid at this
// time, and that nothing is revoked.
func (v *Verifier) applicable(chain *pckChain, c *Collateral, at time.Time) (stale time.Time, err *Error) {
	if c.pin != chain.pin {
		return stale, &Error{Code: "collateral_root", Stage: stageCollateral, Got: fmt.Sprintf("collateral below the root %x", c.pin[:8]), Want: fmt.Sprintf("%x, the root of the PCK chain", chain.pin[:8]),
			Hint: "simulated and real platforms need their own collateral"}
	}
	for i := range chain.windows {
		if err := chain.windows[i].check(stagePCK, at, "check the clock"); err != nil {
			return stale, err
		}
	}
	if stale, err = c.checkTime(at, v.cfg.StaleGrace); err != nil {
		return stale, err
	}
	if c.rootCRL.revoked.has(chain.intermediate) || c.rootCRL.revoked.has(c.issuer) {
		return stale, &Error{Code: "pck_ca_revoked", Stage: stagePCK, Got: fmt.Sprintf("serial number %x in the root CRL", chain.intermediate.SerialNumber), Hint: "do not trust this platform"}
	}
	if c.ca != chain.pck.CA || checkNames(chain.leaf, c.issuer) != nil {
		return stale, &Error{Code: "pck_crl_issuer", Stage: stageCollateral, Got: "a PCK CRL of the " + c.ca + " CA", Want: "one of the " + chain.pck.CA + " CA, which issued the PCK certificate",
			Hint: "fetch collateral for this platform"}
	}
	if c.pckCRL.revoked.has(chain.leaf) {
		return stale, &Error{Code: "pck_revoked", Stage: stagePCK, Got: "serial number " + chain.pck.Serial + " in the PCK CRL", Hint: "do not trust this platform"}
	}
	if c.tcb.fmspc != chain.pck.FMSPC {
		return stale, &Error{Code: "fmspc_mismatch", Stage: stageCollateral, Got: fmt.Sprintf("TCB info of FMSPC %x", c.tcb.fmspc), Want: fmt.Sprintf("%x", chain.pck.FMSPC),
			Hint: "fetch collateral for this platform"}
	}
	if c.tcb.pceID != chain.pck.PCEID {
		return stale, &Error{Code: "pceid_mismatch", Stage: stageCollateral, Got: fmt.Sprintf("TCB info of PCEID %x", c.tcb.pceID), Want: fmt.Sprintf("%x", chain.pck.PCEID),
			Hint: "fetch collateral for this platform"}
	}
	return stale, nil
}
