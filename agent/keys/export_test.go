package keys

import (
	"context"
	"crypto/ecdsa"
	"net/url"

	"tdx-agent/measure"
)

// CertificateOf takes DER for an issued certificate's.
func CertificateOf(der []byte) *Certificate { return &Certificate{der: der} }

// EncodeKMSRequest encodes what SignCert is asked for.
func (r *CertificateRequest) EncodeKMSRequest(spki, attestation []byte) []byte {
	return r.kmsRequest(spki, attestation)
}

// ParseKMSAnswers decodes an answer of each method.
func ParseKMSAnswers(answer []byte, id *measure.Identity, key *ecdsa.PublicKey) (*App, []Certificate) {
	k := &KMS{cfg: KMSConfig{Measured: func(context.Context) (*measure.Identity, error) { return id, nil }}}
	target, err := k.target(context.Background())
	if err != nil {
		return nil, nil
	}
	p := &kmsPeer{kms: k, base: new(url.URL), target: target}
	app, err := p.parseAppKey(append([]byte(nil), answer...))
	if err != nil {
		app = nil
	}
	chain, err := p.parseChain(answer, key)
	if err != nil {
		chain = nil
	}
	return app, chain
}
