package remote_test

import (
	"strings"
	"testing"

	"tdx-agent/remote"
)

const goodPolicy = `version = 1
[defaults]
tcb_status = ["UpToDate"]
[[peer]]
name = "a"
image = ["i"]
compose_hash = ["0x1111111111111111111111111111111111111111111111111111111111111111"]
[image.i]
mrtd = ["` + zeros + `"]
rtmr0 = ["` + zeros + `"]
rtmr1 = ["` + zeros + `"]
rtmr2 = ["` + zeros + `"]
`

const zeros = "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"

func TestPolicyMistakes(t *testing.T) {
	if _, err := remote.ParsePolicy("p", []byte(goodPolicy)); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, old, new, want string }{
		{"empty", goodPolicy, "", "version is 0"},
		{"no version", "version = 1", "", "version is 0"},
		{"another version", "version = 1", "version = 2", "want version = 1"},
		{"no entry", goodPolicy, "version = 1", "0 [[peer]]"},
		{"unknown key", `name = "a"`, "name = \"a\"\ncompose_hsh = []", `p:6: unknown key "peer.compose_hsh"`},
		{"unknown key of an image", "[image.i]", "[image.i]\nrtmr9 = []", `unknown key "image.i.rtmr9"`},
		{"unknown table", "[defaults]", "[default]", `unknown key "default"`},
		{"case of a key", "tcb_status", "TCB_Status", "unknown key"},
		{"long s in a key", "tcb_status", `"tcb_ſtatus"`, "unknown key"},
		{"syntax", "version = 1", "version = ", "line 1"},
		{"no name", `name = "a"`, "", "give it a name"},
		{"a name twice", "[image.i]", "[[peer]]\nname = \"a\"\nallow_any_image = true\nallow_any_app = true\n[image.i]", "is there twice"},
		{"no image", `image = ["i"]`, "", "name an image, or write allow_any_image = true"},
		{"image and any image", `image = ["i"]`, "image = [\"i\"]\nallow_any_image = true", "exclude each other"},
		{"unknown image", `image = ["i"]`, `image = ["j"]`, `there is no [image."j"]`},
		{"no application", "compose_hash", "# compose_hash", "give app_id or compose_hash"},
		{"application and any application", `name = "a"`, "name = \"a\"\nallow_any_app = true", "exclude each other"},
		{"image without a kernel", "rtmr1", "# rtmr1", "give all three"},
		{"image without RTMR0", "rtmr0", "# rtmr0", "allow_any_rtmr0"},
		{"short register", `mrtd = ["00`, `mrtd = ["`, "digest has 94 characters"},
		{"short hash", `"0x11`, `"0x`, "has 31 bytes, want 32"},
		{"no hexadecimal", `"0x11`, `"0xzz`, "not hexadecimal"},
		{"foreign root", `name = "a"`, "name = \"a\"\nroot = \"sha256:" + strings.Repeat("00", 32) + `"`, "allow_simulated = true"},
		{"no root", `name = "a"`, "name = \"a\"\nroot = \"\"", "root is"},
		{"simulated Intel", `name = "a"`, "name = \"a\"\nallow_simulated = true", "not Intel's"},
		{"Intel by its hash", `name = "a"`, "name = \"a\"\nallow_simulated = true\nroot = \"sha256:44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3\"", `write root = "intel"`},
		{"Revoked", `["UpToDate"]`, `["UpToDate", "Revoked"]`, `"Revoked" can never be accepted`},
		{"NotSupported", `["UpToDate"]`, `["NotSupported"]`, "can never be accepted"},
		{"Unrecognized", `["UpToDate"]`, `["Unrecognized"]`, "can never be accepted"},
		{"no status", `["UpToDate"]`, `[]`, "nothing could match"},
		{"negative grace", "[defaults]", "[defaults]\ntcb_grace = \"-1s\"", "negative"},
		{"no age", "[defaults]", "[defaults]\nmax_collateral_age = \"0s\"", "allow_any_collateral_age"},
		{"negative minimum", "[defaults]", "[defaults]\nmin_qe_svn = -1", "negative"},
		{"long SVN", "[defaults]", "[defaults]\nmin_tee_tcb_svn = \"" + strings.Repeat("00", 17) + `"`, "at most 16"},
		{"short mask", "[defaults]", "[defaults]\nxfam = {mask = \"ff\", value = \"00\"}", "want 8"},
		{"value outside its mask", "[defaults]", "[defaults]\nxfam = {mask = \"0000000000000000\", value = \"0100000000000000\"}", "nothing could match"},
		{"event that no boot measures", "[defaults]", "[defaults]\nrequire_events = [\"mine\"]", "no event that the boot measures"},
		{"unknown era", "[defaults]", "[defaults]\nera = \"0.2\"", "era is"},
		{"unknown assurance", "[defaults]", "[defaults]\nrequire = \"hope\"", "require is"},
		{"KMS without an id", `name = "a"`, "name = \"a\"\nkey_provider = {kind = \"kms\"}", "allow_any_id"},
		{"unknown provider", `name = "a"`, "name = \"a\"\nkey_provider = {kind = \"cloud\"}", "kind is"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if !strings.Contains(goodPolicy, tc.old) {
				t.Fatalf("nothing to replace: %q", tc.old)
			}
			p, err := remote.ParsePolicy("p", []byte(strings.Replace(goodPolicy, tc.old, tc.new, 1)))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
			if p != nil {
				t.Error("a policy with mistakes is returned")
			}
		})
	}
	if _, err := remote.ParsePolicy("p", make([]byte, remote.MaxPolicy+1)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a policy too large: %v", err)
	}
}

// TestEntriesDoNotShare decodes two entries: what one adds is not in the other.
func TestEntriesDoNotShare(t *testing.T) {
	text := strings.Replace(goodPolicy, "[image.i]", "[[peer]]\nname = \"b\"\nallow_any_image = true\nallow_any_app = true\ntcb_status = [\"OutOfDate\"]\n[image.i]", 1)
	p, err := remote.ParsePolicy("p", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if a, b := p.Entries[0].TCBStatus, p.Entries[1].TCBStatus; a[0] != "UpToDate" || b[0] != "OutOfDate" {
		t.Errorf("statuses are %v and %v", a, b)
	}
}

func TestLoosened(t *testing.T) {
	p, err := remote.ParsePolicy("p", []byte(`version = 1
[defaults]
tcb_status = ["UpToDate", "OutOfDate"]
tcb_grace = "1h"
allow_any_advisory = true
allow_any_collateral_age = true
allow_stale_collateral = true
allow_debug = true
allow_service_td = true
require_sept_ve_disable = false
require = "key"
require_measured_agent_key = false
allow_unattested_clients = true
require_events = []
era = "0.3"
[[peer]]
name = "a"
root = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
allow_simulated = true
allow_any_image = true
allow_any_app = true
key_provider = {kind = "kms", allow_any_id = true}
[[peer]]
name = "b"
image = ["i"]
app_id = ["1111111111111111111111111111111111111111"]
[image.i]
mrtd = ["`+zeros+`"]
rtmr1 = ["`+zeros+`"]
rtmr2 = ["`+zeros+`"]
allow_any_rtmr0 = true
`))
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(p.Loosened(), "\n")
	for _, want := range []string{"allow_simulated", "allow_any_image", "allow_any_app", "allow_any_id", "allow_any_advisory", "allow_any_collateral_age", "allow_stale_collateral",
		"allow_debug", "allow_service_td", "require_sept_ve_disable", "OutOfDate", "tcb_grace", "era 0.3", "require_events", `require = "key"`, "require_measured_agent_key",
		"allow_unattested_clients", "allow_any_rtmr0", "app_id without compose_hash", "no key_provider"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not noted", want)
		}
	}
	strict := strings.Replace(goodPolicy, `name = "a"`, "name = \"a\"\nkey_provider = {kind = \"none\"}", 1)
	if p, err = remote.ParsePolicy("p", []byte(strict)); err != nil || len(p.Loosened()) > 0 {
		t.Errorf("a policy of defaults: %v, %v", p.Loosened(), err)
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(goodPolicy))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := remote.ParsePolicy("p", text)
		if (p == nil) == (err == nil) {
			t.Errorf("policy %v with error %v", p, err)
		}
		if p == nil {
			return
		}
		p.Loosened()
		if _, err := p.Roots(); err != nil {
			t.Error(err)
		}
	})
}
