package dcap

import (
	"encoding/binary"
	"fmt"
	"time"
)

// An SGX quote (Intel SGX ECDSA Quote Library API, A.4, quote version 3): header, report of
// the enclave, length, signature data.
const (
	enclaveVersion    = 3
	enclaveHeader     = 48
	enclaveReportSize = 384
	enclaveSigned     = enclaveHeader + enclaveReportSize
	attributeDebug    = 2
)

// EnclaveReport is a quote of an SGX enclave that is genuine: what the enclave is, and the
// TCB of its platform. Whether these are good enough is for the caller to say.
type EnclaveReport struct {
	MREnclave, MRSigner [32]byte
	ISVProdID, ISVSVN   uint16
	Debug               bool // the host can read and change the enclave
	ReportData          [64]byte

	PCK                        PCK
	Root                       [32]byte // SHA-256 of the root certificate that the PCK chain ends in
	Platform, QEStatus, Merged TCB
}

// ParseEnclaveCollateral is [ParseCollateral] for SGX quotes: TCB info of id SGX, and the
// identity of the quoting enclave for enclaves (QE).
func ParseEnclaveCollateral(bundle []byte, roots *Roots) (*Collateral, error) {
	return parseCollateral(bundle, roots, ofEnclave)
}

// VerifyEnclave is Verify for the quote of an SGX enclave, of version 3, with collateral of
// [ParseEnclaveCollateral]. Nobody else is asked for an opinion, and nothing is cached but
// the PCK chain.
func (v *Verifier) VerifyEnclave(quote []byte, c *Collateral, at time.Time) (*EnclaveReport, error) {
	r, err := v.verifyEnclave(quote, c, at)
	if err != nil {
		return nil, err // not returned as it is: a nil *Error is no nil error
	}
	return r, nil
}

func (v *Verifier) verifyEnclave(quote []byte, c *Collateral, at time.Time) (*EnclaveReport, *Error) {
	if v == nil || v.cfg.Roots == nil || len(v.cfg.Roots.pins) == 0 {
		return nil, &Error{Code: "no_roots", Stage: stageSetup, Hint: "give Config.Roots"}
	}
	if err := checkSetup(c, ofEnclave, at); err != nil {
		return nil, err
	}
	d, err := parseEnclaveQuote(quote)
	if err != nil {
		return nil, err
	}
	chain, err := v.chain(d.chain, c)
	if err != nil {
		return nil, err
	}
	key, qe, err := d.certify(chain.key)
	if err != nil {
		return nil, err
	}
	if !verifyRaw(key, quote[:enclaveSigned], d.signature) {
		return nil, &Error{Code: "quote_signature", Stage: stageQuote, Hint: "the quote was changed after it was signed"}
	}
	if _, err := v.applicable(chain, c, at); err != nil {
		return nil, err
	}
	if err := c.checkQE(qe); err != nil {
		return nil, err
	}
	report := quote[enclaveHeader:enclaveSigned]
	r := &EnclaveReport{
		MREnclave: [32]byte(report[64:]), MRSigner: [32]byte(report[128:]), ISVProdID: binary.LittleEndian.Uint16(report[256:]), ISVSVN: binary.LittleEndian.Uint16(report[258:]),
		Debug: report[48]&attributeDebug != 0, ReportData: [64]byte(report[320:]),
		PCK: *chain.pck, Root: chain.pin,
	}
	platform, enclave := c.enclaveLevel(chain.pck), levelOf(c.qe.levels, int(qe.ISVSVN))
	r.Platform, r.QEStatus = platform.clone(), enclave.clone()
	r.Merged = merge(converge(r.Platform.Status, r.QEStatus.Status), &r.Platform, &r.QEStatus)
	return r, nil
}

// enclaveLevel is the first level of the SGX side that the platform reaches.
func (c *Collateral) enclaveLevel(pck *PCK) TCB {
	for i := range c.tcb.levels {
		if l := &c.tcb.levels[i]; l.pceSVN <= pck.PCESVN && reaches(pck.Components[:], l.sgx[:]) {
			return l.tcb
		}
	}
	return TCB{Status: NotSupported}
}

// parseEnclaveQuote checks the header and reads the signature data, in which the PCK chain
// stands by itself and not inside other certification data. Every length must be exact.
func parseEnclaveQuote(quote []byte) (*signatureData, *Error) {
	if len(quote) < enclaveSigned+4 || len(quote) > maxQuote {
		return nil, quoteError("quote_size", fmt.Sprint(len(quote), " bytes"), fmt.Sprint(enclaveSigned+4, " to ", maxQuote))
	}
	switch version, keyType, tee := binary.LittleEndian.Uint16(quote), binary.LittleEndian.Uint16(quote[2:]), binary.LittleEndian.Uint32(quote[4:]); {
	case version != enclaveVersion || tee != 0:
		return nil, quoteError("not_sgx", fmt.Sprintf("version %d, TEE type %#x", version, tee), "version 3, TEE type 0 (an SGX enclave)")
	case keyType != keyTypeP256:
		return nil, quoteError("quote_key_type", fmt.Sprint(keyType), "2 (ECDSA P-256)")
	case [16]byte(quote[12:]) != qeVendor:
		return nil, quoteError("qe_vendor", fmt.Sprintf("%x", quote[12:28]), fmt.Sprintf("%x (Intel)", qeVendor))
	}
	rest := quote[enclaveSigned+4:]
	if size := binary.LittleEndian.Uint32(quote[enclaveSigned:]); uint64(size) != uint64(len(rest)) {
		return nil, quoteError("quote_size", fmt.Sprint(len(rest), " bytes of signature data"), fmt.Sprint(size))
	}
	d, err := parseEnclaveSignature(rest)
	if err != nil {
		return nil, &Error{Code: "certification_format", Stage: stageQuote, Err: err}
	}
	return d, nil
}

func parseEnclaveSignature(b []byte) (d *signatureData, err error) {
	r := reader{b}
	d = &signatureData{signature: r.take(signatureSize), key: r.take(attestationKey)}
	d.qeReport, d.qeSignature = r.take(qeReportSize), r.take(signatureSize)
	d.auth = r.take(int(r.uint16()))
	if d.chain, err = r.certification(certificationPEM); err != nil {
		return nil, err
	}
	if len(r.rest) > 0 || d.auth == nil {
		return nil, fmt.Errorf("%d bytes follow the PCK chain", len(r.rest))
	}
	return d, nil
}
