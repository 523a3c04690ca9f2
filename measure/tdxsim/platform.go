package tdxsim

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"time"
)

// platform is a machine with its certificates: what survives a reboot.
type platform struct {
	cfg    Config
	secret []byte
	pki    *pki

	ppid, instanceID [16]byte
	fmspc            [6]byte

	tail []byte // of every quote: from the end of the quote signature on
}

// SVNs of the simulated machine's SGX side, in the PCK certificate and in the TCB
// info.
var (
	sgxSVN        = [16]byte{4, 4, 3, 3, 3, 1, 0, 5}
	pceSVN uint16 = 13
)

// newPlatform derives a machine from its secret. created dates its certificates.
func newPlatform(secret []byte, created time.Time, cfg Config) (*platform, error) {
	p := &platform{cfg: cfg, secret: secret}
	copy(p.ppid[:], derive(secret, "PPID", 16))
	copy(p.instanceID[:], derive(secret, "platform instance", 16))
	p.fmspc = cfg.FMSPC
	if p.fmspc == [6]byte{} {
		copy(p.fmspc[:], derive(secret, "FMSPC", 4))
	}
	ext, err := p.sgxExtension()
	if err != nil {
		return nil, fmt.Errorf("tdxsim: SGX extension: %v", err)
	}
	valid := cfg.Certificates.or(day(created).AddDate(0, 0, -1), 20*365)
	if p.pki, err = newPKI(secret, valid, ext); err != nil {
		return nil, err
	}
	p.tail, err = p.certification()
	return p, err
}

// oidSGX is the root of Intel's SGX certificate extensions.
var oidSGX = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1}

// attribute is one {OID, value} of the SGX extension.
type attribute struct {
	ID    asn1.ObjectIdentifier
	Value any
}

func sgxAttribute(value any, arc ...int) attribute {
	return attribute{append(append(asn1.ObjectIdentifier{}, oidSGX...), arc...), value}
}

// sgxExtension encodes the platform's identity for its PCK certificate (Intel SGX
// PCK Certificate and CRL Profile Specification, 1.3.5).
func (p *platform) sgxExtension() (pkix.Extension, error) {
	var tcb []attribute
	for i, svn := range sgxSVN {
		tcb = append(tcb, sgxAttribute(int(svn), 2, i+1))
	}
	tcb = append(tcb, sgxAttribute(int(pceSVN), 2, 17), sgxAttribute(sgxSVN[:], 2, 18))
	const scalableWithIntegrity = asn1.Enumerated(2)
	value, err := asn1.Marshal([]attribute{
		sgxAttribute(p.ppid[:], 1),
		sgxAttribute(tcb, 2),
		sgxAttribute([]byte{0, 0}, 3),
		sgxAttribute(p.fmspc[:], 4),
		sgxAttribute(scalableWithIntegrity, 5),
		sgxAttribute(p.instanceID[:], 6),
		sgxAttribute([]attribute{
			sgxAttribute(true, 7, 1),  // dynamic platform
			sgxAttribute(false, 7, 2), // cached keys
			sgxAttribute(true, 7, 3),  // SMT
		}, 7),
	})
	return pkix.Extension{Id: oidSGX, Value: value}, err
}
