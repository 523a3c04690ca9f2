package remote_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
)

// BenchmarkAppraise is a whole appraisal with a policy and a log of 30 events seen
// before, beside its floor: one P-256 verification.
func BenchmarkAppraise(b *testing.B) {
	b.Run("floor-p256", func(b *testing.B) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		digest := sha256.Sum256(nil)
		signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature) {
				b.Fatal("the signature does not hold")
			}
		}
	})
	a := newAttester(b, tdxsim.Config{}, nil)
	for i := 0; len(a.events) < 30; i++ {
		a.emit(b, event(b, fmt.Sprintf("application-%d", i), make([]byte, 64)))
	}
	p := parsePolicy(b, a.policyText(b, "", "", ""))
	var evidence []*measure.Evidence
	for i := range 16 {
		evidence = append(evidence, a.evidence(b, measure.ReportData{byte(i)}))
	}
	appraise := func(b *testing.B, v *remote.Verifier, i int) {
		if _, err := v.Appraise(context.Background(), evidence[i%16], remote.Expect{ReportData: measure.ReportData{byte(i % 16)}}); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("warm", func(b *testing.B) {
		v := newVerifier(b, p, a.bundle)
		appraise(b, v, 0)
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			i++
			appraise(b, v, i)
		}
	})
	b.Run("warm-parallel", func(b *testing.B) {
		v := newVerifier(b, p, a.bundle)
		b.RunParallel(func(pb *testing.PB) {
			for i := 0; pb.Next(); i++ {
				appraise(b, v, i)
			}
		})
	})
}

// TestSwap appraises from 64 goroutines while policy and collateral are replaced.
func TestSwap(t *testing.T) {
	a := newAttester(t, tdxsim.Config{}, nil)
	worse := newAttester(t, tdxsim.Config{TCBStatus: "OutOfDate"}, nil) // the same platform, by other collateral
	p := parsePolicy(t, a.policyText(t, "", "", ""))
	now := func() time.Time { return testTime }
	v := newVerifier(t, p, a.bundle)
	good, bad := newStore(t, p, a.bundle, now), newStore(t, p, worse.bundle, now)
	ev := a.evidence(t, measure.ReportData{})
	var group sync.WaitGroup
	for range 64 {
		group.Go(func() {
			for range 20 {
				_, err := v.Appraise(context.Background(), ev, remote.Expect{})
				if r, ok := err.(*remote.Rejection); err != nil && (!ok || r.Code() != "tcb_status") {
					t.Errorf("got %v, want accepted or tcb_status", err)
				}
			}
		})
	}
	for i := range 50 {
		store := good
		if i%2 == 1 {
			store = bad
		}
		if err := v.SetPolicy(p, store); err != nil {
			t.Error(err)
		}
	}
	group.Wait()
	if err := v.SetPolicy(p, bad); err != nil {
		t.Fatal(err)
	}
	_, err := v.Appraise(context.Background(), ev, remote.Expect{})
	wantRefused(t, err, "tcb_status", "tcb_status", true)
}
