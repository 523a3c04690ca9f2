package keys

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// signCert is a request for a certificate.
type signCert struct {
	APIVersion int    `json:"api_version"`
	CSR        string `json:"csr"`       // hexadecimal
	Signature  string `json:"signature"` // of the CSR's key over it: ASN.1, hexadecimal
	VMConfig   string `json:"vm_config"`
}

// certify has the KMS sign a certificate: PEM, the leaf first, then the application's
// authority, then the root. A quote is made for every one, since the KMS judges the key
// by it.
func (k *KMS) certify(ctx context.Context, key *ecdsa.PrivateKey, r *CertificateRequest, attest Attest) ([]Certificate, error) {
	ev, err := attestKey(ctx, &key.PublicKey, attest)
	if err != nil {
		return nil, err
	}
	attestation, err := measure.EncodeAttestation(ev.Evidence, ratls.ReportData(ev.spki))
	if err != nil {
		return nil, err
	}
	csr := r.kmsRequest(ev.spki, attestation)
	digest := sha256.Sum256(csr)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	request := signCert{APIVersion: 2, CSR: hex.EncodeToString(csr), Signature: hex.EncodeToString(signature), VMConfig: k.cfg.VMConfig}
	return each(ctx, k, func(p *kmsPeer) ([]Certificate, error) {
		answer, err := p.call(ctx, "SignCert", request, nil)
		if err != nil {
			return nil, err
		}
		chain, err := p.parseChain(answer, &key.PublicKey)
		if err != nil {
			return nil, p.faultf(KMSAnswer, "SignCert: %w", err)
		}
		return chain, nil
	})
}

// kmsRequest encodes dstack's certificate request, version 2: SCALE of the words that
// confirm it, the key, what the certificate is to say, and the attestation.
func (r *CertificateRequest) kmsRequest(spki, attestation []byte) []byte {
	b := appendScaleBytes(make([]byte, 0, 512+len(attestation)), "please sign cert:")
	b = appendScaleBytes(b, string(spki))
	b = append(b, 0) // no organisation
	b = appendScaleBytes(b, r.Subject)
	b = appendScaleSize(b, len(r.AltNames))
	for _, name := range r.AltNames {
		b = appendScaleBytes(b, name)
	}
	for _, flag := range []bool{r.Server, r.Client, r.RATLS, r.AppInfo} {
		b = append(b, map[bool]byte{true: 1}[flag])
	}
	for _, seconds := range []*uint64{r.NotBefore, r.NotAfter} {
		if seconds == nil {
			b = append(b, 0)
		} else {
			b = binary.LittleEndian.AppendUint64(append(b, 1), *seconds)
		}
	}
	return append(b, attestation...)
}

// appendScaleSize appends a compact integer of the SCALE codec, below 2^30.
func appendScaleSize(b []byte, n int) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n<<2))
	case n < 1<<14:
		return binary.LittleEndian.AppendUint16(b, uint16(n<<2|1))
	}
	return binary.LittleEndian.AppendUint32(b, uint32(n<<2|2))
}

func appendScaleBytes(b []byte, s string) []byte { return append(appendScaleSize(b, len(s)), s...) }

// kmsChainLength is how many certificates a KMS answers with.
const kmsChainLength = 3

// parseChain takes a chain that proves to anybody who knows the root whose key it is: to
// be handed on, not to be believed.
func (p *kmsPeer) parseChain(answer []byte, key *ecdsa.PublicKey) ([]Certificate, error) {
	doc, err := measure.ParseJSONObject(answer)
	if err != nil {
		return nil, err
	}
	var list []string
	if err := json.Unmarshal(doc["certificate_chain"], &list); err != nil || len(list) != kmsChainLength {
		return nil, fmt.Errorf("certificate_chain: %d certificates, want %d", len(list), kmsChainLength)
	}
	chain, certs := make([]Certificate, kmsChainLength), make([]*x509.Certificate, kmsChainLength)
	for i, text := range list {
		block, _ := pem.Decode([]byte(text))
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("certificate_chain: element %d is no certificate in PEM", i)
		}
		if certs[i], err = x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("certificate_chain: element %d: %w", i, err)
		}
		chain[i].der = block.Bytes
	}
	leaf, authority, root := certs[0], certs[1], certs[2]
	if !p.target.root.Equal(root.PublicKey) {
		return nil, errors.New("certificate_chain: the root is not the key that this boot has measured")
	}
	if !key.Equal(leaf.PublicKey) {
		return nil, errors.New("certificate_chain: the first certificate is of another key than the one it was asked for")
	}
	// Dates are what the caller has asked for, and his to live with.
	if err := leaf.CheckSignatureFrom(authority); err != nil {
		return nil, fmt.Errorf("certificate_chain: the first certificate is not signed by the second: %w", err)
	}
	if err := authority.CheckSignatureFrom(root); err != nil {
		return nil, fmt.Errorf("certificate_chain: the second certificate is not signed by the root: %w", err)
	}
	return chain, p.checkAppID(authority)
}

// checkAppID demands that the authority is this application's.
func (p *kmsPeer) checkAppID(authority *x509.Certificate) error {
	claims, err := ratls.ParseIssuerClaims(authority)
	if err != nil {
		return fmt.Errorf("certificate_chain: the application's authority: %w", err)
	}
	if want := p.target.identity.AppID; claims.Usage != ratls.UsageAppCA || string(claims.AppID) != string(want) {
		return fmt.Errorf("certificate_chain: the authority is for %q of application %x, want %q of %x", claims.Usage, claims.AppID, ratls.UsageAppCA, want)
	}
	return nil
}
