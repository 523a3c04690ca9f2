package dcap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Common names of Intel's certificates, which tell their roles: the root issues
// both the CAs of PCK certificates and the certificates that sign documents.
const (
	namePCK         = "Intel SGX PCK Certificate"
	namePlatformCA  = "Intel SGX PCK Platform CA"
	nameProcessorCA = "Intel SGX PCK Processor CA"
	nameSigner      = "Intel SGX TCB Signing"
)

// Certificate authorities of PCK certificates, as Intel's PCS names them.
const (
	CAPlatform  = "platform"
	CAProcessor = "processor"
)

// PCK is what a platform's PCK certificate says.
type PCK struct {
	PPID       [16]byte
	CPUSVN     [16]byte
	Components [16]byte // SVNs of the 16 SGX TCB components, which TCB levels are compared with
	PCESVN     uint16
	PCEID      [2]byte
	FMSPC      [6]byte
	CA         string // CAPlatform or CAProcessor

	Serial              string // hexadecimal
	NotBefore, NotAfter time.Time
	SHA256              [32]byte // of the certificate's DER
}

// window is a time of validity. Both ends are inside.
type window struct {
	what        string // as in the code of an Error
	from, until time.Time
	document    bool // not a certificate: may be used for a while after it ended
}

func certificateWindow(what string, c *x509.Certificate) window {
	return window{what: what, from: c.NotBefore, until: c.NotAfter}
}

// parseCertificate parses a certificate in the profile that all of Intel's follow:
// version 3, P-256, ECDSA with SHA-256, no critical extension that is not understood.
func parseCertificate(der []byte) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || key.Curve != elliptic.P256():
		return nil, fmt.Errorf("certificate %q: not a P-256 key", c.Subject.CommonName)
	case c.Version != 3:
		return nil, fmt.Errorf("certificate %q: version %d, want 3", c.Subject.CommonName, c.Version)
	case c.SignatureAlgorithm != x509.ECDSAWithSHA256:
		return nil, fmt.Errorf("certificate %q: signed with %v, want ECDSA-SHA256", c.Subject.CommonName, c.SignatureAlgorithm)
	case len(c.UnhandledCriticalExtensions) > 0:
		return nil, fmt.Errorf("certificate %q: unknown critical extension %v", c.Subject.CommonName, c.UnhandledCriticalExtensions[0])
	}
	return c, nil
}

// checkNames says why parent cannot have issued child, but for the signature.
func checkNames(child, parent *x509.Certificate) error {
	if !bytes.Equal(child.RawIssuer, parent.RawSubject) {
		return fmt.Errorf("%q names the issuer %q, want %q", child.Subject.CommonName, child.Issuer.CommonName, parent.Subject.CommonName)
	}
	if len(child.AuthorityKeyId) > 0 && !bytes.Equal(child.AuthorityKeyId, parent.SubjectKeyId) {
		return fmt.Errorf("%q names another key of its issuer", child.Subject.CommonName)
	}
	return nil
}

// checkIssued checks names and signature.
func checkIssued(child, parent *x509.Certificate) error {
	if err := checkNames(child, parent); err != nil {
		return err
	}
	if err := child.CheckSignatureFrom(parent); err != nil {
		return fmt.Errorf("%q is not signed by %q: %v", child.Subject.CommonName, parent.Subject.CommonName, err)
	}
	return nil
}

// caOf tells the CA of PCK certificates by its name.
func caOf(c *x509.Certificate) (string, error) {
	if c.IsCA && c.KeyUsage&x509.KeyUsageCertSign != 0 {
		switch c.Subject.CommonName {
		case namePlatformCA:
			return CAPlatform, nil
		case nameProcessorCA:
			return CAProcessor, nil
		}
	}
	return "", fmt.Errorf("certificate %q is no CA of PCK certificates", c.Subject.CommonName)
}

// pinnedRoot parses the last certificate of a chain, which must be one of roots.
// known may be the one that was last.
func pinnedRoot(der []byte, roots *Roots, known *x509.Certificate) (*x509.Certificate, [32]byte, error) {
	pin := sha256.Sum256(der)
	if !roots.trust(pin) {
		return nil, pin, &Error{Code: "root_not_trusted", Stage: stagePCK, Got: fmt.Sprintf("a chain to the certificate with SHA-256 %x", pin), Want: "a chain to " + roots.Name(),
			Hint: "pre-production or simulated hardware, unless the root was replaced on purpose"}
	}
	if known != nil && bytes.Equal(known.Raw, der) {
		return known, pin, nil
	}
	c, err := parseCertificate(der)
	return c, pin, err
}

// Arcs below Intel's SGX extension 1.2.840.113741.1.13.1 (PCK Certificate and CRL
// Profile Specification, 1.3.5).
const (
	arcPPID  = 1
	arcTCB   = 2
	arcPCEID = 3
	arcFMSPC = 4

	tcbPCESVN = 17 // 1 to 16 are the SGX components
	tcbCPUSVN = 18
)

var (
	oidSGX    = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1}
	oidSGXTCB = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, arcTCB}
)

// parsePCK reads the SGX extension of a PCK certificate.
func parsePCK(c *x509.Certificate) (*PCK, error) {
	p := &PCK{Serial: fmt.Sprintf("%x", c.SerialNumber), NotBefore: c.NotBefore, NotAfter: c.NotAfter, SHA256: sha256.Sum256(c.Raw)}
	for i := range c.Extensions {
		if c.Extensions[i].Id.Equal(oidSGX) { // crypto/x509 refuses a second one
			return p, p.readExtension(c.Extensions[i].Value)
		}
	}
	return nil, errors.New("no SGX extension")
}

func (p *PCK) readExtension(value []byte) error {
	var ppid, pceID, fmspc []byte
	var tcb cryptobyte.String
	seen, err := attributes(value, oidSGX, func(arc int, v *cryptobyte.String) bool {
		switch arc {
		case arcPPID:
			return v.ReadASN1Bytes(&ppid, cryptobyteasn1.OCTET_STRING)
		case arcTCB:
			return v.ReadASN1Element(&tcb, cryptobyteasn1.SEQUENCE)
		case arcPCEID:
			return v.ReadASN1Bytes(&pceID, cryptobyteasn1.OCTET_STRING)
		case arcFMSPC:
			return v.ReadASN1Bytes(&fmspc, cryptobyteasn1.OCTET_STRING)
		}
		var other cryptobyte.String
		return v.ReadAnyASN1Element(&other, nil) // of no use here
	})
	if err != nil {
		return err
	}
	if needed := uint32(1<<arcPPID | 1<<arcTCB | 1<<arcPCEID | 1<<arcFMSPC); seen&needed != needed {
		return errors.New("PPID, TCB, PCEID or FMSPC is missing")
	}
	if len(ppid) != 16 || len(pceID) != 2 || len(fmspc) != 6 {
		return fmt.Errorf("PPID, PCEID and FMSPC have %d, %d and %d bytes, want 16, 2 and 6", len(ppid), len(pceID), len(fmspc))
	}
	p.PPID, p.PCEID, p.FMSPC = [16]byte(ppid), [2]byte(pceID), [6]byte(fmspc)
	return p.readTCB(tcb)
}

func (p *PCK) readTCB(value []byte) error {
	seen, err := attributes(value, oidSGXTCB, func(arc int, v *cryptobyte.String) bool {
		switch {
		case arc >= 1 && arc <= 16:
			return v.ReadASN1Integer(&p.Components[arc-1])
		case arc == tcbPCESVN:
			return v.ReadASN1Integer(&p.PCESVN)
		case arc == tcbCPUSVN:
			var svn []byte
			return v.ReadASN1Bytes(&svn, cryptobyteasn1.OCTET_STRING) && len(svn) == 16 && copy(p.CPUSVN[:], svn) == 16
		}
		return false
	})
	if err == nil && seen != 1<<(tcbCPUSVN+1)-2 {
		err = errors.New("the TCB lacks an SVN")
	}
	return err
}

// attributes calls read for each {OID, value} of a sequence whose OID is one arc
// below base. seen has bit n set for arc n; no arc may be there twice.
func attributes(der []byte, base asn1.ObjectIdentifier, read func(arc int, value *cryptobyte.String) bool) (seen uint32, err error) {
	input, list := cryptobyte.String(der), cryptobyte.String(nil)
	if !input.ReadASN1(&list, cryptobyteasn1.SEQUENCE) || !input.Empty() {
		return 0, errors.New("the SGX extension is not one DER sequence")
	}
	for !list.Empty() {
		var entry cryptobyte.String
		var id asn1.ObjectIdentifier
		if !list.ReadASN1(&entry, cryptobyteasn1.SEQUENCE) || !entry.ReadASN1ObjectIdentifier(&id) ||
			len(id) != len(base)+1 || !id[:len(base)].Equal(base) || id[len(base)] > 31 {
			return 0, errors.New("the SGX extension has a malformed entry")
		}
		arc := id[len(base)]
		if seen&(1<<arc) != 0 {
			return 0, fmt.Errorf("the SGX extension has %v twice", id)
		}
		seen |= 1 << arc
		if !read(arc, &entry) || !entry.Empty() {
			return 0, fmt.Errorf("the SGX extension has a malformed value of %v", id)
		}
	}
	return seen, nil
}
