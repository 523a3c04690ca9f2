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
