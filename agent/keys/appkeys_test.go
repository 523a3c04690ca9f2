package keys_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/agent/keys"
)

func TestParseAppKeysClearsItsInput(t *testing.T) {
	for _, k256 := range []string{vectorKey, "zz"} {
		b := marshal(t, appKeys(t, k256, ""))
		keys.ParseAppKeys(b)
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("k256_key %q: the input is left", k256)
		}
	}
}

func TestProvidersOfFile(t *testing.T) {
	evidence, _ := attest(t)
	key, cert := testCA(t, true)
	for variant, c := range map[string]struct {
		value  any
		event  string
		issues bool
	}{
		"None":  {map[string]any{"key": key}, `{"name":"none","id":""}`, true},
		"Local": {map[string]any{"key": key, "mr": strings.Repeat("0a", 32)}, `{"name":"local-sgx","id":"` + strings.Repeat("0a", 32) + `"}`, true},
		"Tpm":   {map[string]any{"key": key, "pubkey": "00"}, `{"name":"tpm","id":""}`, true},
		"Kms":   {map[string]any{"url": "u", "pubkey": "0102", "tmp_ca_key": key, "tmp_ca_cert": cert}, `{"name":"kms","id":"0102"}`, false},
	} {
		doc := appKeys(t, vectorKey, strings.Repeat("00", 65))
		doc["ca_cert"], doc["key_provider"] = cert, map[string]any{variant: c.value}
		app := parse(t, doc)
		if p := app.Provider(); string(p.Payload()) != c.event {
			t.Errorf("%s: event %s, want %s", variant, p.Payload(), c.event)
		}
		k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{}, evidence)
		if !c.issues {
			if err == nil || !strings.Contains(err.Error(), "issued by its KMS") {
				t.Errorf("%s: error is %v", variant, err)
			}
			continue
		}
		if err != nil || k.Chain[1].PEM() != cert {
			t.Errorf("%s: %v", variant, err)
		}
	}
}

func TestParseAppKeysRefusals(t *testing.T) {
	key, cert := testCA(t, true)
	otherKey, otherCert := testCA(t, true)
	leafKey, leafCert := testCA(t, false)
	none := func(key string) any { return map[string]any{"None": map[string]any{"key": key}} }
	order := "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141"
	for name, c := range map[string]struct {
		change map[string]any // nil value: member removed
		words  string
	}{
		"no k256_key":          {map[string]any{"k256_key": nil}, "k256_key: want a string"},
		"k256_key number":      {map[string]any{"k256_key": 7}, "k256_key: want a string"},
		"k256_key short":       {map[string]any{"k256_key": vectorKey[2:]}, "k256_key: 31 bytes, want 32"},
		"k256_key long":        {map[string]any{"k256_key": vectorKey + "00"}, "k256_key: 66 digits"},
		"k256_key prefix":      {map[string]any{"k256_key": "0x" + vectorKey[2:]}, "k256_key: is not"},
		"k256_key odd":         {map[string]any{"k256_key": vectorKey[1:]}, "k256_key: is not"},
		"k256_key zero":        {map[string]any{"k256_key": strings.Repeat("0", 64)}, "not the scalar"},
		"k256_key the order":   {map[string]any{"k256_key": order}, "not the scalar"},
		"signature short":      {map[string]any{"k256_signature": strings.Repeat("00", 64)}, "64 bytes, want 65 or none"},
		"signature long":       {map[string]any{"k256_signature": strings.Repeat("00", 66)}, "132 digits"},
		"no signature":         {map[string]any{"k256_signature": nil}, "k256_signature: want a string"},
		"no disk key":          {map[string]any{"disk_crypt_key": nil}, "disk_crypt_key: want a string"},
		"disk key":             {map[string]any{"disk_crypt_key": "secret!!"}, "disk_crypt_key: is not"},
		"env key":              {map[string]any{"env_crypt_key": []int{1}}, "env_crypt_key: want a string"},
		"no ca_cert":           {map[string]any{"ca_cert": nil}, "ca_cert is missing"},
		"ca_cert no PEM":       {map[string]any{"ca_cert": "x"}, "want one CERTIFICATE block"},
		"ca_cert twice":        {map[string]any{"ca_cert": cert + cert}, "want one CERTIFICATE block"},
		"ca_cert is a key":     {map[string]any{"ca_cert": key}, "want one CERTIFICATE block"},
		"ca_cert broken":       {map[string]any{"ca_cert": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}, "ca_cert: x509"},
		"ca_cert of a leaf":    {map[string]any{"ca_cert": leafCert, "key_provider": none(leafKey)}, "not the certificate of an authority"},
		"ca_cert of other key": {map[string]any{"ca_cert": otherCert, "key_provider": none(key)}, "not the certificate of the key provider's key"},
		"key of other cert":    {map[string]any{"ca_cert": cert, "key_provider": none(otherKey)}, "not the certificate of the key provider's key"},
		"no key":               {map[string]any{"key_provider": map[string]any{"None": map[string]any{}}}, "key: want a string"},
		"key is no PEM":        {map[string]any{"key_provider": none("secret!!")}, "key: want one block"},
		"key is a cert":        {map[string]any{"key_provider": none(cert)}, "is not a private key"},
		"key twice":            {map[string]any{"key_provider": none(key + key)}, "key: want one block"},
		"key escaped":          {map[string]any{"key_provider": none("\x01")}, `escape \u`},
		"no provider":          {map[string]any{"key_provider": nil}, "key_provider: is missing"},
		"provider unknown":     {map[string]any{"key_provider": map[string]any{"Cloud": map[string]any{}}}, "variant \"Cloud\""},
		"two providers":        {map[string]any{"key_provider": map[string]any{"None": map[string]any{"key": key}, "Tpm": map[string]any{"key": key}}}, "2 members"},
		"local without mr":     {map[string]any{"key_provider": map[string]any{"Local": map[string]any{"key": key}}}, "mr has 0 bytes"},
	} {
		doc := appKeys(t, vectorKey, "")
		for member, value := range c.change {
			if doc[member] = value; value == nil {
				delete(doc, member)
			}
		}
		if _, err := keys.ParseAppKeys(marshal(t, doc)); err == nil || !strings.Contains(err.Error(), c.words) || strings.Contains(err.Error(), "secret!!") {
			t.Errorf("%s: error is %v, want it to say %q", name, err, c.words)
		}
	}
	good := string(marshal(t, appKeys(t, vectorKey, "")))
	for text, words := range map[string]string{
		"": "not valid JSON", "[]": "want a JSON object", "{}": "is missing", good + "x": "not valid JSON",
		good[:len(good)-1] + `,"k256_key":"00"}`: "there twice", strings.Replace(good, `"None":{`, `"None":{"key":"","key":`, 1)[:20]: "not valid JSON",
		strings.Replace(good, `"None":{"key"`, `"None":{"key":"","key"`, 1): "there twice", "\xff": "UTF-8",
	} {
		if _, err := keys.ParseAppKeys([]byte(text)); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%.40q: error is %v, want it to say %q", text, err, words)
		}
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, ".appkeys.json")
	file := keys.File{Path: path}
	if _, err := file.App(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
	if err := os.WriteFile(path, marshal(t, appKeys(t, vectorKey, "")), 0o400); err != nil {
		t.Fatal(err)
	}
	if app, err := file.App(t.Context()); err != nil {
		t.Error(err)
	} else if k, err := app.Derive("vms", "", ""); err != nil || hex.EncodeToString(k.Bytes())[:8] != "9db79b3f" {
		t.Errorf("%v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, make([]byte, 256<<10+1), 0o400); err != nil {
		t.Fatal(err)
	}
	for path, words := range map[string]string{link: "symbolic link", large: "want at most", dir: "want a regular file"} {
		if _, err := (keys.File{Path: path}).App(t.Context()); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: error is %v", path, err)
		}
	}
}

// TestFileThatOthersWrite has files whose keys somebody else may have chosen, and one
// whose keys others may know.
func TestFileThatOthersWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".appkeys.json")
	file := keys.File{Path: path}
	for mode, c := range map[fs.FileMode]struct{ refused, exposed string }{
		0o600: {}, 0o440: {}, 0o644: {exposed: "has mode 644: every user"}, 0o666: {"has mode 666", "has mode 666"}, 0o620: {refused: "has mode 620"},
	} {
		os.Remove(path)
		if err := os.WriteFile(path, marshal(t, appKeys(t, vectorKey, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := file.App(t.Context())
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("mode %o: error is %v, want %q", mode, err, c.refused)
		}
		if got := file.Exposed(); (got == "") != (c.exposed == "") || !strings.Contains(got, c.exposed) {
			t.Errorf("mode %o: exposed %q, want %q", mode, got, c.exposed)
		}
	}
	t.Run("another's", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("only root can give a file away")
		}
		if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, 4000000, -1)); err != nil {
			t.Fatal(err)
		}
		if _, err := file.App(t.Context()); err == nil || !strings.Contains(err.Error(), "belongs to uid 4000000") {
			t.Errorf("error is %v", err)
		}
	})
}

func TestSeedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seed")
	for name, c := range map[string]struct {
		size  int
		mode  fs.FileMode
		words string
	}{
		"short": {31, 0o400, "31 bytes, want 32"}, "long": {33, 0o400, "want at most 32"}, "open": {32, 0o404, "has mode 404"},
	} {
		os.Remove(path)
		if err := os.WriteFile(path, make([]byte, c.size), c.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := (keys.Ephemeral{Path: path}).App(t.Context()); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	if st, err := os.Lstat(path); err != nil || fmt.Sprint(st.Mode()) == "" {
		t.Error(err)
	}
}

// TestDstackSimulatorKeys holds the agent to the keys of dstack's own simulator, whose
// file is not in this repository.
func TestDstackSimulatorKeys(t *testing.T) {
	path := os.Getenv("TDX_AGENT_DSTACK_APPKEYS")
	if path == "" {
		t.Skip("set TDX_AGENT_DSTACK_APPKEYS to dstack's sdk/simulator/appkeys.json")
	}
	app, err := keys.File{Path: path}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	k, err := app.Derive("/test/path", "test-purpose", "secp256k1")
	if err != nil {
		t.Fatal(err)
	}
	public, err := app.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		got         []byte
		begin, ends string
	}{{k.Bytes(), "b9fbb717", "fc042cb7"}, {k.Chain[0], "f50c5173", "978d01"}, {k.Chain[1], "9e618603", "c500"},
		{public, "02818494263695e8839122dbd88e281d7380622999df4e60a14befa0f2d096fc7c", ""}} {
		if s := hex.EncodeToString(c.got); !strings.HasPrefix(s, c.begin) || !strings.HasSuffix(s, c.ends) {
			t.Errorf("%s, want %s...%s", s, c.begin, c.ends)
		}
	}
	appID := unhex("5bb4ff9a3837357f19dc176407a5709c62eb6c56")
	root := recoverKey(t, k.Chain[1], keccak([]byte("dstack-kms-issued:"), appID, public))
	if got := hex.EncodeToString(root); got != "0321529e458424ab1f710a3a57ec4dad2fb195ddca572f7469242ba6c7563085b6" {
		t.Errorf("the chain leads to the KMS root %s", got)
	}
}

// FuzzParseAppKeys demands that nothing panics and that no error quotes a secret.
func FuzzParseAppKeys(f *testing.F) {
	f.Add(marshal(f, appKeys(f, vectorKey, "")))
	f.Add([]byte(`{"k256_key":"\\","key_provider":{"None":{"key":"\n\u0000"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		app, err := keys.ParseAppKeys(b)
		if err != nil {
			if strings.Contains(err.Error(), vectorKey[:16]) {
				t.Fatal(err)
			}
			return
		}
		if _, err := app.Derive("", "", ""); err != nil {
			t.Fatal(err)
		}
	})
}
