package keys_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	secpecdsa "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"golang.org/x/crypto/sha3"

	"tdx-agent/agent/keys"
)

// vectorKey is the application key of dstack's own vectors.
const vectorKey = "1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b"

// testCA returns a P-256 key and a certificate of an authority for it, both PEM.
func testCA(t testing.TB, isCA bool) (key, cert string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: isCA, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// appKeys is a .appkeys.json with a provider of its own authority.
func appKeys(t testing.TB, k256Key, k256Signature string) map[string]any {
	t.Helper()
	key, cert := testCA(t, true)
	return map[string]any{
		"disk_crypt_key": strings.Repeat("d1", 32), "env_crypt_key": "", "k256_key": k256Key, "k256_signature": k256Signature,
		"gateway_app_id": "", "ca_cert": cert, "key_provider": map[string]any{"None": map[string]any{"key": key}},
	}
}

func marshal(t testing.TB, doc any) []byte {
	t.Helper()
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse(t testing.TB, doc map[string]any) *keys.App {
	t.Helper()
	app, err := keys.ParseAppKeys(marshal(t, doc))
	if err != nil {
		t.Fatal(err)
	}
	return app
}

func vectorApp(t testing.TB) *keys.App { return parse(t, appKeys(t, vectorKey, "")) }

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// TestDHSecretVector is the vector of dstack's own tests.
func TestDHSecretVector(t *testing.T) {
	root := unhex("f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1")
	s, err := keys.DHSecret(root, "context one", "context two")
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(s.Bytes()); got != "663afd58820be8ad645f9c035e93199d114ab16f738db62393bc1d7d623e8813" {
		t.Errorf("DH secret is %s", got)
	}
	s.Zero()
	if !bytes.Equal(s.Bytes(), make([]byte, 32)) {
		t.Error("Zero leaves the secret")
	}
}

func TestGetKeyVectors(t *testing.T) {
	app := vectorApp(t)
	for _, c := range []struct{ algorithm, public, signature string }{
		{"secp256k1", "A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9",
			"96c843fc9a4970f206a4e478f6d2f909f680bd8252ea9813d3f5aabe654682f31333ff2a8e8f16ea1c88a704b4de4b0feb58527687be42ca1cf2f476a997401201"},
		{"ed25519", "5Pbre1Amf1hrp2V2bbfKlIfxpQb2pJAmrgmhxgVoG9s",
			"48fb33c6219be3732b90a69241f45e875d481a98e2d68353807a197c35f56ed07ef4629cc730667fa9b4eaad9091c4690ce390d8afd0f9e5c3ecc1ac206cda1100"},
	} {
		k, err := app.Derive("vms", "signing", c.algorithm)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(k.Bytes()); got != "9db79b3fefe69f2a7b7efbc908c854bf845a629023361f2c9cb3db09fb99010f" {
			t.Errorf("%s: key is %s", c.algorithm, got)
		}
		if got := base64.RawURLEncoding.EncodeToString(k.PublicKey); got != c.public {
			t.Errorf("%s: public key is %s, want %s", c.algorithm, got, c.public)
		}
		if got := hex.EncodeToString(k.Chain[0]); got != c.signature {
			t.Errorf("%s: signature is %s, want %s", c.algorithm, got, c.signature)
		}
		if len(k.Chain[1]) != 0 {
			t.Errorf("%s: without a KMS there is a signature of one: %x", c.algorithm, k.Chain[1])
		}
	}
}

// TestAttestationReportData has the two vectors that dstack publishes.
func TestAttestationReportData(t *testing.T) {
	app := vectorApp(t)
	for algorithm, want := range map[string]string{
		"ed25519":             "dip1::ed25519-pk:5Pbre1Amf1hrp2V2bbfKlIfxpQb2pJAmrgmhxgVoG9s",
		"secp256k1":           "dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9",
		"secp256k1_prehashed": "dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9",
	} {
		rd, err := app.AttestationReportData(algorithm)
		if err != nil || strings.TrimRight(string(rd[:]), "\x00") != want {
			t.Errorf("%s: %q (%v), want %q", algorithm, rd[:], err, want)
		}
	}
	if _, err := app.AttestationReportData(""); err == nil || err.Error() != "Unsupported algorithm" {
		t.Errorf("error is %v", err)
	}
}

func TestAlgorithmNames(t *testing.T) {
	app := vectorApp(t)
	want, err := app.Derive("a", "b", "secp256k1")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "k256"} {
		if k, err := app.Derive("a", "b", name); err != nil || !bytes.Equal(k.Bytes(), want.Bytes()) || !bytes.Equal(k.Chain[0], want.Chain[0]) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"secp256k1_prehashed", "rsa", "ED25519", " ed25519", "p256"} {
		var refused *keys.RequestError
		if _, err := app.Derive("a", "b", name); !errors.As(err, &refused) || err.Error() != "Unsupported algorithm" || refused.ExitCode() != 2 {
			t.Errorf("%q: error is %v", name, err)
		}
	}
	if k, err := app.Derive("a", "other", ""); err != nil || !bytes.Equal(k.Bytes(), want.Bytes()) || bytes.Equal(k.Chain[0], want.Chain[0]) {
		t.Errorf("the purpose changes the key, or not what is signed: %v", err)
	}
	if k, err := app.Derive("A", "b", ""); err != nil || bytes.Equal(k.Bytes(), want.Bytes()) {
		t.Errorf("two paths have one key: %v", err)
	}
}

// keccak is what the signatures of chains cover.
func keccak(parts ...[]byte) []byte {
	h := sha3.NewLegacyKeccak256()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// recover returns the key that made a signature of a chain.
func recoverKey(t *testing.T, signature, digest []byte) []byte {
	t.Helper()
	if len(signature) != 65 || signature[64] > 1 {
		t.Fatalf("signature %x: want 65 bytes, the last 0 or 1", signature)
	}
	key, _, err := secpecdsa.RecoverCompact(append([]byte{31 + signature[64]}, signature[:64]...), digest)
	if err != nil {
		t.Fatal(err)
	}
	return key.SerializeCompressed()
}

// TestChainLeadsToTheKMS issues an application key as a KMS does and follows the chain
// back to it.
func TestChainLeadsToTheKMS(t *testing.T) {
	root, err := secp256k1.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	appID := bytes.Repeat([]byte{0xa1}, 20)
	issued := keccak([]byte("dstack-kms-issued:"), appID, secp256k1.PrivKeyFromBytes(unhex(vectorKey)).PubKey().SerializeCompressed())
	compact := secpecdsa.SignCompact(root, issued, true)
	app := parse(t, appKeys(t, vectorKey, hex.EncodeToString(append(compact[1:], compact[0]-31))))
	for _, algorithm := range []string{"secp256k1", "ed25519"} {
		k, err := app.Derive("/my/path", "p:urpose", algorithm)
		if err != nil {
			t.Fatal(err)
		}
		appKey := recoverKey(t, k.Chain[0], keccak([]byte("p:urpose:"+hex.EncodeToString(k.PublicKey))))
		if want, err := app.PublicKey(); err != nil || !bytes.Equal(appKey, want) {
			t.Errorf("the chain leads to application key %x, want %x (%v)", appKey, want, err)
		}
		if got := recoverKey(t, k.Chain[1], keccak([]byte("dstack-kms-issued:"), appID, appKey)); !bytes.Equal(got, root.PubKey().SerializeCompressed()) {
			t.Errorf("the chain leads to %x, want %x", got, root.PubKey().SerializeCompressed())
		}
	}
}

func TestSignAndVerify(t *testing.T) {
	app := vectorApp(t)
	digest := sha256.Sum256([]byte("message"))
	for algorithm, data := range map[string][]byte{"ed25519": []byte("message"), "secp256k1": []byte("message"), "k256": nil, "secp256k1_prehashed": digest[:]} {
		s, err := app.Sign(algorithm, data)
		if err != nil {
			t.Fatal(err)
		}
		base := strings.TrimSuffix(algorithm, "_prehashed")
		k, err := app.Derive("vms", "signing", base)
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Signature) != 64 || !bytes.Equal(s.Chain[0], s.Signature) || !bytes.Equal(s.Chain[1], k.Chain[0]) || !bytes.Equal(s.PublicKey, k.PublicKey) {
			t.Errorf("%s: %+v", algorithm, s)
		}
		if ok, err := keys.Verify(algorithm, data, s.Signature, s.PublicKey); !ok || err != nil {
			t.Errorf("%s: own signature is %v (%v)", algorithm, ok, err)
		}
		for i := range s.Signature {
			broken := bytes.Clone(s.Signature)
			broken[i] ^= 1
			if ok, _ := keys.Verify(algorithm, data, broken, s.PublicKey); ok {
				t.Errorf("%s: signature is valid with byte %d changed", algorithm, i)
			}
		}
		if algorithm != "secp256k1_prehashed" {
			data = append(bytes.Clone(data), '!')
		} else {
			data = make([]byte, 32)
		}
		if ok, err := keys.Verify(algorithm, data, s.Signature, s.PublicKey); ok || err != nil {
			t.Errorf("%s: signature of other data is %v (%v)", algorithm, ok, err)
		}
	}
	plain, err := app.Sign("secp256k1", []byte("message"))
	if err != nil {
		t.Fatal(err)
	}
	if hashed, err := app.Sign("secp256k1_prehashed", digest[:]); err != nil || !bytes.Equal(plain.Signature, hashed.Signature) {
		t.Errorf("the digest's signature is %x (%v), the message's %x", hashed.Signature, err, plain.Signature)
	}
}

func TestVerifyKeyForms(t *testing.T) {
	app := vectorApp(t)
	s, err := app.Sign("secp256k1", []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := secp256k1.ParsePubKey(s.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := keys.Verify("secp256k1", []byte("m"), s.Signature, key.SerializeUncompressed()); !ok || err != nil {
		t.Errorf("uncompressed key: %v (%v)", ok, err)
	}
	// The same signature with n-s instead of s.
	var high secp256k1.ModNScalar
	high.SetByteSlice(s.Signature[32:])
	high.Negate()
	upper := high.Bytes()
	if ok, err := keys.Verify("secp256k1", []byte("m"), append(bytes.Clone(s.Signature[:32]), upper[:]...), s.PublicKey); ok || err != nil {
		t.Errorf("s in the upper half: %v (%v), want not valid", ok, err)
	}
}

func TestSignAndVerifyRefusals(t *testing.T) {
	app := vectorApp(t)
	for _, c := range []struct {
		algorithm string
		size      int
		want      string
	}{
		{"", 1, "Unsupported algorithm"}, {"rsa", 1, "Unsupported algorithm"}, {"SECP256K1", 1, "Unsupported algorithm"},
		{"secp256k1_prehashed", 0, "Pre-hashed signing requires a 32-byte digest, but received 0 bytes"},
		{"secp256k1_prehashed", 31, "Pre-hashed signing requires a 32-byte digest, but received 31 bytes"},
		{"secp256k1_prehashed", 33, "Pre-hashed signing requires a 32-byte digest, but received 33 bytes"},
	} {
		if _, err := app.Sign(c.algorithm, make([]byte, c.size)); err == nil || err.Error() != c.want || !errors.As(err, new(*keys.RequestError)) {
			t.Errorf("Sign %q: error is %v, want %s", c.algorithm, err, c.want)
		}
	}
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	k256, err := app.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	off := bytes.Repeat([]byte{0}, 32) // y = 2: no point
	off[0] = 2
	one := append(make([]byte, 63), 1)
	one[31] = 1
	order := unhex("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141")
	for name, c := range map[string]struct {
		algorithm            string
		data, signature, key []byte
		words                string
	}{
		"unknown":           {"rsa", nil, one, public, "Unsupported algorithm"},
		"none":              {"", nil, one, k256, "Unsupported algorithm"},
		"short signature":   {"ed25519", nil, one[1:], public, "63 bytes, want 64"},
		"long signature":    {"secp256k1", nil, append(one, 0), k256, "65 bytes, want 64"},
		"short key":         {"ed25519", nil, one, public[1:], "31 bytes, want 32"},
		"key is no point":   {"ed25519", nil, one, off, "not a point"},
		"k256 key empty":    {"secp256k1", nil, one, nil, "invalid secp256k1 public key"},
		"k256 key no point": {"secp256k1", nil, one, append([]byte{2}, make([]byte, 32)...), "invalid secp256k1 public key"},
		"k256 key infinity": {"secp256k1", nil, one, []byte{0}, "invalid secp256k1 public key"},
		"r is 0":            {"secp256k1", nil, append(make([]byte, 32), one[:32]...), k256, "not in the range"},
		"s is 0":            {"secp256k1", nil, append(bytes.Clone(one[:32]), make([]byte, 32)...), k256, "not in the range"},
		"r is the order":    {"secp256k1", nil, append(bytes.Clone(order), one[:32]...), k256, "not in the range"},
		"s is the order":    {"secp256k1", nil, append(bytes.Clone(one[:32]), order...), k256, "not in the range"},
		"digest":            {"secp256k1_prehashed", one[:31], one, k256, "32-byte digest, but received 31 bytes"},
	} {
		if ok, err := keys.Verify(c.algorithm, c.data, c.signature, c.key); ok || err == nil || !strings.Contains(err.Error(), c.words) || !errors.As(err, new(*keys.RequestError)) {
			t.Errorf("Verify, %s: %v, error is %v, want it to say %q", name, ok, err, c.words)
		}
	}
}

// TestEd25519Points compares which keys are points with what can be known of them
// otherwise: every real key is one, and about half of all y are not.
func TestEd25519Points(t *testing.T) {
	signature := make([]byte, 64)
	none := 0
	for i := range 200 {
		public := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i)}, 32))[32:]
		if _, err := keys.Verify("ed25519", nil, signature, public); err != nil {
			t.Errorf("key %x: %v", public, err)
		}
		y := sha256.Sum256([]byte{byte(i)})
		if _, err := keys.Verify("ed25519", nil, signature, y[:]); err != nil {
			none++
		}
	}
	if none < 60 || none > 140 {
		t.Errorf("%d of 200 random keys are no points", none)
	}
}

func TestDropped(t *testing.T) {
	app := vectorApp(t)
	app.Zero()
	app.Zero()
	if _, err := app.Derive("a", "", ""); err == nil {
		t.Error("Derive works without keys")
	}
	if _, err := app.Sign("ed25519", nil); err == nil {
		t.Error("Sign works without keys")
	}
	if _, err := app.PublicKey(); err == nil {
		t.Error("PublicKey works without keys")
	}
	for _, issue := range []func() (*keys.TLSKey, error){
		func() (*keys.TLSKey, error) { return app.IssueRandom(t.Context(), keys.CertificateRequest{}, nil) },
		func() (*keys.TLSKey, error) {
			return app.IssueDerived(t.Context(), "", keys.CertificateRequest{}, nil)
		},
	} {
		if _, err := issue(); err == nil {
			t.Error("a certificate is issued without keys")
		}
	}
}
