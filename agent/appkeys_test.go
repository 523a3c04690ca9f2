package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
)

// appKeysDocument is a .appkeys.json with an authority of its own.
func appKeysDocument(k256Key, provider string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{"disk_crypt_key": "", "env_crypt_key": "", "k256_key": k256Key, "k256_signature": "",
		"ca_cert":      string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})),
		"key_provider": map[string]any{provider: map[string]any{"key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))}}})
}

// failingKeys fails as often as it is told to.
type failingKeys struct {
	left int
	then keys.Provider
}

func (p *failingKeys) App(ctx context.Context) (*keys.App, error) {
	if p.left--; p.left >= 0 {
		return nil, errors.New("not now")
	}
	return p.then.App(ctx)
}

// TestKeysAreTheMeasuredProviders replaces the keys after the boot step.
func TestKeysAreTheMeasuredProviders(t *testing.T) {
	d := benchDaemon(t)
	good, err := d.appKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if again, err := d.appKeys(t.Context()); err != nil || again != good {
		t.Errorf("keys are loaded twice (%v)", err)
	}
	path := t.TempDir() + "/.appkeys.json"
	doc, err := appKeysDocument(strings.Repeat("01", 32), "Tpm")
	check(t, err)
	check(t, os.WriteFile(path, doc, 0o400))
	_, err = d.measuredKeys(t.Context(), &appKeys{provider: keys.File{Path: path}})
	if err == nil || !strings.Contains(err.Error(), `are of provider {"name":"tpm","id":""}, but this boot has measured {"name":"none","id":""}`) || exitCode(err) != exitConfig {
		t.Errorf("error is %v", err)
	}
	later := &appKeys{provider: &failingKeys{left: 1, then: keys.Ephemeral{Path: d.dir.appSeed()}}}
	if _, err := d.measuredKeys(t.Context(), later); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("error is %v", err)
	}
	if _, err := d.measuredKeys(t.Context(), later); err != nil {
		t.Errorf("a provider that has failed once is not asked again: %v", err)
	}
}

// idleDaemon is an agent that serves nobody, before its boot step, which boot runs.
func idleDaemon(t *testing.T) (d *daemon, boot func()) {
	t.Helper()
	cfg := newConfig()
	dir, err := serverRuntimeDir(t.TempDir(), true)
	check(t, err)
	back, err := openBackend(cfg, dir, true)
	check(t, err)
	t.Cleanup(func() { back.close() })
	l, err := openLedger(t.Context(), cfg, dir, back)
	check(t, err)
	t.Cleanup(func() { l.Close() })
	files := measure.SampleApp()
	d, err = newDaemon(t.Context(), cfg, dir, back, l, "", files, slog.New(slog.DiscardHandler))
	check(t, err)
	return d, func() {
		t.Helper()
		_, err := measureBoot(t.Context(), cfg, dir, l, files)
		check(t, err)
	}
}

// TestNoKeysBeforeTheBootStep: until RTMR3 says whose keys they are to be, nobody gets
// any, of whatever provider.
func TestNoKeysBeforeTheBootStep(t *testing.T) {
	d, boot := idleDaemon(t)
	if _, err := d.appKeys(t.Context()); err == nil || !strings.Contains(err.Error(), "the boot step has not finished") || exitCode(err) != exitDenied {
		t.Errorf("before the boot step: %v", err)
	}
	boot()
	if _, err := d.appKeys(t.Context()); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func TestChoiceOfKeys(t *testing.T) {
	cfg, dir := newConfig(), runtimeDir("/r")
	sample := measure.SampleApp()
	kms := *sample
	kms.Compose.KeyProvider = measure.KeyProviderKMS
	file := *sample
	file.AppKeys = &measure.AppKeysInfo{}
	for name, c := range map[string]struct {
		files      *measure.GuestFiles
		hostShared string
		appKeys    string
		want       keys.Provider
		words      string
	}{
		"no files":         {nil, "", "", nil, "could not be read"},
		"none":             {sample, "", "", keys.Ephemeral{Path: "/r/log/app-seed"}, ""},
		"kms without file": {&kms, "", "", nil, `key provider "kms"`},
		"file":             {&file, "", "", keys.File{Path: "/dstack/.host-shared/.appkeys.json"}, ""},
		"file in folder":   {&file, "/h", "", keys.File{Path: "/h/.appkeys.json"}, ""},
		"file by its path": {&file, "/h", "/c/keys", keys.File{Path: "/c/keys"}, ""},
	} {
		cfg.Boot.AppKeys = c.appKeys
		k := newAppKeys(cfg, c.hostShared, dir, c.files, nil, nil)
		if k.provider != c.want || (k.absent == nil) != (c.words == "") {
			t.Errorf("%s: %v, %v", name, k.provider, k.absent)
		}
		if c.words != "" {
			if _, err := k.load(t.Context(), nil); err == nil || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%s: error is %v", name, err)
			}
		}
	}
}
