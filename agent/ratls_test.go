package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"strings"
	"testing"
)

// TestCertificateKeys has what channel.sock hashes under dstack's tag for certificates: a
// P-256 key in its one form, and nothing that somebody could mean by something else.
func TestCertificateKeys(t *testing.T) {
	der := func(key any) string {
		b, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(b)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := der(&p256.PublicKey)
	if spki, err := parseP256SPKI(good); err != nil || hex.EncodeToString(spki) != good || len(spki) != 91 {
		t.Errorf("%x, %v", spki, err)
	}
	if _, err := parseP256SPKI(strings.ToUpper(good)); err != nil {
		t.Error(err)
	}
	last := "00"
	if strings.HasSuffix(good, last) {
		last = "01"
	}
	for name, c := range map[string]struct{ text, words string }{
		"nothing":             {"", "asn1"},
		"no hexadecimal":      {"zz", "in hexadecimal"},
		"another curve":       {der(&p384.PublicKey), "want a P-256 key"},
		"another kind":        {der(edwards), "want a P-256 key"},
		"trailing byte":       {good + "00", "trailing data"},
		"cut":                 {good[:len(good)-2], "asn1"},
		"point off curve":     {good[:len(good)-2] + last, "not on curve"},
		"raw report data":     {strings.Repeat("00", 64), "asn1"},
		"long form of length": {"308159" + good[4:], "asn1"},
	} {
		if _, err := parseP256SPKI(c.text); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", name, err, c.words)
		}
	}
}

// TestBell rings for those who wait, once.
func TestBell(t *testing.T) {
	var b bell
	b.ring() // nobody waits
	first, second := b.wait(), b.wait()
	select {
	case <-first:
		t.Fatal("rang before")
	default:
	}
	b.ring()
	<-first
	<-second
	select {
	case <-b.wait():
		t.Error("rings for ever")
	default:
	}
}
