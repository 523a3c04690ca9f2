package keys_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"tdx-agent/agent/keys"
	"tdx-agent/agent/keys/kmstest"
	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// TestKMSRefused has one vector for each way in which a KMS can be wrong: the reason is
// the named one, no request is sent before it is known unless it lies in an answer, and
// there are no keys.
func TestKMSRefused(t *testing.T) {
	otherKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	swap := func(method, old, new string) func(*kmstest.Config) {
		return func(c *kmstest.Config) {
			c.Answer = func(m string, b []byte) []byte {
				if m == method {
					return bytes.Replace(b, []byte(old), []byte(new), 1)
				}
				return b
			}
		}
	}
	member := func(name string, value any) func(*kmstest.Config) {
		return func(c *kmstest.Config) {
			c.Answer = func(m string, b []byte) []byte {
				var doc map[string]any
				if m != "GetAppKey" || json.Unmarshal(b, &doc) != nil {
					return b
				}
				doc[name] = value
				b, _ = json.Marshal(doc)
				return b
			}
		}
	}
	drop := func(oids ...string) func(*kmstest.Config) {
		return func(c *kmstest.Config) {
			c.EditCertificate = func(cert *x509.Certificate) {
				kept := cert.ExtraExtensions[:0:0]
				for _, e := range cert.ExtraExtensions {
					if !slices.Contains(oids, e.Id.String()) {
						kept = append(kept, e)
					}
				}
				cert.ExtraExtensions = kept
			}
		}
	}
	const oid = "1.3.6.1.4.1.62397.1."
	for name, c := range map[string]struct {
		edit     func(*kmstest.Config)
		guest    func(*kmsSetup)
		reason   string
		words    string
		requests int // that the server saw
	}{
		"another root key":       {nil, func(s *kmsSetup) { s.measured.KeyProvider = providerOf(t, &otherKey.PublicKey) }, keys.KMSRootKey, "not signed by the root key that this boot has measured", 0},
		"another signer":         {func(c *kmstest.Config) { c.Signer = otherKey }, nil, keys.KMSRootKey, "not signed by the root key", 0},
		"no usage":               {drop(oid + "4"), nil, keys.KMSCertificate, `is for "" (authority: false), want "kms:rpc"`, 0},
		"an application's usage": {func(c *kmstest.Config) { c.EditCertificate = usage(ratls.UsageApp) }, nil, keys.KMSCertificate, `is for "app:custom"`, 0},
		"an authority": {func(c *kmstest.Config) {
			c.EditCertificate = func(cert *x509.Certificate) { cert.IsCA, cert.BasicConstraintsValid = true, true }
		}, nil, keys.KMSCertificate, "authority: true", 0},
		"another name": {func(c *kmstest.Config) {
			c.EditCertificate = func(cert *x509.Certificate) { cert.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }
		}, nil, keys.KMSCertificate, "127.0.0.1", 0},
		"out of date": {func(c *kmstest.Config) {
			c.EditCertificate = func(cert *x509.Certificate) { cert.NotAfter = testTime.Add(-time.Hour) }
		}, nil, keys.KMSCertificate, "is good from", 0},
		"a replayed certificate": {func(c *kmstest.Config) { c.Key = otherKey }, nil, keys.KMSCertificate,
			"whose key it does not have", 0},
		"no attestation":      {drop(oid+"1", oid+"2", oid+"8"), nil, keys.KMSAttestation, "no dstack attestation", 0},
		"half an attestation": {drop(oid+"2", oid+"8"), nil, keys.KMSAttestation, "want both", 0},
		"evidence of another key": {func(c *kmstest.Config) { c.AttestKey = &otherKey.PublicKey }, nil, keys.KMSAttestation,
			"bound to another key", 0},
		"another application": {func(c *kmstest.Config) { c.Attest = newKMSMachine(t, 0x12).attest }, nil, keys.KMSPolicy, "compose hash", 0},
		"another platform":    {func(c *kmstest.Config) { c.Attest = newMachine(t, "elsewhere", nil).attest }, nil, keys.KMSPolicy, "not genuine", 0},
		"another mr-kms":      {nil, func(s *kmsSetup) { s.measured.MRKMS = make([]byte, 32) }, keys.KMSMeasurement, "mr-kms 0000", 0},
		"we are not accepted": {func(c *kmstest.Config) { c.Guests = newGuest(t).verifier(t, 9) }, nil, keys.KMSDenied, "app not allowed", 2},
		"an answer too large": {swap("GetAppKey", "{", "{\"x\":\""+strings.Repeat("a", 300<<10)+"\","), nil, keys.KMSAnswer, "more than 262144 bytes", 2},
		"an authority too large": {swap("GetTempCaCert", "{", "{\"x\":\""+strings.Repeat("a", 300<<10)+"\","), nil, keys.KMSAnswer,
			"more than 262144 bytes", 1},
		"no JSON":              {swap("GetAppKey", "{", "["), nil, keys.KMSAnswer, "not valid JSON", 2},
		"a member twice":       {swap("GetAppKey", "{", `{"k256_key":"00",`), nil, keys.KMSAnswer, "there twice", 2},
		"a short key":          {member("k256_key", strings.Repeat("5a", 31)), nil, keys.KMSAnswer, "k256_key: 31 bytes, want 32", 2},
		"a long key":           {member("k256_key", strings.Repeat("5a", 33)), nil, keys.KMSAnswer, "k256_key: 66 digits", 2},
		"a key of zeros":       {member("k256_key", strings.Repeat("00", 32)), nil, keys.KMSAnswer, "not the scalar", 2},
		"a key that is none":   {member("k256_key", strings.Repeat("5x", 32)), nil, keys.KMSAnswer, "hexadecimal", 2},
		"a key that is a list": {member("k256_key", []int{1}), nil, keys.KMSAnswer, "k256_key: want a string", 2},
		"no signature":         {member("k256_signature", ""), nil, keys.KMSAnswer, "k256_signature: 0 bytes, want 65", 2},
		"a short disk key":     {member("disk_crypt_key", "5a5a"), nil, keys.KMSAnswer, "disk_crypt_key: 2 bytes, want 32", 2},
		"no environment key":   {member("env_crypt_key", ""), nil, keys.KMSAnswer, "env_crypt_key: 0 bytes, want 32", 2},
		"another image":        {member("os_image_hash", strings.Repeat("cd", 32)), nil, keys.KMSAnswer, "os_image_hash is cdcd", 2},
		"another root":         {member("ca_cert", otherRoot(t, otherKey)), nil, keys.KMSAnswer, "ca_cert: it is not an authority's certificate of the root key", 2},
		"no root":              {member("ca_cert", ""), nil, keys.KMSAnswer, "ca_cert: want one CERTIFICATE", 2},
		"no authority":         {swap("GetTempCaCert", "temp_ca_key", "temp_ca_kex"), nil, keys.KMSAnswer, "temp_ca_key", 1},
		"it refuses our certificate": {func(c *kmstest.Config) {
			c.Clients = x509.NewCertPool()
			c.Clients.AddCert(&x509.Certificate{Raw: []byte{1}, RawSubject: []byte{2}})
		}, nil, keys.KMSDenied, "refuse our certificate", 1},
		"it leaves early": {func(c *kmstest.Config) {
			c.Delay = func(*http.Request) { panic(http.ErrAbortHandler) }
		}, nil, keys.KMSUnreachable, "GetTempCaCert", 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newKMSSetup(t, c.edit)
			if c.guest != nil {
				c.guest(s)
			}
			app, err := s.kms(t).App(t.Context())
			var fault *keys.KMSError
			if app != nil || !errors.As(err, &fault) || fault.Reason != c.reason || !strings.Contains(err.Error(), c.words) || fault.URL != s.url {
				t.Fatalf("keys: %v, error: %v, want %s and %q", app != nil, err, c.reason, c.words)
			}
			if got := s.server.Requests(); len(got) != c.requests {
				t.Errorf("the server saw %q, want %d requests", got, c.requests)
			}
			if strings.Contains(err.Error(), "5a5a5a") {
				t.Errorf("the error shows a key: %v", err)
			}
		})
	}
}

func providerOf(t *testing.T, key *ecdsa.PublicKey) string {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: spki}.Payload())
}

// usage replaces the certificate's usage.
func usage(text string) func(*x509.Certificate) {
	return func(cert *x509.Certificate) {
		cert.ExtraExtensions[len(cert.ExtraExtensions)-1] = ratls.UsageExtension(text)
	}
}

func otherRoot(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: testTime.Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
