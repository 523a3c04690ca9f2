package status_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"
	"time"

	"tdx-agent/agent/status"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile("testdata/"+name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/" + name)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s is (%v)\n%s\nand now\n%s", name, err, want, got)
	}
}

var at = time.Date(2026, 11, 25, 8, 0, 0, 0, time.UTC)

func samplePeers() *status.Peers {
	return &status.Peers{Schema: status.PeersSchema, Processes: []status.PeerProcess{{
		Name: "endpoint", PID: 42, Started: at, Policy: "sha256:0123456789abcdef", Generation: 2, Accepted: 3, Refused: 2,
		Peers: []status.Peer{
			{Ref: "7f3a09c4d2e15b68", Direction: "in", Address: "10.0.0.2:4000", Service: "jobs", Assurance: "key", Entry: "worker", Policy: "sha256:0123456789abcdef",
				AppID: strings.Repeat("a1", 20), InstanceID: strings.Repeat("b2", 20), ComposeHash: strings.Repeat("c3", 32), KeyProvider: "kms", Image: "dstack-0.5.5",
				MRTD: strings.Repeat("d4", 48), TCBStatus: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-00615"}, AgentKey: strings.Repeat("e5", 32), QuoteSHA256: strings.Repeat("f6", 32),
				VerifiedAt: at.Add(time.Minute), Opened: at.Add(2 * time.Minute), Expires: at.Add(62 * time.Minute), Draining: true, BytesIn: 10, BytesOut: 20},
			{Ref: "0011223344556677", Direction: "in", Address: "10.0.0.9:4000", Service: "public", Assurance: "none", Advisories: []string{}, Opened: at, Expires: at.Add(time.Hour)},
		},
		Failures: []status.PeerFailure{
			{Time: at.Add(time.Hour), Millis: 12, Direction: "in", Address: "10.0.0.7:999", Service: "jo\x1b[2Jbs", Ref: "aabbccddeeff0011", Step: "verify", Code: "policy_denied", Entry: "worker",
				Error: "policy sha256:0123456789abcdef accepts no such peer", Checks: []status.FailedCheck{{Name: "rtmr1", Code: "rtmr1", Got: "11", Want: "22", Hint: "another kernel"}}},
			{Time: at.Add(time.Minute), Millis: 3, Direction: "out", Address: "10.0.0.3:8443", Service: "jobs", Ref: "8899aabbccddeeff", Step: "wait_evidence", Code: "evidence_invalid", ByPeer: true, Checks: []status.FailedCheck{}},
		},
	}}}
}

// TestPeersGolden holds the JSON form, which only ever grows, and the text.
func TestPeersGolden(t *testing.T) {
	p := samplePeers()
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "peers.json", append(b, '\n'))
	var text bytes.Buffer
	if err := p.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "peers.txt", text.Bytes())
	if bytes.ContainsRune(text.Bytes(), '\x1b') {
		t.Error("a peer's words steer the terminal")
	}
}

func TestPeersSummary(t *testing.T) {
	p := samplePeers()
	s := p.Summary()
	if s.Open != 2 || s.Accepted != 3 || s.Refused != 2 || s.Last == nil || s.Last.Ref != "aabbccddeeff0011" {
		t.Errorf("the summary is %+v", s)
	}
	if (&status.Peers{}).Summary() != nil {
		t.Error("a summary of nothing")
	}
	one := p.Only("8899aabbccddeeff")
	if len(one.Processes) != 1 || len(one.Processes[0].Peers) != 0 || len(one.Processes[0].Failures) != 1 {
		t.Errorf("of one ref there is %+v", one)
	}
	if len(p.Only("0").Processes) != 0 || len(p.Processes[0].Peers) != 2 {
		t.Error("an unknown ref finds something, or the report was changed")
	}
}
