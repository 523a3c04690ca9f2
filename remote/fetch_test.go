package remote_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
)

// TestNoFetchForStrangers counts what a server of collateral is asked: nothing for
// quotes that are not genuine, whatever platform they name.
func TestNoFetchForStrangers(t *testing.T) {
	var asked atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		http.NotFound(w, r)
	}))
	defer server.Close()
	a, stranger := newAttester(t, tdxsim.Config{}, nil), newAttester(t, tdxsim.Config{Seed: []byte("stranger")}, nil)
	p := remote.BuiltinPolicy(a.root)
	roots, err := p.Roots()
	if err != nil {
		t.Fatal(err)
	}
	now := func() time.Time { return testTime }
	store, err := collateral.New(collateral.Config{Roots: roots, PCCS: []string{server.URL}, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: store, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	genuine := a.evidence(t, measure.ReportData{})
	for at := 0; at < len(genuine.Quote); at += 7 {
		ev := *genuine
		ev.Quote = append([]byte(nil), genuine.Quote...)
		ev.Quote[at] ^= 0x10
		if _, err := v.Appraise(context.Background(), &ev, anyData); err == nil {
			t.Fatalf("byte %d changed: accepted", at)
		}
	}
	if _, err := v.Appraise(context.Background(), stranger.evidence(t, measure.ReportData{}), anyData); err == nil {
		t.Error("a stranger is accepted")
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests for quotes that are not genuine", n)
	}
	_, err = v.Appraise(context.Background(), genuine, anyData)
	wantRefused(t, err, "collateral", "collateral_not_found", true)
	if asked.Load() == 0 {
		t.Error("no request for a genuine quote")
	}
}
