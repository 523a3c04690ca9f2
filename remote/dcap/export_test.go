package dcap

import (
	"crypto/sha256"
	"crypto/x509"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Judge applies the TCB rule to a quote of a platform below Intel's root and these
// documents, whose signatures are not checked.
func Judge(quote, tcbInfo, qeIdentity []byte) (platform, module, qe, merged TCB, err error) {
	v := NewVerifier(Config{Roots: IntelRoots()})
	q, d, fault := v.parse(quote)
	if fault != nil {
		return platform, module, qe, merged, fault
	}
	a, fault := v.attest(q, d, nil)
	if fault != nil {
		return platform, module, qe, merged, fault
	}
	c := new(Collateral)
	if c.tcb, err = parseTCBInfo(tcbInfo, ofTD); err != nil {
		return platform, module, qe, merged, err
	}
	if c.qe, err = parseQEIdentity(qeIdentity, ofTD); err != nil {
		return platform, module, qe, merged, err
	}
	j, fault := c.judge(a.chain.pck, &q.Body, q.BodyType, a.qe)
	if fault != nil {
		return platform, module, qe, merged, fault
	}
	return j.platform, j.module, j.qe, j.merged, nil
}

// Converge is the convergence of one component's status into the platform's.
var Converge = converge

// CacheSizes returns how many attestation keys, PCK chains, verdicts and second
// opinions are remembered.
func (v *Verifier) CacheSizes() [4]int {
	return [4]int{v.keys.Len(), v.chains.Len(), v.verdicts.Len(), v.opinions.Len()}
}

// AddChain makes a verifier know a chain that does not exist.
func (v *Verifier) AddChain(name string) {
	v.chains.Add(sha256.Sum256([]byte(name)), &pckChain{pck: new(PCK)})
}

// The decoders, for fuzzing.
func ParseTCBInfo(text []byte) (fmspc [6]byte, evaluation int, statuses []string, err error) {
	t, err := parseTCBInfo(text, ofTD)
	if err != nil {
		return fmspc, 0, nil, err
	}
	for _, l := range t.levels {
		statuses = append(statuses, string(l.tcb.Status))
	}
	return t.fmspc, t.evaluation, statuses, nil
}

var DecodePEM = decodePEM

// ForgetKeys empties the cache of attestation keys, so that the next quote seems to
// have a new one.
func (v *Verifier) ForgetKeys() {
	v.keys.Clear()
}

// ParseQEIdentity decodes a QE identity.
func ParseQEIdentity(text []byte) (signer [32]byte, evaluation int, err error) {
	q, err := parseQEIdentity(text, ofTD)
	if err != nil {
		return signer, 0, err
	}
	return q.signer, q.evaluation, nil
}

// ParsePCK reads a PCK certificate's SGX extension.
func ParsePCK(extension []byte) (*PCK, error) {
	p := new(PCK)
	return p, p.readExtension(extension)
}

// RevokedSerials reads a CRL without checking its signature.
func RevokedSerials(der []byte, issuer *x509.Certificate) (serials map[string]struct{}, issued, next time.Time, err error) {
	input, list, signed, body := cryptobyte.String(der), cryptobyte.String(nil), cryptobyte.String(nil), cryptobyte.String(nil)
	if !input.ReadASN1(&list, cryptobyteasn1.SEQUENCE) || !list.ReadASN1Element(&signed, cryptobyteasn1.SEQUENCE) || !signed.ReadASN1(&body, cryptobyteasn1.SEQUENCE) {
		return nil, issued, next, errMalformedCRL
	}
	c, err := readRevocations(body, issuer)
	if err != nil {
		return nil, issued, next, err
	}
	return c.revoked, c.issued, c.next, nil
}
