package keys

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// Attest makes Evidence of this TD for report data that a certificate's key demands.
type Attest func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error)

// lifetime is how long certificates live whose dates nobody asked for. Their first
// day is dstack's, too: a guest's clock may be wrong when it boots.
const lifetime = 3650 * 24 * time.Hour

var firstDay = time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC)

// authority is the application's own certificate authority.
type authority struct {
	key     *ecdsa.PrivateKey
	encoder ratls.Encoder

	turn chan struct{} // holds one token; who has it may look at and set what follows
	cert *x509.Certificate
	text Certificate // cert, written out
}

// newAuthority returns the authority of key. cert is its certificate, or nil if it is
// still to be made.
func newAuthority(key *ecdsa.PrivateKey, cert *x509.Certificate) *authority {
	c := &authority{key: key, turn: make(chan struct{}, 1)}
	if cert != nil {
		c.set(cert)
	}
	c.turn <- struct{}{}
	return c
}

func (c *authority) set(cert *x509.Certificate) {
	c.cert, c.text = cert, Certificate{der: cert.Raw}
	c.text.json = string(c.text.AppendJSON(nil))
}

// certificate returns the authority's certificate, and makes it when it is first
// asked for: it carries evidence, and the host may not have been able to give any
// when the agent started.
func (c *authority) certificate(ctx context.Context, now time.Time, attest Attest, omitLegacy bool) (*x509.Certificate, Certificate, error) {
	select {
	case <-c.turn:
	case <-ctx.Done():
		return nil, Certificate{}, fmt.Errorf("certificate of the application's authority: %w", ctx.Err())
	}
	defer func() { c.turn <- struct{}{} }()
	if c.cert != nil {
		return c.cert, c.text, nil
	}
	cert, err := c.selfSign(ctx, now, attest, omitLegacy)
	if err != nil {
		return nil, Certificate{}, fmt.Errorf("certificate of the application's authority: %w", err)
	}
	c.set(cert)
	return c.cert, c.text, nil
}

// certify signs a certificate: it comes first, then the authority's.
func (c *authority) certify(ctx context.Context, key *ecdsa.PrivateKey, r *CertificateRequest, attest Attest, omitLegacy bool) ([]Certificate, error) {
	parent, text, err := c.certificate(ctx, r.now(), attest, omitLegacy)
	if err != nil {
		return nil, err
	}
	template := r.template()
	if template.ExtraExtensions, err = c.extensions(ctx, r, &key.PublicKey, attest, omitLegacy); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, c.key)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	return []Certificate{{der: der}, text}, nil
}

func (c *authority) selfSign(ctx context.Context, now time.Time, attest Attest, omitLegacy bool) (*x509.Certificate, error) {
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "App Root Cert"},
		NotBefore:             firstDay,
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLen:            1,
	}
	ev, err := attestKey(ctx, &c.key.PublicKey, attest)
	if err != nil {
		return nil, err
	}
	if template.ExtraExtensions, err = c.evidence(ev, omitLegacy); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &c.key.PublicKey, c.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// attested is evidence for a key.
type attested struct {
	*measure.Evidence
	spki []byte
}

func (c *authority) evidence(ev *attested, omitLegacy bool) ([]pkix.Extension, error) {
	list, err := c.encoder.Extensions(ev.Evidence, ev.spki)
	if omitLegacy {
		list = ratls.WithoutLegacy(list)
	}
	return list, err
}

func attestKey(ctx context.Context, key *ecdsa.PublicKey, attest Attest) (*attested, error) {
	spki, err := p256SPKI(key)
	if err != nil {
		return nil, err
	}
	ev, err := attest(ctx, ratls.ReportData(spki))
	if err != nil {
		return nil, err
	}
	return &attested{Evidence: ev, spki: spki}, nil
}

// parseAuthority returns the authority of a key and its certificate, both PEM. The
// certificate must be one that may sign others, and that key's.
func parseAuthority(keyPEM, certPEM []byte) (*authority, error) {
	key, err := parseP256PEM(keyPEM)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("ca_cert: want one CERTIFICATE block in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("ca_cert: %v", err)
	}
	if !cert.IsCA {
		return nil, errors.New("ca_cert: is not the certificate of an authority")
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("ca_cert: is not the certificate of the key provider's key")
	}
	return newAuthority(key, cert), nil
}

// parseP256PEM clears what it takes out of the PEM. Its errors tell nothing of it.
func parseP256PEM(keyPEM []byte) (*ecdsa.PrivateKey, error) {
	block, rest := pem.Decode(keyPEM)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("key_provider: key: want one block in PEM")
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("key_provider: key: is not a private key in PKCS #8 form")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve.Params().BitSize != 256 {
		return nil, errors.New("key_provider: key: is not a P-256 key")
	}
	return key, nil
}
