package remote_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
	"tdx-agent/remote"
)

// carriedEvidence is real evidence of a guest whose vm_config carries the measurement
// document of its image.
func carriedEvidence(t *testing.T) (*measure.Evidence, *image.VMConfig) {
	t.Helper()
	_, paths, _ := realEvidence(t)
	var doc struct {
		Quote, EventLog, VMConfig string
		Log                       json.RawMessage `json:"event_log"`
		Config                    string          `json:"vm_config"`
	}
	if err := json.Unmarshal(readFile(t, paths["dk-lite-getquote"]), &doc); err != nil {
		t.Fatal(err)
	}
	quote, err := hex.DecodeString(doc.Quote)
	if err != nil {
		t.Fatal(err)
	}
	events, err := measure.ParseEventLog(doc.Log)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ParseVMConfig([]byte(doc.Config))
	if err != nil {
		t.Fatal(err)
	}
	return &measure.Evidence{Quote: quote, Events: events, VMConfig: doc.Config}, config
}

// judgeImage appraises by a policy with this image table. There is no collateral of the
// time, so only the boot checks count.
func judgeImage(t *testing.T, ev *measure.Evidence, table string) *remote.Result {
	t.Helper()
	p := parsePolicy(t, "version = 1\n[[peer]]\nname = \"a\"\nimage = [\"i\"]\nallow_any_app = true\n[image.i]\n"+table)
	if err := p.LoadImages(context.Background()); err != nil {
		t.Fatal(err)
	}
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: newStore(t, p, nil, nil)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Appraise(context.Background(), ev, anyData)
	rejection, ok := errors.AsType[*remote.Rejection](err)
	if !ok {
		t.Fatal(err)
	}
	return rejection.Result
}

func wantBoot(t *testing.T, r *remote.Result, want map[string]remote.Outcome) {
	t.Helper()
	for name, o := range want {
		if got := outcome(r, name); got != o {
			t.Errorf("%s is %v, want %v", name, got, o)
			for _, c := range r.Checks {
				if c.Name == name {
					t.Log(c.String())
				}
			}
		}
	}
}

// TestCalculatedImage proves a real boot from the document of its image.
func TestCalculatedImage(t *testing.T) {
	ev, config := carriedEvidence(t)
	all := map[string]remote.Outcome{"mrtd": remote.Passed, "rtmr0": remote.Passed, "rtmr1": remote.Passed, "rtmr2": remote.Passed}
	carried := fmt.Sprintf("carried = true\nos_image_hash = \"%x\"\n", config.OSImageHash)
	wantBoot(t, judgeImage(t, ev, carried), all)

	file := filepath.Join(t.TempDir(), "measurement.tdx.cbor")
	if err := os.WriteFile(file, config.Material, 0o600); err != nil {
		t.Fatal(err)
	}
	byFile := fmt.Sprintf("metadata = %q\n", file)
	for range 2 { // the second time from what is kept
		wantBoot(t, judgeImage(t, ev, byFile), all)
	}

	p := remote.BuiltinPolicy()
	if err := p.RequireImage(context.Background(), file); err != nil {
		t.Fatal(err)
	}
	if err := p.RequireImage(context.Background(), file); err == nil {
		t.Error("a second image is taken")
	}

	t.Run("another machine than it says", func(t *testing.T) {
		liar := *ev
		liar.VMConfig = strings.Replace(ev.VMConfig, fmt.Sprintf(`"cpu_count":%d`, config.CPUCount), fmt.Sprintf(`"cpu_count":%d`, config.CPUCount+1), 1)
		if liar.VMConfig == ev.VMConfig {
			t.Fatal("nothing was changed")
		}
		for _, table := range []string{carried, byFile} {
			wantBoot(t, judgeImage(t, &liar, table), map[string]remote.Outcome{"mrtd": remote.Passed, "rtmr0": remote.Failed, "rtmr1": remote.Passed})
		}
	})
	t.Run("another image", func(t *testing.T) {
		other := strings.Replace(carried, fmt.Sprintf("%x", config.OSImageHash), strings.Repeat("11", 32), 1)
		r := judgeImage(t, ev, other)
		wantBoot(t, r, map[string]remote.Outcome{"mrtd": remote.Failed, "rtmr0": remote.NotChecked})
	})
	t.Run("no vm_config", func(t *testing.T) {
		bare := *ev
		bare.VMConfig = ""
		for _, table := range []string{carried, byFile} {
			wantBoot(t, judgeImage(t, &bare, table), map[string]remote.Outcome{"mrtd": remote.Failed, "rtmr0": remote.NotChecked})
		}
	})
	t.Run("a document of its own", func(t *testing.T) {
		forged := *ev
		m, err := image.ParseMaterial(config.Material)
		if err != nil {
			t.Fatal(err)
		}
		m.Initrd[0] ^= 1
		document, err := m.Material()
		if err != nil {
			t.Fatal(err)
		}
		forged.VMConfig = replaceMaterial(t, ev.VMConfig, document)
		wantBoot(t, judgeImage(t, &forged, carried), map[string]remote.Outcome{"mrtd": remote.Failed})
	})
	t.Run("not genuine", func(t *testing.T) {
		forged := *ev
		forged.Quote = append([]byte(nil), ev.Quote...)
		forged.Quote[600] ^= 1
		wantBoot(t, judgeImage(t, &forged, byFile), map[string]remote.Outcome{"signature": remote.Failed, "mrtd": remote.NotChecked})
	})
}

// replaceMaterial puts another measurement document into a vm_config.
func replaceMaterial(t *testing.T, config string, document []byte) string {
	t.Helper()
	var c map[string]any
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		t.Fatal(err)
	}
	c["tdx_measurement"].(map[string]any)["measurement"] = document
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestImagesMustBeLoaded(t *testing.T) {
	p := parsePolicy(t, "version = 1\n[[peer]]\nname = \"a\"\nimage = [\"i\"]\nallow_any_app = true\n[image.i]\nmetadata = \"/nowhere/metadata.json\"\n")
	if _, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: newStore(t, p, nil, nil)}); err == nil || !strings.Contains(err.Error(), "LoadImages") {
		t.Errorf("got %v", err)
	}
	if err := p.LoadImages(context.Background()); err == nil || !strings.Contains(err.Error(), `image "i"`) {
		t.Errorf("got %v", err)
	}
	for table, want := range map[string]string{
		"carried = true":                                 "carried needs the os_image_hash",
		"metadata = \"x.json\"":                          "want an absolute path",
		"metadata = \"/x\"\ncarried = true":              "exclude each other",
		"metadata = \"/x\"\nallow_any_rtmr0 = true":      "leave out",
		"metadata = \"/x\"\nrtmr1 = [\"" + zeros + "\"]": "leave out",
		"allow_any_page_order = true":                    "goes with metadata",
	} {
		_, err := remote.ParsePolicy("p", []byte("version = 1\n[[peer]]\nname = \"a\"\nimage = [\"i\"]\nallow_any_app = true\n[image.i]\n"+table+"\n"))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", table, err, want)
		}
	}
}
