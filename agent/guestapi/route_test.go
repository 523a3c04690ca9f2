package guestapi_test

import (
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
)

const versionBody = `{"version":"0.5.11","rev":"git:0123456789abcdef0123"}`

func TestDstackRoutes(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	for _, target := range []string{"/Version", "/Version?", "/%56ersion", "http://dstack/Version"} {
		wantOK(t, exchange(t, path, get(target)), versionBody)
	}
	for target, name := range map[string]string{
		"/DstackGuest.GetQuote":         "DstackGuest.GetQuote",
		"/version":                      "version",
		"/RawQuote":                     "RawQuote",
		"/Tappd.Info":                   "Tappd.Info",
		"/prpc%2FVersion":               "prpc/Version",
		"/N%c3%a4":                      "N\u00e4",
		"/" + strings.Repeat("x", 9000): strings.Repeat("x", 100) + "...",
	} {
		wantError(t, exchange(t, path, get(target)), 400, 2, "Service not found: "+name)
		wantError(t, exchange(t, path, postJSON(target, "{}")), 400, 2, "Service not found: "+name)
	}
	for _, target := range []string{"/", "/prpc/Version", "/Version/", "//Version", "/prpc/DstackGuest.Version", "*"} {
		wantError(t, exchange(t, path, get(target)), 404, 2, "/<Method>")
		wantError(t, exchange(t, path, post(target, "", "")), 404, 2, "/<Method>")
	}
}

func TestTappdRoutes(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	for _, target := range []string{"/prpc/Version", "/prpc/Tappd.Version", "/prpc/Tappd.Tappd.Version"} {
		wantOK(t, exchange(t, path, get(target)), versionBody)
		wantOK(t, exchange(t, path, postJSON(target, "{}")), versionBody)
	}
	for target, name := range map[string]string{
		"/prpc/DstackGuest.Version": "DstackGuest.Version",
		"/prpc/GetQuote":            "GetQuote",
		"/prpc/Tappd.EmitEvent":     "EmitEvent",
		"/prpc/tappd.Version":       "tappd.Version",
		"/prpc/Tappd.":              "",
	} {
		wantError(t, exchange(t, path, get(target)), 400, 2, "Service not found: "+name)
	}
	for _, target := range []string{"/", "/Version", "/prpc", "/prpc/", "/prpc/Tappd/Version", "/v1/prpc/Version"} {
		wantError(t, exchange(t, path, get(target)), 404, 2, "/prpc/<Method>")
	}
}

func TestOtherHTTPMethods(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	for _, verb := range []string{"PUT", "DELETE", "OPTIONS", "PATCH"} {
		r := exchange(t, path, strings.Replace(get("/Version"), "GET", verb, 1))
		wantError(t, r, 405, 2, "want GET or POST")
		if r.header.Get("Allow") != "GET, POST" {
			t.Errorf("%s: Allow is %q", verb, r.header.Get("Allow"))
		}
	}
}

func TestAgentWithoutKeys(t *testing.T) {
	dstack := serve(t, config(guestapi.Dstack, newTestGuest()))
	for _, name := range []string{"GetTlsKey", "GetKey", "Sign"} {
		wantError(t, exchange(t, dstack, postJSON("/"+name, `{"path":"x","alt_names":["a"],"usage_ra_tls":true}`)), 400, 1, "this agent has no keys")
	}
	tappd := serve(t, config(guestapi.Tappd, newTestGuest()))
	for _, name := range []string{"DeriveKey", "DeriveK256Key"} {
		wantError(t, exchange(t, tappd, get("/prpc/Tappd."+name)), 400, 1, "this agent has no keys")
	}
}

func TestGrantsDenyByDefault(t *testing.T) {
	guest := newTestGuest()
	requests := map[guestapi.Surface][]string{
		guestapi.Dstack: {"/GetQuote", "/Attest", "/TdxQuote", "/Info", "/EmitEvent", "/Version", "/GpuInfo", "/GetKey", "/GetTlsKey", "/Sign", "/Verify"},
		guestapi.Tappd:  {"/prpc/TdxQuote", "/prpc/RawQuote", "/prpc/Info", "/prpc/Version", "/prpc/DeriveKey", "/prpc/DeriveK256Key"},
	}
	for surface, targets := range requests {
		cfg := config(surface, guest)
		cfg.Grants = guestapi.Grants{}
		path := serve(t, cfg)
		for _, target := range targets {
			wantError(t, exchange(t, path, get(target)), 400, 8, "is not allowed here")
			wantError(t, exchange(t, path, postJSON(target, "not even JSON")), 400, 8, "is not allowed here")
		}
	}
	if guest.lastCaller().Known {
		t.Error("a refused call reached the guest")
	}
}

func TestEmitEventNeedsMeasure(t *testing.T) {
	cfg := config(guestapi.Dstack, newTestGuest())
	cfg.Grants.Measure = nil
	r := exchange(t, serve(t, cfg), postJSON("/EmitEvent", `{"event":"a","payload":""}`))
	wantError(t, r, 400, 8, "full_access = true under [compat]")
	wantError(t, r, 400, 8, "admin socket")
}

func TestKeysNeedTheirGrant(t *testing.T) {
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Grants.Cert, cfg.Grants.Sign, cfg.Grants.Keys = false, false, nil
	path := serve(t, cfg)
	for _, name := range []string{"GetTlsKey", "GetKey", "Sign", "Verify"} {
		wantError(t, exchange(t, path, postJSON("/"+name, `{"algorithm":"ed25519"}`)), 400, 8, "full_access = true under [compat]")
	}
	// The larger body is for who may sign.
	wantError(t, exchange(t, path, postJSON("/Sign", strings.Repeat(" ", 64<<10+1))), 400, 2, "want at most 65536 bytes")
}

func TestRawReportDataIsAGrantOfItsOwn(t *testing.T) {
	cfg := config(guestapi.Dstack, newTestGuest())
	cfg.Grants = guestapi.Grants{Quote: true}
	dstack := serve(t, cfg)
	wantError(t, exchange(t, dstack, postJSON("/GetQuote", `{"report_data":"00"}`)), 400, 8, "raw report data")
	wantError(t, exchange(t, dstack, postJSON("/Attest", `{"report_data":"00"}`)), 400, 8, "raw report data")
	wantError(t, exchange(t, dstack, postJSON("/TdxQuote", `{"report_data":"00","hash_algorithm":"raw"}`)), 400, 8, "raw report data")
	decodeQuote(t, exchange(t, dstack, postJSON("/TdxQuote", `{"report_data":"00"}`)))
	cfg.Surface = guestapi.Tappd
	tappd := serve(t, cfg)
	raw := strings.Repeat("00", 64)
	wantError(t, exchange(t, tappd, postJSON("/prpc/RawQuote", `{"report_data":"`+raw+`"}`)), 400, 8, "raw report data")
	wantError(t, exchange(t, tappd, postJSON("/prpc/TdxQuote", `{"report_data":"`+raw+`","hash_algorithm":"raw"}`)), 400, 8, "raw report data")
	decodeQuote(t, exchange(t, tappd, postJSON("/prpc/TdxQuote", `{"report_data":"00"}`)))

	cfg.Grants = guestapi.Grants{RawReportData: true}
	wantError(t, exchange(t, serve(t, cfg), postJSON("/prpc/RawQuote", `{"report_data":"`+raw+`"}`)), 400, 8, "no grant for quotes")
}
