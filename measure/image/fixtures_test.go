package image_test

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"tdx-agent/measure"
)

// guest is a real guest: its event log, and what else is known of it.
type guest struct {
	events   []measure.Event
	quote    *measure.Registers // nil where there is no quote
	vmConfig string
}

// realGuest reads one file of real evidence, or skips the test where there is none.
func realGuest(t testing.TB, name string) guest {
	t.Helper()
	dir := os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "fixtures")
	}
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Skipf("no real evidence: set TDX_AGENT_FIXTURES to its folder (%v)", err)
	}
	var g guest
	log := json.RawMessage(b)
	if b[0] == '{' {
		var doc struct {
			Log      json.RawMessage `json:"event_log"`
			OldLog   json.RawMessage `json:"eventLog"`
			Quote    string          `json:"quote"`
			Intel    string          `json:"intel_quote"`
			VMConfig string          `json:"vm_config"`
			Info     struct {
				VMConfig string `json:"vm_config"`
			} `json:"info"`
		}
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		if log = doc.Log; log == nil {
			log = doc.OldLog
		}
		g.vmConfig = doc.VMConfig + doc.Info.VMConfig
		g.quote = registers(t, doc.Quote+doc.Intel)
	}
	if g.events, err = measure.ParseEventLog(log); err != nil {
		t.Fatal(err)
	}
	return g
}

func registers(t testing.TB, text string) *measure.Registers {
	t.Helper()
	if text == "" {
		return nil
	}
	if len(text) > 2 && text[:2] == "0x" {
		text = text[2:]
	}
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	q, err := measure.ParseQuote(b)
	if err != nil {
		t.Fatal(err)
	}
	return &q.Body.Registers
}
