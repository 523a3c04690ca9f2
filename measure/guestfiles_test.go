package measure_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tdx-agent/measure"
)

const guestAppKeys = `{"disk_crypt_key":"5ec2e7","env_crypt_key":"","k256_key":"5ec2e7","k256_signature":"","gateway_app_id":"",` +
	`"ca_cert":"PEM","key_provider":{"Kms":{"url":"https://kms","pubkey":"3059","tmp_ca_key":"5ec2e7","tmp_ca_cert":"x"}}}`

// guestDir writes files into a new directory; an empty text leaves one out.
func guestDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestReadGuestFiles(t *testing.T) {
	dir := guestDir(t, map[string]string{
		"app-compose.json": `{"name":"a","kms_enabled":true}` + "\n",
		".sys-config.json": `{"vm_config":"{ \"cpu_count\":1}","mr_config":"doc"}`,
		".instance_info":   `{"app_id":"` + strings.Repeat("AB", 20) + `","instance_id_seed":"","bootstrapped":true}`,
		".appkeys.json":    guestAppKeys,
	})
	f, err := measure.ReadGuestFiles(dir, measure.GuestFileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if string(f.AppCompose) != `{"name":"a","kms_enabled":true}`+"\n" || f.Compose.KeyProvider != measure.KeyProviderKMS {
		t.Errorf("app-compose: %q, %+v", f.AppCompose, f.Compose)
	}
	if f.SysConfig.VMConfig != `{ "cpu_count":1}` || f.SysConfig.MRConfig != "doc" {
		t.Errorf("sys-config: %+v", f.SysConfig)
	}
	if !bytes.Equal(f.Instance.AppID, bytes.Repeat([]byte{0xab}, 20)) || f.Instance.InstanceIDSeed != nil {
		t.Errorf("instance: %+v", f.Instance)
	}
	if f.AppKeys == nil || !bytes.Equal(f.AppKeys.KeyProvider.ID, []byte{0x30, 0x59}) || f.AppKeys.CACert != "PEM" {
		t.Errorf("app keys: %+v", f.AppKeys)
	}
}

func TestReadGuestFilesMissing(t *testing.T) {
	dir := guestDir(t, map[string]string{"app-compose.json": `{"name":"a"}`})
	f, err := measure.ReadGuestFiles(dir, measure.GuestFileOptions{SysConfigOptional: true})
	if err != nil || f.AppKeys != nil || f.SysConfig.Raw != nil {
		t.Errorf("optional files: %+v, %v", f, err)
	}
	for _, c := range []struct {
		dir, file string
		opt       measure.GuestFileOptions
	}{
		{t.TempDir(), "app-compose.json", measure.GuestFileOptions{SysConfigOptional: true}},
		{dir, ".sys-config.json", measure.GuestFileOptions{}},
		{dir, "credential", measure.GuestFileOptions{SysConfigOptional: true, AppKeys: filepath.Join(dir, "credential")}},
	} {
		if _, err := measure.ReadGuestFiles(c.dir, c.opt); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), c.file) {
			t.Errorf("missing %s: %v", c.file, err)
		}
	}
}

func TestReadGuestFilesHostile(t *testing.T) {
	at := func(name string) func(dir string) string {
		return func(dir string) string { return filepath.Join(dir, name) }
	}
	for _, c := range []struct {
		name  string
		path  func(string) string
		plant func(path string) error
		want  string
	}{
		{"symlink", at(".instance_info"), func(p string) error { return os.Symlink("/etc/hostname", p) }, "symbolic link"},
		{"dangling symlink", at(".appkeys.json"), func(p string) error { return os.Symlink("/nonexistent", p) }, "symbolic link"},
		{"FIFO", at(".instance_info"), func(p string) error { return syscall.Mkfifo(p, 0o600) }, "want a regular file"},
		{"directory", at(".appkeys.json"), func(p string) error { return os.Mkdir(p, 0o700) }, "want a regular file"},
		{"oversize", at(".instance_info"), func(p string) error { return os.WriteFile(p, make([]byte, 10<<10+1), 0o600) }, "at most 10240"},
		{"sparse oversize", at("app-compose.json"), func(p string) error { return os.Truncate(p, 50<<20+1) }, "at most 52428800"},
		{"oversize sys-config", at(".sys-config.json"), func(p string) error { return os.Truncate(p, 32<<10+1) }, "at most 32768"},
	} {
		dir := guestDir(t, map[string]string{"app-compose.json": `{"name":"a"}`, ".sys-config.json": `{}`})
		path := c.path(dir)
		if err := c.plant(path); err != nil {
			t.Fatal(err)
		}
		_, err := measure.ReadGuestFiles(dir, measure.GuestFileOptions{})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q and the path", c.name, err, c.want)
		}
	}
}

func TestParseAppCompose(t *testing.T) {
	c, err := measure.ParseAppCompose([]byte(`{"manifest_version":"3","name":"n","Name":"other","runner":"docker-compose","key_provider":null,
		"local_key_provider_enabled":true,"key_provider_id":"0aFF","no_instance_id":true,"event_log_version":2,"init_script":"a\nb",
		"requirements":{"gpu_policy":{"b":[{}],"a":1}},"public_tcbinfo":false,"storage_fs":"zfs","unknown":{"x":1,"x":2}}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.ManifestVersion != "3" || c.Name != "n" || c.Runner != "docker-compose" || c.KeyProvider != measure.KeyProviderLocal ||
		!bytes.Equal(c.KeyProviderID, []byte{10, 255}) || !c.NoInstanceID || c.EventLogVersion != measure.EventV2 ||
		len(c.InitScripts) != 1 || c.InitScripts[0] != "a\nb" || string(c.GPUPolicy) != `{"b":[{}],"a":1}` ||
		c.PublicTCBInfo || c.StorageFS != "zfs" {
		t.Errorf("got %+v", c)
	}
	c, err = measure.ParseAppCompose([]byte(` {"name":"","manifest_version":2,"init_script":["a","b"],"KMS_ENABLED":true} `))
	if err != nil || c.ManifestVersion != "2" || len(c.InitScripts) != 2 || !c.PublicTCBInfo || c.PublicLogs ||
		c.EventLogVersion != measure.EventV1 || c.KeyProvider != measure.KeyProviderNone || c.GPUPolicy != nil {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestParseAppComposeRefuses(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{``, "not valid JSON"},
		{`[]`, "want a JSON object"},
		{`{"name":"a"} {}`, "not valid JSON"},
		{"{\"name\":\"\xff\"}", "not valid UTF-8"},
		{`{}`, "name is missing"},
		{`{"name":null}`, "name is null"},
		{`{"name":1}`, "name:"},
		{`{"name":"a","name":"b"}`, `"name" is there twice`},
		{`{"name":"a","kms_enabled":false,"kms\u005fenabled":true}`, `"kms_enabled" is there twice`},
		{`{"name":"a","kms_enabled":"yes"}`, "kms_enabled"},
		{`{"name":"a","key_provider":"hsm"}`, `key_provider is "hsm"`},
		{`{"name":"a","key_provider":1}`, "key_provider"},
		{`{"name":"a","key_provider_id":"abc"}`, "key_provider_id"},
		{`{"name":"a","key_provider_id":"` + strings.Repeat("00", 513) + `"}`, "513 bytes, want at most 512"},
		{`{"name":"a","event_log_version":3}`, "event_log_version is 3"},
		{`{"name":"a","event_log_version":"2"}`, "event_log_version"},
		{`{"name":"a","storage_fs":"xfs"}`, "storage_fs"},
		{`{"name":"a","init_script":["1","2","3","4","5","6"]}`, "6 scripts, want at most 5"},
		{`{"name":"a","init_script":{}}`, "init_script"},
		{`{"name":"a","manifest_version":{}}`, "manifest_version"},
		{`{"name":"a","requirements":[]}`, "requirements: want a JSON object"},
		{`{"name":"a","requirements":{"gpu_policy":null}}`, "gpu_policy: want an object"},
		{`{"name":"a","requirements":{"gpu_policy":{},"gpu_policy":{}}}`, "twice"},
		{`{"name":"a","requirements":{"gpu_policy":{"x":{"a":1,"a":2}}}}`, "requirements.gpu_policy"},
	} {
		if got, err := measure.ParseAppCompose([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %+v, %v, want %q", c.text, got, err, c.want)
		}
	}
}

func TestParseSysConfig(t *testing.T) {
	for _, c := range []struct{ text, want, err string }{
		{`{}`, "", ""},
		{`{"vm_config":"not JSON"}`, "not JSON", ""},
		{`{"vm_config":"{\"vm_config\":\"{ }\",\"kms_urls\":[]}"}`, "{ }", ""},
		{`{"vm_config":" {\"a\": 1}\n"}`, " {\"a\": 1}\n", ""},
		{`{"vm_config":{}}`, "", "vm_config"},
		{`{"vm_config":"{\"a\":1,\"a\":2}"}`, "", "twice"},
		{`{"vm_config":"{\"vm_config\":7}"}`, "", "wrapped vm_config"},
		{`{"vm_config":"","vm_config":"x"}`, "", "twice"},
		{`{"mr_config":{}}`, "", "mr_config"},
	} {
		got, err := measure.ParseSysConfig([]byte(c.text))
		if c.err == "" && (err != nil || got.VMConfig != c.want) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: got %q, %v, want %q, %q", c.text, got.VMConfig, err, c.want, c.err)
		}
	}
	const want = `{"os_image_hash":"64f0d1545cd510a8dfed7ad609d105b5d41f0cb2afcfdda8867ede00c88add7a","cpu_count":1,"memory_size":2147483648}`
	if got, err := measure.ParseSysConfig(bootFixture(t, "eventlogs/ph-sim-sysconfig.json")); err != nil || got.VMConfig != want {
		t.Errorf("real file: got %q, %v", got.VMConfig, err)
	}
}

func TestParseInstanceInfo(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{"app_id":"00"}`, "app_id has 1 bytes"},
		{`{"instance_id_seed":"0x` + strings.Repeat("00", 20) + `"}`, "instance_id_seed"},
		{`{"instance_id":"` + strings.Repeat("00", 21) + `"}`, "instance_id has 21 bytes"},
		{`{"app_id":[]}`, "app_id"},
		{`{"app_id":"","app_id":""}`, "twice"},
	} {
		if got, err := measure.ParseInstanceInfo([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %+v, %v, want %q", c.text, got, err, c.want)
		}
	}
}

func TestParseAppKeys(t *testing.T) {
	b := []byte(guestAppKeys)
	if _, err := measure.ParseAppKeys(b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, make([]byte, len(b))) {
		t.Errorf("secrets left behind: %q", b)
	}
	provider := func(s string) string { return `{"ca_cert":"","key_provider":` + s + `}` }
	for text, want := range map[string]measure.KeyProviderKind{
		provider(`{"None":{"key":"x"}}`):                                          measure.KeyProviderNone,
		provider(`{"Tpm":{"key":"x","pubkey":"00"}}`):                             measure.KeyProviderTPM,
		provider(`{"Kms":{"url":"old"}}`):                                         measure.KeyProviderKMS,
		provider(`{"Local":{"key":"x","mr":"` + strings.Repeat("00", 32) + `"}}`): measure.KeyProviderLocal,
	} {
		if got, err := measure.ParseAppKeys([]byte(text)); err != nil || got.KeyProvider.Kind != want {
			t.Errorf("%s: got %+v, %v, want %s", text, got, err, want)
		}
	}
	for _, c := range []struct{ text, want string }{
		{`{"key_provider":{"None":{}}}`, "ca_cert is missing"},
		{`{"ca_cert":""}`, "key_provider: is missing"},
		{provider(`"None"`), "want a JSON object"},
		{provider(`{}`), "has 0 members"},
		{provider(`{"None":{},"Tpm":{}}`), "has 2 members"},
		{provider(`{"None":{},"None":{}}`), "twice"},
		{provider(`{"Hsm":{}}`), `variant "Hsm"`},
		{provider(`{"Local":{"mr":"00"}}`), "mr has 1 bytes"},
		{provider(`{"Kms":{"pubkey":"0"}}`), "pubkey"},
		{provider(`{"Kms":{"pubkey":"","pubkey":"00"}}`), "twice"},
	} {
		b := []byte(c.text)
		if got, err := measure.ParseAppKeys(b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %+v, %v, want %q", c.text, got, err, c.want)
		}
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("%s: not cleared after an error", c.text)
		}
	}
}

func FuzzGuestJSON(f *testing.F) {
	f.Add([]byte(guestAppKeys))
	f.Add([]byte(`{"name":"a","init_script":["x"],"requirements":{"gpu_policy":{"a":[1,"}"]}}}`))
	f.Add([]byte(`{"vm_config":"{\"vm_config\":\"\"}", "app_id":"\u0061\\"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := measure.ParseAppCompose(b); err == nil {
			if _, err := measure.GPUPolicyHash(c.GPUPolicy); err != nil {
				t.Errorf("accepted a GPU policy without a hash: %v", err)
			}
		}
		measure.ParseSysConfig(b)
		measure.ParseInstanceInfo(b)
		measure.ParseAppKeys(bytes.Clone(b))
		measure.CheckMRConfigID(measure.MRConfigIDV3(string(b)), measure.MRConfigClaims{Document: string(b)})
	})
}
