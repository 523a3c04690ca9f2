package keys_test

import (
	"bytes"
	"path/filepath"
	"sync"
	"testing"

	"tdx-agent/agent/keys"
)

// TestConcurrentUseAndDrop uses one application's keys from several goroutines while
// they are dropped. What is handed out is right to the end: a key that was overwritten
// is an error, never the key that zeros give.
func TestConcurrentUseAndDrop(t *testing.T) {
	evidence, _ := attest(t)
	for range 20 {
		app, err := keys.Ephemeral{Path: filepath.Join(t.TempDir(), "seed")}.App(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want, err := app.Derive("a", "b", "")
		if err != nil {
			t.Fatal(err)
		}
		derived, err := app.IssueDerived(t.Context(), "a", keys.CertificateRequest{}, evidence)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					k, err := app.Derive("a", "b", "")
					if err != nil {
						return
					}
					if !bytes.Equal(k.Bytes(), want.Bytes()) || !bytes.Equal(k.Chain[0], want.Chain[0]) {
						t.Error("another key")
					}
					if c, err := app.IssueDerived(t.Context(), "a", keys.CertificateRequest{RATLS: true}, evidence); err == nil && !bytes.Equal(c.KeyPEM(), derived.KeyPEM()) {
						t.Error("another certificate key")
					}
					if s, err := app.Sign("ed25519", nil); err == nil {
						if ok, err := keys.Verify("ed25519", nil, s.Signature, s.PublicKey); !ok || err != nil {
							t.Errorf("signature is %v (%v)", ok, err)
						}
					}
				}
			})
		}
		app.Zero()
		wg.Wait()
	}
}
