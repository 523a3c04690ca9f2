package dcap_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tdx-guest/abi"
	guest "github.com/google/go-tdx-guest/verify"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

// The seeds are whole documents, since signed ones cannot be shortened: fuzz with
// -fuzzminimizetime=5x, or most of the time goes into making them smaller.

// parts returns a simulated bundle, for seeds.
func parts(f *testing.F) (*set, dcap.Bundle) {
	s := simulate(f, tdxsim.Config{})
	var b dcap.Bundle
	if err := json.Unmarshal(s.bundle, &b); err != nil {
		f.Fatal(err)
	}
	return s, b
}

// FuzzCollateral changes a bundle. What is accepted must have the signed texts of the
// seed: anything else would be a forgery.
func FuzzCollateral(f *testing.F) {
	s, genuine := parts(f)
	f.Add(s.bundle)
	f.Add([]byte(`{"tcb_info":"","TCB_INFO":""}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		_, err := dcap.ParseCollateral(text, s.roots)
		if err != nil {
			if _, ok := errors.AsType[*dcap.Error](err); !ok {
				t.Errorf("%v is no *dcap.Error", err)
			}
			return
		}
		var b dcap.Bundle
		if err := json.Unmarshal(text, &b); err != nil {
			t.Fatalf("encoding/json refuses it: %v", err)
		}
		if b.TCBInfo != genuine.TCBInfo || b.QEIdentity != genuine.QEIdentity {
			t.Error("forged")
		}
	})
}

// FuzzTCBInfo compares with encoding/json: what is accepted is JSON, with these values
// under exactly these keys.
func FuzzTCBInfo(f *testing.F) {
	_, b := parts(f)
	f.Add([]byte(b.TCBInfo))
	f.Add([]byte(`{"id":"TDX","version":3,"fmspc":"000000000000","FMSPC":""}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		fmspc, evaluation, statuses, err := dcap.ParseTCBInfo(text)
		if err != nil {
			return
		}
		var members map[string]json.RawMessage
		if err := json.Unmarshal(text, &members); err != nil {
			t.Fatalf("encoding/json refuses it: %v", err)
		}
		var want string
		var number int
		var levels []json.RawMessage
		for key, into := range map[string]any{"fmspc": &want, "tcbEvaluationDataNumber": &number, "tcbLevels": &levels} {
			if err := json.Unmarshal(members[key], into); err != nil {
				t.Fatalf("%s: %v", key, err)
			}
		}
		if !strings.EqualFold(want, hex.EncodeToString(fmspc[:])) || number != evaluation || len(levels) != len(statuses) {
			t.Errorf("got %x, %d, %d levels; want %s, %d, %d", fmspc, evaluation, len(statuses), want, number, len(levels))
		}
	})
}

// FuzzQEIdentity is FuzzTCBInfo for the other document.
func FuzzQEIdentity(f *testing.F) {
	_, b := parts(f)
	f.Add([]byte(b.QEIdentity))
	f.Fuzz(func(t *testing.T, text []byte) {
		signer, evaluation, err := dcap.ParseQEIdentity(text)
		if err != nil {
			return
		}
		var want struct {
			MRSigner string `json:"mrsigner"`
			Number   int    `json:"tcbEvaluationDataNumber"`
		}
		if err := json.Unmarshal(text, &want); err != nil {
			t.Fatalf("encoding/json refuses it: %v", err)
		}
		if !strings.EqualFold(want.MRSigner, hex.EncodeToString(signer[:])) || want.Number != evaluation {
			t.Errorf("got %x, %d; want %+v", signer, evaluation, want)
		}
	})
}

// FuzzChain compares with encoding/pem: what is accepted has the same certificates, but
// for the NUL that may follow, which encoding/pem takes for a part of the last line.
func FuzzChain(f *testing.F) {
	s, _ := parts(f)
	f.Add(chainOf(s.quote))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\r\nAA==\r\n-----END CERTIFICATE-----\r\n\x00"))
	f.Fuzz(func(t *testing.T, text []byte) {
		chain, err := dcap.DecodePEM(text)
		if err != nil {
			return
		}
		rest := bytes.TrimSuffix(text, []byte{0})
		for i, der := range chain {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil || !bytes.Equal(block.Bytes, der) {
				if len(der) == 0 {
					return // encoding/pem skips a block without content
				}
				t.Fatalf("certificate %d: %x, encoding/pem has another", i, der)
			}
		}
	})
}

// FuzzPCK compares with encoding/asn1: what is accepted is a DER sequence.
func FuzzPCK(f *testing.F) {
	f.Add(newAuthority(f).extension.Value)
	f.Fuzz(func(t *testing.T, extension []byte) {
		if _, err := dcap.ParsePCK(extension); err != nil {
			return
		}
		var list []asn1.RawValue
		if rest, err := asn1.Unmarshal(extension, &list); err != nil || len(rest) > 0 || len(list) < 4 {
			t.Errorf("%d entries, %d bytes more, %v", len(list), len(rest), err)
		}
	})
}

// FuzzCRL compares with crypto/x509: what is accepted revokes the same certificates at
// the same time.
func FuzzCRL(f *testing.F) {
	_, b := parts(f)
	chain, err := dcap.DecodePEM([]byte(b.PCKCRLIssuerChain))
	if err != nil {
		f.Fatal(err)
	}
	issuer, err := x509.ParseCertificate(chain[0])
	if err != nil {
		f.Fatal(err)
	}
	for _, digits := range []string{b.PCKCRL, b.RootCACRL} {
		der, _ := hex.DecodeString(digits) // it is from a bundle
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		serials, issued, next, err := dcap.RevokedSerials(der, issuer)
		if err != nil {
			return
		}
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return // it is stricter about what is not used, as the dates of entries
		}
		if !list.ThisUpdate.Equal(issued) || !list.NextUpdate.Equal(next) {
			t.Errorf("from %v until %v, crypto/x509: %v until %v", issued, next, list.ThisUpdate, list.NextUpdate)
		}
		for _, e := range list.RevokedCertificateEntries {
			if _, is := serials[string(e.SerialNumber.Bytes())]; !is {
				t.Errorf("%x is not revoked", e.SerialNumber)
			}
			if e.SerialNumber.Sign() < 0 {
				t.Error("a negative serial number")
			}
		}
	})
}

// FuzzQuote changes quotes. What is accepted must be signed as the seeds were, and
// go-tdx-guest must not refuse its signatures.
func FuzzQuote(f *testing.F) {
	s, _ := parts(f)
	v5 := simulate(f, tdxsim.Config{QuoteVersion: 5})
	f.Add(s.quote)
	f.Add(v5.quote)
	c, err := dcap.ParseCollateral(s.bundle, s.roots)
	if err != nil {
		f.Fatal(err)
	}
	v := dcap.NewVerifier(dcap.Config{Roots: s.roots})
	root, err := dcap.DecodePEM(chainOf(s.quote))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, quote []byte) {
		r, err := v.Verify(context.Background(), quote, c, testTime)
		if err != nil {
			return
		}
		if signed := r.Quote.Signed; !bytes.Equal(signed, s.quote[:len(signed)]) && !bytes.Equal(signed, v5.quote[:len(signed)]) {
			t.Error("forged")
		}
		if err := askGuest(quote[:len(quote)-r.TrailingBytes], root[2]); err != nil {
			t.Errorf("go-tdx-guest: %v", err)
		}
	})
}

// askGuest is go-tdx-guest's verdict on the signatures; nil if it panics.
func askGuest(quote, root []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = nil
		}
	}()
	parsed, err := abi.QuoteToProto(quote)
	if err != nil {
		return fmt.Errorf("cannot read what is accepted: %v", err)
	}
	c, err := x509.ParseCertificate(root)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	return guest.TdxQuote(parsed, &guest.Options{TrustedRoots: pool, Now: &guest.TimeSet{PckCertChain: testTime, TcbInfo: testTime, QeIdentity: testTime, PckCrl: testTime, RootCaCrl: testTime}})
}
