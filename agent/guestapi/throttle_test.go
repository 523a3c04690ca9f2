package guestapi_test

import (
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
)

func TestThrottled(t *testing.T) {
	cfg := keyConfig(t, guestapi.Dstack)
	var rates guestapi.Rates
	for class := range rates {
		rates[class] = guestapi.Rate{PerSecond: 0.01, Burst: 2}
	}
	cfg.Limits = guestapi.NewLimiter(rates)
	path := serve(t, cfg)
	for range 2 {
		if r := exchange(t, path, postJSON("/GetKey", `{"path":"a"}`)); r.status != 200 {
			t.Fatal(r.raw)
		}
	}
	r := exchange(t, path, postJSON("/GetKey", `{"path":"a"}`))
	wantError(t, r, 429, 9, `too many calls: your user and container may make 0.01 of class "key" a second, and 2 at once; try again in 1m`)
	if retry := r.header.Get("Retry-After"); retry != "100" {
		t.Errorf("Retry-After is %q, want 100", retry)
	}
	r = exchange(t, path, post("/GetKey", "application/octet-stream", "\x0a\x01a"))
	if r.status != 429 || r.header.Get("Content-Type") != "application/octet-stream" || !strings.Contains(protoFields(t, r.body)[1], "too many calls") {
		t.Errorf("protobuf: %q", r.raw)
	}

	// Other classes have buckets of their own, and other sockets of the Limiter have not.
	wantOK(t, exchange(t, path, get("/Version")), versionBody)
	cfg.Surface = guestapi.Tappd
	tappd := serve(t, cfg)
	wantError(t, exchange(t, tappd, postJSON("/prpc/DeriveK256Key", `{"path":"a"}`)), 429, 9, "too many calls")

	// What is refused for other reasons, or does not exist, counts too.
	cfg.Limits, cfg.Grants = guestapi.NewLimiter(rates), guestapi.Grants{}
	cfg.Surface = guestapi.Dstack
	path = serve(t, cfg)
	for range 2 {
		wantError(t, exchange(t, path, postJSON("/GetKey", `{"path":"a"}`)), 400, 8, "not allowed")
		wantError(t, exchange(t, path, postJSON("/Nothing", `{}`)), 400, 2, "Service not found")
	}
	wantError(t, exchange(t, path, postJSON("/GetKey", `{"path":"a"}`)), 429, 9, "too many calls")
	wantError(t, exchange(t, path, postJSON("/Nothing", `{}`)), 429, 9, "too many calls")
}
