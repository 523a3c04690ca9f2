package guestapi_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/guestapi"
)

// recorder keeps Records, and fails when told to.
type recorder struct {
	mu   sync.Mutex // guards what follows
	all  []guestapi.Record
	fail error
}

func (r *recorder) record(rec guestapi.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return r.fail
	}
	rec.Arguments = []byte(string(rec.Arguments))
	r.all = append(r.all, rec)
	return nil
}

// next returns the Records since the last call.
func (r *recorder) next() []guestapi.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

// TestRefusalsAreRecorded: every refusal has the shape and text of the reference and
// exactly one record.
func TestRefusalsAreRecorded(t *testing.T) {
	var rec recorder
	dstack, tappd, web := keyConfig(t, guestapi.Dstack), keyConfig(t, guestapi.Tappd), keyConfig(t, guestapi.Dstack)
	web.Grants = webGrants
	for _, cfg := range []*guestapi.Config{&dstack, &tappd, &web} {
		cfg.Audit = rec.record
	}
	sockets := map[string]string{"dstack": serve(t, dstack), "tappd": serve(t, tappd), "web": serve(t, web)}
	ascii := `{"path":"` + "\u00fcber" // Content-Length counted characters: the last byte is missing
	for _, c := range []struct {
		socket, target, body string
		exit                 int
		words                string
		class                guestapi.Class
		name                 string
	}{
		{"dstack", "/GetKey", `{"algorithm":"rsa"}`, 2, "Unsupported algorithm", guestapi.ClassKey, ""},
		{"dstack", "/GetKey", `{"path":"a","algorithm":"secp256k1_prehashed"}`, 2, "Unsupported algorithm", guestapi.ClassKey, "a"},
		{"dstack", "/Sign", `{"algorithm":"secp256k1_prehashed","data":"00"}`, 2, "Pre-hashed signing requires a 32-byte digest, but received 1 bytes", guestapi.ClassSign, ""},
		{"dstack", "/Verify", `{"algorithm":"rsa"}`, 2, "Unsupported algorithm", guestapi.ClassSign, ""},
		{"dstack", "/GetKey", `{"path":"` + strings.Repeat("x", 64<<10+1-len(`{"path":""}`)) + `"}`, 2, "failed to read data: payload too large", guestapi.ClassKey, ""},
		{"dstack", "/GetKey", ascii, 2, "Content-Length counts bytes", guestapi.ClassKey, ""},
		{"dstack", "/GetQuote", `{"report_data":"` + strings.Repeat("00", 65) + `"}`, 2, "Report data is too long", guestapi.ClassQuote, ""},
		{"dstack", "/GetTlsKey", `{"not_before":2,"not_after":1}`, 2, "not_before must be earlier than not_after", guestapi.ClassCert, ""},
		{"dstack", "/EmitEvent", `{"event":"app-id"}`, 8, "is reserved", guestapi.ClassMeasure, "app-id"},
		{"tappd", "/prpc/Tappd.TdxQuote", `{"report_data":"00","hash_algorithm":"md5"}`, 2, "invalid hash algorithm", guestapi.ClassQuote, ""},
		{"tappd", "/prpc/RawQuote", `{"report_data":"00"}`, 2, "invalid content length", guestapi.ClassQuote, ""},
		{"tappd", "/prpc/TdxQuote", `{"report_data":"00","prefix":"kms-root-ca"}`, 8, "is reserved", guestapi.ClassQuote, ""},
		{"web", "/Sign", `{"algorithm":"ed25519","data":"00"}`, 8, `no grant "sign"`, guestapi.ClassSign, ""},
		{"web", "/GetQuote", `{"report_data":"00"}`, 8, "no grant for quotes", guestapi.ClassQuote, ""},
		{"web", "/GetKey", `{"path":"billing/db"}`, 8, `GetKey of path "billing/db" is not allowed here: this socket's keys are those of names that begin with "web/" or "shared/"`, guestapi.ClassKey, "billing/db"},
		{"web", "/EmitEvent", `{"event":"other"}`, 8, `begin with "web/"`, guestapi.ClassMeasure, "other"},
	} {
		r := exchange(t, sockets[c.socket], postJSON(c.target, c.body))
		wantError(t, r, 400, c.exit, c.words)
		got := rec.next()
		if len(got) != 1 {
			t.Errorf("%s %.60s: %d records, want 1", c.target, c.body, len(got))
			continue
		}
		g := got[0]
		method := c.target[strings.LastIndexAny(c.target, "/.")+1:]
		if g.Method != method || g.Class != c.class || g.Name != c.name || g.Exit != c.exit || g.Caller.PID != int32(os.Getpid()) {
			t.Errorf("%s %.60s: record is %+v", c.target, c.body, g)
		}
		if want := c.body; len(want) <= 64<<10 && string(g.Arguments) != want {
			t.Errorf("%s: arguments are %q, want %q", c.target, g.Arguments, want)
		}
	}
}

// TestOtherHTTPMethodsAreRecorded: a call for a key leaves its record in any form.
func TestOtherHTTPMethodsAreRecorded(t *testing.T) {
	var rec recorder
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Audit = rec.record
	path := serve(t, cfg)
	wantError(t, exchange(t, path, strings.Replace(get("/GetKey?path=a"), "GET", "PUT", 1)), 405, 2, "want GET or POST")
	if got := rec.next(); len(got) != 1 || got[0].Method != "GetKey" || got[0].Class != guestapi.ClassKey || got[0].Exit != 2 {
		t.Errorf("records are %+v", got)
	}
}

func TestCallsAreRecorded(t *testing.T) {
	var rec recorder
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Audit = rec.record
	path := serve(t, cfg)
	for _, target := range []string{"/GetKey?path=a", "/GetTlsKey", "/Sign?algorithm=ed25519&data=00", "/GetQuote?report_data=00", "/Attest", "/EmitEvent?event=e"} {
		if r := exchange(t, path, get(target)); r.status != 200 {
			t.Fatal(r.raw)
		}
		got := rec.next()
		if len(got) != 1 || got[0].Exit != 0 || got[0].Took <= 0 {
			t.Errorf("%s: records are %+v, want one of a success", target, got)
		}
	}
	for _, target := range []string{"/Info", "/Version", "/GpuInfo", "/Nothing", "/a/b"} {
		exchange(t, path, get(target))
		if got := rec.next(); len(got) != 0 {
			t.Errorf("%s: records are %+v, want none", target, got)
		}
	}
	cfg.Guest.(*testGuest).before = func(context.Context) error { panic("boom") }
	exchange(t, path, get("/GetQuote"))
	if got := rec.next(); len(got) != 1 || got[0].Exit != 1 {
		t.Errorf("a panic: records are %+v, want one", got)
	}
}

func TestThrottledCallsAreRecorded(t *testing.T) {
	var rec recorder
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Audit = rec.record
	var rates guestapi.Rates
	for class := range rates {
		rates[class] = guestapi.Rate{PerSecond: 0.01, Burst: 1}
	}
	cfg.Limits = guestapi.NewLimiter(rates)
	path := serve(t, cfg)
	for range 3 {
		exchange(t, path, get("/GetKey?path=a"))
	}
	got := rec.next()
	if len(got) != 3 || got[0].Exit != 0 || got[1].Exit != 9 || got[2].Exit != 9 {
		t.Errorf("records are %+v, want ok, throttled, throttled", got)
	}
}

func TestKeysAreNotGivenWithoutARecord(t *testing.T) {
	rec := recorder{fail: errors.New("no space left on device")}
	dstack, tappd := keyConfig(t, guestapi.Dstack), keyConfig(t, guestapi.Tappd)
	dstack.Audit, tappd.Audit = rec.record, rec.record
	path := serve(t, dstack)
	for _, target := range []string{"/GetKey?path=a", "/GetTlsKey", "/Sign?algorithm=ed25519&data=00"} {
		r := exchange(t, path, get(target))
		wantError(t, r, 400, 1, "is not answered: its audit record could not be written")
	}
	r := exchange(t, path, post("/GetKey", "", "\x0a\x01a"))
	if r.status != 400 || !strings.Contains(protoFields(t, r.body)[1], "is not answered") {
		t.Errorf("protobuf: %q", r.raw)
	}
	for _, method := range []string{"DeriveKey", "DeriveK256Key"} {
		wantError(t, exchange(t, serve(t, tappd), get("/prpc/"+method)), 400, 1, "is not answered")
	}
	// A refusal stays what it was; quotes and events go on, and are seen elsewhere.
	wantError(t, exchange(t, path, get("/GetKey?algorithm=rsa")), 400, 2, "Unsupported algorithm")
	decodeQuote(t, exchange(t, path, get("/GetQuote")))
	wantOK(t, exchange(t, path, get("/EmitEvent?event=e")), "null")
}

// TestRecordsHoldNoSecrets makes every call that has secrets in it, good and malformed,
// and looks for them in the audit record and in the most talkative log.
func TestRecordsHoldNoSecrets(t *testing.T) {
	dir := t.TempDir()
	record, err := audit.Open(dir, audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer record.Close()
	var out lockedBuffer
	secret := []byte("secret report data, 32 bytes ...")
	text, sum := hex.EncodeToString(secret), sha256.Sum256(secret)
	secrets := [][]byte{secret, sum[:], []byte("PRIVATE KEY")}
	calls := 0
	for surface, targets := range map[guestapi.Surface][]string{
		guestapi.Dstack: {"/GetQuote", "/Attest", "/TdxQuote", "/GetKey", "/GetTlsKey", "/Sign", "/Verify", "/EmitEvent"},
		guestapi.Tappd:  {"/prpc/TdxQuote", "/prpc/RawQuote", "/prpc/DeriveKey", "/prpc/DeriveK256Key"},
	} {
		cfg := keyConfig(t, surface)
		cfg.Logger = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
		cfg.Audit = func(r guestapi.Record) error {
			calls++ // one at a time: every exchange waits for its answer
			return record.Call(audit.Entry{Method: r.Method, Name: r.Name, Exit: r.Exit}, r.Arguments)
		}
		path := serve(t, cfg)
		for _, target := range targets {
			for _, body := range []string{
				`{"report_data":"` + text + `","data":"` + text + `","payload":"` + text + `","event":"e","algorithm":"ed25519","path":"p"}`,
				`{"report_data":["` + text + `"],"data":{"a":"` + text + `"},"payload":["` + text + `"],"event":"e"}`,
				`{"report_data":"` + text + `z","data":"` + text + `z","payload":"` + text + `z"}`,
				`{"report_data":"` + text + text + text + `","data":"` + text + `"`,
			} {
				r := exchange(t, path, postJSON(target, body))
				secrets = append(secrets, secretsOf(r)...)
				exchange(t, path, post(target, "", body))
			}
		}
	}
	lines, err := os.ReadFile(filepath.Join(dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	if chain, err := audit.Verify(dir); err != nil || calls < 80 || len(chain.Entries) != calls+1 {
		t.Fatalf("%d calls: %v", calls, err)
	}
	if len(secrets) < 6 {
		t.Fatalf("only %d secrets were given", len(secrets))
	}
	out.mu.Lock()
	defer out.mu.Unlock()
	for _, where := range []string{string(lines), out.b.String()} {
		for _, s := range secrets {
			for _, form := range []string{string(s), hex.EncodeToString(s), strings.ToUpper(hex.EncodeToString(s)), base64.StdEncoding.EncodeToString(s), fmt.Sprint(s)} {
				if strings.Contains(where, form) {
					t.Errorf("%.20q is in a log or record", form)
				}
			}
		}
	}
}

// secretsOf takes what is secret from an answer: a key's bytes, or a line of its PEM.
func secretsOf(r reply) (found [][]byte) {
	for _, name := range []string{`"key":"`, `"k256_key":"`} {
		_, after, ok := strings.Cut(r.body, name)
		if !ok {
			continue
		}
		if _, pem, ok := strings.Cut(after, `PRIVATE KEY-----\n`); ok {
			found = append(found, []byte(pem[:64]))
		} else if key, err := hex.DecodeString(after[:64]); err == nil {
			found = append(found, key)
		}
	}
	return found
}
