package guestapi_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
)

// methodsWithArguments are those whose first argument is bytes.
var methodsWithArguments = map[guestapi.Surface]map[string]string{
	guestapi.Dstack: {"/GetQuote": "report_data", "/Attest": "report_data", "/TdxQuote": "report_data", "/EmitEvent": "payload"},
	guestapi.Tappd:  {"/prpc/TdxQuote": "report_data", "/prpc/RawQuote": "report_data"},
}

func TestMalformedArguments(t *testing.T) {
	deep := strings.Repeat(`{"a":`, 7000)
	for surface, methods := range methodsWithArguments {
		path := serve(t, config(surface, newTestGuest()))
		for target, field := range methods {
			for _, c := range []struct{ body, words string }{
				{``, "no body"},
				{`null`, "not an object"},
				{`[]`, "not an object"},
				{`"00"`, "not an object"},
				{`{`, "unexpected end"},
				{`{"` + field + `":"00"`, "unexpected end"},
				{`{"` + field + `":"00"}{}`, "after top-level value"},
				{`{"` + field + `":"00",}`, "not JSON"},
				{`{"` + field + `":"00","` + field + `":"00"}`, "duplicate field"},
				{`{"` + field + `":"00","\u00` + fmt.Sprintf("%x", field[0]) + field[1:] + `":"00"}`, "duplicate field"},
				{`{"x":1,"x":1}`, "duplicate field"},
				{`{"` + field + `":null}`, field + ": want a string, got null"},
				{`{"` + field + `":7}`, field + ": want a string, got a number"},
				{`{"` + field + `":["00"]}`, field + ": want a string, got an array"},
				{`{"` + field + `":{"a":{"b":[]}}}`, field + ": want a string, got an object"},
				{`{"` + field + `":"0"}`, field + ": invalid hex"},
				{`{"` + field + `":"0x0"}`, field + ": invalid hex"},
				{`{"` + field + `":"zz"}`, field + ": invalid hex"},
				{`{"` + field + `":" 00"}`, field + ": invalid hex"},
				{`{"` + field + `":"\ud800"}`, "surrogate"},
				{"{\"" + field + "\":\"\xff\"}", "not valid UTF-8"},
				{"{\"" + field + "\":\"\x00\"}", "not JSON"},
				{"\v{\"" + field + "\":\"00\"}", "not JSON"},
				{"{\"" + field + "\":\"00\"}\u00a0", "not JSON"},
				{deep, "unexpected end"},
				{strings.Repeat(`[`, 60000), "exceeded max depth"},
				// A deep value under an unknown key is skipped without recursion.
				{`{"x":` + deep + "1" + strings.Repeat("}", 7000) + `,"` + field + `":"q"}`, field + ": invalid hex"},
				{"{\"" + field + "\":\"\u00e4\u00e4", "Content-Length counts bytes"},
				{`{"` + field + `":"00","note":"` + "\u00e4\xc3", "Content-Length counts bytes"},
			} {
				wantError(t, exchange(t, path, postJSON(target, c.body)), 400, 2, c.words)
			}
		}
	}
}

func TestMalformedQueries(t *testing.T) {
	for surface, methods := range methodsWithArguments {
		path := serve(t, config(surface, newTestGuest()))
		for target, field := range methods {
			for query, words := range map[string]string{
				field + "=0":                      "invalid hex",
				field + "=%zz":                    "malformed",
				field + "=00&" + field + "=00":    "duplicate field",
				field + "[0]=00":                  "not a list",
				field + "%5B%5D=00":               "not a list",
				"%zz=1":                           "malformed",
				field + "=" + "%ff":               "invalid hex",
				field + "=00;" + field + "=00%20": "invalid hex",
			} {
				wantError(t, exchange(t, path, get(target+"?"+query)), 400, 2, words)
			}
		}
	}
}

func TestMalformedProtobuf(t *testing.T) {
	for surface, methods := range methodsWithArguments {
		path := serve(t, config(surface, newTestGuest()))
		for target, field := range methods {
			tag := "\x0a" // field 1, bytes
			varint := "\x08"
			if field == "payload" {
				tag, varint = "\x12", "\x10"
			}
			for body, words := range map[string]string{
				"\x00":         "not a protobuf message",
				tag:            "not a protobuf message",
				tag + "\x05ab": "not a protobuf message",
				tag + "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f": "not a protobuf message",
				varint + "\x01":                   field + ": protobuf wire type 0",
				"\x9b\x06":                        "is a group",
				strings.Repeat("\x9b\x06", 20000): "is a group",
				"\xff":                            "not a protobuf message",
			} {
				r := exchange(t, path, post(target, "application/octet-stream", body))
				if r.status != 400 || r.header.Get("Content-Type") != "application/octet-stream" || !strings.Contains(protoFields(t, r.body)[1], words) {
					t.Errorf("%s %q: %q, want %q", target, clip(body), r.raw, words)
				}
			}
		}
	}
}

func clip(s string) string { return s[:min(len(s), 60)] }

func TestJSONWithoutItsContentType(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	for _, media := range []string{"application/x-www-form-urlencoded", "text/json", ""} {
		for _, body := range []string{`{"report_data":"00"}`, "\n {}", "[]", "null"} {
			wantError(t, exchange(t, path, post("/GetQuote", media, body)), 400, 2, "Content-Type: application/json")
		}
	}
	wantError(t, exchange(t, path, post("/Info", "", "{}")), 400, 2, "?json")
	wantError(t, exchange(t, path, post("/Info?json=false", "", "{}")), 400, 2, "?json")
}

func TestReportDataTooLong(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	long := strings.Repeat("00", 65)
	for _, target := range []string{"/GetQuote", "/Attest"} {
		r := exchange(t, path, postJSON(target, `{"report_data":"`+long+`"}`))
		if r.status != 400 || r.body != "{\n  \"error\": \"Report data is too long\"\n}" {
			t.Errorf("%s: %q", target, r.raw)
		}
		wantError(t, exchange(t, path, get(target+"?report_data="+long)), 400, 2, "Report data is too long")
	}
}

func TestEmptyRequestsAreChecked(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	for _, target := range []string{"/Info", "/Version", "/GpuInfo"} {
		for body, words := range map[string]string{
			`[]`: "not an object", `0`: "not an object", `{}x`: "not JSON", `{"a":1,"a":2}`: "duplicate field", `nul`: "not JSON",
		} {
			wantError(t, exchange(t, path, postJSON(target, body)), 400, 2, words)
		}
	}
}

func TestOversizeBody(t *testing.T) {
	const limit = 64 << 10
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	fits := `{"report_data":"","x":"` + strings.Repeat("x", limit-25) + `"}`
	if r := exchange(t, path, postJSON("/prpc/TdxQuote", fits)); len(fits) != limit || r.status != 200 {
		t.Errorf("%d bytes: status %d", len(fits), r.status)
	}
	over := postJSON("/prpc/TdxQuote", fits+" ")
	wantError(t, exchange(t, path, over), 400, 2, "payload too large")
	chunked := "POST /prpc/TdxQuote?json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n10001\r\n" + strings.Repeat(" ", limit+1) + "\r\n0\r\n\r\n"
	wantError(t, exchange(t, path, chunked), 400, 2, "payload too large")

	// A body that is announced as huge is refused before it is sent.
	conn := dial(t, path)
	io.WriteString(conn, "POST /prpc/TdxQuote?json HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"+strings.Repeat("x", limit+1))
	raw, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, parse(t, string(raw)), 400, 2, "payload too large")

	// One that dstack would take is refused when all of it is there: more than fits into
	// the socket, so that a client would see a broken connection instead.
	large := postJSON("/prpc/TdxQuote", strings.Repeat(" ", 4<<20))
	conn = dial(t, path)
	if n, err := io.WriteString(conn, large); err != nil {
		t.Errorf("the connection broke after %d bytes: %v", n, err)
	}
	if raw, err = io.ReadAll(conn); err != nil {
		t.Error(err)
	}
	wantError(t, parse(t, string(raw)), 400, 2, "payload too large")

	r := exchange(t, path, post("/prpc/TdxQuote", "", strings.Repeat("x", limit+1)))
	if r.status != 400 || !strings.Contains(protoFields(t, r.body)[1], "payload too large") {
		t.Errorf("protobuf: %q", r.raw)
	}
}

func TestTruncatedBody(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	conn := dial(t, path)
	io.WriteString(conn, "POST /GetQuote HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"report")
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, parse(t, string(raw)), 400, 2, "broke off after 8 bytes of 100")
}

func TestEmitEventRefusals(t *testing.T) {
	g := newTestGuest()
	path := serve(t, config(guestapi.Dstack, g))
	before := len(g.eventNames())
	for _, name := range strings.Fields("system-preparing app-id compose-hash instance-id boot-mr-done mr-kms os-image-hash " +
		"key-provider storage-fs system-ready rootfs-hash ca-cert-hash init-script-hash gpu-policy-hash gpu-attestation agent-key agent-config") {
		wantError(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"`+name+`:x","payload":"3a"}`)), 400, 8, "could move the colon")
		wantError(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"`+name+`","payload":""}`)), 400, 8, "is reserved")
	}
	for body, words := range map[string]string{
		`{"payload":"00"}`:                            "no name",
		`{"event":""}`:                                "no name",
		`{"event":"a\nb"}`:                            "printable",
		`{"event":"a\u0000"}`:                         "printable",
		`{"event":"a\u200b"}`:                         "printable",
		`{"event":"a\ufffd"}`:                         "U+FFFD",
		`{"event":["a"]}`:                             "want a string",
		`{"event":"` + strings.Repeat("n", 65) + `"}`: "65 bytes, want at most 64",
		`{"event":"a","payload":"` + strings.Repeat("00", 4097) + `"}`: "4097 bytes, want at most 4096",
		`{"event":"a","payload":"0"}`:                                  "invalid hex",
	} {
		wantError(t, exchange(t, path, postJSON("/EmitEvent", body)), 400, 2, words)
	}
	if got := g.eventNames(); len(got) != before {
		t.Errorf("refused events were recorded: %v", got[before:])
	}
	r := exchange(t, path, post("/EmitEvent", "", "\x0a\x02\xc3\x28"))
	if !strings.Contains(protoFields(t, r.body)[1], "not valid UTF-8") {
		t.Errorf("protobuf name: %q", r.raw)
	}
}

func TestEmitEvent(t *testing.T) {
	g := newTestGuest()
	path := serve(t, config(guestapi.Dstack, g))
	name := strings.Repeat("\u00e4", 32)
	wantOK(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"`+name+`","payload":"`+strings.Repeat("00", 4096)+`"}`)), "null")
	wantOK(t, exchange(t, path, get("/EmitEvent?event=LIUM_MINER+HOTKEY&payload=0xAB")), "null")
	got := g.eventNames()
	if got = got[len(got)-2:]; got[0] != name || got[1] != "LIUM_MINER HOTKEY" {
		t.Errorf("recorded %q", got)
	}
}
