package measure_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/sha3"
	"tdx-agent/measure"
)

// identityRegisters reads the registers from a version 4 quote, at the offsets of
// the TD report body (Intel TDX DCAP quote format).
func identityRegisters(t *testing.T, quote []byte) measure.Registers {
	t.Helper()
	if len(quote) < 632 {
		t.Fatalf("quote has %d bytes", len(quote))
	}
	at := func(offset int) (d measure.Digest) {
		copy(d[:], quote[offset:])
		return d
	}
	r := measure.Registers{MRTD: at(184), MRConfigID: at(232), MROwner: at(280), MROwnerConfig: at(328)}
	for i := range r.RTMR {
		r.RTMR[i] = at(376 + 48*i)
	}
	return r
}

func identityReplay(t *testing.T, events []measure.Event) measure.Digest {
	t.Helper()
	rtmr, err := measure.Replay(events)
	if err != nil {
		t.Fatal(err)
	}
	return rtmr[3]
}

// TestIdentityOfGateway checks every value that a real 0.5.1-era guest reports of
// itself against its quote and log.
func TestIdentityOfGateway(t *testing.T) {
	const file = "attestations/nr-gateway-report.json"
	var doc struct {
		IntelQuote string `json:"intel_quote"`
		Info       struct {
			AppID        string `json:"app_id"`
			InstanceID   string `json:"instance_id"`
			MRAggregated string `json:"mr_aggregated"`
			OSImageHash  string `json:"os_image_hash"`
			KeyProvider  string `json:"key_provider_info"`
			ComposeHash  string `json:"compose_hash"`
		}
	}
	if err := json.Unmarshal(bootFixture(t, file), &doc); err != nil {
		t.Fatal(err)
	}
	events := bootFixtureEvents(t, file, "event_log")
	id, err := measure.IdentityOf(events)
	if err != nil {
		t.Fatal(err)
	}
	regs := identityRegisters(t, bootHex(t, doc.IntelQuote))
	if got := identityReplay(t, events); got != regs.RTMR[3] {
		t.Fatalf("log gives RTMR3 %s, quote has %s", got, regs.RTMR[3])
	}
	for _, c := range []struct {
		name, want string
		got        []byte
	}{
		{"app_id", doc.Info.AppID, id.AppID},
		{"instance_id", doc.Info.InstanceID, id.InstanceID},
		{"compose_hash", doc.Info.ComposeHash, id.ComposeHash},
		{"os_image_hash", doc.Info.OSImageHash, id.OSImageHash},
	} {
		if hex.EncodeToString(c.got) != c.want {
			t.Errorf("%s is %x, want %s", c.name, c.got, c.want)
		}
	}
	if id.KeyProvider != doc.Info.KeyProvider || !id.Ready || id.Late != nil || len(id.MRKMS) != 32 {
		t.Errorf("identity %+v", id)
	}
	if got := measure.MRAggregated(regs); hex.EncodeToString(got[:]) != doc.Info.MRAggregated {
		t.Errorf("mr_aggregated is %x, want %s", got, doc.Info.MRAggregated)
	}
	checkIdentityMRConfig(t, regs, id)
}

func checkIdentityMRConfig(t *testing.T, regs measure.Registers, id measure.Identity) {
	t.Helper()
	claims := measure.MRConfigClaims{ComposeHash: [32]byte(id.ComposeHash)}
	if v, err := measure.CheckMRConfigID(regs.MRConfigID, claims); v != 1 || err != nil {
		t.Errorf("MRCONFIGID: version %d, %v, want 1", v, err)
	}
	claims.ComposeHash[0] ^= 1
	if _, err := measure.CheckMRConfigID(regs.MRConfigID, claims); err == nil {
		t.Error("MRCONFIGID of another application accepted")
	}
}

func TestIdentityOfOldLogs(t *testing.T) {
	events := bootFixtureEvents(t, "attestations/zk-livy.json", "eventLog")
	id, err := measure.IdentityOf(events)
	if err != nil || id.Ready || len(id.CACertHash) != 32 || len(id.RootFSHash) != 32 || id.KeyProvider != "" {
		t.Errorf("0.3: %+v, %v", id, err)
	}
	events = bootFixtureEvents(t, "eventlogs/nm-2511-tcbinfo.json", "event_log")
	id, err = measure.IdentityOf(events)
	if err != nil || !id.Ready || id.InstanceID == nil || len(id.InstanceID) != 0 {
		t.Errorf("0.4.2 without instance id: %+v, %v", id, err)
	}
	compose := measure.ComposeHash(bootFixture(t, "eventlogs/nm-2511-appcompose.json"))
	if !bytes.Equal(compose[:], id.ComposeHash) {
		t.Errorf("compose_hash is %x, want %x", compose, id.ComposeHash)
	}
	other := measure.ComposeHash(bootFixture(t, "eventlogs/ph-sim-appcompose.json"))
	id, _ = measure.IdentityOf(bootFixtureEvents(t, "eventlogs/ph-sim-eventlog.json"))
	if bytes.Equal(other[:], id.ComposeHash) {
		t.Error("ph-sim-appcompose hashes to the event, though it should not")
	}
}

func TestMRConfigIDOfQuotes(t *testing.T) {
	var doc struct{ Quote string }
	if err := json.Unmarshal(bootFixture(t, "attestations/dk-lite-getquote.json"), &doc); err != nil {
		t.Fatal(err)
	}
	id, err := measure.IdentityOf(bootFixtureEvents(t, "attestations/dk-lite-getquote.json", "event_log"))
	if err != nil {
		t.Fatal(err)
	}
	checkIdentityMRConfig(t, identityRegisters(t, bootHex(t, doc.Quote)), id)

	gas := identityRegisters(t, bootHex(t, strings.TrimSpace(string(bootFixture(t, "quotes/dq-gas-quote.hex")))))
	hash := bootHex(t, "12a20aed7d6c68601e9f6e108a93b4199ae7231684307ffc4833c9cd08d45de7")
	if got := measure.MRConfigIDV1([32]byte(hash)); got != gas.MRConfigID {
		t.Errorf("got %s, want %s", got, gas.MRConfigID)
	}
	coco := identityRegisters(t, bootFixture(t, "quotes/coco-quote6.bin"))
	if _, err := measure.CheckMRConfigID(coco.MRConfigID, measure.MRConfigClaims{}); err == nil || !strings.Contains(err.Error(), "unknown version") {
		t.Errorf("a foreign MRCONFIGID: %v, want unknown version", err)
	}
}

func TestMRSystem(t *testing.T) {
	var r measure.Registers
	for i, d := range []*measure.Digest{&r.MRTD, &r.RTMR[0], &r.RTMR[1], &r.RTMR[2], &r.RTMR[3]} {
		d[0] = byte(i + 1)
	}
	hash := func(parts ...[]byte) [32]byte { return sha256.Sum256(bytes.Join(parts, nil)) }
	var zero [32]byte
	if got, want := measure.MRSystem(r, nil), hash(r.MRTD[:], r.RTMR[0][:], r.RTMR[1][:], r.RTMR[2][:], zero[:]); got != want {
		t.Errorf("mr_system without key provider is %x, want %x", got, want)
	}
	kp := measure.KeyProvider{Kind: measure.KeyProviderNone}.Payload()
	kpHash := sha256.Sum256([]byte(`{"name":"none","id":""}`))
	if got, want := measure.MRSystem(r, kp), hash(r.MRTD[:], r.RTMR[0][:], r.RTMR[1][:], r.RTMR[2][:], kpHash[:]); got != want {
		t.Errorf("mr_system is %x, want %x", got, want)
	}
	all := [][]byte{r.MRTD[:], r.RTMR[0][:], r.RTMR[1][:], r.RTMR[2][:], r.RTMR[3][:]}
	if got, want := measure.MRAggregated(r), hash(all...); got != want {
		t.Errorf("mr_aggregated is %x, want %x", got, want)
	}
	r.MROwnerConfig[47] = 1 // one of the three brings in all of them
	all = append(all, r.MRConfigID[:], r.MROwner[:], r.MROwnerConfig[:])
	if got, want := measure.MRAggregated(r), hash(all...); got != want {
		t.Errorf("mr_aggregated with MROWNERCONFIG is %x, want %x", got, want)
	}
	if got := measure.DeviceID(nil); hex.EncodeToString(got[:]) != "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Errorf("device_id of a guest is %x", got)
	}
}

func TestMRConfigIDV2(t *testing.T) {
	compose, app := [32]byte{1}, [20]byte{2}
	for i, kind := range []measure.KeyProviderKind{measure.KeyProviderNone, measure.KeyProviderLocal, measure.KeyProviderKMS, measure.KeyProviderTPM} {
		p := measure.KeyProvider{Kind: kind, ID: []byte{3, 4}}
		h := sha3.NewLegacyKeccak256()
		h.Write(compose[:])
		h.Write(app[:])
		h.Write([]byte{byte(i), 3, 4})
		want := measure.Digest{2}
		copy(want[1:], h.Sum(nil))
		got, err := measure.MRConfigIDV2(compose, app, p)
		if err != nil || got != want {
			t.Errorf("%s: got %s, %v, want %s", kind, got, err, want)
		}
		claims := measure.MRConfigClaims{ComposeHash: compose, AppID: app, KeyProvider: p}
		if v, err := measure.CheckMRConfigID(got, claims); v != 2 || err != nil {
			t.Errorf("%s: version %d, %v, want 2", kind, v, err)
		}
	}
	if _, err := measure.MRConfigIDV2(compose, app, measure.KeyProvider{}); err == nil {
		t.Error("no key provider kind: want an error")
	}
}

func TestMRConfigIDV3(t *testing.T) {
	claims := measure.MRConfigClaims{
		ComposeHash: [32]byte(bytes.Repeat([]byte{0x22}, 32)), AppID: [20]byte(bytes.Repeat([]byte{0x11}, 20)),
		KeyProvider:      measure.KeyProvider{Kind: measure.KeyProviderKMS, ID: bytes.Repeat([]byte{0x33}, 32)},
		InstanceID:       bytes.Repeat([]byte{0x44}, 20),
		GPUPolicyHash:    bytes.Repeat([]byte{0x55}, 32),
		InitScriptHashes: [][]byte{bytes.Repeat([]byte{0x66}, 32)},
	}
	const whole = `"compose_hash":"2222222222222222222222222222222222222222222222222222222222222222","key_provider":"kms"`
	for _, c := range []struct{ document, want string }{
		{`{` + whole + `}`, ""},
		{`{"app_id":"1111111111111111111111111111111111111111",` + whole +
			`,"gpu_policy_hash":"` + strings.Repeat("55", 32) + `","init_script_hashes":["` + strings.Repeat("66", 32) +
			`"],"instance_id":"` + strings.Repeat("44", 20) + `","key_provider_id":"` + strings.Repeat("33", 32) + `","version":3}`, ""},
		{`{"key_provider":"kms"}`, "compose_hash is missing"},
		{`{` + whole + `,"app_id":"00"}`, "app_id is 00"},
		{`{` + whole + `,"app_id":"zz"}`, "app_id"},
		{`{` + whole + `,"version":2}`, "version is 2"},
		{`{` + whole + `,"init_script_hashes":[]}`, "init_script_hashes"},
		{`{` + whole + `,"extra":1}`, `unknown member "extra"`},
		{`{` + whole + `,"key_provider":"kms"}`, "twice"},
		{`{"compose_hash":"` + strings.Repeat("22", 32) + `","key_provider":"none"}`, "key_provider is"},
		{`[]`, "want a JSON object"},
	} {
		claims.Document = c.document
		_, err := measure.CheckMRConfigID(measure.MRConfigIDV3(c.document), claims)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.document, err, c.want)
		}
	}
	claims.Document = `{` + whole + `}`
	if _, err := measure.CheckMRConfigID(measure.MRConfigIDV3(claims.Document+" "), claims); err == nil || !strings.Contains(err.Error(), "claims give") {
		t.Errorf("document of other bytes: %v", err)
	}
	claims.Document = ""
	if _, err := measure.CheckMRConfigID(measure.Digest{3}, claims); err == nil || !strings.Contains(err.Error(), "needs the mr_config document") {
		t.Errorf("no document: %v", err)
	}
	if v, err := measure.CheckMRConfigID(measure.Digest{}, claims); v != 0 || err != nil {
		t.Errorf("unused: version %d, %v, want 0", v, err)
	}
}

func TestParseKeyProvider(t *testing.T) {
	p := measure.KeyProvider{Kind: measure.KeyProviderLocal, ID: []byte{0xab, 1}}
	if got := string(p.Payload()); got != `{"name":"local-sgx","id":"ab01"}` {
		t.Errorf("payload %s", got)
	}
	if got, err := measure.ParseKeyProvider(p.Payload()); err != nil || got.Kind != p.Kind || !bytes.Equal(got.ID, p.ID) {
		t.Errorf("got %+v, %v, want %+v", got, err, p)
	}
	for _, s := range []string{
		``, `null`, `{}`, `{"name":"","id":""}`, `{"name":"local","id":""}`, `{"name":"kms","id":"AB"}`, `{"name":"kms","id":"a"}`,
		`{"name":"kms", "id":""}`, `{"id":"","name":"kms"}`, `{"name":"kms","id":"","id":"ab"}`, `{"Name":"kms","id":""}`,
		`{"name":"other","id":""}`, `{"name":"kms","id":""}x`, `{"name":"kms","id":"` + strings.Repeat("00", 600) + `"}`,
	} {
		if got, err := measure.ParseKeyProvider([]byte(s)); err == nil {
			t.Errorf("%q: got %+v, want an error", s, got)
		}
	}
}

func identityLog(t *testing.T) []measure.Event {
	t.Helper()
	h := bytes.Repeat([]byte{1}, 32)
	var log []measure.Event
	for _, e := range []measure.BootEvent{
		{measure.EventSystemPreparing, nil}, {measure.EventAppID, h[:20]}, {measure.EventComposeHash, h},
		{measure.EventInitScriptHash, h}, {measure.EventInitScriptHash, h},
		{measure.EventInstanceID, h[:20]}, {measure.EventBootMRDone, nil},
		{measure.EventKeyProvider, []byte(`{"name":"none","id":""}`)}, {measure.EventStorageFS, []byte("zfs")},
		{measure.EventAgentConfig, []byte(`{"a":1}`)}, {measure.EventAgentKey, h}, {measure.EventSystemReady, nil},
	} {
		log = append(log, bootEvent(t, e.Name, e.Payload))
	}
	return log
}

func TestIdentityOf(t *testing.T) {
	log := identityLog(t)
	id, err := measure.IdentityOf(log)
	if err != nil || !id.Ready || len(id.InitScriptHashes) != 2 || id.StorageFS != "zfs" || len(id.AgentKey) != 32 || string(id.AgentConfig) != `{"a":1}` {
		t.Fatalf("%+v, %v", id, err)
	}
	// Events of other registers, and of applications, say nothing.
	app := bootEvent(t, measure.EventAppID, make([]byte, 20))
	other := app
	other.IMR = 2
	id, err = measure.IdentityOf(append([]measure.Event{other, bootEvent(t, "my-event", nil)}, log...))
	if err != nil || id.AppID[0] != 1 {
		t.Errorf("events that are not runtime events: %x, %v", id.AppID, err)
	}
	id, err = measure.IdentityOf(append(log, app))
	if err != nil || id.AppID[0] != 1 || len(id.Late) != 1 || id.Late[0] != measure.EventAppID {
		t.Errorf("late event: %x, late %v, %v", id.AppID, id.Late, err)
	}
	if id, err = measure.IdentityOf(log[:len(log)-1]); err != nil || id.Ready {
		t.Errorf("log without system-ready: ready %v, %v", id.Ready, err)
	}
}

func TestIdentityOfRefuses(t *testing.T) {
	h := bytes.Repeat([]byte{2}, 32)
	wrong := bootEvent(t, measure.EventAppID, h[:20])
	wrong.Digest[0] ^= 1
	for _, c := range []struct {
		name  string
		extra measure.Event // put first
		want  string
	}{
		{"second app-id", bootEvent(t, measure.EventAppID, h[:20]), "second time"},
		{"second agent-key", bootEvent(t, measure.EventAgentKey, h), "second time"},
		{"digest", wrong, "digest"},
		{"long app-id", bootEvent(t, measure.EventAppID, h), "32 bytes, want 20"},
		{"short mr-kms", bootEvent(t, measure.EventMRKMS, h[1:]), "31 bytes, want 32"},
		{"short gpu-policy-hash", bootEvent(t, measure.EventGPUPolicyHash, nil), "0 bytes, want 32"},
		{"short init-script-hash", bootEvent(t, measure.EventInitScriptHash, h[1:]), "31 bytes, want 32"},
		{"marker with payload", bootEvent(t, measure.EventBootMRDone, h), "32 bytes, want 0"},
		{"storage", bootEvent(t, measure.EventStorageFS, []byte("btrfs")), "want zfs or ext4"},
		{"key provider", bootEvent(t, measure.EventKeyProvider, []byte("kms")), "key provider"},
		{"agent-config", bootEvent(t, measure.EventAgentConfig, []byte(`{"a":1,"a":2}`)), "twice"},
		{"gpu-attestation", bootEvent(t, measure.EventGPUAttestation, make([]byte, 5000)), "at most 4096"},
	} {
		_, err := measure.IdentityOf(append([]measure.Event{c.extra}, identityLog(t)...))
		var bad *measure.IdentityError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	var six []measure.Event
	for range 6 {
		six = append(six, bootEvent(t, measure.EventInitScriptHash, h))
	}
	if _, err := measure.IdentityOf(six); err == nil || !strings.Contains(err.Error(), "more than 5 times") {
		t.Errorf("six init scripts: %v", err)
	}
	// The first of a name wins even when refused, as in dstack's own readers.
	id, _ := measure.IdentityOf(append([]measure.Event{bootEvent(t, measure.EventComposeHash, h)}, identityLog(t)...))
	if !bytes.Equal(id.ComposeHash, h) {
		t.Errorf("compose-hash %x, want the first one", id.ComposeHash)
	}
}

func TestReservedEvents(t *testing.T) {
	for _, name := range []string{"agent-key", "agent-config", "app-id", "compose-hash", "key-provider", "instance-id",
		"system-ready", "boot-mr-done", "os-image-hash", "mr-kms", "rootfs-hash", "storage-fs", "init-script-hash"} {
		if !measure.ReservedEvent(name) || measure.OnceOnly(name) != (name != "init-script-hash") {
			t.Errorf("%s: reserved %v, once only %v", name, measure.ReservedEvent(name), measure.OnceOnly(name))
		}
	}
	for _, name := range []string{"", "App-ID", "mpc-image-digest"} {
		if measure.ReservedEvent(name) || measure.OnceOnly(name) {
			t.Errorf("%q is reserved", name)
		}
	}
}

func TestBootTimeEvents(t *testing.T) {
	log := identityLog(t)
	cut, ok := measure.BootTimeEvents(log)
	if !ok || cut[len(cut)-1].Name != measure.EventBootMRDone || len(cut) != 7 {
		t.Errorf("got %d events, %v", len(cut), ok)
	}
	if cut, ok = measure.BootTimeEvents(log[:3]); ok || len(cut) != 3 {
		t.Errorf("without boot-mr-done: got %d events, %v", len(cut), ok)
	}
}

func FuzzParseKeyProvider(f *testing.F) {
	f.Add([]byte(`{"name":"kms","id":"3059"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := measure.ParseKeyProvider(b); err == nil && !bytes.Equal(p.Payload(), b) {
			t.Errorf("%q re-encodes as %q", b, p.Payload())
		}
	})
}

func ExampleKeyProvider() {
	fmt.Printf("%s\n", measure.KeyProvider{Kind: measure.KeyProviderTPM}.Payload())
	// Output: {"name":"tpm","id":""}
}
