package main

import (
	"testing"
	"time"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/guestapi"
)

// TestFloodOfRefusals: calls that fail cost their caller nothing, so they must not push
// out the lines of others.
func TestFloodOfRefusals(t *testing.T) {
	d := benchDaemon(t)
	flooder := guestapi.Caller{UID: 1, Known: true, CgroupID: 1}
	other := guestapi.Caller{UID: 1, Known: true, CgroupID: 2}
	check(t, d.record("dstack", guestapi.Record{Method: "GetKey", Class: guestapi.ClassKey, Name: "first", Caller: other}))
	start := time.Now()
	for range 100_000 {
		check(t, d.record("dstack", guestapi.Record{Method: "GetKey", Class: guestapi.ClassKey, Caller: flooder, Exit: exitDenied}))
	}
	most := 200 + 10*int(time.Since(start).Seconds()+1)
	check(t, d.record("dstack", guestapi.Record{Method: "GetKey", Class: guestapi.ClassKey, Name: "last", Caller: other, Exit: exitDenied}))
	chain, err := audit.Verify(d.dir.log())
	check(t, err)
	lines, names := 0, ""
	for _, e := range chain.Entries {
		if e.Result == audit.Denied && e.Name == "" {
			lines++
		}
		names += e.Name
	}
	if lines < 200 || lines > most || names != "firstlast" {
		t.Errorf("%d lines of the flood, want 200 to %d; lines of others: %q", lines, most, names)
	}
}

// TestFloodOfQuotes: whoever may have quotes must not push out the lines of keys.
func TestFloodOfQuotes(t *testing.T) {
	d := benchDaemon(t)
	flooder := guestapi.Caller{UID: 1, Known: true, CgroupID: 1}
	check(t, d.record("app-web", guestapi.Record{Method: "GetKey", Class: guestapi.ClassKey, Name: "first", Caller: guestapi.Caller{UID: 1, Known: true, CgroupID: 2}}))
	start := time.Now()
	for range 50_000 {
		check(t, d.record("dstack", guestapi.Record{Method: "GetQuote", Class: guestapi.ClassQuote, Caller: flooder}))
	}
	most := 200 + 10*int(time.Since(start).Seconds()+1)
	chain, err := audit.Verify(d.dir.log())
	check(t, err)
	lines, first := 0, false
	for _, e := range chain.Entries {
		if e.Method == "GetQuote" && e.Caller != nil && e.Caller.UID == 1 {
			lines++
		}
		first = first || e.Name == "first"
	}
	if lines < 200 || lines > most || !first {
		t.Errorf("%d lines of the flood, want 200 to %d; the line of the key is there: %t", lines, most, first)
	}
}
