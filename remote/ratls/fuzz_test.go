package ratls_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// FuzzParse reads three extension values under a fixed key. What is accepted is bound
// to the key and within the caps, and is accepted again when written anew.
func FuzzParse(f *testing.F) {
	_, spki := newKey(f)
	list := extensions(f, spki, measure.EventV1)
	f.Add(list[0].Value, list[1].Value, []byte(nil))
	f.Add([]byte(nil), []byte(nil), list[2].Value)
	f.Add([]byte(nil), []byte(nil), extensions(f, spki, measure.EventV2)[0].Value)
	f.Add(list[0].Value, octets(pack("[]")), []byte(nil))
	f.Fuzz(func(t *testing.T, quote, log, blob []byte) {
		cert := &x509.Certificate{RawSubjectPublicKeyInfo: spki}
		for _, e := range []pkix.Extension{{Id: ratls.OIDQuote, Value: quote}, {Id: ratls.OIDEventLog, Value: log}, {Id: ratls.OIDAttestation, Value: blob}} {
			if e.Value != nil {
				cert.Extensions = append(cert.Extensions, e)
			}
		}
		a, err := ratls.Parse(cert)
		if err != nil {
			return
		}
		q, err := measure.ParseQuote(a.Evidence.Quote)
		if err != nil || q.Body.ReportData != ratls.ReportData(spki) || len(a.Evidence.Events) > 1024 {
			t.Fatalf("accepted %+v", a)
		}
		again, err := ratls.Extensions(a.Evidence, spki)
		if err != nil {
			return // more events than we would write, or a name that is not text
		}
		b, err := ratls.Parse(&x509.Certificate{RawSubjectPublicKeyInfo: spki, Extensions: again})
		if err != nil || !bytes.Equal(a.Evidence.Quote, b.Evidence.Quote) {
			t.Fatalf("written anew: %v", err)
		}
	})
}

// FuzzParseIssuerClaims has the same for the claims.
func FuzzParseIssuerClaims(f *testing.F) {
	f.Add(octets("12345678901234567890"), octets("kms:rpc"), octets(string(sampleInfo().Marshal())))
	f.Add(octets("12345678901234567890"), octets("kms:rpc"), octets("\x89\xa6app_id\xc4\x01\x01\xa3new\x92\xc0\x01"))
	f.Fuzz(func(t *testing.T, id, usage, info []byte) {
		c, err := ratls.ParseIssuerClaims(&x509.Certificate{Extensions: []pkix.Extension{
			{Id: ratls.OIDAppID, Value: id}, {Id: ratls.OIDUsage, Value: usage}, {Id: ratls.OIDAppInfo, Value: info}}})
		if err != nil {
			return
		}
		if len(c.AppID) != 20 || c.Usage == "" || c.AppInfo == nil {
			t.Fatalf("accepted %+v", c)
		}
		var inner []byte
		if _, err := asn1.Unmarshal(c.AppInfo.Extension().Value, &inner); err != nil {
			t.Fatal(err)
		}
		if again, err := ratls.ParseAppInfo(inner); err != nil || !bytes.Equal(again.Marshal(), inner) {
			t.Fatalf("written anew: %v", err)
		}
	})
}
