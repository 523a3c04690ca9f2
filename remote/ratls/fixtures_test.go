package ratls_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// chainFixture is a real chain in the manifest, leaf first.
type chainFixture struct {
	ID, Path, Kind string
	Expect         struct{ Certificates []expectedCertificate }
}

type expectedCertificate struct {
	SHA256     string         `json:"der_sha256"`
	Extensions map[string]int `json:"custom_extensions"`
	AppID      string         `json:"app_id"`
	Usage      string         `json:"cert_usage"`
	Quote      *struct {
		SHA256     string
		Length     int
		ReportData string `json:"report_data"`
	}
	Log *struct {
		Events   int
		Replayed [4]measure.Digest `json:"replayed_rtmr"`
		Runtime  []struct{ Name, Payload string }
	} `json:"event_log"`
}

// fixtures returns the chains of one folder, or skips where there are none.
func fixtures(t testing.TB, folder string) (list []chainFixture, dir string) {
	t.Helper()
	dir = os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "fixtures")
	}
	b, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		t.Skip("no real evidence here (TDX_AGENT_FIXTURES): ", err)
	}
	var manifest struct{ Items []json.RawMessage }
	if err := json.Unmarshal(b, &manifest); err != nil {
		t.Fatal(err)
	}
	for _, raw := range manifest.Items {
		var head struct{ Path, Kind string }
		if err := json.Unmarshal(raw, &head); err != nil {
			t.Fatal(err)
		}
		if head.Kind != "ratls-chain" || filepath.Dir(head.Path) != folder {
			continue
		}
		var f chainFixture
		if err := json.Unmarshal(raw, &f); err != nil {
			t.Fatal(err)
		}
		list = append(list, f)
	}
	if len(list) == 0 {
		t.Fatal("the manifest has no RA-TLS chains")
	}
	return list, dir
}

func chain(t testing.TB, path string) (certs []*x509.Certificate) {
	t.Helper()
	rest, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return certs
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, cert)
	}
}

func TestRealChains(t *testing.T) {
	list, dir := fixtures(t, "ratls")
	for _, f := range list {
		t.Run(f.ID, func(t *testing.T) {
			certs := chain(t, filepath.Join(dir, f.Path))
			if len(certs) != len(f.Expect.Certificates) {
				t.Fatalf("%d certificates, want %d", len(certs), len(f.Expect.Certificates))
			}
			for i, cert := range certs {
				checkCertificate(t, cert, f.Expect.Certificates[i])
			}
			if a, err := ratls.Parse(certs[0]); err == nil {
				sameLog(t, certs[0], a)
			}
		})
	}
}

func checkCertificate(t *testing.T, cert *x509.Certificate, want expectedCertificate) {
	t.Helper()
	if sum := sha256.Sum256(cert.Raw); hex.EncodeToString(sum[:]) != want.SHA256 {
		t.Errorf("another certificate: %x", sum)
	}
	claims, err := ratls.ParseIssuerClaims(cert)
	if err != nil || hex.EncodeToString(claims.AppID) != want.AppID || claims.Usage != want.Usage {
		t.Errorf("issuer's claims %+v (%v), want %s and %q", claims, err, want.AppID, want.Usage)
	}
	a, err := ratls.Parse(cert)
	if want.Quote == nil {
		if !errors.Is(err, ratls.ErrNoAttestation) {
			t.Errorf("error is %v, want ErrNoAttestation", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	quote, err := measure.ParseQuote(a.Evidence.Quote)
	if err != nil {
		t.Fatal(err)
	}
	whole := a.Evidence.Quote[:len(a.Evidence.Quote)-len(quote.Trailing)]
	if sum := sha256.Sum256(whole); hex.EncodeToString(sum[:]) != want.Quote.SHA256 || len(a.Evidence.Quote) != want.Extensions[ratls.OIDQuote.String()] {
		t.Errorf("quote of %d bytes hashes to %x", len(whole), sum)
	}
	if a.ReportData.String() != want.Quote.ReportData {
		t.Errorf("report data %s, want %s", a.ReportData, want.Quote.ReportData)
	}
	replayed, err := measure.Replay(a.Evidence.Events)
	if err != nil || replayed != want.Log.Replayed || replayed != quote.Body.RTMR || len(a.Evidence.Events) != want.Log.Events {
		t.Errorf("%d events replay to %v (%v), want %v", len(a.Evidence.Events), replayed, err, want.Log.Replayed)
	}
}

// sameLog writes the log that was read once more and compares the bytes.
func sameLog(t *testing.T, cert *x509.Certificate, a *ratls.Attested) {
	t.Helper()
	again, err := measure.FormatEventLog(a.Evidence.Events, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range cert.Extensions {
		if !e.Id.Equal(ratls.OIDEventLog) {
			continue
		}
		var log []byte
		if _, err := asn1.Unmarshal(e.Value, &log); err != nil || !bytes.Equal(log, again) {
			t.Errorf("the log is written as\n%s\nwant\n%s", again, log)
		}
	}
}

// TestCrossedChains puts the attestation of one certificate under the key of another.
func TestCrossedChains(t *testing.T) {
	list, dir := fixtures(t, "ratls")
	key, _ := newKey(t)
	for _, f := range list {
		leaf := chain(t, filepath.Join(dir, f.Path))[0]
		crossed := issue(t, key)
		crossed.Extensions = leaf.Extensions
		if _, err := ratls.Parse(crossed); err == nil {
			t.Errorf("%s: its quote was taken for another key", f.ID)
		}
		// The evidence itself is sound: only the key is not.
		crossed.RawSubjectPublicKeyInfo = leaf.RawSubjectPublicKeyInfo
		if _, err := ratls.Parse(crossed); err != nil {
			t.Error(err)
		}
	}
}

// TestForeignCertificate reads a certificate of another project's RA-TLS.
func TestForeignCertificate(t *testing.T) {
	list, dir := fixtures(t, "bad")
	for _, f := range list {
		for _, cert := range chain(t, filepath.Join(dir, f.Path)) {
			if _, err := ratls.Parse(cert); !errors.Is(err, ratls.ErrNoAttestation) {
				t.Errorf("%s: error is %v", f.ID, err)
			}
		}
	}
}
