package tdxsim

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"math/big"

	"tdx-agent/measure"
)

// Fixed values of a quote (Intel TDX DCAP Quoting Library API, A.3 and A.4).
const (
	keyTypeP256    = 2
	teeTypeTDX     = 0x81
	certificatePEM = 5 // certification data: the PCK chain as PEM
	certificateQE  = 6 // certification data: the QE report and what certifies it
	bodySizeTD10   = 584
	bodySizeTD15   = 648
	qeProductID    = 2 // the TD quoting enclave
	qeSVN          = 8
	xfam           = 0x602e7 // of a current Xeon: x87 to AVX-512, PKRU, AMX
)

// qeVendor is Intel's QE vendor id, which every DCAP quote carries.
var qeVendor = []byte("\x93\x9a\x72\x33\xf7\x9c\x4c\xa9\x94\x0a\x0d\xb3\x95\x7f\x06\x07")

var (
	qeSigner      = sha256.Sum256([]byte("tdx-agent SIMULATED quoting enclave: MRSIGNER"))
	qeMeasurement = sha256.Sum256([]byte("tdx-agent SIMULATED quoting enclave: MRENCLAVE"))
	qeAttributes  = [16]byte{0x15, 8: 0xe7}
)

// quote makes a signed quote of these registers and this report data.
func (p *platform) quote(regs *measure.Registers, rd measure.ReportData) ([]byte, error) {
	b := p.header()
	b = p.appendBody(b, regs, rd)
	signature, err := signRaw(p.pki.attestationKey, b, false)
	if err != nil {
		return nil, fmt.Errorf("tdxsim: sign quote: %v", err)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(signature)+len(p.tail)))
	b = append(b, signature...)
	return append(b, p.tail...), nil
}

// header is everything before the body.
func (p *platform) header() []byte {
	b := make([]byte, 0, 8192)
	b = binary.LittleEndian.AppendUint16(b, uint16(p.cfg.QuoteVersion))
	b = binary.LittleEndian.AppendUint16(b, keyTypeP256)
	b = binary.LittleEndian.AppendUint32(b, teeTypeTDX)
	b = append(b, 0, 0, 0, 0)
	b = append(b, qeVendor...)
	user := make([]byte, 20) // the QE's id of this platform
	copy(user, derive(p.secret, "QE id", 16))
	b = append(b, user...)
	if p.cfg.QuoteVersion == 5 {
		size := uint32(bodySizeTD10)
		if p.cfg.BodyType == 3 {
			size = bodySizeTD15
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(p.cfg.BodyType))
		b = binary.LittleEndian.AppendUint32(b, size)
	}
	return b
}

// appendBody adds the TD report body.
func (p *platform) appendBody(b []byte, regs *measure.Registers, rd measure.ReportData) []byte {
	c := &p.cfg
	b = append(b, c.TEETCBSVN[:]...)
	b = append(b, c.MRSEAM[:]...)
	b = append(b, c.MRSignerSEAM[:]...)
	b = binary.LittleEndian.AppendUint64(b, c.SEAMAttributes)
	b = binary.LittleEndian.AppendUint64(b, c.Attributes)
	b = binary.LittleEndian.AppendUint64(b, xfam)
	for _, d := range registerList(regs) {
		b = append(b, d[:]...)
	}
	b = append(b, rd[:]...)
	if c.BodyType == 3 {
		b = append(b, c.TEETCBSVN2[:]...)
		b = append(b, c.MRServiceTD[:]...)
	}
	return b
}

// certification is what follows the quote's signature. It is the same in every
// quote: the attestation key, the QE's report on it, and the PCK chain.
func (p *platform) certification() ([]byte, error) {
	key, inner, err := p.vouched()
	if err != nil {
		return nil, err
	}
	return appendCertification(key, certificateQE, inner), nil
}

// vouched returns the attestation key and what the quoting enclave says of it, with the
// PCK chain. An SGX quote has the one right behind the other.
func (p *platform) vouched() (key, inner []byte, err error) {
	key, err = p.pki.attestationKey.PublicKey.Bytes()
	if err != nil {
		return nil, nil, fmt.Errorf("tdxsim: attestation key: %v", err)
	}
	key = key[1:] // without the point format octet
	auth := make([]byte, 32)
	for i := range auth {
		auth[i] = byte(i)
	}
	report := p.qeReport(key, auth)
	signature, err := signRaw(p.pki.pckKey, report, true)
	if err != nil {
		return nil, nil, fmt.Errorf("tdxsim: sign QE report: %v", err)
	}
	chain := append(pemChain(p.pki.pck, p.pki.ca, p.pki.root), 0)

	inner = append(report, signature...)
	inner = binary.LittleEndian.AppendUint16(inner, uint16(len(auth)))
	inner = append(inner, auth...)
	return key, appendCertification(inner, certificatePEM, chain), nil
}

func appendCertification(b []byte, kind uint16, data []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, kind)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// qeReport is the quoting enclave's SGX report body, which vouches for the
// attestation key by its report data.
func (p *platform) qeReport(key, auth []byte) []byte {
	b := make([]byte, 384)
	copy(b, sgxSVN[:])
	copy(b[48:], qeAttributes[:])
	if p.cfg.QEDebug {
		b[48] |= 2
	}
	copy(b[64:], qeMeasurement[:])
	copy(b[128:], qeSigner[:])
	binary.LittleEndian.PutUint16(b[256:], qeProductID)
	binary.LittleEndian.PutUint16(b[258:], qeSVN)
	binding := sha256.Sum256(append(append([]byte{}, key...), auth...))
	copy(b[320:], binding[:])
	return b
}

// signRaw signs the SHA-256 of message and returns r || s, 32 bytes each. What
// every process must derive alike is signed with RFC 6979's nonce.
func signRaw(key *ecdsa.PrivateKey, message []byte, deterministic bool) ([]byte, error) {
	random := rand.Reader
	if deterministic {
		random = nil
	}
	digest := sha256.Sum256(message)
	der, err := key.Sign(random, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	var s struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &s); err != nil {
		return nil, err
	}
	raw := make([]byte, 64)
	s.R.FillBytes(raw[:32])
	s.S.FillBytes(raw[32:])
	return raw, nil
}

// registerList lists the registers in the order of TDINFO, of a quote's body and of
// the state file.
func registerList(r *measure.Registers) [8]*measure.Digest {
	return [8]*measure.Digest{&r.MRTD, &r.MRConfigID, &r.MROwner, &r.MROwnerConfig, &r.RTMR[0], &r.RTMR[1], &r.RTMR[2], &r.RTMR[3]}
}
