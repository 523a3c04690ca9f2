package guestapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
	"tdx-agent/remote/ratls"
)

// The application key of dstack's vectors, and what it gives for the path "vms" and
// the purpose "signing".
const (
	vectorKey       = "1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b"
	vectorDerived   = "9db79b3fefe69f2a7b7efbc908c854bf845a629023361f2c9cb3db09fb99010f"
	vectorSignature = "96c843fc9a4970f206a4e478f6d2f909f680bd8252ea9813d3f5aabe654682f31333ff2a8e8f16ea1c88a704b4de4b0feb58527687be42ca1cf2f476a997401201"
	vectorEd25519   = "48fb33c6219be3732b90a69241f45e875d481a98e2d68353807a197c35f56ed07ef4629cc730667fa9b4eaad9091c4690ce390d8afd0f9e5c3ecc1ac206cda1100"
)

// vectorApp is an application with that key and an authority of its own.
func vectorApp(t testing.TB) *keys.App {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := json.Marshal(map[string]any{"disk_crypt_key": "", "env_crypt_key": "", "k256_key": vectorKey, "k256_signature": "",
		"ca_cert":      string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		"key_provider": map[string]any{"None": map[string]any{"key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))}}})
	if err != nil {
		t.Fatal(err)
	}
	app, err := keys.ParseAppKeys(doc)
	if err != nil {
		t.Fatal(err)
	}
	return app
}

// keyConfig serves everything, with the vector's keys.
func keyConfig(t testing.TB, surface guestapi.Surface) guestapi.Config {
	app := vectorApp(t)
	cfg := config(surface, newTestGuest())
	cfg.Keys = func(context.Context) (*keys.App, error) { return app, nil }
	return cfg
}

func TestGetKeyIsExact(t *testing.T) {
	path := serve(t, keyConfig(t, guestapi.Dstack))
	const want = `{"key":"` + vectorDerived + `","signature_chain":["` + vectorSignature + `",""]}`
	for _, request := range []string{
		postJSON("/GetKey", `{"path":"vms","purpose":"signing"}`),
		postJSON("/GetKey", `{"path":"vms","purpose":"signing","algorithm":"secp256k1","unknown":[true]}`),
		postJSON("/GetKey", `{"path":"vms","purpose":"signing","algorithm":"k256"}`),
		get("/GetKey?path=vms&purpose=signing&algorithm="),
		post("/GetKey?json", "", `{"path":"vms","purpose":"signing"}`),
	} {
		wantOK(t, exchange(t, path, request), want)
	}
	wantOK(t, exchange(t, path, postJSON("/GetKey", `{"path":"vms","purpose":"signing","algorithm":"ed25519"}`)),
		`{"key":"`+vectorDerived+`","signature_chain":["`+vectorEd25519+`",""]}`)
	for _, algorithm := range []string{"secp256k1_prehashed", "rsa"} {
		r := exchange(t, path, postJSON("/GetKey", `{"algorithm":"`+algorithm+`"}`))
		if r.status != 400 || r.body != "{\n  \"error\": \"Unsupported algorithm\"\n}" {
			t.Errorf("%s: %q", algorithm, r.raw)
		}
	}
	tappd := serve(t, keyConfig(t, guestapi.Tappd))
	wantOK(t, exchange(t, tappd, postJSON("/prpc/Tappd.DeriveK256Key?json", `{"path":"vms","purpose":"signing"}`)),
		`{"k256_key":"`+vectorDerived+`","k256_signature_chain":["`+vectorSignature+`",""]}`)
}

func TestGetKeyInProtobuf(t *testing.T) {
	path := serve(t, keyConfig(t, guestapi.Dstack))
	r := exchange(t, path, post("/GetKey", "application/octet-stream", "\x0a\x03vms\x12\x07signing"))
	key, _ := hex.DecodeString(vectorDerived)
	signature, _ := hex.DecodeString(vectorSignature)
	// The second element of the chain is empty, and there.
	want := "\x0a\x20" + string(key) + "\x12\x41" + string(signature) + "\x12\x00"
	if r.status != 200 || r.body != want {
		t.Errorf("%q, want %q", r.body, want)
	}
	r = exchange(t, path, post("/GetKey", "application/octet-stream", "\x1a\x03rsa"))
	if r.status != 400 || protoFields(t, r.body)[1] != "Unsupported algorithm" {
		t.Errorf("%q", r.raw)
	}
}

func TestSignAndVerifyOverTheWire(t *testing.T) {
	path := serve(t, keyConfig(t, guestapi.Dstack))
	digest := strings.Repeat("5a", 32)
	for _, algorithm := range []string{"ed25519", "secp256k1", "secp256k1_prehashed"} {
		r := exchange(t, path, postJSON("/Sign", `{"algorithm":"`+algorithm+`","data":"0x`+digest+`"}`))
		wantKeys(t, r.body, "signature", "signature_chain", "public_key")
		var s struct {
			Signature string
			Chain     []string `json:"signature_chain"`
			PublicKey string   `json:"public_key"`
		}
		if err := json.Unmarshal([]byte(r.body), &s); err != nil || len(s.Signature) != 128 || len(s.Chain) != 3 || s.Chain[0] != s.Signature {
			t.Fatalf("%v: %s", err, r.body)
		}
		if want := map[string]string{"ed25519": vectorEd25519}[algorithm]; want == "" && s.Chain[1] != vectorSignature || want != "" && s.Chain[1] != want {
			t.Errorf("%s: the key's signature is %s", algorithm, s.Chain[1])
		}
		body := `{"algorithm":"` + algorithm + `","data":"` + digest + `","signature":"` + s.Signature + `","public_key":"` + s.PublicKey + `"}`
		wantOK(t, exchange(t, path, postJSON("/Verify", body)), `{"valid":true}`)
		wantOK(t, exchange(t, path, get("/Verify?algorithm="+algorithm+"&data="+digest+"&signature="+s.Signature+"&public_key="+s.PublicKey)), `{"valid":true}`)
		wantOK(t, exchange(t, path, postJSON("/Verify", strings.Replace(body, `"5a5a`, `"5a5b`, 1))), `{"valid":false}`)
		wantError(t, exchange(t, path, postJSON("/Verify", strings.Replace(body, s.Signature, s.Signature[2:], 1))), 400, 2, "63 bytes, want 64")
		wantError(t, exchange(t, path, postJSON("/Verify", strings.Replace(body, s.PublicKey, "00", 1))), 400, 2, "public key")

		signature, _ := hex.DecodeString(s.Signature)
		public, _ := hex.DecodeString(s.PublicKey)
		data, _ := hex.DecodeString(digest)
		var request []byte
		for num, v := range [][]byte{[]byte(algorithm), data, signature, public} {
			request = protowire.AppendTag(request, protowire.Number(num+1), protowire.BytesType)
			request = protowire.AppendBytes(request, v)
		}
		if r := exchange(t, path, post("/Verify", "", string(request))); r.status != 200 || r.body != "\x08\x01" {
			t.Errorf("protobuf, valid: %q", r.raw)
		}
		data[0] ^= 1
		request = bytes.Replace(request, bytes.Repeat([]byte{0x5a}, 32), data, 1)
		if r := exchange(t, path, post("/Verify", "", string(request))); r.status != 200 || r.body != "" {
			t.Errorf("protobuf, not valid: %q", r.raw)
		}
	}
	r := exchange(t, path, postJSON("/Sign", `{"algorithm":"secp256k1_prehashed","data":"00"}`))
	if r.body != "{\n  \"error\": \"Pre-hashed signing requires a 32-byte digest, but received 1 bytes\"\n}" {
		t.Errorf("%q", r.raw)
	}
	large := postJSON("/Sign", `{"algorithm":"ed25519","data":"`+strings.Repeat("00", 500<<10)+`"}`)
	if r := exchange(t, path, large); r.status != 200 {
		t.Errorf("500 KiB to sign: %.200s", r.raw)
	}
	wantError(t, exchange(t, path, postJSON("/Sign", strings.Repeat(" ", 1<<20+1))), 400, 2, "want at most 1048576 bytes")
	wantError(t, exchange(t, path, postJSON("/GetKey", strings.Repeat(" ", 64<<10+1))), 400, 2, "want at most 65536 bytes")
}

// tlsReply parses an answer of GetTlsKey or DeriveKey.
func tlsReply(t *testing.T, r reply) (chain []*x509.Certificate, key string) {
	t.Helper()
	var doc struct {
		Key   string
		Chain []string `json:"certificate_chain"`
	}
	if err := json.Unmarshal([]byte(r.body), &doc); err != nil || r.status != 200 {
		t.Fatalf("%d %s (%v)", r.status, r.body, err)
	}
	wantKeys(t, r.body, "key", "certificate_chain")
	pair, err := tls.X509KeyPair([]byte(strings.Join(doc.Chain, "\n")), []byte(doc.Key))
	if err != nil {
		t.Fatal(err)
	}
	for _, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	return chain, doc.Key
}

func TestGetTLSKey(t *testing.T) {
	path := serve(t, keyConfig(t, guestapi.Dstack))
	first := postJSON("/GetTlsKey", `{"subject":"a\u00e4","alt_names":["x.example","127.0.0.1"],"usage_server_auth":true,"usage_ra_tls":true,"not_before":null,"not_after":4000000000}`)
	chain, key := tlsReply(t, exchange(t, path, first))
	leaf := chain[0]
	if len(chain) != 2 || leaf.Subject.CommonName != "aä" || len(leaf.DNSNames) != 1 || len(leaf.IPAddresses) != 1 || len(leaf.ExtKeyUsage) != 1 || leaf.NotAfter.Unix() != 4000000000 {
		t.Errorf("%d certificates, leaf %+v", len(chain), leaf)
	}
	if _, err := ratls.Parse(leaf); err != nil {
		t.Error(err)
	}
	if _, again := tlsReply(t, exchange(t, path, first)); again == key {
		t.Error("two calls gave one key")
	}
	chain, _ = tlsReply(t, exchange(t, path, get("/GetTlsKey?subject=q&alt_names[0]=a.example&alt_names%5B1%5D=b.example&usage_client_auth=true&not_before=5")))
	if leaf = chain[0]; leaf.Subject.CommonName != "q" || strings.Join(leaf.DNSNames, " ") != "a.example b.example" || leaf.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || leaf.NotBefore.Unix() != 5 {
		t.Errorf("leaf %+v", leaf)
	}
	if chain, _ = tlsReply(t, exchange(t, path, postJSON("/GetTlsKey", `{}`))); len(chain[0].ExtKeyUsage) != 0 {
		t.Errorf("usages %v", chain[0].ExtKeyUsage)
	}
	proto := "\x0a\x01p\x12\x09a.example\x12\x09b.example\x20\x01\x28\x01\x30\x05\x38\xff\xff\xff\xff\x0e"
	r := exchange(t, path, post("/GetTlsKey", "", proto))
	key, certs := "", ""
	for b := []byte(r.body); len(b) > 0; {
		num, _, n := protowire.ConsumeTag(b)
		v, m := protowire.ConsumeBytes(b[n:])
		if m < 0 {
			t.Fatalf("%q", r.raw)
		}
		if num == 1 {
			key += string(v)
		} else {
			certs += string(v)
		}
		b = b[n+m:]
	}
	pair, err := tls.X509KeyPair([]byte(certs), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	if leaf = pair.Leaf; len(leaf.DNSNames) != 2 || len(leaf.ExtKeyUsage) != 2 || leaf.NotAfter.Unix() != 0xefffffff {
		t.Errorf("leaf %+v", leaf)
	}
}

func TestGetTLSKeyRefusals(t *testing.T) {
	path := serve(t, keyConfig(t, guestapi.Dstack))
	for body, words := range map[string]string{
		`{"not_before":5,"not_after":5}`:                       "not_before must be earlier than not_after",
		`{"not_before":-1}`:                                    "whole number",
		`{"not_before":1.5}`:                                   "whole number",
		`{"not_before":"5"}`:                                   "whole number",
		`{"not_after":18446744073709551616}`:                   "whole number",
		`{"usage_ra_tls":null}`:                                "want true or false",
		`{"usage_ra_tls":1}`:                                   "want true or false",
		`{"usage_ra_tls":"true"}`:                              "want true or false",
		`{"alt_names":"a"}`:                                    "want an array of strings",
		`{"alt_names":null}`:                                   "want an array of strings",
		`{"alt_names":[1]}`:                                    "alt_names: want a string",
		`{"alt_names":[null]}`:                                 "alt_names: want a string",
		`{"alt_names":{"0":"a"}}`:                              "want an array of strings",
		`{"alt_names":["\ud800"]}`:                             "surrogate",
		`{"alt_names":[""]}`:                                   "alt_names",
		`{"subject":"` + strings.Repeat("s", 257) + `"}`:       "subject",
		`{"alt_names":["` + strings.Repeat(`","`, 200) + `"]}`: "201 names",
	} {
		wantError(t, exchange(t, path, postJSON("/GetTlsKey", body)), 400, 2, words)
	}
	for query, words := range map[string]string{
		"alt_names=a": "want a list", "alt_names[1]=a": "in order, next alt_names[0]", "alt_names[0]=a&alt_names[0]=b": "in order, next alt_names[1]",
		"alt_names[x]=a": "in order", "alt_names[0][1]=a": "in order", "usage_ra_tls=yes": "true or false", "usage_ra_tls=": "true or false",
		"not_before=+5": "whole number", "subject[]=a": "not a list",
	} {
		wantError(t, exchange(t, path, get("/GetTlsKey?"+query)), 400, 2, words)
	}
	for body, words := range map[string]string{
		"\x18\x80": "not a protobuf message", "\x1a\x01\x01": "usage_ra_tls: protobuf wire type 2, want 0", "\x10\x01": "alt_names: protobuf wire type 0, want 2",
		"\x12\x02\xc3\x28": "not valid UTF-8",
	} {
		if r := exchange(t, path, post("/GetTlsKey", "", body)); r.status != 400 || !strings.Contains(protoFields(t, r.body)[1], words) {
			t.Errorf("%q: %q, want %q", body, r.raw, words)
		}
	}
}

func TestDeriveKey(t *testing.T) {
	path := serve(t, keyConfig(t, guestapi.Tappd))
	body := `{"path":"vms","subject":"s","usage_server_auth":true,"alt_names":[]}`
	chain, key := tlsReply(t, exchange(t, path, postJSON("/prpc/Tappd.DeriveKey", body)))
	block, _ := pem.Decode([]byte(key))
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := parsed.(*ecdsa.PrivateKey).Bytes(); err != nil || hex.EncodeToString(raw) != vectorDerived || chain[0].Subject.CommonName != "s" {
		t.Errorf("scalar %x (%v)", raw, err)
	}
	if _, again := tlsReply(t, exchange(t, path, postJSON("/prpc/DeriveKey", body))); again != key {
		t.Error("two calls gave two keys")
	}
	if _, random := tlsReply(t, exchange(t, path, postJSON("/prpc/DeriveKey", `{"path":"vms","random_seed":true}`))); random == key {
		t.Error("a random key is the path's")
	}
}

func TestKeysThatCannotBeHad(t *testing.T) {
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Keys = func(context.Context) (*keys.App, error) { return nil, errors.New("the keys file is not there") }
	path := serve(t, cfg)
	for _, target := range []string{"/GetKey", "/GetTlsKey", "/Sign"} {
		wantError(t, exchange(t, path, postJSON(target, `{}`)), 400, 1, "the keys file is not there")
	}
	cfg = keyConfig(t, guestapi.Dstack)
	g := cfg.Guest.(*testGuest)
	g.before = func(context.Context) error { return &busyError{statusError{9}} }
	r := exchange(t, serve(t, cfg), postJSON("/GetTlsKey", `{"usage_ra_tls":true}`))
	wantError(t, r, 429, 9, "log and register differ")
}

// lockedBuffer is written by several connections.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// TestLogsHoldNoSecrets calls everything that touches keys, successful and not, with
// the most talkative log, and looks for the secrets in it.
func TestLogsHoldNoSecrets(t *testing.T) {
	var out lockedBuffer
	secrets := []string{vectorKey[:24], vectorDerived[:24], "PRIVATE KEY"}
	for surface, targets := range map[guestapi.Surface][]string{
		guestapi.Dstack: {"/GetKey", "/GetTlsKey", "/Sign", "/Verify", "/Info"},
		guestapi.Tappd:  {"/prpc/DeriveKey", "/prpc/DeriveK256Key"},
	} {
		cfg := keyConfig(t, surface)
		cfg.Logger = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
		path := serve(t, cfg)
		for _, target := range targets {
			for _, body := range []string{`{"path":"vms","algorithm":"ed25519"}`, `{"path":"vms","algorithm":"rsa"}`, `{"path":7}`, `{"alt_names":["` + strings.Repeat("x", 300) + `"]}`, `{`} {
				exchange(t, path, postJSON(target, body))
				exchange(t, path, post(target, "", body))
			}
			r := exchange(t, path, get(target+"?path=vms&purpose=signing&algorithm=secp256k1"))
			if i := strings.Index(r.body, "PRIVATE KEY"); i > 0 {
				secrets = append(secrets, r.body[i+40:i+80])
			}
		}
	}
	out.mu.Lock()
	defer out.mu.Unlock()
	if n := strings.Count(out.b.String(), "msg=call"); n < 70 {
		t.Fatalf("%d calls in the log", n)
	}
	for _, s := range secrets {
		raw, _ := hex.DecodeString(s)
		for _, form := range []string{s, strings.ToUpper(s), string(raw), base64.StdEncoding.EncodeToString(raw), fmt.Sprint(raw)} {
			if form != "" && form != "[]" && strings.Contains(out.b.String(), form) {
				t.Errorf("the log holds %q", form)
			}
		}
	}
}
