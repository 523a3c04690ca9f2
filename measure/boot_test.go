package measure_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure"
)

// bootFixture reads a file of the public evidence set.
func bootFixture(t testing.TB, name string) []byte {
	t.Helper()
	dir := os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = filepath.Join("..", "..", "shared", "fixtures")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no fixtures: set TDX_AGENT_FIXTURES to their directory (%v)", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// bootFixtureEvents returns the events of a fixture's log, filling in the digests
// that some dstack releases leave out. path leads to the log in the document.
func bootFixtureEvents(t testing.TB, name string, path ...string) []measure.Event {
	t.Helper()
	raw := json.RawMessage(bootFixture(t, name))
	for _, key := range path {
		var o map[string]json.RawMessage
		if err := json.Unmarshal(raw, &o); err != nil {
			t.Fatal(err)
		}
		raw = o[key]
	}
	if raw[0] == '"' {
		var s string
		if err := json.Unmarshal(raw, &s); err != nil {
			t.Fatal(err)
		}
		raw = json.RawMessage(s)
	}
	var log []struct {
		IMR          int    `json:"imr"`
		Type         uint32 `json:"event_type"`
		Digest       string
		Event        string
		EventPayload string `json:"event_payload"`
	}
	if err := json.Unmarshal(raw, &log); err != nil {
		t.Fatal(err)
	}
	var events []measure.Event
	for _, l := range log {
		e := measure.Event{IMR: l.IMR, Type: l.Type, Name: l.Event, Payload: bootHex(t, l.EventPayload)}
		if l.Digest == "" {
			e = bootEvent(t, l.Event, e.Payload)
		} else if err := e.Digest.UnmarshalText([]byte(l.Digest)); err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	return events
}

func bootHex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.TrimPrefix(s, "0x"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func bootEvent(t testing.TB, name string, payload []byte) measure.Event {
	t.Helper()
	e, err := measure.NewRuntimeEvent(name, payload, measure.EventV1)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// bootFixtureSequence returns what a fixture measured into RTMR3 up to
// system-ready, or all of it if that is not there.
func bootFixtureSequence(events []measure.Event) []measure.BootEvent {
	var seq []measure.BootEvent
	for _, e := range events {
		if !e.IsRuntime() {
			continue
		}
		seq = append(seq, measure.BootEvent{Name: e.Name, Payload: e.Payload})
		if e.Name == measure.EventSystemReady {
			break
		}
	}
	return seq
}

func bootPayload(seq []measure.BootEvent, name string) []byte {
	for _, e := range seq {
		if e.Name == name {
			return e.Payload
		}
	}
	return nil
}

func bootNames(seq []measure.BootEvent) string {
	var names []string
	for _, e := range seq {
		names = append(names, e.Name)
	}
	return strings.Join(names, " ")
}

// sampleBoot is an input that every era accepts.
func sampleBoot(era measure.Era) measure.BootInput {
	hash := bytes.Repeat([]byte{7}, 32)
	return measure.BootInput{Files: measure.SampleApp(), Era: era, RootFSHash: hash, CACertHash: hash,
		OSImageHash: hash, MRKMS: hash, Rand: bytes.NewReader(make([]byte, 20))}
}

func withKMS(in measure.BootInput) measure.BootInput {
	in.Files.Compose.KeyProvider = measure.KeyProviderKMS
	in.Files.AppKeys = &measure.AppKeysInfo{KeyProvider: measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: []byte{0x30, 0x59}}}
	in.Files.Instance.InstanceIDSeed = make([]byte, 20)
	return in
}

func bootKey(t *testing.T, curve elliptic.Curve) *ecdsa.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &key.PublicKey
}

func TestAgentKeyPayload(t *testing.T) {
	key := bootKey(t, elliptic.P256())
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(spki)
	if got, err := measure.AgentKeyPayload(key); err != nil || !bytes.Equal(got, want[:]) {
		t.Errorf("got %x, %v, want %x", got, err, want)
	}
	for _, bad := range []*ecdsa.PublicKey{nil, {}} {
		if got, err := measure.AgentKeyPayload(bad); err == nil {
			t.Errorf("%v: got %x, want an error", bad, got)
		}
	}
}

func TestBootSequenceOrder(t *testing.T) {
	key := bootKey(t, elliptic.P256())
	agent := func(in measure.BootInput) measure.BootInput {
		in.AgentConfig, in.AgentKey = []byte(`{"compat.full_access":true}`), key
		return in
	}
	full := withKMS(agent(sampleBoot(measure.Era06)))
	full.Files.Compose.InitScripts = []string{"a", "b"}
	full.GPUAttestation = []byte(`{"version":2}`)
	for _, c := range []struct {
		in   measure.BootInput
		want string
	}{
		{sampleBoot(measure.Era03), "rootfs-hash app-id compose-hash ca-cert-hash instance-id"},
		{agent(sampleBoot(measure.Era03)), "rootfs-hash app-id compose-hash ca-cert-hash instance-id agent-config agent-key"},
		{withKMS(sampleBoot(measure.Era040)), "system-preparing rootfs-hash app-id compose-hash instance-id boot-mr-done mr-kms key-provider system-ready"},
		{sampleBoot(measure.Era042), "system-preparing app-id compose-hash instance-id boot-mr-done key-provider system-ready"},
		{withKMS(sampleBoot(measure.Era051)), "system-preparing app-id compose-hash instance-id boot-mr-done mr-kms os-image-hash key-provider system-ready"},
		{sampleBoot(measure.Era0511), "system-preparing app-id compose-hash instance-id boot-mr-done key-provider storage-fs system-ready"},
		{agent(sampleBoot(measure.Era0511)), "system-preparing app-id compose-hash instance-id boot-mr-done key-provider storage-fs agent-config agent-key system-ready"},
		{sampleBoot(measure.Era06), "system-preparing app-id compose-hash gpu-policy-hash instance-id boot-mr-done key-provider storage-fs system-ready"},
		{full, "system-preparing app-id compose-hash init-script-hash init-script-hash gpu-policy-hash gpu-attestation instance-id boot-mr-done os-image-hash key-provider storage-fs agent-config agent-key system-ready"},
	} {
		seq, err := measure.BootSequence(c.in)
		if err != nil {
			t.Fatalf("%s: %v", c.in.Era, err)
		}
		if got := bootNames(seq); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.in.Era, got, c.want)
		}
	}
}

func TestBootSequenceRefuses(t *testing.T) {
	foreign := bytes.Repeat([]byte{9}, 20)
	p384 := bootKey(t, elliptic.P384())
	for _, c := range []struct {
		name   string
		in     measure.BootInput
		change func(*measure.BootInput)
		want   string
	}{
		{"no files", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.Files = nil }, "no app-compose.json"},
		{"no era", sampleBoot(""), func(*measure.BootInput) {}, "unknown event order"},
		{"no root file system hash", sampleBoot(measure.Era040), func(in *measure.BootInput) { in.RootFSHash = nil }, "root file system hash"},
		{"no CA hash", withKMS(sampleBoot(measure.Era03)), func(in *measure.BootInput) { in.CACertHash = nil }, "CA certificate"},
		{"no mr-kms", withKMS(sampleBoot(measure.Era0511)), func(in *measure.BootInput) { in.MRKMS = nil }, "mr_aggregated"},
		{"short os-image-hash", withKMS(sampleBoot(measure.Era06)), func(in *measure.BootInput) { in.OSImageHash = make([]byte, 31) }, "got 31 bytes, want 32"},
		{"no storage", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.Files.Compose.StorageFS = "" }, "supply the storage file system"},
		{"two storages", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.StorageFS = "zfs" }, `app-compose.json says "ext4"`},
		{"no randomness", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.Rand = nil }, "no source of random bytes"},
		{"too little randomness", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.Rand = bytes.NewReader(foreign[1:]) }, "unexpected EOF"},
		{"short seed", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.InstanceIDSeed = foreign[1:] }, "seed has 19 bytes"},
		{"foreign app_id without KMS", sampleBoot(measure.Era042), func(in *measure.BootInput) { in.Files.Instance.AppID = foreign }, "without a KMS"},
		{"short app_id", withKMS(sampleBoot(measure.Era042)), func(in *measure.BootInput) { in.Files.Instance.AppID = foreign[1:] }, "app_id has 19 bytes"},
		{"KMS without id", withKMS(sampleBoot(measure.Era042)), func(in *measure.BootInput) { in.Files.AppKeys = nil }, "supply .appkeys.json"},
		{"other provider", withKMS(sampleBoot(measure.Era042)), func(in *measure.BootInput) { in.Files.Compose.KeyProvider = measure.KeyProviderLocal }, "asks for key provider local"},
		{"other provider id", withKMS(sampleBoot(measure.Era042)), func(in *measure.BootInput) { in.Files.Compose.KeyProviderID = foreign }, "demands key_provider_id"},
		{"GPU before 0.6", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.GPUAttestation = []byte("{}") }, "has no gpu-attestation"},
		{"GPU not JSON", sampleBoot(measure.Era06), func(in *measure.BootInput) { in.GPUAttestation = []byte("{") }, "not valid JSON"},
		{"loose agent-config", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.AgentConfig = []byte(`{"a": 1}`) }, "RFC 8785"},
		{"empty agent-config", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.AgentConfig = []byte(`{}`) }, "empty object"},
		{"long agent-config", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.AgentConfig = make([]byte, 4097) }, "at most 4096"},
		{"wrong curve", sampleBoot(measure.Era0511), func(in *measure.BootInput) { in.AgentKey = p384 }, "P-256"},
	} {
		c.change(&c.in)
		seq, err := measure.BootSequence(c.in)
		if err == nil || !strings.Contains(err.Error(), c.want) || seq != nil {
			t.Errorf("%s: got %v, %v, want an error with %q", c.name, seq, err, c.want)
		}
	}
}

func TestBootAppID(t *testing.T) {
	foreign := bytes.Repeat([]byte{9}, 20)
	sum := measure.ComposeHash(measure.SampleApp().AppCompose)
	for _, c := range []struct {
		in   measure.BootInput
		want []byte
	}{
		{withKMS(sampleBoot(measure.Era0511)), foreign},
		{sampleBoot(measure.Era0511), sum[:20]}, // ignored, as dstack does
		{sampleBoot(measure.Era06), foreign},
	} {
		c.in.Files.Instance.AppID = foreign
		seq, err := measure.BootSequence(c.in)
		if err != nil {
			t.Fatal(err)
		}
		if got := bootPayload(seq, measure.EventAppID); !bytes.Equal(got, c.want) {
			t.Errorf("%s: app-id %x, want %x", c.in.Era, got, c.want)
		}
	}
}

func TestInstanceIDSeed(t *testing.T) {
	kept := bytes.Repeat([]byte{5}, 20)
	fresh := bytes.Repeat([]byte{6}, 20)
	f := measure.SampleApp()
	f.Instance.InstanceIDSeed = kept
	if got, err := measure.InstanceIDSeed(f, bytes.NewReader(fresh)); err != nil || !bytes.Equal(got, fresh) {
		t.Errorf("without a key provider: got %x, %v, want a fresh seed", got, err)
	}
	f.Compose.KeyProvider = measure.KeyProviderLocal
	if got, err := measure.InstanceIDSeed(f, nil); err != nil || !bytes.Equal(got, kept) {
		t.Errorf("with a key provider: got %x, %v, want the kept seed", got, err)
	}
	f.Compose.NoInstanceID = true
	if got, err := measure.InstanceIDSeed(f, nil); err != nil || got != nil {
		t.Errorf("no_instance_id: got %x, %v, want none", got, err)
	}
	in := sampleBoot(measure.Era0511)
	in.InstanceIDSeed, in.Rand = kept, nil
	seq, err := measure.BootSequence(in)
	if err != nil {
		t.Fatal(err)
	}
	sum := measure.ComposeHash(in.Files.AppCompose)
	h := sha256.Sum256(append(slices.Clone(kept), sum[:20]...))
	if got := bootPayload(seq, measure.EventInstanceID); !bytes.Equal(got, h[:20]) {
		t.Errorf("instance-id %x, want %x", got, h[:20])
	}
}

func TestParseEra(t *testing.T) {
	for name, want := range map[string]measure.Era{"0.3": measure.Era03, "0.5.0": measure.Era042, "0.5.11": measure.Era0511} {
		if got, err := measure.ParseEra(name); err != nil || got != want {
			t.Errorf("ParseEra(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"", "0.5", "0.7", " 0.6"} {
		if got, err := measure.ParseEra(name); err == nil {
			t.Errorf("ParseEra(%q) = %q, want an error", name, got)
		}
	}
}

func TestGPUPolicyHash(t *testing.T) {
	const none = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
	for _, c := range []struct{ policy, want string }{
		{"", none}, {"{ }", none},
		{`{"b":1, "a":true}`, fmt.Sprintf("%x", sha256.Sum256([]byte(`{"a":true,"b":1}`)))},
	} {
		var policy json.RawMessage
		if c.policy != "" {
			policy = json.RawMessage(c.policy)
		}
		got, err := measure.GPUPolicyHash(policy)
		if err != nil || hex.EncodeToString(got) != c.want {
			t.Errorf("%q: got %x, %v, want %s", c.policy, got, err, c.want)
		}
	}
}

// TestRuntimeDigests checks the published digests of dstack events.
func TestRuntimeDigests(t *testing.T) {
	for _, c := range []struct {
		version             int
		name, payload, want string
	}{
		{1, "system-preparing", "", "f9974020ef507068183313d0ca808e0d1ca9b2d1ad0c61f5784e7157c362c06536f5ddacdad4451693f48fcc72fff624"},
		{1, "boot-mr-done", "", "98bd7e6bd3952720b65027fd494834045d06b4a714bf737a06b874638b3ea00ff402f7f583e3e3b05e921c8570433ac6"},
		{1, "system-ready", "", "1a76b2a80a0be71eae59f80945d876351a7a3fb8e9fd1ff1cede5734aa84ea11fd72b4edfbb6f04e5a85edd114c751bd"},
		{1, "app-id", "deadbeef", "67b4be4efed0893cfa2bb1d35dca209ad8348b4c97f980807bcde8b9a0f26398dd0923d6eccb5aa2096d98046da8740f"},
		{2, "compose-hash", "abcd", "9dde1673f544faa94b921825209593ddde08d0baf9cd6990175dffaf3081f1bb10311d56de189491feb33842a050ad7b"},
		{2, "system-ready", "", "8c748e7cf5aa7ef37f036bd15cb78308279511a408bcd2aab352802cccd79cf07d7d5e4d174c5b311f2d98f35f53ccd6"},
	} {
		e, err := measure.NewRuntimeEvent(c.name, bootHex(t, c.payload), c.version)
		if err != nil || e.Digest.String() != c.want {
			t.Errorf("%s v%d: got %s, %v, want %s", c.name, c.version, e.Digest, err, c.want)
		}
	}
}

func TestSampleApp(t *testing.T) {
	f := measure.SampleApp()
	if f.Compose.Name != "tdx-agent-sample" || f.Compose.KeyProvider != measure.KeyProviderNone || f.Compose.Runner != "docker-compose" {
		t.Errorf("sample application: %+v", f.Compose)
	}
	if !json.Valid([]byte(f.SysConfig.VMConfig)) {
		t.Errorf("vm_config is not JSON: %q", f.SysConfig.VMConfig)
	}
	seq, err := measure.BootSequence(sampleBoot(measure.Era0511))
	if err != nil {
		t.Fatal(err)
	}
	var events []measure.Event
	for _, e := range seq {
		events = append(events, bootEvent(t, e.Name, e.Payload))
	}
	id, err := measure.IdentityOf(events)
	var bad *measure.IdentityError
	if errors.As(err, &bad) || !id.Ready || len(id.AppID) != 20 || id.KeyProvider != `{"name":"none","id":""}` {
		t.Errorf("identity of the sample: %+v, %v", id, err)
	}
}
