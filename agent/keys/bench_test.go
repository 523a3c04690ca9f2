package keys_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"slices"
	"testing"
	"time"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	secpecdsa "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// paired runs floor and work by turns and reports the medians of both and their
// ratio, so that what else the machine does meets both alike.
func paired(b *testing.B, floor, work func()) {
	var took [2][]time.Duration
	for b.Loop() {
		for i, f := range []func(){floor, work} {
			start := time.Now()
			f()
			took[i] = append(took[i], time.Since(start))
		}
	}
	var p50 [2]float64
	for i := range took {
		slices.Sort(took[i])
		p50[i] = float64(took[i][len(took[i])/2].Nanoseconds()) / 1000
	}
	b.ReportMetric(p50[0], "floor-p50-µs")
	b.ReportMetric(p50[1], "p50-µs")
	b.ReportMetric(p50[1]/p50[0], "x-floor")
}

// BenchmarkDerive has as its floor the two scalar operations that no derivation can
// do without: the public key, and one signature.
func BenchmarkDerive(b *testing.B) {
	app := vectorApp(b)
	key := secp256k1.PrivKeyFromBytes(unhex(vectorKey))
	digest := make([]byte, 32)
	paired(b, func() {
		digest[0]++
		key.PubKey().SerializeCompressed()
		secpecdsa.SignCompact(key, digest, true)
	}, func() {
		k, err := app.Derive("some/path", "purpose", "")
		if err != nil {
			b.Fatal(err)
		}
		k.Zero()
	})
}

// BenchmarkIssue has as its floor a new key and crypto/x509's certificate for it, with
// the same extensions.
func BenchmarkIssue(b *testing.B) {
	evidence := realSize(b)
	app := vectorApp(b)
	caKey, parent := parsedCA(b)
	for name, r := range map[string]keys.CertificateRequest{"plain": {Subject: "s"}, "ratls": {Subject: "s", RATLS: true}} {
		b.Run(name, func(b *testing.B) {
			list := []pkix.Extension{ratls.UsageExtension(ratls.UsageApp)}
			if r.RATLS {
				ev, err := evidence(b.Context(), ratls.ReportData(nil))
				if err != nil {
					b.Fatal(err)
				}
				more, err := ratls.Extensions(ev, nil)
				if err != nil {
					b.Fatal(err)
				}
				list = append(list, more...)
			}
			paired(b, func() {
				key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
				if err != nil {
					b.Fatal(err)
				}
				if r.RATLS { // the quote is no part of either
					if _, err := evidence(b.Context(), measure.ReportData{}); err != nil {
						b.Fatal(err)
					}
				}
				template := &x509.Certificate{Subject: pkix.Name{CommonName: "s"}, NotAfter: time.Now(), KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: list}
				if _, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, caKey); err != nil {
					b.Fatal(err)
				}
			}, func() {
				k, err := app.IssueRandom(b.Context(), r, evidence)
				if err != nil {
					b.Fatal(err)
				}
				k.Zero()
			})
		})
	}
}

// realSize returns an Attest whose evidence is as large as a real one: 30 events of
// the boot log, and a quote of 5006 bytes.
func realSize(b *testing.B) keys.Attest {
	small, _ := attest(b)
	return func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		ev, err := small(ctx, rd)
		if err != nil {
			return nil, err
		}
		quote := make([]byte, 5006)
		copy(quote, ev.Quote)
		events := make([]measure.Event, 0, 30+len(ev.Events))
		for i := range byte(30) {
			events = append(events, measure.Event{IMR: int(i % 3), Type: 0x80000001, Digest: measure.Digest{i}, Payload: make([]byte, 100)})
		}
		return &measure.Evidence{Quote: quote, Events: append(events, ev.Events...), VMConfig: ev.VMConfig}, nil
	}
}

func parsedCA(b *testing.B) (any, *x509.Certificate) {
	keyPEM, certPEM := testCA(b, true)
	block, _ := pem.Decode([]byte(keyPEM))
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		b.Fatal(err)
	}
	block, _ = pem.Decode([]byte(certPEM))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		b.Fatal(err)
	}
	return key, cert
}
