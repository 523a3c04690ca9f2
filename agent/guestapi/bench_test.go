package guestapi

import (
	"context"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/keys"
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

// deadlineRecorder takes read deadlines, as a connection does.
type deadlineRecorder struct{ *httptest.ResponseRecorder }

func (deadlineRecorder) SetReadDeadline(time.Time) error { return nil }
