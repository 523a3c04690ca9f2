package guestapi_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
)

// TestPublishedSDKs runs dstack's own Go and JavaScript SDKs against both surfaces.
// It fetches them, so it runs only where that was asked for.
func TestPublishedSDKs(t *testing.T) {
	if os.Getenv("TDX_AGENT_SDKTEST") != "1" {
		t.Skip("set TDX_AGENT_SDKTEST=1 to fetch dstack's SDKs and run them")
	}
	g := newTestGuest()
	g.name = "Zählwerk"
	app := vectorApp(t)
	dir := t.TempDir()
	for name, surface := range map[string]guestapi.Surface{"dstack.sock": guestapi.Dstack, "tappd.sock": guestapi.Tappd} {
		ln, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		cfg := config(surface, g)
		cfg.Keys = func(context.Context) (*keys.App, error) { return app, nil }
		s := guestapi.NewServer(cfg)
		go s.Serve(ln)
		t.Cleanup(func() { s.Shutdown(t.Context()) })
	}
	cmd := exec.CommandContext(t.Context(), "../../packaging/sdktest/run.sh", dir)
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), "SDKTEST_NO_CERTIFICATE=1") // the test's guest makes none for Info
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}
