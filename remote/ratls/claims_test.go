package ratls_test

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

func sampleInfo() *ratls.AppInfo {
	return &ratls.AppInfo{
		AppID: bytes.Repeat([]byte{1}, 20), ComposeHash: bytes.Repeat([]byte{2}, 32), InstanceID: []byte{}, DeviceID: bytes.Repeat([]byte{4}, 32),
		MRSystem: [32]byte{5}, MRAggregated: [32]byte{6}, OSImageHash: []byte{}, KeyProviderInfo: bytes.Repeat([]byte("p"), 300),
		InitScriptHashes: [][]byte{bytes.Repeat([]byte{9}, 32)},
	}
}

func TestAppInfoBytes(t *testing.T) {
	info := &ratls.AppInfo{AppID: []byte{1, 2}, MRSystem: [32]byte{5}, MRAggregated: [32]byte{6}, KeyProviderInfo: []byte("{}")}
	want := "99c4020102c400c400c400c42005" + strings.Repeat("00", 31) + "c42006" + strings.Repeat("00", 31) + "c400c4027b7dc0"
	if got := hex.EncodeToString(info.Marshal()); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	info = sampleInfo()
	got, err := ratls.ParseAppInfo(info.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(info, got); diff != "" {
		t.Error(diff)
	}
	// The other way in which Rust writes bytes: an array of integers.
	b := append([]byte{0x99, 0x93, 1, 0xcc, 2, 0xcc, 200}, info.Marshal()[23:]...)
	if got, err = ratls.ParseAppInfo(b); err != nil || !bytes.Equal(got.AppID, []byte{1, 2, 200}) {
		t.Errorf("%v %+v", err, got)
	}
}

// asMap is application info in dstack 0.6's form but for app_id, with another member.
func asMap(t *testing.T, name string, value []byte) []byte {
	t.Helper()
	b := []byte{0x80}
	add := func(name string, value []byte) {
		b[0]++
		b = append(append(append(b, 0xa0|byte(len(name))), name...), value...)
	}
	hash := append([]byte{0xc4, 32}, bytes.Repeat([]byte{5}, 32)...)
	for _, name := range []string{"compose_hash", "instance_id", "device_id", "mr_system", "mr_aggregated", "os_image_hash", "key_provider_info"} {
		add(name, hash)
	}
	if name != "" {
		add(name, value)
	}
	return b
}

func TestAppInfoAsMap(t *testing.T) {
	want := bytes.Repeat([]byte{5}, 32)
	b := asMap(t, "app_id", []byte{0xc4, 2, 7, 8})
	info, err := ratls.ParseAppInfo(b)
	if err != nil || !bytes.Equal(info.AppID, []byte{7, 8}) || !bytes.Equal(info.ComposeHash, want) || info.MRSystem != [32]byte(want) || info.MRAggregated != [32]byte(want) ||
		!bytes.Equal(info.OSImageHash, want) || !bytes.Equal(info.KeyProviderInfo, want) || !bytes.Equal(info.InstanceID, want) || !bytes.Equal(info.DeviceID, want) || info.InitScriptHashes != nil {
		t.Fatalf("%+v (%v)", info, err)
	}
	// What is not known is skipped, of whatever form; the last member is optional.
	b[0] += 2
	for _, value := range [][]byte{{0xc0}, {5}, {0xff}, {0xcd, 1, 2}, {0xcf, 1, 2, 3, 4, 5, 6, 7, 8}, {0xa1, 'x'}, {0xd9, 1, 'x'}, {0xc4, 1, 9}, {0x92, 1, 0x91, 2}, {0xc3}} {
		more := append(append(append(bytes.Clone(b), 0xa3, 'n', 'e', 'w'), value...), append([]byte{0xa0 | 18}, "init_script_hashes\x91\xc4\x01\x09"...)...)
		info, err := ratls.ParseAppInfo(more)
		if err != nil || len(info.InitScriptHashes) != 1 || info.InitScriptHashes[0][0] != 9 {
			t.Errorf("%x: %+v (%v)", value, info, err)
		}
	}
}

func TestAppInfoRefusals(t *testing.T) {
	good := sampleInfo().Marshal()
	for name, c := range map[string]struct {
		b     []byte
		words string
	}{
		"empty":             {nil, "ends in the middle"},
		"map of numbers":    {[]byte{0x81, 1, 1}, "want a member's name"},
		"map without all":   {asMap(t, "", nil), "1 members are missing"},
		"map, twice":        {asMap(t, "device_id", []byte{0xc4, 0}), "\"device_id\" is there twice"},
		"map, cut":          {asMap(t, "app_id", []byte{0xc4, 9}), "ends in the middle"},
		"map, too many":     {[]byte{0xde, 1, 0}, "256 members, want at most 32"},
		"map, trailing":     {append(asMap(t, "app_id", []byte{0xc4, 0}), 0), "1 bytes follow it"},
		"map, too deep":     {asMap(t, "new", bytes.Repeat([]byte{0x91}, 9)), "in a member that is not known"},
		"map, an extension": {asMap(t, "new", []byte{0xd4, 0, 0}), "in a member that is not known"},
		"seven members":     {[]byte{0x97}, "7 members, want 9"},
		"ten members":       {[]byte{0x9a}, "10 members, want 9"},
		"cut":               {good[:len(good)-1], "ends in the middle"},
		"trailing":          {append(bytes.Clone(good), 0), "1 bytes follow it"},
		"member is text":    {append([]byte{0x99, 0xa1, 'x'}, good[23:]...), "format 0xa1"},
		"member too long":   {append([]byte{0x99, 0xc4, 65}, make([]byte, 65)...), "65 bytes, want at most 64"},
		"integer over 255":  {[]byte{0x99, 0x91, 0xcd, 1, 0}, "want a byte"},
		"short hash":        {[]byte{0x99, 0xc4, 0, 0xc4, 0, 0xc4, 0, 0xc4, 0, 0xc4, 1, 1}, "1 bytes, want 32"},
		"many scripts":      {append(bytes.Clone(good[:len(good)-35]), 0xdc, 0xff, 0xff), "init scripts"},
		"large":             {make([]byte, 4097), "want at most 4096"},
	} {
		if _, err := ratls.ParseAppInfo(c.b); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: error is %v, want it to say %q", name, err, c.words)
		}
	}
}

func TestIssuerClaims(t *testing.T) {
	key, _ := newKey(t)
	id := strings.Repeat("i", 20)
	c, err := ratls.ParseIssuerClaims(issue(t, key, ext(ratls.OIDAppID, id), ratls.UsageExtension(ratls.UsageApp), sampleInfo().Extension()))
	if err != nil || string(c.AppID) != id || c.Usage != "app:custom" || c.AppInfo == nil || c.AppInfo.MRSystem[0] != 5 {
		t.Errorf("%v %+v", err, c)
	}
	if c, err = ratls.ParseIssuerClaims(issue(t, key)); err != nil || c.AppID != nil || c.Usage != "" || c.AppInfo != nil {
		t.Errorf("%v %+v", err, c)
	}
	for words, e := range map[string]pkix.Extension{
		"19 bytes, want 20":      ext(ratls.OIDAppID, id[1:]),
		"0 bytes, want 20":       ext(ratls.OIDAppID, ""),
		"want at most 25":        ext(ratls.OIDAppID, id+"......"),
		"want text":              ext(ratls.OIDUsage, "\xff"),
		`usage ""`:               ext(ratls.OIDUsage, ""),
		"want at most 69":        ext(ratls.OIDUsage, strings.Repeat("u", 70)),
		"application info: ":     ext(ratls.OIDAppInfo, "\x99"),
		"not a DER OCTET STRING": {Id: ratls.OIDUsage, Value: []byte("kms:rpc")},
	} {
		if _, err := ratls.ParseIssuerClaims(issue(t, key, e)); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("error is %v, want it to say %q", err, words)
		}
	}
}

func TestAppInfoOf(t *testing.T) {
	ev := evidence(t, measure.ReportData{}, measure.EventV1)
	info, err := ratls.AppInfoOf(ev, []byte{1})
	if err != nil || !bytes.Equal(info.AppID, bytes.Repeat([]byte{7}, 20)) {
		t.Fatalf("%v %+v", err, info)
	}
	q, err := measure.ParseQuote(ev.Quote)
	if err != nil || info.MRAggregated != measure.MRAggregated(q.Body.Registers) || info.MRSystem != measure.MRSystem(q.Body.Registers, nil) {
		t.Errorf("%v %+v", err, info)
	}
	ev.Quote[0] = 9
	if _, err := ratls.AppInfoOf(ev, nil); err == nil {
		t.Error("took a quote of version 9")
	}
}
