package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
)

// TestExampleChannels reads the declarations that the example shows as comments: with a
// policy they must be legal, and hold every key there is.
func TestExampleChannels(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "agent.toml.example"))
	if err != nil {
		t.Fatal(err)
	}
	shown := ""
	for _, table := range []string{"#[[service]]\n", "#[[connect]]\n"} {
		_, block, ok := strings.Cut(string(b), table)
		if !ok {
			t.Fatalf("agent.toml.example shows no %s", table)
		}
		block, _, _ = strings.Cut(block, "\n\n")
		shown += table[1:]
		for line := range strings.Lines(block + "\n") {
			if line = strings.TrimPrefix(line, "#"); !strings.HasPrefix(line, "#") {
				shown += line
			}
		}
	}
	cfg := newConfig()
	if err := cfg.decode("example", []byte("endpoint.policy = \"/p\"\n"+shown)); err != nil {
		t.Fatal(err)
	}
	var every strings.Builder
	if err := toml.NewEncoder(&every).Encode(map[string]any{"service": []ServiceConfig{{Peers: []string{"p"}}}, "connect": []ConnectConfig{{Expect: []string{"e"}}}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(tableKeys(t, every.String()), tableKeys(t, shown)); diff != "" {
		t.Errorf("agent.toml.example lacks a key or has one too many:\n%s", diff)
	}
	if got := cfg.destinations(); len(got) != 4 { // the back end, the peer, Intel's two
		t.Errorf("egress may connect to %v", got)
	}
}

func tableKeys(t *testing.T, text string) map[string]bool {
	t.Helper()
	var tables map[string][]map[string]any
	if _, err := toml.Decode(text, &tables); err != nil {
		t.Fatal(err)
	}
	keys := map[string]bool{}
	for name, list := range tables {
		for k := range list[0] {
			keys[name+"."+k] = true
		}
	}
	return keys
}

func TestBadChannels(t *testing.T) {
	const service, connect = "[endpoint]\npolicy = \"/p\"\n[[service]]\nname = \"a\"\nbackend = \"unix:/a\"\n", "[endpoint]\npolicy = \"/p\"\n[[connect]]\nname = \"a\"\nlisten = \"unix:/a\"\naddress = \"h:1\"\nservice = \"s\"\nexpect = [\"e\"]\n"
	for _, tc := range []struct{ name, text, want string }{
		{"service without policy", strings.Replace(service, "/p", "", 1), "endpoint.policy is empty"},
		{"connect without policy", strings.Replace(connect, "/p", "", 1), "endpoint.policy is empty"},
		{"relative policy", strings.Replace(service, "/p", "p", 1), "want an absolute path"},
		{"twice", service + "[[service]]\nname = \"a\"\nbackend = \"unix:/a\"\n", `service "a" is declared twice`},
		{"name", strings.Replace(service, `"a"`, `"a b"`, 1), "name: want"},
		{"no name", strings.Replace(service, `"a"`, `""`, 1), "name: want"},
		{"back end elsewhere", strings.Replace(service, "unix:/a", "10.0.0.1:80", 1), "want unix:PATH or a loopback address"},
		{"back end by a name", strings.Replace(service, "unix:/a", "intranet:80", 1), "want unix:PATH or a loopback address"},
		{"no back end", strings.Replace(service, "unix:/a", "", 1), "want unix:PATH or a loopback address"},
		{"relative socket", strings.Replace(service, "unix:/a", "unix:a", 1), "want an absolute path"},
		{"mode", service + "mode = \"udp\"\n", `want "tcp" or "http"`},
		{"PROXY protocol with HTTP", service + "mode = \"http\"\nproxy_protocol = true\n", "proxy_protocol: not with"},
		{"headers without HTTP", service + "flashbots_headers = true\n", "flashbots_headers: only with"},
		{"one socket for two", connect + strings.Replace(strings.Replace(connect, "[endpoint]\npolicy = \"/p\"\n", "", 1), `name = "a"`, `name = "b"`, 1), `connect "b": listen: "unix:/a" is that of "a" already`},
		{"nobody is expected", strings.Replace(connect, `["e"]`, "[]", 1), "addresses prove nothing"},
		{"anybody is expected", strings.Replace(connect, `["e"]`, `[""]`, 1), "addresses prove nothing"},
		{"listens for everybody", strings.Replace(connect, "unix:/a", "0.0.0.0:80", 1), "want unix:PATH or a loopback address"},
		{"no address", strings.Replace(connect, `"h:1"`, `""`, 1), "address: destination"},
		{"no service", strings.Replace(connect, `"s"`, `""`, 1), "service is"},
		{"socket mode", connect + "socket_mode = \"0777\"\n", "socket_mode is"},
		{"key_ttl", "[endpoint]\nkey_ttl = \"2h\"\n", "key_ttl is 2h0m0s"},
		{"no limit", "[endpoint]\nburst = 0\n", "endpoint.burst is 0"},
		{"too many", "[egress]\nmax_connections = 0\n", "egress.max_connections"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := newConfig().decode("agent.toml", []byte(tc.text)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
	for _, text := range []string{service, connect} {
		if err := newConfig().decode("agent.toml", []byte(text)); err != nil {
			t.Error(err)
		}
	}
}

// TestUnattestedLoosens measures a service for clients that prove nothing, and turns it
// off where that cannot be shown.
func TestUnattestedLoosens(t *testing.T) {
	c := newConfig()
	if err := c.decode("agent.toml", []byte("[endpoint]\npolicy = \"/p\"\n[[service]]\nname = \"a\"\nbackend = \"unix:/a\"\nallow_unattested = true\n")); err != nil {
		t.Fatal(err)
	}
	if got := string(c.agentConfig()); got != `{"service.a.allow_unattested":true}` {
		t.Errorf("measured is %s", got)
	}
	tight := *c
	tight.tighten()
	if tight.agentConfig() != nil || c.agentConfig() == nil {
		t.Errorf("after tighten %s, and before it %s", tight.agentConfig(), c.agentConfig())
	}
}
