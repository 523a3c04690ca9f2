package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEvidenceRefused has files that another reader may read otherwise, or that are
// nothing: the message says which member, and the status is that of bad evidence.
func TestEvidenceRefused(t *testing.T) {
	for text, want := range map[string]string{
		`{"quote":"00","quote":"01"}`:                `member "quote" is there twice`,
		`{"quote":null}`:                             "quote: got null",
		`{"td_quote":"!"}`:                           "td_quote: ",
		`{"quote":"00"}x`:                            "something follows",
		`{"quote":"00","event_log":[}`:               "invalid character",
		`0400020`:                                    "not hexadecimal",
		"0400\n0200":                                 "want one line of digits",
		`{"attestation":"00","attestation":"01"}`:    "is there twice",
		strings.Repeat("[", 20000):                   "exceeded max depth",
		`{"quote":` + strings.Repeat("[", 20000):     "exceeded max depth",
		"\x04" + strings.Repeat("\x00", maxEvidence): "is larger than",
	} {
		path := filepath.Join(t.TempDir(), "evidence")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := (&evidenceFlags{quote: path}).read()
		if err == nil || !strings.Contains(err.Error(), want) || exitCode(err) != exitEvidence {
			t.Errorf("%.40q: got %v with status %d, want %q with %d", text, err, exitCode(err), want, exitEvidence)
		}
	}
	for text, want := range map[string]string{
		`{"event_log":"[]"}`: "no attestation in it",
		`{"attestation":1}`:  "attestation: ",
		"zz":                 "not hexadecimal",
	} {
		if _, err := parseAttestation([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
	if _, err := parseEvents([]byte(`{"event_log":[],"event_log":[]}`)); err == nil || !strings.Contains(err.Error(), "is there twice") {
		t.Errorf("two event logs: %v", err)
	}
}

// TestVerifyRequest takes members by their exact names, each once.
func TestVerifyRequest(t *testing.T) {
	for body, want := range map[string]string{
		`{"quote":"00","quote":"01","event_log":"[]","vm_config":""}`: `"quote" is there twice`,
		`{"QUOTE":"00","event_log":"[]","vm_config":""}`:              "want attestation, or quote",
		`{"quote":null,"event_log":"[]","vm_config":""}`:              "want attestation, or quote",
		`{"quote":7,"event_log":"[]","vm_config":""}`:                 "request: quote: ",
		`[]`:    "no JSON object",
		`{} {}`: "something follows",
	} {
		if _, err := readVerifyRequest(strings.NewReader(body)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", body, err, want)
		}
	}
	ev, err := readVerifyRequest(strings.NewReader(`{"quote":"0x0405","event_log":"[]","vm_config":"{}","QUOTE":"ff","debug":true,"attestation":null}`))
	if err != nil || string(ev.Quote) != "\x04\x05" || ev.VMConfig != "{}" {
		t.Errorf("got %+v, %v", ev, err)
	}
}
