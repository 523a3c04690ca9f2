package guestapi_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
)

// appVersion is what every answer of the external service says, as dstack writes it.
const appVersion = "v0.5.11 (git:0123456789abcdef0123)"

// workerConfig has what a server for strangers is given, with the vectors' keys.
func workerConfig(t testing.TB, g guestapi.Guest) guestapi.Config {
	cfg := keyConfig(t, guestapi.Worker)
	cfg.Guest, cfg.Grants = g, guestapi.Grants{Read: true, Quote: true}
	return cfg
}

func TestWorkerRoutes(t *testing.T) {
	path := serve(t, workerConfig(t, newTestGuest()))
	const version = `{"version":"0.5.11","rev":"git:0123456789abcdef0123"}`
	for _, request := range []string{
		get("/prpc/Worker.Version"), get("/prpc/Version"), get("/prpc/Worker.Worker.Version"), get("/prpc/Version?json"),
		postJSON("/prpc/Worker.Version", ""), postJSON("/prpc/Worker.Version", "{}"), post("/prpc/Version?json", "", "null"),
	} {
		r := exchange(t, path, request)
		wantOK(t, r, version)
		if got := r.header.Get("X-App-Version"); got != appVersion {
			t.Errorf("X-App-Version is %q", got)
		}
	}
	if r := exchange(t, path, post("/prpc/Worker.Version", "application/octet-stream", "")); r.status != 200 || protoFields(t, r.body)[1] != "0.5.11" {
		t.Errorf("protobuf: %q", r.raw)
	}
	for request, status := range map[string]int{
		get("/Version"): 404, get("/"): 404, get("/prpc/"): 404, get("/prpc/Worker/Version"): 404, get("/metrics"): 404,
		get("/prpc/version"): 400, get("/prpc/Tappd.Version"): 400, get("/prpc/worker.Version"): 400,
	} {
		r := exchange(t, path, request)
		wantError(t, r, status, 2, "")
		if got := r.header.Get("X-App-Version"); got != appVersion {
			t.Errorf("%.30q: X-App-Version is %q", request, got)
		}
	}
	r := exchange(t, path, "PUT /prpc/Version HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	if r.status != 405 || r.header.Get("X-App-Version") != appVersion {
		t.Errorf("%q", r.raw)
	}
	if r := exchange(t, serve(t, config(guestapi.Dstack, newTestGuest())), get("/Version")); r.header.Get("X-App-Version") != "" {
		t.Error("an application's socket has the external service's header")
	}
}

// What an application may ask of its own socket, strangers may not.
func TestWorkerHasNoOtherMethods(t *testing.T) {
	path := serve(t, workerConfig(t, newTestGuest()))
	for _, method := range strings.Fields("GetQuote Attest GetKey GetTlsKey Sign Verify EmitEvent GpuInfo TdxQuote RawQuote DeriveKey DeriveK256Key") {
		wantError(t, exchange(t, path, postJSON("/prpc/Worker."+method, "{}")), 400, 2, "Service not found: "+method)
	}
}

func TestWorkerInfoHidesWhatTheApplicationDoes(t *testing.T) {
	g := newTestGuest()
	g.before = func(context.Context) error { return errors.New("Info has taken a quote") }
	for _, public := range []bool{true, false} {
		cfg := workerConfig(t, g)
		cfg.PublicTCBInfo = public
		path := serve(t, cfg)
		var info map[string]string
		r := exchange(t, path, postJSON("/prpc/Info?json", ""))
		if err := json.Unmarshal([]byte(r.body), &info); err != nil || r.status != 200 {
			t.Fatalf("%q (%v)", r.raw, err)
		}
		wantKeys(t, r.body, "app_id", "instance_id", "app_cert", "tcb_info", "app_name", "device_id", "mr_aggregated", "os_image_hash",
			"key_provider_info", "compose_hash", "vm_config", "cloud_vendor", "cloud_product")
		if (info["tcb_info"] != "") != public || (info["vm_config"] != "") != public || info["app_name"] != "demo" {
			t.Errorf("public %v: tcb_info %.30q, vm_config %q", public, info["tcb_info"], info["vm_config"])
		}
	}
	if r := exchange(t, serve(t, config(guestapi.Dstack, g)), get("/Info")); !strings.Contains(r.body, `"tcb_info":"{`) {
		t.Errorf("an application's own Info hides tcb_info: %.300s", r.body)
	}
}

// TestAttestationForAppKey has both vectors that dstack publishes, as quoted.
func TestAttestationForAppKey(t *testing.T) {
	path := serve(t, workerConfig(t, newTestGuest()))
	for algorithm, want := range map[string]string{
		"ed25519":             "dip1::ed25519-pk:5Pbre1Amf1hrp2V2bbfKlIfxpQb2pJAmrgmhxgVoG9s",
		"secp256k1":           "dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9",
		"k256":                "dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9",
		"secp256k1_prehashed": "dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9",
	} {
		want += strings.Repeat("\x00", 64-len(want))
		r := exchange(t, path, postJSON("/prpc/Worker.GetAttestationForAppKey", fmt.Sprintf(`{"algorithm":%q}`, algorithm)))
		q, quote := decodeQuote(t, r)
		wantKeys(t, r.body, "quote", "event_log", "report_data", "vm_config")
		if got := string(quote[568:632]); got != want || q.ReportData != hex.EncodeToString([]byte(want)) {
			t.Errorf("%s: the quote has %q, report_data is %s, want %q", algorithm, got, q.ReportData, want)
		}
		if q.VMConfig != `{"cpu_count":2}` || !strings.Contains(q.EventLog, "system-ready") {
			t.Errorf("%s: vm_config %q, log %.100s", algorithm, q.VMConfig, q.EventLog)
		}
		decodeQuote(t, exchange(t, path, get("/prpc/GetAttestationForAppKey?algorithm="+algorithm)))
	}
	for _, algorithm := range []string{"", "rsa", "Ed25519"} {
		wantError(t, exchange(t, path, postJSON("/prpc/GetAttestationForAppKey", fmt.Sprintf(`{"algorithm":%q}`, algorithm))), 400, 2, "Unsupported algorithm")
	}
}

func TestWorkerGrants(t *testing.T) {
	cfg := workerConfig(t, newTestGuest())
	cfg.Grants = guestapi.Grants{}
	path := serve(t, cfg)
	for _, method := range []string{"Info", "Version", "GetAttestationForAppKey"} {
		wantError(t, exchange(t, path, get("/prpc/"+method)), 400, 8, "is not allowed here")
	}
	cfg = workerConfig(t, newTestGuest())
	cfg.Keys = func(context.Context) (*keys.App, error) { return nil, errors.New("the keys are not here yet") }
	wantError(t, exchange(t, serve(t, cfg), get("/prpc/GetAttestationForAppKey?algorithm=ed25519")), 400, 1, "the keys are not here yet")
}
