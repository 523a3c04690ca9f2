package dcap_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

var testTime = time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)

// simulated returns a quote, its collateral, and a verifier that trusts its root.
func simulated(t testing.TB, cfg tdxsim.Config) (quote, bundle []byte, roots *dcap.Roots) {
	t.Helper()
	cfg.Now = func() time.Time { return testTime }
	td, err := tdxsim.New(t.TempDir(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	if bundle, err = td.Collateral(); err != nil {
		t.Fatal(err)
	}
	if roots, err = dcap.NewRoots(td.RootPEM()); err != nil {
		t.Fatal(err)
	}
	return makeQuote(t, td), bundle, roots
}

func makeQuote(t testing.TB, td *tdxsim.TD) []byte {
	t.Helper()
	var client configfsi.Client = td.Client()
	dir, err := client.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		t.Fatal(err)
	}
	if err := client.WriteFile(dir+"/inblob", make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	q, err := client.ReadFile(dir + "/outblob")
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestFirst(t *testing.T) {
	q, b, roots := simulated(t, tdxsim.Config{})
	c, err := dcap.ParseCollateral(b, roots)
	if err != nil {
		t.Fatal(err)
	}
	v := dcap.NewVerifier(dcap.Config{Roots: roots, SecondOpinion: true})
	r, err := v.Verify(context.Background(), q, c, testTime)
	if err != nil {
		t.Fatal(err)
	}
	if r.Merged.Status != dcap.UpToDate || r.SecondOpinion != "agrees" {
		t.Errorf("%+v", r)
	}
}
