package guestapi_test

import (
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
)

func TestVersionIsExact(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	const want = `{"version":"0.5.11","rev":"git:0123456789abcdef0123"}`
	for _, request := range []string{
		get("/Version"), postJSON("/Version", "{}"), postJSON("/Version", ""), postJSON("/Version", "null"),
		postJSON("/Version", " null\n"), postJSON("/Version", `{"unknown":[1,{"a":2}]}`),
		post("/Version?json", "text/plain", "{}"), post("/Version?json=1", "", ""), post("/Version?x=1&json=true", "", ""),
		post("/Version", "application/JSON; charset=utf-8", "{}"),
		"POST /Version HTTP/1.1\r\nHost: \r\nConnection: close\r\nContent-Type: application/json\r\n\r\n",
		"POST /Version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
		"GET /Version HTTP/1.0\r\n\r\n",
	} {
		wantOK(t, exchange(t, path, request), want)
	}
}

func TestUnknownRevision(t *testing.T) {
	cfg := config(guestapi.Tappd, newTestGuest())
	cfg.Revision = ""
	wantOK(t, exchange(t, serve(t, cfg), get("/prpc/Version")), `{"version":"0.5.11","rev":"unknown"}`)
}

func TestProtobuf(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	r := exchange(t, path, post("/Version", "application/octet-stream", ""))
	want := "\x0a\x060.5.11\x12\x18git:0123456789abcdef0123"
	if r.status != 200 || r.body != want || r.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("Version: %q", r.raw)
	}

	unknown := protowire.AppendTag(nil, 77, protowire.VarintType)
	unknown = protowire.AppendVarint(unknown, 5)
	request := append(unknown, "\x0a\x02\xab\xcd"...)
	r = exchange(t, path, post("/GetQuote", "application/octet-stream", string(request)))
	fields := protoFields(t, r.body)
	if len(fields[1]) != 5006 || fields[3] != "\xab\xcd"+strings.Repeat("\x00", 62) || fields[4] != `{"cpu_count":2}` || len(fields) != 4 {
		t.Errorf("GetQuote: fields %q", fields)
	}

	r = exchange(t, path, post("/EmitEvent", "", "\x0a\x05hello\x12\x01\x00"))
	if r.status != 200 || r.body != "" {
		t.Errorf("EmitEvent: %q", r.raw)
	}

	r = exchange(t, path, post("/Nope", "", ""))
	if r.status != 400 || protoFields(t, r.body)[1] != "Service not found: Nope" || r.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("unknown method: %q", r.raw)
	}
}

func protoFields(t *testing.T, body string) map[protowire.Number]string {
	t.Helper()
	fields := make(map[protowire.Number]string)
	for b := []byte(body); len(b) > 0; {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 || kind != protowire.BytesType {
			t.Fatalf("bad field in %q", body)
		}
		value, m := protowire.ConsumeBytes(b[n:])
		if m < 0 {
			t.Fatalf("bad field in %q", body)
		}
		fields[num] = string(value)
		b = b[n+m:]
	}
	return fields
}

func TestGetQuoteAnswer(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	full := strings.Repeat("5a", 64)
	for _, c := range []struct{ request, want string }{
		{postJSON("/GetQuote", `{"report_data":"1234deadbeef"}`), "1234deadbeef"},
		{postJSON("/GetQuote", `{"report_data":"0x0x1234DEADbeef"}`), "1234deadbeef"},
		{postJSON("/GetQuote", `{"report_data":""}`), ""},
		{postJSON("/GetQuote", `{}`), ""},
		{postJSON("/GetQuote", `{"report_data":"`+full+`"}`), full},
		{get("/GetQuote?report_data=00ff&other=1"), "00ff"},
		{get("/GetQuote?report_data=0x%30%30ff"), "00ff"},
		{get("/GetQuote"), ""},
		{post("/GetQuote?json", "", `{"report_data":"aa"}`), "aa"},
		{post("/GetQuote?json&report_data=bb", "", `{"report_data":"aa"}`), "aa"},
	} {
		want := c.want + strings.Repeat("0", 128-len(c.want))
		r := exchange(t, path, c.request)
		q, quote := decodeQuote(t, r)
		if q.ReportData != want || hex.EncodeToString(quote[568:632]) != want {
			t.Errorf("%q: report data %s, in the quote %x, want %s", c.request, q.ReportData, quote[568:632], want)
		}
		if q.VMConfig != `{"cpu_count":2}` || !strings.HasPrefix(r.body, `{"quote":"0400020081000000`) ||
			!strings.HasSuffix(r.body, `,"vm_config":"{\"cpu_count\":2}"}`) {
			t.Errorf("%q: keys or order differ: %.80s ... %s", c.request, r.body, r.body[len(r.body)-40:])
		}
	}
}

// TestEventLogReplays does what SDKs do with event_log: extend the digests as they
// stand there and compare with the quote.
func TestEventLogReplays(t *testing.T) {
	g := newTestGuest()
	path := serve(t, config(guestapi.Dstack, g))
	wantOK(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"mpc-image-digest","payload":"0xC0FFEE"}`)), "null")
	q, quote := decodeQuote(t, exchange(t, path, postJSON("/GetQuote", "{}")))
	var log []struct {
		IMR     int            `json:"imr"`
		Digest  measure.Digest `json:"digest"`
		Event   string         `json:"event"`
		Payload string         `json:"event_payload"`
	}
	if err := json.Unmarshal([]byte(q.EventLog), &log); err != nil {
		t.Fatal(err)
	}
	var rtmr [4]measure.Digest
	for _, e := range log {
		rtmr[e.IMR] = rtmr[e.IMR].Extend(e.Digest)
		if e.IMR < 3 && e.Payload != "" {
			t.Errorf("boot event has payload %q, want none in a quote", e.Payload)
		}
	}
	for i := range rtmr {
		if got := hex.EncodeToString(quote[376+48*i : 424+48*i]); got != rtmr[i].String() {
			t.Errorf("RTMR%d is %s in the quote, %s by replay", i, got, rtmr[i])
		}
	}
	if last := log[len(log)-1]; last.Event != "mpc-image-digest" || last.Payload != "c0ffee" {
		t.Errorf("last event is %+v", last)
	}
}

func TestAttest(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	r := exchange(t, path, postJSON("/Attest", `{"report_data":"ab"}`))
	if r.status != 200 || !strings.HasPrefix(r.body, `{"attestation":"00`) {
		t.Fatalf("%d %.60s", r.status, r.body)
	}
	if !strings.Contains(r.body, hex.EncodeToString([]byte("boot event data"))) {
		t.Error("the log in the attestation is stripped")
	}
}

func TestInfoAnswer(t *testing.T) {
	for surface, route := range map[guestapi.Surface]string{guestapi.Dstack: "/Info", guestapi.Tappd: "/prpc/Tappd.Info"} {
		g := newTestGuest()
		g.name = "Zählwerk \U0001f600 <&>\x01\u2028"
		r := exchange(t, serve(t, config(surface, g)), get(route))
		if r.status != 200 {
			t.Fatalf("%d %s", r.status, r.body)
		}
		var info struct {
			AppName string `json:"app_name"`
			TCB     string `json:"tcb_info"`
		}
		if err := json.Unmarshal([]byte(r.body), &info); err != nil || info.AppName != g.name {
			t.Errorf("app_name is %q, want %q (%v)", info.AppName, g.name, err)
		}
		if !strings.Contains(r.body, `"app_name":"Z\u00e4hlwerk \ud83d\ude00 <&>\u0001\u2028"`) {
			t.Errorf("app_name is not escaped as wanted: %s", r.body)
		}
		if !strings.HasPrefix(info.TCB, "{\n  \"mrtd\": \"") || !strings.Contains(info.TCB, hex.EncodeToString([]byte("boot event data"))) {
			t.Errorf("tcb_info: %.300s", info.TCB)
		}
		wantKeys(t, r.body, "app_id", "instance_id", "app_cert", "tcb_info", "app_name", "device_id", "mr_aggregated",
			"os_image_hash", "key_provider_info", "compose_hash", "vm_config", "cloud_vendor", "cloud_product")
		wantKeys(t, info.TCB, "mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_aggregated", "os_image_hash",
			"compose_hash", "device_id", "event_log", "app_compose")
	}
}

// wantKeys checks the keys of an object and their order.
func wantKeys(t *testing.T, object string, want ...string) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(object))
	dec.Token()
	var got []string
	for dec.More() {
		key, err := dec.Token()
		var value json.RawMessage
		if err == nil {
			err = dec.Decode(&value)
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, key.(string))
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("keys are %v, want %v", got, want)
	}
}

func TestGPUInfo(t *testing.T) {
	g := newTestGuest()
	g.gpu = "{\"x\":\"\xff\"}"
	path := serve(t, config(guestapi.Dstack, g))
	wantOK(t, exchange(t, path, postJSON("/GpuInfo", "{}")), `{"attestation":"{\"x\":\"\ufffd\"}"}`)
	if r := exchange(t, path, post("/GpuInfo", "", "")); r.body != "\x0a\x0b{\"x\":\"\ufffd\"}" {
		t.Errorf("protobuf: %q", r.body)
	}
}

func TestEmptyMembersAreSent(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	wantOK(t, exchange(t, path, get("/GpuInfo")), `{"attestation":""}`)
	if r := exchange(t, path, post("/GpuInfo", "", "")); r.status != 200 || r.body != "" {
		t.Errorf("protobuf: %q", r.raw)
	}
}
