package keys

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// getAppKey is a request for the keys of whoever shows the certificate.
type getAppKey struct {
	APIVersion int    `json:"api_version"`
	VMConfig   string `json:"vm_config"`
}

// app gets the application's keys from one server.
func (p *kmsPeer) app(ctx context.Context) (*App, error) {
	cert, err := p.clientCertificate(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := p.call(ctx, "GetAppKey", getAppKey{APIVersion: 1, VMConfig: p.kms.cfg.VMConfig}, cert)
	if err != nil {
		return nil, err
	}
	defer clear(answer)
	app, err := p.parseAppKey(answer)
	if err != nil {
		return nil, p.faultf(KMSAnswer, "GetAppKey: %w", err)
	}
	return app, nil
}

// temporaryAuthority is what GetTempCaCert gives to everybody.
type temporaryAuthority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (p *kmsPeer) temporaryAuthority(ctx context.Context) (*temporaryAuthority, error) {
	answer, err := p.call(ctx, "GetTempCaCert", struct{}{}, nil)
	if err != nil {
		return nil, err
	}
	defer clear(answer)
	doc, err := measure.ParseJSONObject(answer)
	if err != nil {
		return nil, p.faultf(KMSAnswer, "GetTempCaCert: %w", err)
	}
	cert, err := text(doc, "temp_ca_cert")
	if err != nil {
		return nil, p.faultf(KMSAnswer, "GetTempCaCert: %w", err)
	}
	key, err := secretText(doc["temp_ca_key"])
	if err != nil {
		return nil, p.faultf(KMSAnswer, "GetTempCaCert: temp_ca_key: %w", err)
	}
	defer clear(key)
	ca, err := parseAuthority(key, []byte(cert))
	if err != nil {
		return nil, p.faultf(KMSAnswer, "GetTempCaCert: the temporary authority: %w", err)
	}
	return &temporaryAuthority{ca.cert, ca.key}, nil
}

// clientLifetime is how long the certificate is good that we show to a KMS. Its key is
// dropped with the connection. It begins long ago as dstack's own do, since the clock of
// a guest that boots may be wrong.
const clientLifetime = 24 * time.Hour

// clientCertificate makes a key, has evidence made for it, and signs its certificate with
// the temporary authority's key. A KMS up to dstack 0.6.0 takes no other issuer; later ones
// look at the evidence alone and take any, and still give that key to everybody.
func (p *kmsPeer) clientCertificate(ctx context.Context) (*tls.Certificate, error) {
	ca, err := p.temporaryAuthority(ctx)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ev, err := attestKey(ctx, &key.PublicKey, p.kms.cfg.Attest)
	if err != nil {
		return nil, fmt.Errorf("kms: evidence for the KMS: %w", err)
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "RA-TLS TEMP Cert"}, NotBefore: firstDay, NotAfter: p.kms.cfg.Now().Add(clientLifetime), KeyUsage: x509.KeyUsageDigitalSignature}
	if template.ExtraExtensions, err = ratls.Extensions(ev.Evidence, ev.spki); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("kms: certificate for the KMS: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// parseAppKey takes the keys out of the answer to GetAppKey. What this agent does not
// use is checked and not kept.
func (p *kmsPeer) parseAppKey(answer []byte) (*App, error) {
	doc, err := measure.ParseJSONObject(answer)
	if err != nil {
		return nil, err
	}
	ca, err := text(doc, "ca_cert")
	if err != nil {
		return nil, err
	}
	if _, err := p.rootCertificate([]byte(ca)); err != nil {
		return nil, fmt.Errorf("ca_cert: %w", err)
	}
	for _, name := range []string{"disk_crypt_key", "env_crypt_key"} {
		unused, err := secretSized(doc, name, 32)
		if err != nil {
			return nil, err
		}
		clear(unused)
	}
	if want := p.target.identity.OSImageHash; want != nil {
		got, err := secretHex(doc, "os_image_hash", 32)
		if err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("os_image_hash is %x, but this boot has measured %x", got, want)
		}
		if err != nil {
			return nil, err
		}
	}
	signature, err := secretSized(doc, "k256_signature", 65)
	if err != nil {
		return nil, err
	}
	key, err := secretSized(doc, "k256_key", 32)
	if err != nil {
		return nil, err
	}
	app, err := newApp(p.target.provider, newSecret(key), signature, nil)
	if err != nil {
		return nil, fmt.Errorf("k256_key: %w", err)
	}
	app.kms = p.kms
	return app, nil
}

// secretSized is secretHex of exactly size bytes.
func secretSized(doc map[string]json.RawMessage, name string, size int) ([]byte, error) {
	b, err := secretHex(doc, name, size)
	if err == nil && len(b) != size {
		clear(b)
		return nil, fmt.Errorf("%s: %d bytes, want %d", name, len(b), size)
	}
	return b, err
}

// rootCertificate parses the certificate of the KMS's root key.
func (p *kmsPeer) rootCertificate(text []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("want one CERTIFICATE block in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if !p.target.root.Equal(cert.PublicKey) || !cert.IsCA {
		return nil, errors.New("it is not an authority's certificate of the root key that this boot has measured")
	}
	return cert, nil
}
