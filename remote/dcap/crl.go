package dcap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
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

// signatureError tells a CRL that its issuer did not sign from one that is malformed.
type signatureError struct{ error }

var (
	oidCRLNumber    = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidAuthorityKey = asn1.ObjectIdentifier{2, 5, 29, 35}
	// ecdsaWithSHA256 is the AlgorithmIdentifier (RFC 5758, 3.2).
	ecdsaWithSHA256 = []byte("\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02")
)

var errMalformedCRL = errors.New("not a DER CRL of version 2")

// Tags of a CRL (RFC 5280, 5.1).
var (
	tagExtensions = cryptobyteasn1.Tag(0).ContextSpecific().Constructed()
	tagKeyID      = cryptobyteasn1.Tag(0).ContextSpecific()
)

// parseCRL checks that issuer signed this CRL and reads it (RFC 5280, 5.1). A CRL
// with a critical extension (a delta, or one of another scope) would not say what it
// seems to. crypto/x509's reader takes longer over the dates of the entries, which
// nobody needs, than its signature does to verify.
func parseCRL(der []byte, issuer *x509.Certificate) (*crl, error) {
	input, list := cryptobyte.String(der), cryptobyte.String(nil)
	var signed, algorithm, body cryptobyte.String
	var signature []byte
	if len(der) > maxCRL || !input.ReadASN1(&list, cryptobyteasn1.SEQUENCE) || !input.Empty() ||
		!list.ReadASN1Element(&signed, cryptobyteasn1.SEQUENCE) || !list.ReadASN1Element(&algorithm, cryptobyteasn1.SEQUENCE) ||
		!list.ReadASN1BitStringAsBytes(&signature) || !list.Empty() {
		return nil, errMalformedCRL
	}
	digest := sha256.Sum256(signed)
	if key := issuer.PublicKey.(*ecdsa.PublicKey); issuer.KeyUsage&x509.KeyUsageCRLSign == 0 || !bytes.Equal(algorithm, ecdsaWithSHA256) ||
		!ecdsa.VerifyASN1(key, digest[:], signature) {
		return nil, &signatureError{fmt.Errorf("CRL is not signed by %q with ECDSA-SHA256", issuer.Subject.CommonName)}
	}
	if !signed.ReadASN1(&body, cryptobyteasn1.SEQUENCE) {
		return nil, errMalformedCRL
	}
	return readRevocations(body, issuer)
}

// readRevocations reads a TBSCertList.
func readRevocations(s cryptobyte.String, issuer *x509.Certificate) (*crl, error) {
	c := &crl{revoked: make(revocations)}
	var version int
	var algorithm, name, entries, extensions cryptobyte.String
	var isPresent bool
	if !s.ReadASN1Integer(&version) || version != 1 || !s.ReadASN1Element(&algorithm, cryptobyteasn1.SEQUENCE) ||
		!bytes.Equal(algorithm, ecdsaWithSHA256) || !s.ReadASN1Element(&name, cryptobyteasn1.SEQUENCE) {
		return nil, errMalformedCRL
	}
	if !bytes.Equal(name, issuer.RawSubject) {
		return nil, &signatureError{fmt.Errorf("CRL names another issuer than %q", issuer.Subject.CommonName)}
	}
	if !readTime(&s, &c.issued) || !readTime(&s, &c.next) { // nextUpdate is optional in X.509, not here
		return nil, errMalformedCRL
	}
	if s.PeekASN1Tag(cryptobyteasn1.SEQUENCE) {
		s.ReadASN1(&entries, cryptobyteasn1.SEQUENCE)
	}
	for !entries.Empty() {
		if err := c.readEntry(&entries); err != nil {
			return nil, err
		}
	}
	if !s.ReadOptionalASN1(&extensions, &isPresent, tagExtensions) || !isPresent || !s.Empty() {
		return nil, errMalformedCRL
	}
	return c, c.readExtensions(extensions, issuer)
}

// readTime reads a UTCTime or a GeneralizedTime.
func readTime(s *cryptobyte.String, t *time.Time) bool {
	if s.PeekASN1Tag(cryptobyteasn1.UTCTime) {
		return s.ReadASN1UTCTime(t)
	}
	return s.ReadASN1GeneralizedTime(t)
}

// readEntry reads a revoked certificate's serial number.
func (c *crl) readEntry(list *cryptobyte.String) error {
	var entry, extensions, when cryptobyte.String
	var serial []byte
	var tag cryptobyteasn1.Tag
	if !list.ReadASN1(&entry, cryptobyteasn1.SEQUENCE) || !entry.ReadASN1Integer(&serial) || !entry.ReadAnyASN1(&when, &tag) {
		return errMalformedCRL
	}
	if !entry.Empty() {
		if !entry.ReadASN1(&extensions, cryptobyteasn1.SEQUENCE) || !entry.Empty() {
			return errMalformedCRL
		}
		if err := readExtensions(extensions, func(id asn1.ObjectIdentifier, critical bool, _ cryptobyte.String) error {
			if critical {
				return fmt.Errorf("an entry has the critical extension %v", id)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	c.revoked[string(bytes.TrimLeft(serial, "\x00"))] = struct{}{}
	return nil
}

// readExtensions reads the CRL's own extensions.
func (c *crl) readExtensions(explicit cryptobyte.String, issuer *x509.Certificate) error {
	var list cryptobyte.String
	if !explicit.ReadASN1(&list, cryptobyteasn1.SEQUENCE) || !explicit.Empty() {
		return errMalformedCRL
	}
	hasNumber := false
	err := readExtensions(list, func(id asn1.ObjectIdentifier, critical bool, value cryptobyte.String) error {
		switch {
		case id.Equal(oidCRLNumber):
			if hasNumber || !value.ReadASN1Integer(&c.number) || !value.Empty() {
				return errors.New("CRL number is not one whole number below 2^64")
			}
			hasNumber = true
		case id.Equal(oidAuthorityKey):
			var names, key cryptobyte.String
			var isPresent bool
			if !value.ReadASN1(&names, cryptobyteasn1.SEQUENCE) || !names.ReadOptionalASN1(&key, &isPresent, tagKeyID) {
				return errMalformedCRL
			}
			if isPresent && !bytes.Equal(key, issuer.SubjectKeyId) {
				return &signatureError{fmt.Errorf("CRL names another key than that of %q", issuer.Subject.CommonName)}
			}
		case critical:
			return fmt.Errorf("CRL has the unknown critical extension %v", id)
		}
		return nil
	})
	if err == nil && !hasNumber {
		err = errors.New("CRL without a number")
	}
	return err
}

// readExtensions calls read for each extension of a list.
func readExtensions(list cryptobyte.String, read func(id asn1.ObjectIdentifier, critical bool, value cryptobyte.String) error) error {
	for !list.Empty() {
		var ext, value cryptobyte.String
		var id asn1.ObjectIdentifier
		critical := false
		if !list.ReadASN1(&ext, cryptobyteasn1.SEQUENCE) || !ext.ReadASN1ObjectIdentifier(&id) ||
			ext.PeekASN1Tag(cryptobyteasn1.BOOLEAN) && !ext.ReadASN1Boolean(&critical) ||
			!ext.ReadASN1(&value, cryptobyteasn1.OCTET_STRING) || !ext.Empty() {
			return errMalformedCRL
		}
		if err := read(id, critical, value); err != nil {
			return err
		}
	}
	return nil
}
