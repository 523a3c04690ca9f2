package tdxsim

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// Distribution points of the simulated CRLs. ".invalid" never resolves (RFC 2606).
const (
	rootCRLURL = "https://simulated-tdx.invalid/root.crl"
	pckCRLURL  = "https://simulated-tdx.invalid/pck-platform.crl"
)

// organization is what tells a simulated certificate from Intel's for a human.
// The common names are Intel's, because go-tdx-guest, which is asked for a second
// opinion, accepts no others.
const organization = "tdx-agent SIMULATED TD, not Intel"

// pki is the simulator's counterpart of Intel's certificates and keys. All of it
// follows from a secret and the time of creation, so none of it is stored.
type pki struct {
	rootKey, caKey, signerKey, pckKey, attestationKey *ecdsa.PrivateKey
	root, ca, signer, pck                             *x509.Certificate
}

// derive returns n bytes that belong to this label.
func derive(secret []byte, label string, n int) []byte {
	b, err := hkdf.Key(sha256.New, secret, nil, "tdx-agent SIMULATED "+label, n)
	if err != nil {
		panic(err) // only for n > 255*32
	}
	return b
}

// deriveKey returns the P-256 key that belongs to this label. About one in 2^32
// strings is no scalar of the group: then the next is taken.
func deriveKey(secret []byte, label string) *ecdsa.PrivateKey {
	for i := 0; ; i++ {
		key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), derive(secret, fmt.Sprintf("key %s %d", label, i), 32))
		if err == nil {
			return key
		}
	}
}

// newPKI derives the keys and issues the certificates. ext is the PCK's SGX
// extension.
func newPKI(secret []byte, valid Window, ext pkix.Extension) (*pki, error) {
	p := &pki{
		rootKey: deriveKey(secret, "root"), caKey: deriveKey(secret, "platform CA"), signerKey: deriveKey(secret, "TCB signing"),
		pckKey: deriveKey(secret, "PCK"), attestationKey: deriveKey(secret, "attestation"),
	}
	issue := func(name string, key *ecdsa.PrivateKey, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, edit func(*x509.Certificate)) (*x509.Certificate, error) {
		t, err := template(secret, name, key, valid)
		if err != nil {
			return nil, err
		}
		edit(t)
		if parent == nil {
			parent = t
		}
		t.AuthorityKeyId = parent.SubjectKeyId
		der, err := x509.CreateCertificate(nil, t, parent, &key.PublicKey, parentKey)
		if err != nil {
			return nil, fmt.Errorf("tdxsim: issue %s: %v", name, err)
		}
		return x509.ParseCertificate(der)
	}
	var err error
	if p.root, err = issue("Intel SGX Root CA", p.rootKey, nil, p.rootKey, authority(1)); err != nil {
		return nil, err
	}
	if p.ca, err = issue("Intel SGX PCK Platform CA", p.caKey, p.root, p.rootKey, authority(0)); err != nil {
		return nil, err
	}
	if p.signer, err = issue("Intel SGX TCB Signing", p.signerKey, p.root, p.rootKey, func(*x509.Certificate) {}); err != nil {
		return nil, err
	}
	p.pck, err = issue("Intel SGX PCK Certificate", p.pckKey, p.ca, p.caKey, func(t *x509.Certificate) {
		t.CRLDistributionPoints = []string{pckCRLURL}
		t.ExtraExtensions = []pkix.Extension{ext}
	})
	return p, err
}

// template is an end-entity certificate; authority makes a CA of it.
func template(secret []byte, name string, key *ecdsa.PrivateKey, valid Window) (*x509.Certificate, error) {
	public, err := key.PublicKey.Bytes()
	if err != nil {
		return nil, fmt.Errorf("tdxsim: key of %s: %v", name, err)
	}
	id := sha256.Sum256(public)
	serial := derive(secret, "serial "+name, 20)
	serial[0] = serial[0]&0x7f | 0x40 // positive, and always 20 bytes
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(serial),
		Subject:               pkix.Name{CommonName: name, Organization: []string{organization}, Locality: []string{"Santa Clara"}, Province: []string{"CA"}, Country: []string{"US"}},
		NotBefore:             valid.From,
		NotAfter:              valid.Until,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment,
		BasicConstraintsValid: true,
		SubjectKeyId:          id[:20],
		CRLDistributionPoints: []string{rootCRLURL},
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
	}, nil
}

func authority(pathLen int) func(*x509.Certificate) {
	return func(t *x509.Certificate) {
		t.IsCA = true
		t.MaxPathLen, t.MaxPathLenZero = pathLen, pathLen == 0
		t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
}

// pemChain writes certificates one after the other.
func pemChain(chain ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range chain {
		// Writing to a Buffer does not fail.
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.Bytes()
}

// revocationList is a CRL of this issuer, of this number, with these serial numbers in it.
func revocationList(issuer *x509.Certificate, key *ecdsa.PrivateKey, valid Window, number int64, revoked ...*big.Int) ([]byte, error) {
	list := &x509.RevocationList{
		Number: big.NewInt(max(number, 1)), ThisUpdate: valid.From, NextUpdate: valid.Until,
		SignatureAlgorithm: x509.ECDSAWithSHA256,
	}
	for _, serial := range revoked {
		const keyCompromise = 1
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: serial, RevocationTime: valid.From, ReasonCode: keyCompromise})
	}
	der, err := x509.CreateRevocationList(nil, list, issuer, key)
	if err != nil {
		return nil, fmt.Errorf("tdxsim: CRL of %s: %v", issuer.Subject.CommonName, err)
	}
	return der, nil
}

// day is the start of t's day, UTC.
func day(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }
