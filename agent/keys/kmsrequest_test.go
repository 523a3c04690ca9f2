package keys_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"strings"
	"testing"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
)

// TestKMSRequestIsExact has the two vectors that dstack publishes, whose attestation is
// empty but for the quote.
func TestKMSRequestIsExact(t *testing.T) {
	const head = "44706c65617365207369676e20636572743a0c0102030040746573742e6578616d706c652e636f6d000100"
	for quote, want := range map[string]string{
		"":     head + "00000000" + strings.Repeat("00", 5) + strings.Repeat("00", 64) + "00",
		"\x09": head + "01000000" + "00000409" + strings.Repeat("00", 2) + strings.Repeat("00", 64) + "00",
	} {
		attestation, err := measure.EncodeAttestation(&measure.Evidence{Quote: []byte(quote)}, measure.ReportData{})
		if err != nil {
			t.Fatal(err)
		}
		r := keys.CertificateRequest{Subject: "test.example.com", Server: true, RATLS: quote != ""}
		if got := hex.EncodeToString(r.EncodeKMSRequest([]byte{1, 2, 3}, attestation)); got != want {
			t.Errorf("quote %x:\n%s, want\n%s", quote, got, want)
		}
	}
	r := keys.CertificateRequest{Subject: "s", AltNames: []string{strings.Repeat("a", 64), "b"}, Client: true, AppInfo: true, NotBefore: seconds(1), NotAfter: seconds(258)}
	const want = "44706c65617365207369676e20636572743a" + "00" + "00" + "0473" + "08" + "0101"
	got := hex.EncodeToString(r.EncodeKMSRequest(nil, []byte{0xee}))
	if !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "0462"+"00010001"+"010100000000000000"+"010201000000000000"+"ee") {
		t.Errorf("%s", got)
	}
}

// FuzzKMSAnswers decodes what a KMS may send.
func FuzzKMSAnswers(f *testing.F) {
	_, rootPEM := testCA(f, true)
	block, _ := pem.Decode([]byte(rootPEM))
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		f.Fatal(err)
	}
	id := &measure.Identity{AppID: testAppID, KeyProvider: string(measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: root.RawSubjectPublicKeyInfo}.Payload())}
	public := root.PublicKey.(*ecdsa.PublicKey)
	good := mustJSON(f, map[string]any{"ca_cert": rootPEM, "disk_crypt_key": strings.Repeat("01", 32), "env_crypt_key": strings.Repeat("02", 32),
		"k256_key": vectorKey, "k256_signature": strings.Repeat("03", 65)})
	if app, _ := keys.ParseKMSAnswers(good, id, public); app == nil {
		f.Fatal("the good answer is refused")
	}
	f.Add(good)
	f.Add(mustJSON(f, map[string]any{"certificate_chain": []string{rootPEM, rootPEM, rootPEM}}))
	f.Add([]byte(`{"error":"no"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		app, chain := keys.ParseKMSAnswers(b, id, public)
		if !json.Valid(b) && (app != nil || chain != nil) {
			t.Error("what is not JSON gives keys or a chain")
		}
		if chain != nil && len(chain) != 3 {
			t.Errorf("a chain of %d", len(chain))
		}
	})
}
