package guestapi_test

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
)

// tappdVector is the report data that dstack makes of "test" with the default hash
// and prefix.
const tappdVector = "1864e059be7e1ec12d9fe9da903d3711e0d72edab19f044cc9d6ac90c32b996b545a9979309bd19c36b803941e8e3485115e9b794001f2b9f367f6e03c52e532"

func TestTdxQuote(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	sum256 := sha256.Sum256([]byte("app-data:test"))
	sum384 := sha512.Sum384([]byte("app-data::test"))
	custom := sha512.Sum512([]byte("ratls:test"))
	raw := strings.Repeat("a7", 64)
	for _, c := range []struct{ data, algorithm, prefix, want, wantAlgorithm, wantPrefix string }{
		{"test", "", "", tappdVector, "sha512", "app-data"},
		{"test", "sha512", "app-data", tappdVector, "sha512", "app-data"},
		{"test", "sha256", "", hex.EncodeToString(sum256[:]), "sha256", "app-data"},
		{"test", "sha384", "app-data:", hex.EncodeToString(sum384[:]), "sha384", "app-data:"},
		{"test", "", "ratls", hex.EncodeToString(custom[:]), "sha512", "ratls"},
		{strings.Repeat("\xa7", 64), "raw", "ignored", raw, "raw", ""},
	} {
		body := fmt.Sprintf(`{"report_data":"%x","hash_algorithm":%q,"prefix":%q}`, c.data, c.algorithm, c.prefix)
		r := exchange(t, path, postJSON("/prpc/Tappd.TdxQuote", body))
		q, quote := decodeQuote(t, r)
		want := c.want + strings.Repeat("0", 128-len(c.want))
		if got := hex.EncodeToString(quote[568:632]); got != want {
			t.Errorf("%s: report data %s, want %s", body, got, want)
		}
		if q.HashAlgorithm != c.wantAlgorithm || q.Prefix == nil || *q.Prefix != c.wantPrefix {
			t.Errorf("%s: algorithm %q, prefix %v, want %q and %q", body, q.HashAlgorithm, q.Prefix, c.wantAlgorithm, c.wantPrefix)
		}
		wantKeys(t, r.body, "quote", "event_log", "hash_algorithm", "prefix")
	}
}

func TestTdxQuoteByGET(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	_, quote := decodeQuote(t, exchange(t, path, get("/prpc/TdxQuote?report_data=74657374&hash_algorithm=sha512&prefix=app%2Ddata")))
	if hex.EncodeToString(quote[568:632]) != tappdVector {
		t.Errorf("report data %x", quote[568:632])
	}
	decodeQuote(t, exchange(t, path, get("/prpc/RawQuote?report_data="+strings.Repeat("1F", 64))))
}

func TestTdxQuoteHashes(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	for _, algorithm := range strings.Fields("sha256 sha384 sha512 sha3-256 sha3-384 sha3-512 keccak256 keccak384 keccak512") {
		q, quote := decodeQuote(t, exchange(t, path, postJSON("/prpc/TdxQuote", `{"report_data":"00","hash_algorithm":"`+algorithm+`"}`)))
		var bits int
		fmt.Sscanf(algorithm[len(algorithm)-3:], "%d", &bits)
		tail := quote[568+bits/8 : 632]
		if q.HashAlgorithm != algorithm || strings.Trim(string(tail), "\x00") != "" {
			t.Errorf("%s: answered %q, zero padding is %x", algorithm, q.HashAlgorithm, tail)
		}
	}
}

func TestTdxQuoteRefusals(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	for _, prefix := range []string{
		"ratls-cert", "kms-root-ca", "tdx-atls-v1",
		"ratls-cert:", "ratls-cert:0*0\\u0005\\u0006\\u0003+ep\\u0003!\\u0000", "kms-root-ca:x:y",
	} {
		for _, algorithm := range strings.Split(" sha256 sha384 sha512 sha3-256 sha3-384 sha3-512 keccak256 keccak384 keccak512 raw", " ") {
			body := fmt.Sprintf(`{"report_data":"00","hash_algorithm":"%s","prefix":"%s"}`, algorithm, prefix)
			wantError(t, exchange(t, path, postJSON("/prpc/TdxQuote", body)), 400, 8, "is reserved")
		}
	}
	for _, algorithm := range []string{"md5", "SHA512", "sha3", "keccak-384", " sha256", "raw "} {
		body := `{"report_data":"00","hash_algorithm":"` + algorithm + `"}`
		wantError(t, exchange(t, path, postJSON("/prpc/TdxQuote", body)), 400, 2, "invalid hash algorithm")
	}
	for _, n := range []int{0, 1, 63, 65, 1000} {
		data := strings.Repeat("00", n)
		wantError(t, exchange(t, path, postJSON("/prpc/RawQuote", `{"report_data":"`+data+`"}`)), 400, 2, "invalid content length")
		wantError(t, exchange(t, path, postJSON("/prpc/TdxQuote", `{"report_data":"`+data+`","hash_algorithm":"raw"}`)), 400, 2, "invalid content length")
	}
}
