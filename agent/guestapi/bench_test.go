package guestapi

import (
	"context"
	ecdsap256 "crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// BenchmarkGetKey measures the handler, with limits and audit record and without
// sockets, beside the two scalar
// operations that it cannot do without: the derived key's public half, and the
// application key's signature.
func BenchmarkGetKey(b *testing.B) {
	app, err := keys.Ephemeral{Path: filepath.Join(b.TempDir(), "seed")}.App(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	key, err := secp256k1.GeneratePrivateKey()
	if err != nil {
		b.Fatal(err)
	}
	record, err := audit.Open(b.TempDir(), audit.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer record.Close()
	s := NewServer(Config{Surface: Dstack, Grants: Grants{Keys: AllNames, ReservedKeys: true}, Keys: func(context.Context) (*keys.App, error) { return app, nil },
		Limits: NewLimiter(equalRates(Rate{PerSecond: 1e6, Burst: 1e6})),
		Audit: func(r Record) error {
			return record.Call(audit.Entry{Method: r.Method, Class: r.Class.String(), Name: r.Name, Micros: r.Took.Microseconds()}, r.Arguments)
		}})
	const body = `{"path":"some/path","purpose":"signing","algorithm":"secp256k1"}`
	digest := make([]byte, 32)
	paired(b, func() {
		digest[0]++
		key.PubKey().SerializeCompressed()
		ecdsa.SignCompact(key, digest, true)
	}, func() {
		r := httptest.NewRequest(http.MethodPost, "/GetKey", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := deadlineRecorder{httptest.NewRecorder()}
		s.handle(w, r)
		if w.Code != http.StatusOK {
			b.Fatal(w.Body)
		}
	})
}

// BenchmarkGetTLSKey measures the handler, with limits and audit record and without
// sockets, beside a new key and crypto/x509's certificate for it with the same
// extensions. The quote is made in no time, for both.
func BenchmarkGetTLSKey(b *testing.B) {
	app, err := keys.Ephemeral{Path: filepath.Join(b.TempDir(), "seed")}.App(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	record, err := audit.Open(b.TempDir(), audit.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer record.Close()
	guest := newBenchGuest(b)
	s := NewServer(Config{Surface: Dstack, Grants: Grants{Cert: true}, Guest: guest, Keys: func(context.Context) (*keys.App, error) { return app, nil },
		Limits: NewLimiter(equalRates(Rate{PerSecond: 1e6, Burst: 1e6})),
		Audit: func(r Record) error {
			return record.Call(audit.Entry{Method: r.Method, Class: r.Class.String(), Micros: r.Took.Microseconds()}, r.Arguments)
		}})
	ca, err := ecdsap256.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	parent := &x509.Certificate{Subject: pkix.Name{CommonName: "App Root Cert"}, PublicKey: &ca.PublicKey}
	target, header := &url.URL{Path: "/GetTlsKey"}, http.Header{"Content-Type": {"application/json"}}
	for name, body := range map[string]string{"plain": `{"subject":"s"}`, "ratls": `{"subject":"s","usage_ra_tls":true}`} {
		b.Run(name, func(b *testing.B) {
			list := []pkix.Extension{ratls.UsageExtension(ratls.UsageApp)}
			if name == "ratls" {
				ev, err := guest.Evidence(b.Context(), ratls.ReportData(nil), Caller{})
				if err != nil {
					b.Fatal(err)
				}
				more, err := ratls.Extensions(ev, nil)
				if err != nil {
					b.Fatal(err)
				}
				list = append(list, more...)
			}
			paired(b, func() {
				key, err := ecdsap256.GenerateKey(elliptic.P256(), rand.Reader)
				if err != nil {
					b.Fatal(err)
				}
				if name == "ratls" {
					guest.Evidence(b.Context(), measure.ReportData{}, Caller{})
				}
				template := &x509.Certificate{Subject: pkix.Name{CommonName: "s"}, NotAfter: time.Now(), KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: list}
				if _, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, ca); err != nil {
					b.Fatal(err)
				}
			}, func() {
				r := &http.Request{Method: http.MethodPost, URL: target, Header: header, ContentLength: int64(len(body)), Body: io.NopCloser(strings.NewReader(body))}
				w := &discardWriter{header: http.Header{}}
				s.handle(w, r)
				if w.status != http.StatusOK {
					b.Fatal(w.status)
				}
			})
		})
	}
}

// benchGuest has evidence as large as a real one: 30 events of the boot log, 8 of RTMR3,
// and a quote of 5006 bytes.
type benchGuest struct {
	Guest
	quote  []byte
	events []measure.Event
}

func newBenchGuest(b *testing.B) *benchGuest {
	g := &benchGuest{quote: make([]byte, 5006)}
	for i := range byte(30) {
		g.events = append(g.events, measure.Event{IMR: int(i % 3), Type: 0x80000001, Digest: measure.Digest{i}, Payload: make([]byte, 100)})
	}
	for range 8 {
		e, err := measure.NewRuntimeEvent("event", make([]byte, 32), measure.EventV1)
		if err != nil {
			b.Fatal(err)
		}
		g.events = append(g.events, e)
	}
	binary.LittleEndian.PutUint16(g.quote[0:], 4)
	binary.LittleEndian.PutUint16(g.quote[2:], 2)
	binary.LittleEndian.PutUint32(g.quote[4:], 0x81)
	binary.LittleEndian.PutUint32(g.quote[632:], uint32(len(g.quote)-636))
	return g
}

func (g *benchGuest) Evidence(_ context.Context, rd measure.ReportData, _ Caller) (*measure.Evidence, error) {
	quote := slices.Clone(g.quote)
	copy(quote[568:], rd[:])
	return &measure.Evidence{Quote: quote, Events: g.events, VMConfig: `{"cpu_count":2}`}, nil
}

// paired runs floor and work by turns and reports the medians of both and their
// ratio, so that what else the machine does meets both alike.
func paired(b *testing.B, floor, work func()) {
	var took [2][]time.Duration
	for b.Loop() {
		for i, f := range []func(){floor, work} {
			start := time.Now()
			f()
			took[i] = append(took[i], time.Since(start))
		}
	}
	var p50 [2]float64
	for i := range took {
		slices.Sort(took[i])
		p50[i] = float64(took[i][len(took[i])/2].Nanoseconds()) / 1000
	}
	b.ReportMetric(p50[0], "floor-p50-µs")
	b.ReportMetric(p50[1], "p50-µs")
	b.ReportMetric(p50[1]/p50[0], "x-floor")
}

// discardWriter keeps the status of an answer. A recorder would copy tens of kilobytes.
type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header           { return w.header }
func (w *discardWriter) WriteHeader(status int)        { w.status = status }
func (w *discardWriter) Write(b []byte) (int, error)   { return len(b), nil }
func (*discardWriter) SetReadDeadline(time.Time) error { return nil }

// deadlineRecorder takes read deadlines, as a connection does.
type deadlineRecorder struct{ *httptest.ResponseRecorder }

func (deadlineRecorder) SetReadDeadline(time.Time) error { return nil }
