package dcap

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

const maxCRL = 1 << 20

// CRLBytes returns the DER of a CRL as a server sends it: Intel's PCS sends DER, a
// PCCS may send its hexadecimal digits. The result is not yet checked.
func CRLBytes(body []byte) ([]byte, error) {
	if len(body) > 2*maxCRL+2 {
		return nil, fmt.Errorf("dcap: CRL of %d bytes, want at most %d", len(body), maxCRL)
	}
	const sequence = 0x30
	if text := bytes.TrimSpace(body); len(text) > 1 && text[0] == '3' && text[1] == '0' {
		// "30" are hexadecimal digits; as DER they were no SEQUENCE.
		der, err := hex.AppendDecode(nil, text)
		if err != nil {
			return nil, fmt.Errorf("dcap: CRL in hexadecimal: %v", err)
		}
		body = der
	}
	if len(body) == 0 || body[0] != sequence || len(body) > maxCRL {
		return nil, fmt.Errorf("dcap: CRL of %d bytes is neither DER nor its hexadecimal digits", len(body))
	}
	return body, nil
}

// revocations are the serial numbers of a CRL, as big.Int.Bytes has them.
type revocations map[string]struct{}

func (r revocations) has(c *x509.Certificate) bool {
	_, is := r[string(c.SerialNumber.Bytes())]
	return is
}

// crl is a verified CRL.
type crl struct {
	issued, next time.Time
	number       uint64
	revoked      revocations
}

var (
	oidCRLNumber    = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidAuthorityKey = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// parseCRL checks that issuer signed this CRL and reads it. A CRL with a critical
// extension (a delta, or one of another scope) would not say what it seems to.
func parseCRL(der []byte, issuer *x509.Certificate) (*crl, error) {
	if len(der) > maxCRL {
		return nil, fmt.Errorf("CRL of %d bytes, want at most %d", len(der), maxCRL)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(list.RawIssuer, issuer.RawSubject) || len(list.AuthorityKeyId) > 0 && !bytes.Equal(list.AuthorityKeyId, issuer.SubjectKeyId) {
		return nil, &signatureError{fmt.Errorf("CRL of the issuer %q, want %q", list.Issuer.CommonName, issuer.Subject.CommonName)}
	}
	if list.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		return nil, &signatureError{fmt.Errorf("signed with %v, want ECDSA-SHA256", list.SignatureAlgorithm)}
	}
	if err := list.CheckSignatureFrom(issuer); err != nil {
		return nil, &signatureError{fmt.Errorf("CRL of %q: %v", issuer.Subject.CommonName, err)}
	}
	for _, e := range list.Extensions {
		if e.Critical && !e.Id.Equal(oidCRLNumber) && !e.Id.Equal(oidAuthorityKey) {
			return nil, fmt.Errorf("unknown critical extension %v", e.Id)
		}
	}
	if list.NextUpdate.IsZero() || list.Number == nil || !list.Number.IsUint64() {
		return nil, errors.New("CRL without nextUpdate or a usable number")
	}
	c := &crl{issued: list.ThisUpdate, next: list.NextUpdate, number: list.Number.Uint64(), revoked: make(revocations, len(list.RevokedCertificateEntries))}
	for i := range list.RevokedCertificateEntries {
		entry := &list.RevokedCertificateEntries[i]
		for _, e := range entry.Extensions {
			if e.Critical {
				return nil, fmt.Errorf("an entry has the critical extension %v", e.Id)
			}
		}
		c.revoked[string(entry.SerialNumber.Bytes())] = struct{}{}
	}
	return c, nil
}

// signatureError tells a CRL that its issuer did not sign from one that is malformed.
type signatureError struct{ error }
