package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
)

func TestExampleHoldsEveryDefault(t *testing.T) {
	path := filepath.Join("..", "agent.toml.example")
	got, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(newConfig(), got); diff != "" {
		t.Errorf("agent.toml.example differs from the defaults:\n%s", diff)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var example, all map[string]any
	if _, err := toml.Decode(string(b), &example); err != nil {
		t.Fatal(err)
	}
	var every strings.Builder
	if err := toml.NewEncoder(&every).Encode(newConfig()); err != nil {
		t.Fatal(err)
	}
	if _, err := toml.Decode(every.String(), &all); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(all, example); diff != "" {
		t.Errorf("agent.toml.example lacks a key or has one too many:\n%s", diff)
	}
}

func TestBadConfig(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"unknown key", "[boot]\n\nersa = \"0.3\"\n", `agent.toml:3: unknown key "boot.ersa"`},
		{"key in upper case", "[compat]\nfull_access = false\nFULL_ACCESS = true\n", `agent.toml:3: unknown key "compat.FULL_ACCESS"`},
		{"unknown table", "# x\n[bot]\nera = \"0.3\"\n", `agent.toml:2: unknown key "bot"`},
		{"wrong type", "[compat]\nfull_access = 1\n", "full_access"},
		{"syntax", "on_foreign_extend = refuse\n", "line 1"},
		{"wrong value", "on_foreign_extend = \"ignore\"\n", `want "refuse" or "serve"`},
		{"relative path", "[kernel]\nccel = \"ccel\"\n", "kernel.ccel"},
		{"entry that leaves its folder", "[kernel]\nentry = \"../x\"\n", "kernel.entry"},
		{"unknown era", "[boot]\nera = \"9\"\n", "boot.era"},
		{"short hash", "[boot]\nmr_kms = \"00\"\n", "boot.mr_kms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "agent.toml")
			if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := loadConfig(path)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q in it", err, tc.want)
			}
			if exitCode(err) != exitConfig {
				t.Errorf("exit status %d, want %d", exitCode(err), exitConfig)
			}
		})
	}
	if _, err := loadConfig(filepath.Join(t.TempDir(), "absent.toml")); exitCode(err) != exitConfig {
		t.Errorf("a file that was asked for and is absent: %v", err)
	}
}
