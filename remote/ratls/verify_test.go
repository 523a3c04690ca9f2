package ratls_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tdx-agent/remote/ratls"
)

// signed makes a certificate of name that parent's key signs.
func signed(t testing.TB, name string, key *ecdsa.PrivateKey, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: day, NotAfter: day.Add(time.Hour),
		IsCA: strings.HasPrefix(name, "authority"), BasicConstraintsValid: true}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

var day = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func TestCheckLeaf(t *testing.T) {
	key, _ := newKey(t)
	caKey, _ := newKey(t)
	otherKey, _ := newKey(t)
	own, ca := signed(t, "own", key, nil, nil), signed(t, "authority", caKey, nil, nil)
	issued, other := signed(t, "leaf", key, ca, caKey), signed(t, "authority", otherKey, nil, nil)
	notCA := signed(t, "leaf", key, signed(t, "no-authority", caKey, nil, nil), caKey)
	der := bytes.Clone(own.Raw)
	der[len(der)-1] ^= 1
	changed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		at    time.Time
		words string // "": fine
	}{
		"own":                    {[]*x509.Certificate{own}, day, ""},
		"own, last moment":       {[]*x509.Certificate{own}, day.Add(time.Hour), ""},
		"own, others follow":     {[]*x509.Certificate{own, ca}, day, ""},
		"issued":                 {[]*x509.Certificate{issued, ca}, day, ""},
		"ended":                  {[]*x509.Certificate{own}, day.Add(time.Hour + time.Second), "valid from 2026-01-02T03:04:05Z until 2026-01-02T04:04:05Z, and it is 2026-01-02T04:04:06Z"},
		"not yet":                {[]*x509.Certificate{own}, day.Add(-time.Second), "valid from"},
		"nothing":                {nil, day, "no certificate"},
		"changed":                {[]*x509.Certificate{changed}, day, "signature is not of its own key"},
		"issuer not shown":       {[]*x509.Certificate{issued}, day, ratls.ErrNoIssuer.Error()},
		"another of that name":   {[]*x509.Certificate{issued, other}, day, "nor of the next one's"},
		"issuer comes first":     {[]*x509.Certificate{ca, issued}, day, ""}, // the authority, which may have evidence of its own
		"issuer is no authority": {[]*x509.Certificate{notCA, signed(t, "no-authority", caKey, nil, nil)}, day, "nor of the next one's"},
	} {
		err := ratls.CheckLeaf(c.chain, c.at)
		if (err == nil) != (c.words == "") || err != nil && !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", name, err, c.words)
		}
		if name == "issuer not shown" && !errors.Is(err, ratls.ErrNoIssuer) {
			t.Errorf("%v is not ErrNoIssuer", err)
		}
	}
	list, dir := fixtures(t, "ratls")
	for _, f := range list {
		certs := chain(t, filepath.Join(dir, f.Path))
		if err := ratls.CheckLeaf(certs, time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)); err != nil {
			t.Errorf("%s: %v", f.ID, err)
		}
		certs[1] = certs[2]
		if err := ratls.CheckLeaf(certs, time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)); err == nil {
			t.Errorf("%s: signed by the root", f.ID)
		}
	}
}
