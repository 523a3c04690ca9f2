package guestapi_test

import (
	"os"
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
)

// webGrants are those of an application that keeps below its own name.
var webGrants = guestapi.Grants{Cert: true, Keys: guestapi.Names{"web/", "shared/"}, Measure: guestapi.Names{"web/"}}

func TestKeyPathsKeepCallersApart(t *testing.T) {
	for surface, targets := range map[guestapi.Surface][]string{
		guestapi.Dstack: {"/GetKey"},
		guestapi.Tappd:  {"/prpc/DeriveK256Key", "/prpc/Tappd.DeriveKey"},
	} {
		cfg := keyConfig(t, surface)
		cfg.Grants = webGrants
		path := serve(t, cfg)
		for _, target := range targets {
			for _, allowed := range []string{"web/", "web/db", "web//..", "shared/x"} {
				if r := exchange(t, path, postJSON(target, `{"path":"`+allowed+`"}`)); r.status != 200 {
					t.Errorf("%s of %q: %s", target, allowed, r.body)
				}
			}
			for _, refused := range []string{"", "web", "web2/x", "Web/x", "/web/x", " web/x", "other/web/", "vms", "w\u0435b/x"} {
				wantError(t, exchange(t, path, postJSON(target, `{"path":"`+refused+`"}`)), 400, 8,
					`is not allowed here: this socket's keys are those of names that begin with "web/" or "shared/"`)
			}
			r := exchange(t, path, post(target, "", "\x0a\x07other/x"))
			if r.status != 400 || !strings.Contains(protoFields(t, r.body)[1], "this socket's keys") {
				t.Errorf("%s in protobuf: %q", target, r.raw)
			}
		}
	}
}

func TestReservedKeys(t *testing.T) {
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Grants = guestapi.Grants{Cert: true, Keys: guestapi.AllNames}
	dstack := serve(t, cfg)
	wantError(t, exchange(t, dstack, postJSON("/GetKey", `{"path":"vms"}`)), 400, 8, "the path is reserved")
	wantError(t, exchange(t, dstack, postJSON("/GetKey", `{"path":"a","purpose":"signing"}`)), 400, 8, "the key signs for the whole application")
	if r := exchange(t, dstack, postJSON("/GetKey", `{"path":"vms2","purpose":"signing2"}`)); r.status != 200 {
		t.Errorf("neither is reserved: %s", r.body)
	}
	cfg.Surface = guestapi.Tappd
	tappd := serve(t, cfg)
	for _, method := range []string{"DeriveKey", "DeriveK256Key"} {
		wantError(t, exchange(t, tappd, postJSON("/prpc/"+method, `{"path":"vms"}`)), 400, 8, "the path is reserved")
	}

	// Who may sign for the whole application may have chains that say so, but not the key.
	cfg.Surface, cfg.Grants.Sign = guestapi.Dstack, true
	dstack = serve(t, cfg)
	wantError(t, exchange(t, dstack, postJSON("/GetKey", `{"path":"vms","purpose":"signing"}`)), 400, 8, "the path is reserved")
	if r := exchange(t, dstack, postJSON("/GetKey", `{"path":"a","purpose":"signing"}`)); r.status != 200 {
		t.Errorf("with the grant to sign: %s", r.body)
	}
}

func TestDeriveKeyTakesTwoGrants(t *testing.T) {
	cfg := keyConfig(t, guestapi.Tappd)
	cfg.Grants = guestapi.Grants{Keys: guestapi.AllNames}
	wantError(t, exchange(t, serve(t, cfg), postJSON("/prpc/DeriveKey", `{"path":"a"}`)), 400, 8, `no grant "cert"`)
	cfg.Grants = guestapi.Grants{Cert: true}
	path := serve(t, cfg)
	wantError(t, exchange(t, path, postJSON("/prpc/DeriveKey", `{"path":"a"}`)), 400, 8, `no grant "key"`)
	if r := exchange(t, path, postJSON("/prpc/DeriveKey", `{"path":"a","random_seed":true}`)); r.status != 200 {
		t.Errorf("a random key: %s", r.body)
	}
}

func TestSigningIsAGrantOfItsOwn(t *testing.T) {
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.Grants = webGrants
	path := serve(t, cfg)
	for _, method := range []string{"Sign", "Verify"} {
		wantError(t, exchange(t, path, postJSON("/"+method, `{"algorithm":"ed25519","data":"00"}`)), 400, 8, `no grant "sign"`)
	}
	cfg.Grants = guestapi.Grants{Sign: true}
	path = serve(t, cfg)
	if r := exchange(t, path, postJSON("/Sign", `{"algorithm":"ed25519","data":"00"}`)); r.status != 200 {
		t.Errorf("with the grant: %s", r.body)
	}
	wantError(t, exchange(t, path, postJSON("/GetKey", `{"path":"web/a"}`)), 400, 8, `no grant "key"`)
}

func TestEventNamesKeepCallersApart(t *testing.T) {
	g := newTestGuest()
	cfg := config(guestapi.Dstack, g)
	cfg.Grants = webGrants
	path := serve(t, cfg)
	wantOK(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"web/release","payload":"00"}`)), "null")
	before := len(g.eventNames())
	for _, name := range []string{"web", "other", "web2/x"} {
		wantError(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"`+name+`"}`)), 400, 8, `this socket's events are those of names that begin with "web/"`)
	}
	wantError(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"app-id"}`)), 400, 8, "is reserved")
	if got := g.eventNames(); len(got) != before {
		t.Errorf("refused events were recorded: %v", got[before:])
	}
}

func TestOnlyTheseUsers(t *testing.T) {
	cfg := keyConfig(t, guestapi.Dstack)
	cfg.OnlyUIDs = []uint32{uint32(os.Getuid()) + 1}
	path := serve(t, cfg)
	for _, method := range []string{"Version", "GetKey", "GetQuote", "Sign", "NoSuchMethod"} {
		wantError(t, exchange(t, path, postJSON("/"+method, `{"path":"a"}`)), 400, 8, "this socket is for other users than yours")
	}
	cfg.OnlyUIDs = append(cfg.OnlyUIDs, uint32(os.Getuid()))
	wantOK(t, exchange(t, serve(t, cfg), get("/Version")), versionBody)
}
