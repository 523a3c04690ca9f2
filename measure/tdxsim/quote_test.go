package tdxsim_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"syscall"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	errors.As(err, &errno)
	return errno
}

func certificates(t testing.TB, b []byte) (certs []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, c)
	}
	return certs
}

func verifyRaw(t testing.TB, what string, key *ecdsa.PublicKey, message, signature []byte) {
	t.Helper()
	digest := sha256.Sum256(message)
	if !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:64])) {
		t.Errorf("%s: bad signature", what)
	}
}

// verifyQuote follows the signatures from the simulator's root to the body, by
// offsets, and returns the body and the PCK certificate.
func verifyQuote(t testing.TB, td *tdxsim.TD, q []byte) (body []byte, pck *x509.Certificate) {
	t.Helper()
	signed := 48 + 584
	if v := binary.LittleEndian.Uint16(q); v == 5 {
		signed = 54 + int(binary.LittleEndian.Uint32(q[50:]))
		body = q[54:signed]
	} else if v == 4 {
		body = q[48:signed]
	} else {
		t.Fatalf("version %d", v)
	}
	if key, tee := binary.LittleEndian.Uint16(q[2:]), binary.LittleEndian.Uint32(q[4:]); key != 2 || tee != 0x81 {
		t.Fatalf("key type %d, TEE type %#x", key, tee)
	}
	s := q[signed+4:]
	if n := binary.LittleEndian.Uint32(q[signed:]); int(n) != len(s) {
		t.Fatalf("signature data size is %d, want %d", n, len(s))
	}
	if kind, n := binary.LittleEndian.Uint16(s[128:]), binary.LittleEndian.Uint32(s[130:]); kind != 6 || int(n) != len(s)-134 {
		t.Fatalf("certification data of type %d, size %d of %d", kind, n, len(s)-134)
	}
	if n := binary.LittleEndian.Uint16(s[582:]); n != 32 {
		t.Fatalf("QE authentication data has %d bytes", n)
	}
	if kind, n := binary.LittleEndian.Uint16(s[616:]), binary.LittleEndian.Uint32(s[618:]); kind != 5 || int(n) != len(s)-622 {
		t.Fatalf("chain of type %d, size %d of %d", kind, n, len(s)-622)
	}
	chain := certificates(t, s[622:])
	if len(chain) != 3 {
		t.Fatalf("chain has %d certificates", len(chain))
	}
	checkChain(t, td, chain...)
	report := s[134:518]
	verifyRaw(t, "QE report", chain[0].PublicKey.(*ecdsa.PublicKey), report, s[518:582])
	binding := sha256.Sum256(append(bytes.Clone(s[64:128]), s[584:616]...))
	if !bytes.Equal(report[320:384], append(binding[:], make([]byte, 32)...)) {
		t.Error("the QE report does not bind the attestation key")
	}
	ak, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, s[64:128]...))
	if err != nil {
		t.Fatal(err)
	}
	verifyRaw(t, "quote", ak, q[:signed], s[:64])
	return body, chain[0]
}

// checkChain verifies a chain, leaf first, to the TD's root.
func checkChain(t testing.TB, td *tdxsim.TD, chain ...*x509.Certificate) {
	t.Helper()
	root := certificates(t, td.RootPEM())[0]
	if !chain[len(chain)-1].Equal(root) {
		t.Fatal("the chain does not end in the TD's root")
	}
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, c := range chain[1 : len(chain)-1] {
		middle.AddCert(c)
	}
	leaf := *chain[0]
	leaf.UnhandledCriticalExtensions = nil
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: middle, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	for _, c := range chain {
		if c.Version != 3 || c.SignatureAlgorithm != x509.ECDSAWithSHA256 || !strings.Contains(c.Subject.String(), "SIMULATED") {
			t.Errorf("certificate %v: version %d, %v", c.Subject, c.Version, c.SignatureAlgorithm)
		}
	}
}

func TestQuote(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  tdxsim.Config
		body int
	}{
		{"v4", tdxsim.Config{}, 584},
		{"v5 TD 1.0", tdxsim.Config{QuoteVersion: 5, BodyType: 2}, 584},
		{"v5 TD 1.5", tdxsim.Config{QuoteVersion: 5, TEETCBSVN2: [16]byte{9, 1, 6}, MRServiceTD: measure.Digest{5}}, 648},
		{"overrides", tdxsim.Config{Debug: true, MRTD: measure.Digest{1}, MRConfigID: measure.Digest{2}, MROwner: measure.Digest{3}, MROwnerConfig: measure.Digest{4}, FMSPC: [6]byte{1, 2, 3}, TEETCBSVN: [16]byte{5, 0, 3}}, 584},
	} {
		t.Run(c.name, func(t *testing.T) {
			td := newTD(t, c.cfg)
			if err := td.Extend(3, measure.Digest{9}); err != nil {
				t.Fatal(err)
			}
			rd := measure.ReportData{0: 1, 63: 2}
			q := makeQuote(t, td, rd)
			body, pck := verifyQuote(t, td, q)
			if len(body) != c.body || len(q) < 4800 || len(q) > 5400 {
				t.Errorf("body has %d bytes, quote %d", len(body), len(q))
			}
			if !bytes.Equal(body[520:584], rd[:]) {
				t.Errorf("report data is %x", body[520:584])
			}
			regs := registers(t, td)
			for i, d := range []measure.Digest{regs.MRTD, regs.MRConfigID, regs.MROwner, regs.MROwnerConfig, regs.RTMR[0], regs.RTMR[1], regs.RTMR[2], regs.RTMR[3]} {
				if !bytes.Equal(body[136+48*i:][:48], d[:]) {
					t.Errorf("register %d is %x, want %s", i, body[136+48*i:][:48], d)
				}
			}
			attributes := uint64(1 << 28)
			if c.cfg.Debug {
				attributes |= 1
			}
			if got := binary.LittleEndian.Uint64(body[120:]); got != attributes {
				t.Errorf("attributes %#x", got)
			}
			if c.body == 648 && (!bytes.Equal(body[584:600], c.cfg.TEETCBSVN2[:]) || body[600] != 5) {
				t.Errorf("end of body: %x", body[584:])
			}
			ext := sgxExtension(t, pck)
			if fmspc := ext["1.2.840.113741.1.13.1.4"]; len(fmspc) != 6 || c.cfg.FMSPC[0] != 0 && !bytes.Equal(fmspc, c.cfg.FMSPC[:]) {
				t.Errorf("FMSPC %x", fmspc)
			}
			if len(ext["1.2.840.113741.1.13.1.1"]) != 16 || len(ext["1.2.840.113741.1.13.1.2"]) == 0 || len(ext["1.2.840.113741.1.13.1.3"]) != 2 {
				t.Errorf("SGX extension: %x", ext)
			}
		})
	}
}

// sgxExtension returns the top-level fields of the PCK's SGX extension.
func sgxExtension(t testing.TB, pck *x509.Certificate) map[string][]byte {
	t.Helper()
	fields := make(map[string][]byte)
	for _, e := range pck.Extensions {
		if e.Id.String() != "1.2.840.113741.1.13.1" {
			continue
		}
		var list []struct {
			ID    asn1.ObjectIdentifier
			Value asn1.RawValue
		}
		if rest, err := asn1.Unmarshal(e.Value, &list); err != nil || len(rest) > 0 {
			t.Fatalf("SGX extension: %v, %d bytes left", err, len(rest))
		}
		for _, f := range list {
			fields[f.ID.String()] = f.Value.Bytes
		}
	}
	return fields
}

func TestSeed(t *testing.T) {
	cfg := tdxsim.Config{Seed: []byte("seed"), Now: func() time.Time { return testTime }}
	a, b := newTD(t, cfg), newTD(t, cfg)
	cfg.Seed = []byte("other")
	c := newTD(t, cfg)
	if !bytes.Equal(a.RootPEM(), b.RootPEM()) || bytes.Equal(a.RootPEM(), c.RootPEM()) {
		t.Error("the root does not depend on the seed alone")
	}
	// b's quotes chain to a's root, since all its certificates are the same.
	verifyQuote(t, a, makeQuote(t, b, measure.ReportData{}))
}

func BenchmarkQuote(b *testing.B) {
	td := openTD(b, b.TempDir())
	for i := range b.N {
		makeQuote(b, td, measure.ReportData{byte(i), byte(i >> 8)})
	}
}

var testTime = time.Date(2026, 10, 1, 12, 0, 0, 0, time.UTC)

// TestQuoteOf lets the platform sign for a TD that is not its own.
func TestQuoteOf(t *testing.T) {
	td, err := tdxsim.New(t.TempDir(), tdxsim.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer td.Close()
	regs, err := td.Registers()
	if err != nil {
		t.Fatal(err)
	}
	regs.MRTD[0] ^= 1
	regs.RTMR[3][0] ^= 1
	rd := measure.ReportData{1}
	b, err := td.QuoteOf(&regs, rd)
	if err != nil {
		t.Fatal(err)
	}
	verifyQuote(t, td, b)
	q, err := measure.ParseQuote(b)
	if err != nil || q.Body.Registers != regs || q.Body.ReportData != rd {
		t.Errorf("got %+v, %v", q, err)
	}
}
