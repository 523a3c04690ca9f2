package guestapi_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"tdx-agent/agent/guestapi"
)

// TestPublishedSDKs runs dstack's own Go and JavaScript SDKs against both surfaces.
// It fetches them, so it runs only where that was asked for.
func TestPublishedSDKs(t *testing.T) {
	if os.Getenv("TDX_AGENT_SDKTEST") != "1" {
		t.Skip("set TDX_AGENT_SDKTEST=1 to fetch dstack's SDKs and run them")
	}
	g := newTestGuest()
	g.name = "Zählwerk"
	dir := t.TempDir()
	for name, surface := range map[string]guestapi.Surface{"dstack.sock": guestapi.Dstack, "tappd.sock": guestapi.Tappd} {
		ln, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		s := guestapi.NewServer(config(surface, g))
		go s.Serve(ln)
		t.Cleanup(func() { s.Shutdown(t.Context()) })
	}
	cmd := exec.CommandContext(t.Context(), "../../packaging/sdktest/run.sh", dir)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}
