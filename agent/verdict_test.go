package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestVerdictGolden holds verify's JSON form to golden files: it only ever grows. Only
// its members and their types are kept, since values belong to the evidence.
func TestVerdictGolden(t *testing.T) {
	dir := fixtures()
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no real evidence: set TDX_AGENT_FIXTURES to its folder (%v)", err)
	}
	for name, tc := range map[string]struct {
		args   []string
		status int
	}{
		"valid":       {[]string{"verify", "--json", "--quote", dir + "/attestations/zk-livy.json", "--collateral", dir + "/collateral/dq-gas-collateral.json", "--at", "2025-09-17T07:22:55Z"}, 0},
		"era":         {[]string{"verify", "--json", "--policy", "testdata/golden/era.toml", "--quote", dir + "/attestations/zk-livy.json", "--collateral", dir + "/collateral/dq-gas-collateral.json", "--at", "2025-09-17T07:22:55Z"}, 0},
		"out-of-date": {[]string{"verify", "--json", "--quote", dir + "/attestations/nr-gateway-report.json", "--collateral", dir + "/collateral/nm-2603b-collateral.json", "--at", "2026-04-01T07:22:55Z"}, exitPolicy},
		"dcap-qvl":    {[]string{"verify", "--format", "dcap-qvl", "--quote", dir + "/attestations/zk-livy.json", "--collateral", dir + "/collateral/dq-gas-collateral.json", "--at", "2025-09-17T07:22:55Z"}, 0},
		"dstack":      {[]string{"verify", "--format", "dstack", "--quote", dir + "/attestations/nr-gateway-report.json", "--collateral", dir + "/collateral/nm-2603b-collateral.json", "--at", "2026-04-01T07:22:55Z"}, exitPolicy},
		"collateral":  {[]string{"collateral", "show", "--json", dir + "/collateral/dq-gas-collateral.json"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			var out, stderr bytes.Buffer
			if status := run(ctx, tc.args, &out, &stderr); status != tc.status {
				t.Fatalf("exit status is %d, want %d: %s", status, tc.status, &stderr)
			}
			var doc any
			if err := json.Unmarshal(out.Bytes(), &doc); err != nil {
				t.Fatal(err)
			}
			shape, err := json.MarshalIndent(shapeOf(doc), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join("testdata", "golden", name+".json")
			if *update {
				if err := os.WriteFile(path, append(shape, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(append(shape, '\n'), want) {
				t.Errorf("the form has changed (go test ./agent -run Golden -update, if it has only grown); got\n%s\nwant\n%s", shape, want)
			}
		})
	}
}

// shapeOf replaces values by their types, and a list by the shapes of its elements.
func shapeOf(v any) any {
	switch v := v.(type) {
	case map[string]any:
		shape := map[string]any{}
		for name, member := range v {
			shape[name] = shapeOf(member)
		}
		return shape
	case []any:
		var shapes []any
		var seen []string
		for _, e := range v {
			s := shapeOf(e)
			if text, err := json.Marshal(s); err == nil && !slices.Contains(seen, string(text)) {
				seen, shapes = append(seen, string(text)), append(shapes, s)
			}
		}
		return shapes
	case string:
		return "string"
	case float64:
		return "number"
	case bool:
		return "boolean"
	}
	return nil
}
