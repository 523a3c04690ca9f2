package dcap_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

// authority is a PKI whose every certificate and CRL a test can change before it is
// signed. The documents and the TD are a simulated TD's, signed anew.
type authority struct {
	t              testing.TB
	sim            *set
	bundle         dcap.Bundle
	extension      pkix.Extension // of the simulated PCK certificate
	keys           map[string]*ecdsa.PrivateKey
	edit           map[string]func(*x509.Certificate)    // by role, before signing
	editCRL        map[string]func(*x509.RevocationList) // by role of the issuer
	revokedByRoot  []string                              // roles
	crlIssuerAgain bool                                  // the chain of the PCK CRL has a renewed CA certificate
	made           map[string]*x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, sim: simulate(t, tdxsim.Config{}), keys: make(map[string]*ecdsa.PrivateKey), edit: make(map[string]func(*x509.Certificate)),
		editCRL: make(map[string]func(*x509.RevocationList)), made: make(map[string]*x509.Certificate)}
	if err := json.Unmarshal(a.sim.bundle, &a.bundle); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(chainOf(a.sim.quote))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range leaf.Extensions {
		if e.Id.String() == "1.2.840.113741.1.13.1" {
			a.extension = e
		}
	}
	return a
}

func (a *authority) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

// certificate issues the certificate of a role once.
func (a *authority) certificate(role, name, parent string) *x509.Certificate {
	if c := a.made[role]; c != nil {
		return c
	}
	curve := elliptic.P256()
	if strings.HasSuffix(name, "P-384") {
		curve, name = elliptic.P384(), strings.TrimSuffix(name, " P-384")
	}
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	a.must(err)
	a.keys[role] = key
	id := sha256.Sum256([]byte(role))
	c := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(id[1:17]), Subject: pkix.Name{CommonName: name}, SubjectKeyId: id[:20],
		NotBefore: testTime.AddDate(-1, 0, 0), NotAfter: testTime.AddDate(1, 0, 0), BasicConstraintsValid: true,
		SignatureAlgorithm: x509.ECDSAWithSHA256, KeyUsage: x509.KeyUsageDigitalSignature, CRLDistributionPoints: []string{"https://simulated-tdx.invalid/crl"},
	}
	if role == "root" || role == "ca" {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	}
	if role == "pck" {
		c.ExtraExtensions = []pkix.Extension{a.extension}
	}
	if edit := a.edit[role]; edit != nil {
		edit(c)
	}
	issuer := c
	if parent != "" {
		issuer = a.made[parent]
		c.AuthorityKeyId = issuer.SubjectKeyId
	}
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), a.keys[parent+map[bool]string{true: role}[parent == ""]])
	a.must(err)
	a.made[role], err = x509.ParseCertificate(der)
	a.must(err)
	return a.made[role]
}

func pemOf(list ...*x509.Certificate) string {
	var b bytes.Buffer
	for _, c := range list {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer does not fail
	}
	return b.String()
}

func (a *authority) sign(role string, message []byte) []byte {
	digest := sha256.Sum256(message)
	der, err := a.keys[role].Sign(rand.Reader, digest[:], crypto.SHA256)
	a.must(err)
	var s struct{ R, S *big.Int }
	_, err = asn1.Unmarshal(der, &s)
	a.must(err)
	return append(s.R.FillBytes(make([]byte, 32)), s.S.FillBytes(make([]byte, 32))...)
}

func (a *authority) crl(role string, revoked ...string) string {
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: testTime.AddDate(0, 0, -1), NextUpdate: testTime.AddDate(0, 0, 1), SignatureAlgorithm: x509.ECDSAWithSHA256}
	for _, r := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: a.made[r].SerialNumber, RevocationTime: testTime})
	}
	if edit := a.editCRL[role]; edit != nil {
		edit(list)
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.made[role], a.keys[role])
	a.must(err)
	return hex.EncodeToString(der)
}

// set issues everything and signs the TD's quote and documents with it.
func (a *authority) set(caName, pckName string) *set {
	root := a.certificate("root", "Intel SGX Root CA", "")
	ca, pck, signer := a.certificate("ca", caName, "root"), a.certificate("pck", pckName, "ca"), a.certificate("signer", "Intel SGX TCB Signing", "root")
	b := a.bundle
	b.PCKCRLIssuerChain, b.TCBInfoIssuerChain, b.QEIdentityIssuerChain = pemOf(ca, root), pemOf(signer, root), pemOf(signer, root)
	if a.crlIssuerAgain {
		again := *ca
		again.SerialNumber = big.NewInt(77)
		der, err := x509.CreateCertificate(rand.Reader, &again, root, ca.PublicKey, a.keys["root"])
		a.must(err)
		renewed, err := x509.ParseCertificate(der)
		a.must(err)
		b.PCKCRLIssuerChain = pemOf(renewed, root)
	}
	b.RootCACRL, b.PCKCRL = a.crl("root", a.revokedByRoot...), a.crl("ca")
	b.TCBInfoSignature, b.QEIdentitySignature = hex.EncodeToString(a.sign("signer", []byte(b.TCBInfo))), hex.EncodeToString(a.sign("signer", []byte(b.QEIdentity)))
	bundle, err := json.Marshal(b)
	a.must(err)
	roots, err := dcap.NewRoots([]byte(pemOf(root)))
	a.must(err)
	return &set{quote: a.quote(pemOf(pck, ca, root)), bundle: bundle, roots: roots}
}

// quote signs the simulated TD's quote with an attestation key of its own.
func (a *authority) quote(chain string) []byte {
	var err error
	a.keys["ak"], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	a.must(err)
	public, err := a.keys["ak"].PublicKey.Bytes()
	a.must(err)
	signature, certification, auth, _ := layout(a.sim.quote)
	q := resize(a.sim.quote, []byte(chain))
	copy(q[signature+4+64:], public[1:])
	n := int(binary.LittleEndian.Uint16(q[auth:]))
	binding := sha256.Sum256(append(bytes.Clone(public[1:]), q[auth+2:auth+2+n]...))
	report := q[certification+4:][:384]
	copy(report[320:], binding[:])
	if a.keys["pck"].Curve == elliptic.P256() {
		copy(q[certification+4+384:], a.sign("pck", report))
	}
	copy(q[signature+4:], a.sign("ak", q[:signature]))
	return q
}

const (
	platformCA  = "Intel SGX PCK Platform CA"
	processorCA = "Intel SGX PCK Processor CA"
	pckName     = "Intel SGX PCK Certificate"
)

func TestProcessorCA(t *testing.T) {
	s := newAuthority(t).set(processorCA, pckName)
	r := s.mustVerify(t)
	if r.PCK.CA != dcap.CAProcessor || !strings.HasPrefix(r.SecondOpinion, "not consulted: ") {
		t.Errorf("CA %s, second opinion %q", r.PCK.CA, r.SecondOpinion)
	}
	if s.collateral(t).CA() != dcap.CAProcessor {
		t.Error("the collateral is of another CA")
	}
	if r, err := dcap.NewVerifier(dcap.Config{Roots: s.roots}).Verify(context.Background(), s.quote, s.collateral(t), testTime); err != nil || r.SecondOpinion != "not consulted: switched off" {
		t.Errorf("%v, %v", r, err)
	}
}

// TestCRLOfOtherCA judges a PCK certificate of one CA with the CRL of the other.
func TestCRLOfOtherCA(t *testing.T) {
	a := newAuthority(t)
	s := a.set(processorCA, pckName)
	delete(a.made, "ca")
	delete(a.made, "pck")
	other := a.set(platformCA, pckName)
	_, err := s.verifier().Verify(context.Background(), s.quote, other.collateral(t), testTime)
	wantCode(t, err, "pck_crl_issuer")
}

// TestRevokedRenewedCA revokes the CA certificate in the PCK chain, while the CRL's
// chain has a newer one.
func TestRevokedRenewedCA(t *testing.T) {
	a := newAuthority(t)
	a.crlIssuerAgain = true
	a.set(platformCA, pckName).mustVerify(t)
	a.revokedByRoot = []string{"ca"}
	_, err := a.set(platformCA, pckName).verify(t)
	wantCode(t, err, "pck_ca_revoked")
}

// TestSecondOpinionDiffers has a certificate that only go-tdx-guest refuses: an
// extended key usage that its chain check does not take.
func TestSecondOpinionDiffers(t *testing.T) {
	a := newAuthority(t)
	a.edit["pck"] = func(c *x509.Certificate) {
		c.CRLDistributionPoints, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	s := a.set(platformCA, pckName)
	v := s.verifier()
	for range 2 { // the refusal is not forgotten by a cache
		_, err := v.Verify(context.Background(), s.quote, s.collateral(t), testTime)
		wantCode(t, err, "second_opinion")
	}
	if _, err := dcap.NewVerifier(dcap.Config{Roots: s.roots}).Verify(context.Background(), s.quote, s.collateral(t), testTime); err != nil {
		t.Error(err)
	}
	// A seventh extension is beyond what it reads.
	a = newAuthority(t)
	a.edit["pck"] = func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}})
	}
	if r := a.set(platformCA, pckName).mustVerify(t); !strings.HasPrefix(r.SecondOpinion, "not consulted: ") {
		t.Errorf("second opinion %q", r.SecondOpinion)
	}
}

// TestCertificates changes one certificate at a time.
func TestCertificates(t *testing.T) {
	critical := func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
	}
	isCA := func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign }
	extension := func(edit func([]byte) []byte) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			e := c.ExtraExtensions[0]
			e.Value = edit(bytes.Clone(e.Value))
			c.ExtraExtensions = []pkix.Extension{e}
		}
	}
	// arc finds the last byte of an OID {1.2.840.113741.1.13.1, ...} in DER.
	arc := func(der []byte, arcs ...byte) int {
		oid := append([]byte{0x06, byte(9 + len(arcs)), 0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 1, 0x0d, 1}, arcs...)
		return bytes.Index(der, oid) + len(oid) - 1
	}
	for name, c := range map[string]struct {
		code, role, ca, pck string
		edit                func(*x509.Certificate)
	}{
		"CA of another name":         {"pck_crl_chain", "ca", "Intel SGX TCB Signing", pckName, nil},
		"PCK of another name":        {"pck_chain", "pck", platformCA, "Intel SGX TCB Signing", nil},
		"PCK that is a CA":           {"pck_chain", "pck", platformCA, pckName, isCA},
		"PCK of P-384":               {"pck_chain", "pck", platformCA, pckName + " P-384", nil},
		"PCK with a critical member": {"pck_chain", "pck", platformCA, pckName, critical},
		"CA with a critical member":  {"pck_crl_chain", "ca", platformCA, pckName, critical},
		"signer that is a CA":        {"tcb_info_chain", "signer", platformCA, pckName, isCA},
		"signer of no signatures":    {"tcb_info_chain", "signer", platformCA, pckName, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }},
		"no SGX extension":           {"pck_extension", "pck", platformCA, pckName, func(c *x509.Certificate) { c.ExtraExtensions = nil }},
		"empty SGX extension":        {"pck_extension", "pck", platformCA, pckName, extension(func([]byte) []byte { return []byte{0x30, 0} })},
		"cut SGX extension":          {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { return b[:len(b)-1] })},
		"no sequence":                {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { return []byte{5, 0} })},
		"an FMSPC twice":             {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { b[arc(b, 6)] = 4; return b })},
		"no FMSPC":                   {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { b[arc(b, 4)] = 9; return b })},
		"a component twice":          {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { b[arc(b, 2, 2)] = 1; return b })},
		"a component 19":             {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { b[arc(b, 2, 16)] = 19; return b })},
		"a component of 255 - 256":   {"pck_extension", "pck", platformCA, pckName, extension(func(b []byte) []byte { b[arc(b, 2, 1)+3] = 0xff; return b })},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t)
			a.edit[c.role] = c.edit
			s := a.set(c.ca, c.pck)
			collateral, err := dcap.ParseCollateral(s.bundle, s.roots)
			if err == nil {
				_, err = s.verifier().Verify(context.Background(), s.quote, collateral, testTime)
			}
			wantCode(t, err, c.code)
		})
	}
}

// TestCRLs changes one CRL at a time.
func TestCRLs(t *testing.T) {
	extension := func(critical bool) []pkix.Extension {
		return []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: critical, Value: []byte{0x30, 0}}}
	}
	entry := func(critical bool) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(5), RevocationTime: testTime, ExtraExtensions: extension(critical)})
		}
	}
	for name, c := range map[string]struct {
		code string
		edit func(*x509.RevocationList)
	}{
		"of a scope":                 {"_format", func(l *x509.RevocationList) { l.ExtraExtensions = extension(true) }},
		"with another extension":     {"", func(l *x509.RevocationList) { l.ExtraExtensions = extension(false) }},
		"with an indirect entry":     {"_format", entry(true)},
		"with an entry's extension":  {"", entry(false)},
		"with a number beyond count": {"_format", func(l *x509.RevocationList) { l.Number = new(big.Int).Lsh(big.NewInt(1), 64) }},
		"with a large number":        {"", func(l *x509.RevocationList) { l.Number = new(big.Int).SetUint64(1 << 63) }},
	} {
		for role, code := range map[string]string{"root": "root_crl", "ca": "pck_crl"} {
			a := newAuthority(t)
			a.editCRL[role] = c.edit
			s := a.set(platformCA, pckName)
			_, err := dcap.ParseCollateral(s.bundle, s.roots)
			if c.code == "" && err != nil {
				t.Errorf("%s %s: %v", code, name, err)
			} else if c.code != "" {
				wantCode(t, err, code+c.code)
			}
		}
	}
}

// TestTwoRoots crosses chains of two roots that are both trusted.
func TestTwoRoots(t *testing.T) {
	a, b := newAuthority(t), newAuthority(t)
	one, two := a.set(platformCA, pckName), b.set(platformCA, pckName)
	roots, err := dcap.NewRoots([]byte(pemOf(a.made["root"], b.made["root"])))
	if err != nil {
		t.Fatal(err)
	}
	var theirs dcap.Bundle
	if err := json.Unmarshal(two.bundle, &theirs); err != nil {
		t.Fatal(err)
	}
	mixed := one.edited(t, func(b *dcap.Bundle) {
		b.QEIdentity, b.QEIdentityIssuerChain, b.QEIdentitySignature = theirs.QEIdentity, theirs.QEIdentityIssuerChain, theirs.QEIdentitySignature
	})
	_, err = dcap.ParseCollateral(mixed, roots)
	wantCode(t, err, "qe_identity_chain")
	v := dcap.NewVerifier(dcap.Config{Roots: roots})
	for i, s := range []*set{one, two} {
		c, err := dcap.ParseCollateral(s.bundle, roots)
		if err != nil {
			t.Fatal(err)
		}
		for j, q := range []*set{one, two} {
			_, err := v.Verify(context.Background(), q.quote, c, testTime)
			if i != j {
				wantCode(t, err, "collateral_root")
			} else if err != nil {
				t.Error(err)
			}
		}
	}
}
