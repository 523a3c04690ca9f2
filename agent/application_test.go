package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/status"
)

// TestExampleApplication reads the declaration that the example shows as a comment: it
// must be legal once the line with both ways to name callers is decided, and hold every
// key there is.
func TestExampleApplication(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "agent.toml.example"))
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(b), "#[[application]]\n")
	if !ok {
		t.Fatal("agent.toml.example shows no [[application]]")
	}
	var text strings.Builder
	text.WriteString("[[application]]\n")
	for line := range strings.Lines(block) {
		if line = strings.TrimPrefix(line, "#"); !strings.HasPrefix(line, "#") {
			text.WriteString(line)
		}
	}
	cfg := newConfig()
	if err := cfg.decode("example", []byte(text.String())); err != nil {
		t.Fatal(err)
	}
	var shown, all map[string][]map[string]any
	if _, err := toml.Decode(text.String(), &shown); err != nil {
		t.Fatal(err)
	}
	full := ApplicationConfig{Name: "a", Grants: []string{"read"}, UIDs: []uint32{1}, KeyPaths: []string{"a/"}, Events: []string{"a/"}, Limits: map[string]guestapi.Rate{"key": {PerSecond: 1, Burst: 1}}}
	var every strings.Builder
	if err := toml.NewEncoder(&every).Encode(map[string]any{"application": []ApplicationConfig{full}}); err != nil {
		t.Fatal(err)
	}
	if _, err := toml.Decode(every.String(), &all); err != nil {
		t.Fatal(err)
	}
	keys := func(m map[string][]map[string]any) map[string]bool {
		set := map[string]bool{}
		for k := range m["application"][0] {
			set[k] = true
		}
		return set
	}
	if diff := cmp.Diff(keys(all), keys(shown)); diff != "" {
		t.Errorf("agent.toml.example lacks a key of [[application]] or has one too many:\n%s", diff)
	}
}

func TestBadApplications(t *testing.T) {
	const good = "allow_any_uid = true\ngrants = [\"read\", \"key\", \"measure\"]\n"
	many := strings.Repeat("[[application]]\nname = \"a\"\ngrants = [\"read\"]\nallow_any_uid = true\n", 17)
	large := ""
	for i := range maxApplications {
		large += fmt.Sprintf("[[application]]\nname = \"a%d\"\ngrants = [\"key\"]\nallow_any_uid = true\nkey_paths = [%s\"\"]\n", i, strings.Repeat(`"`+strings.Repeat("x", 63)+`/",`, 7))
	}
	for _, tc := range []struct{ name, text, want string }{
		{"no name", "[[application]]\n" + good, "name is \"\""},
		{"name that leaves its folder", "[[application]]\nname = \"../x\"\n" + good, "name is"},
		{"long name", "[[application]]\nname = \"" + strings.Repeat("a", 33) + "\"\n" + good, "name is"},
		{"no grants", "[[application]]\nname = \"a\"\nallow_any_uid = true\n", "grants is empty"},
		{"unknown grant", "[[application]]\nname = \"a\"\nallow_any_uid = true\ngrants = [\"keys\"]\n", `"keys" is none of read, quote`},
		{"grant twice", "[[application]]\nname = \"a\"\nallow_any_uid = true\ngrants = [\"read\", \"read\"]\n", "there twice"},
		{"raw without quote", "[[application]]\nname = \"a\"\nallow_any_uid = true\ngrants = [\"raw_report_data\"]\n", `nothing without "quote"`},
		{"nobody may call", "[[application]]\nname = \"a\"\ngrants = [\"read\"]\n", "nobody may call"},
		{"everybody and somebody", "[[application]]\nname = \"a\"\nuids = [1]\n" + good, "want one of them"},
		{"prefix that opens others", "[[application]]\nname = \"a\"\nkey_paths = [\"a\"]\n" + good, `would open "a2/x" too`},
		{"key_paths without key", "[[application]]\nname = \"a\"\nallow_any_uid = true\ngrants = [\"read\"]\nkey_paths = [\"a/\"]\n", `without the grant "key"`},
		{"events without measure", "[[application]]\nname = \"a\"\nallow_any_uid = true\ngrants = [\"read\"]\nevents = [\"a/\"]\n", `without the grant "measure"`},
		{"key_paths that are none", "[[application]]\nname = \"a\"\nkey_paths = []\n" + good, "key_paths is empty"},
		{"events that are none", "[[application]]\nname = \"a\"\nevents = []\n" + good, "events is empty"},
		{"events with a colon", "[[application]]\nname = \"a\"\nevents = [\"a:\"]\n" + good, "has a colon"},
		{"declared twice", "[[application]]\nname = \"a\"\n" + good + "[[application]]\nname = \"a\"\n" + good, "declared twice"},
		{"unknown key", "[[application]]\nname = \"a\"\nuid = 1\n" + good, `unknown key "application.uid"`},
		{"limit that lets nothing through", "[limits]\nkey = {per_second = 0.0, burst = 1}\n", "limits.key: per_second is 0"},
		{"limit of an application without a burst", "[[application]]\nname = \"a\"\nlimits = {quote = {per_second = 1.0}}\n" + good, "limits.quote: per_second is 1 and burst 0"},
		{"limit of an application that lets nothing through", "[[application]]\nname = \"a\"\nlimits = {key = {per_second = 0, burst = 0}}\n" + good, "limits.key: per_second is 0 and burst 0"},
		{"limit of an application that says nothing", "[[application]]\nname = \"a\"\nlimits = {key = {}}\n" + good, "limits.key: per_second is 0 and burst 0"},
		{"limit of no class", "[[application]]\nname = \"a\"\nlimits = {keys = {per_second = 1, burst = 1}}\n" + good, `limits: "keys" is none of cert, key, measure`},
		{"unknown key of a limit", "[[application]]\nname = \"a\"\nlimits = {key = {per_second = 1, bursts = 1}}\n" + good, `unknown key "application.limits.key.bursts"`},
		{"too many", many, "17 applications"},
		{"more than can be measured", large, "want at most 4096"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := newConfig().decode("agent.toml", []byte(tc.text))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
}

// TestTightenedGrantsNothingMeasured: what is off when the log cannot show that it was
// measured must be all of what is measured.
func TestTightenedGrantsNothingMeasured(t *testing.T) {
	cfg := newConfig()
	cfg.OnForeignExtend, cfg.Kernel.AllowEnvOverrides, cfg.Compat.FullAccess = "serve", true, true
	cfg.Applications = []ApplicationConfig{{Name: "a", Grants: grantNames, AllowAnyUID: true}}
	before := cfg.agentConfig()
	tight := *cfg
	tight.tighten()
	if got := tight.loosened(); len(got) > 0 {
		t.Errorf("still loosened: %v", got)
	}
	if g := tight.Applications[0].grants(); !g.Read || !g.Quote {
		t.Errorf("grants are %+v, want read and quote kept", g)
	}
	if string(cfg.agentConfig()) != string(before) {
		t.Error("the original has changed")
	}
}

// TestApplicationSocketsFromSystemd: systemd must pass exactly the declared ones.
func TestApplicationSocketsFromSystemd(t *testing.T) {
	cfg := newConfig()
	cfg.Applications = []ApplicationConfig{{Name: "web", Grants: []string{"read"}, AllowAnyUID: true}}
	for want, names := range map[string][]string{
		"": {"app-web"},
		`passed no socket named "app-web"; start the .socket units (of application NAME: tdx-agent-app@NAME.socket)`: {},
		`passed 1 sockets named "app-other"`: {"app-web", "app-other"},
		`passed 2 sockets named "app-web"`:   {"app-web", "app-web"},
	} {
		passed := map[string][]net.Listener{}
		for _, name := range append(names, socketDstack, socketTappd, socketAgent, socketAdmin) {
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			check(t, err)
			t.Cleanup(func() { l.Close() })
			passed[name] = append(passed[name], l)
		}
		got, err := takeListeners(passed, cfg)
		if want == "" && (err != nil || got[socketOf("web")] == nil) {
			t.Errorf("%v: %v", names, err)
		}
		if want != "" && (err == nil || !strings.Contains(err.Error(), want) || exitCode(err) != exitConfig) {
			t.Errorf("%v: %v, want %q", names, err, want)
		}
	}
}

// TestGrantsThatEqualKeys has sockets with what a key provider takes for the agent's own
// evidence: see keys.TestEvidenceForAKeyOpensTheKMS.
func TestGrantsThatEqualKeys(t *testing.T) {
	cert := ApplicationConfig{Name: "c", Grants: []string{"read", "quote", "cert"}}
	d := &daemon{access: []status.Access{{Socket: "/raw", Grants: describe((&CompatConfig{RawReportData: true}).grants())},
		{Socket: "/hashed", Grants: describe((&CompatConfig{}).grants())}, {Socket: "/cert", Grants: describe(cert.grants())},
		{Socket: "/channel", Grants: []string{"channel evidence", "RA-TLS certificate evidence"}}}}
	raw := "socket /raw: the grant of raw report data equals access to the application's keys"
	for provider, want := range map[string][]string{
		`{"name":"kms","id":"3059"}`: {raw, "socket /cert: the grant of certificates equals access to the application's keys",
			"socket /channel: the grant of RA-TLS certificate evidence equals access to the application's keys"},
		`{"name":"local-sgx","id":"00"}`: {raw}, `{"name":"tpm","id":""}`: nil, `{"name":"none","id":""}`: nil, "": nil,
	} {
		notes := d.keyNotes(provider)
		if !slices.EqualFunc(notes, want, strings.HasPrefix) {
			t.Errorf("%s: %q, want %q", provider, notes, want)
		}
	}
}
