package dcap_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	guestpcs "github.com/google/go-tdx-guest/pcs"
	guest "github.com/google/go-tdx-guest/verify"

	"tdx-agent/remote/dcap"
)

// realSet is a real quote that is UpToDate by its collateral, with the time of that.
func realSet(b *testing.B) (quote, bundle []byte, at time.Time) {
	e := loadEvidence(b)
	return e.quote(b, "dq-gas-quote"), e.raw(b, "dq-gas-collateral"), time.Date(2025, 9, 17, 7, 22, 55, 0, time.UTC)
}

// BenchmarkVerify shows each way through the engine beside its floor, one P-256
// verification, and beside go-tdx-guest with collateral and CRLs.
func BenchmarkVerify(b *testing.B) {
	quote, bundle, at := realSet(b)
	parse := func() *dcap.Collateral {
		c, err := dcap.ParseCollateral(bundle, dcap.IntelRoots())
		if err != nil {
			b.Fatal(err)
		}
		return c
	}
	c := parse()
	verify := func(v *dcap.Verifier, quote []byte, c *dcap.Collateral) {
		if _, err := v.Verify(context.Background(), quote, c, at); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("floor-p256", benchmarkFloor)
	b.Run("warm", func(b *testing.B) {
		v := dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots(), SecondOpinion: true})
		verify(v, quote, c)
		b.ReportAllocs()
		for b.Loop() {
			verify(v, quote, c)
		}
	})
	b.Run("warm-parallel", func(b *testing.B) {
		v := dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots()})
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				verify(v, quote, c)
			}
		})
	})
	b.Run("new-key", func(b *testing.B) {
		v := dcap.NewVerifier(dcap.Config{Roots: dcap.IntelRoots(), SecondOpinion: true})
		verify(v, quote, c)
		b.ReportAllocs()
		for b.Loop() {
			v.ForgetKeys()
			verify(v, quote, c)
		}
	})
	cold := func(cfg dcap.Config) func(*testing.B) {
		return func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				verify(dcap.NewVerifier(cfg), quote, parse())
			}
		}
	}
	b.Run("cold", cold(dcap.Config{Roots: dcap.IntelRoots()}))
	b.Run("cold-second-opinion", cold(dcap.Config{Roots: dcap.IntelRoots(), SecondOpinion: true}))
	b.Run("collateral", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			parse()
		}
	})
	b.Run("go-tdx-guest", func(b *testing.B) {
		getter := newGuestGetter(b, bundle)
		b.ReportAllocs()
		for b.Loop() {
			if err := getter.verify(quote, at); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// benchmarkFloor is one P-256 verification.
func benchmarkFloor(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature) {
			b.Fatal("the signature does not hold")
		}
	}
}

// guestGetter serves a bundle to go-tdx-guest from memory.
type guestGetter struct {
	bundle dcap.Bundle
	root   *x509.Certificate
}

func newGuestGetter(t testing.TB, bundle []byte) *guestGetter {
	t.Helper()
	g := new(guestGetter)
	if err := json.Unmarshal(bundle, &g.bundle); err != nil {
		t.Fatal(err)
	}
	chain, err := dcap.DecodePEM([]byte(g.bundle.TCBInfoIssuerChain))
	if err != nil {
		t.Fatal(err)
	}
	if g.root, err = x509.ParseCertificate(chain[1]); err != nil {
		t.Fatal(err)
	}
	return g
}

// verify asks go-tdx-guest, with collateral and revocation.
func (g *guestGetter) verify(quote []byte, at time.Time) error {
	roots := x509.NewCertPool()
	roots.AddCert(g.root)
	return guest.RawTdxQuote(quote, &guest.Options{GetCollateral: true, CheckRevocations: true, Getter: g, TrustedRoots: roots,
		Now: &guest.TimeSet{PckCertChain: at, TcbInfo: at, QeIdentity: at, PckCrl: at, RootCaCrl: at}})
}

// Get implements go-tdx-guest's trust.HTTPSGetter.
func (g *guestGetter) Get(url string) (map[string][]string, []byte, error) {
	header := func(name, chain string) map[string][]string {
		return map[string][]string{name: {strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D").Replace(chain)}}
	}
	switch {
	case strings.Contains(url, "/tcb?"):
		return header(guestpcs.TcbInfoIssuerChainPhrase, g.bundle.TCBInfoIssuerChain),
			fmt.Appendf(nil, `{"tcbInfo":%s,"signature":"%s"}`, g.bundle.TCBInfo, g.bundle.TCBInfoSignature), nil
	case strings.Contains(url, "/qe/identity"):
		return header(guestpcs.SgxQeIdentityIssuerChainPhrase, g.bundle.QEIdentityIssuerChain),
			fmt.Appendf(nil, `{"enclaveIdentity":%s,"signature":"%s"}`, g.bundle.QEIdentity, g.bundle.QEIdentitySignature), nil
	case strings.Contains(url, "/pckcrl"):
		der, err := hex.DecodeString(g.bundle.PCKCRL)
		return header(guestpcs.SgxPckCrlIssuerChainPhrase, g.bundle.PCKCRLIssuerChain), der, err
	}
	der, err := hex.DecodeString(g.bundle.RootCACRL)
	return nil, der, err
}
