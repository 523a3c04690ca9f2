package keys_test

import (
	"path/filepath"
	"testing"

	"tdx-agent/agent/keys"
	"tdx-agent/remote/ratls"
)

// TestOmitLegacyOIDs looks at leaf and authority.
func TestOmitLegacyOIDs(t *testing.T) {
	for _, omit := range []bool{false, true} {
		app, err := keys.Ephemeral{Path: filepath.Join(t.TempDir(), "seed")}.App(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if omit {
			app.OmitLegacyOIDs()
		}
		evidence, _ := attest(t)
		k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{RATLS: true}, evidence)
		if err != nil {
			t.Fatal(err)
		}
		for i, cert := range certificates(t, k) {
			legacy := 0
			for _, e := range cert.Extensions {
				if e.Id.Equal(ratls.OIDQuote) || e.Id.Equal(ratls.OIDEventLog) {
					legacy++
				}
			}
			if (legacy == 0) != omit {
				t.Errorf("certificate %d has %d legacy extensions, omit is %v", i, legacy, omit)
			}
			if _, err := ratls.Parse(cert); err != nil {
				t.Error(err)
			}
		}
	}
}
