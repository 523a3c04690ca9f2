package keys_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	"tdx-agent/agent/keys"
	"tdx-agent/remote/ratls"
)

// TestEvidenceForAKeyOpensTheKMS shows why status says that certificates with evidence
// equal access to all keys: their holder signs the same evidence anew with the temporary
// authority's key, which the KMS gives to everybody, and is the application to it.
func TestEvidenceForAKeyOpensTheKMS(t *testing.T) {
	s := newKMSSetup(t, nil)
	app, err := s.kms(t).App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	granted, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Now: testTime, RATLS: true}, s.guest.attest)
	if err != nil {
		t.Fatal(err)
	}
	key := parsePrivate(t, granted.KeyPEM())
	temporary := s.call(t, "GetTempCaCert", nil)
	block, _ := pem.Decode([]byte(temporary["temp_ca_cert"]))
	authority, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: testTime.Add(time.Hour)}
	for _, e := range certificates(t, granted)[0].Extensions {
		if e.Id.Equal(ratls.OIDAttestation) {
			template.ExtraExtensions = append(template.ExtraExtensions, e)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority, &key.PublicKey, parsePrivate(t, []byte(temporary["temp_ca_key"])))
	if err != nil {
		t.Fatal(err)
	}
	got := s.call(t, "GetAppKey", &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	want, _, err := s.server.AppKey(testAppID)
	if err != nil {
		t.Fatal(err)
	}
	if got["k256_key"] != hex.EncodeToString(want) {
		t.Errorf("the KMS tells the certificate of an application from the agent's own (%s): then status says too much", got["error"])
	}
}

func parsePrivate(t *testing.T, text []byte) *ecdsa.PrivateKey {
	t.Helper()
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*ecdsa.PrivateKey)
}

// call asks the KMS without this project's client.
func (s *kmsSetup) call(t *testing.T, method string, cert *tls.Certificate) (answer map[string]string) {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	client := http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}
	resp, err := client.Post(s.url+"/prpc/KMS."+method+"?json", "application/json", strings.NewReader(`{"api_version":1,"vm_config":""}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(b, &answer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return answer
}
