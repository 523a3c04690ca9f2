package dcap

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"

	"tdx-agent/measure"
)

// Caps of a quote. Quotes of real platforms have about 5,000 bytes.
const (
	maxQuote    = 16 << 10
	maxTrailing = 4 << 10
)

// Fixed values of a quote (Intel TDX DCAP Quoting Library API, A.3 and A.4).
const (
	keyTypeP256      = 2
	certificationPEM = 5
	certificationQE  = 6
	signatureSize    = 64
	attestationKey   = 64
	qeReportSize     = 384
)

// qeVendor is Intel's QE vendor id.
var qeVendor = [16]byte{0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07}

// QEReport is what the quoting enclave's report says of the enclave.
type QEReport struct {
	MRSigner   [32]byte
	MREnclave  [32]byte
	ISVProdID  uint16
	ISVSVN     uint16
	Attributes [16]byte
	MiscSelect [4]byte // as in the report: little endian
}

// signatureData is the signature part of a quote. The slices are parts of the quote.
type signatureData struct {
	signature   []byte // r || s over the signed part, by key
	certified   []byte // everything after it: constant for one attestation key
	key         []byte // x || y
	qeReport    []byte
	qeSignature []byte // r || s over qeReport, by the PCK
	auth        []byte
	chain       []byte // PEM
}

// parseQuote parses quote and signature data, and checks what the header says.
func parseQuote(quote []byte) (*measure.Quote, *signatureData, *Error) {
	if len(quote) > maxQuote+maxTrailing {
		return nil, nil, quoteError("quote_size", fmt.Sprint(len(quote), " bytes"), fmt.Sprintf("at most %d", maxQuote+maxTrailing))
	}
	q, err := measure.ParseQuote(quote)
	if err != nil {
		code := "quote_format"
		if e, ok := errors.AsType[*measure.QuoteParseError](err); ok && (e.Field == "TEE type" || e.Field == "version") {
			code = "not_tdx" // an SGX quote has version 3 and TEE type 0
		}
		return nil, nil, &Error{Code: code, Stage: stageQuote, Err: err}
	}
	switch {
	case len(quote)-len(q.Trailing) > maxQuote:
		return nil, nil, quoteError("quote_size", fmt.Sprint(len(quote)-len(q.Trailing), " bytes"), fmt.Sprint("at most ", maxQuote))
	case len(q.Trailing) > maxTrailing:
		return nil, nil, quoteError("quote_size", fmt.Sprint(len(q.Trailing), " bytes behind the quote"), fmt.Sprint("at most ", maxTrailing))
	case q.AttestationKeyType != keyTypeP256:
		return nil, nil, quoteError("quote_key_type", fmt.Sprint(q.AttestationKeyType), "2 (ECDSA P-256)")
	case q.QEVendorID != qeVendor:
		return nil, nil, quoteError("qe_vendor", fmt.Sprintf("%x", q.QEVendorID), fmt.Sprintf("%x (Intel)", qeVendor))
	}
	d, err := parseSignatureData(q.SignatureData)
	if err != nil {
		return nil, nil, &Error{Code: "certification_format", Stage: stageQuote, Err: err}
	}
	return q, d, nil
}

func quoteError(code, got, want string) *Error {
	return &Error{Code: code, Stage: stageQuote, Got: got, Want: want}
}

// parseSignatureData reads signature, attestation key, and certification data of
// type 6 with a PEM chain (type 5) in it. Every length must be exact.
func parseSignatureData(b []byte) (*signatureData, error) {
	r := reader{b}
	d := &signatureData{signature: r.take(signatureSize)}
	d.certified = r.rest
	d.key = r.take(attestationKey)
	inner, err := r.certification(certificationQE)
	if err != nil {
		return nil, err
	}
	if len(r.rest) > 0 {
		return nil, fmt.Errorf("%d bytes follow the certification data", len(r.rest))
	}
	r = reader{inner}
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

// reader takes bytes from the front. Once there are too few it returns nil, and
// certification an error.
type reader struct{ rest []byte }

func (r *reader) take(n int) []byte {
	if n > len(r.rest) || r.rest == nil {
		r.rest = nil
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

// certification takes {type, size, data}.
func (r *reader) certification(want uint16) ([]byte, error) {
	head := r.take(6)
	if head == nil {
		return nil, fmt.Errorf("the signature data ends before certification data of type %d", want)
	}
	if got := binary.LittleEndian.Uint16(head); got != want {
		return nil, fmt.Errorf("certification data of type %d, want %d", got, want)
	}
	size := binary.LittleEndian.Uint32(head[2:])
	if uint64(size) > uint64(len(r.rest)) {
		return nil, fmt.Errorf("certification data of type %d has %d bytes, but %d are left", want, size, len(r.rest))
	}
	return r.take(int(size)), nil
}

// binding is the hash of attestation key and authentication data that a QE report
// must carry, followed by zeros.
func (d *signatureData) binding() (want [64]byte) {
	h := sha256.New()
	h.Write(d.key)
	h.Write(d.auth)
	h.Sum(want[:0])
	return want
}

// certify checks that the PCK signed the QE report and that the report vouches for
// the attestation key, which it returns.
func (d *signatureData) certify(pck *ecdsa.PublicKey) (*ecdsa.PublicKey, *QEReport, *Error) {
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, d.key...))
	if err != nil {
		return nil, nil, &Error{Code: "attestation_key", Stage: stageQuote, Err: err}
	}
	if want := d.binding(); subtle.ConstantTimeCompare(want[:], d.qeReport[320:]) != 1 {
		return nil, nil, &Error{Code: "qe_binding", Stage: stageQuote, Hint: "the quoting enclave did not vouch for this attestation key"}
	}
	if !verifyRaw(pck, d.qeReport, d.qeSignature) {
		return nil, nil, &Error{Code: "qe_report_signature", Stage: stageQuote, Hint: "the QE report was not signed by this platform's PCK"}
	}
	return key, &QEReport{
		MiscSelect: [4]byte(d.qeReport[16:]),
		Attributes: [16]byte(d.qeReport[48:]),
		MREnclave:  [32]byte(d.qeReport[64:]),
		MRSigner:   [32]byte(d.qeReport[128:]),
		ISVProdID:  binary.LittleEndian.Uint16(d.qeReport[256:]),
		ISVSVN:     binary.LittleEndian.Uint16(d.qeReport[258:]),
	}, nil
}

// verifyRaw verifies a signature r || s, 32 bytes each, over the SHA-256 of message.
func verifyRaw(key *ecdsa.PublicKey, message, signature []byte) bool {
	if len(signature) != signatureSize {
		return false
	}
	const sequence = 0x30
	der := append(make([]byte, 0, 72), sequence, 0)
	der = appendInteger(der, signature[:32])
	der = appendInteger(der, signature[32:])
	der[1] = byte(len(der) - 2)
	digest := sha256.Sum256(message)
	return ecdsa.VerifyASN1(key, digest[:], der)
}

// appendInteger appends a big-endian number as a DER INTEGER.
func appendInteger(der, n []byte) []byte {
	const integer = 0x02
	for len(n) > 1 && n[0] == 0 {
		n = n[1:]
	}
	if n[0] >= 0x80 {
		der = append(der, integer, byte(len(n)+1), 0)
	} else {
		der = append(der, integer, byte(len(n)))
	}
	return append(der, n...)
}
