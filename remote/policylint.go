package remote

import (
	"fmt"
	"time"

	"tdx-agent/remote/dcap"
)

// Loosened lists every term of the policy that accepts any value, or more than the
// defaults do, as "peer NAME: what, and what it means".
func (p *Policy) Loosened() (notes []string) {
	for i := range p.Entries {
		e := &p.Entries[i]
		note := func(format string, a ...any) {
			notes = append(notes, fmt.Sprintf("peer %q: ", e.Name)+fmt.Sprintf(format, a...))
		}
		e.notes(note)
		for k := range e.images {
			image := &e.images[k]
			if image.AllowAnyRTMR0 {
				note("image %q: allow_any_rtmr0: firmware settings, ACPI tables and boot order may be any", image.Name)
			}
			if image.AllowAnyPageOrder {
				note("image %q: allow_any_page_order: MRTD may be of either order of pages", image.Name)
			}
		}
		e.Terms.notes(note)
	}
	return notes
}

func (e *Entry) notes(note func(format string, a ...any)) {
	if e.AllowSimulated {
		note("allow_simulated: accepts evidence below the root %s, which proves nothing about hardware", e.Root)
	}
	if e.AllowAnyImage {
		note("allow_any_image: firmware, kernel, command line and initrd may be any")
	}
	switch {
	case e.AllowAnyApp:
		note("allow_any_app: the application may be any")
	case len(e.ComposeHash) == 0:
		note("app_id without compose_hash: whoever may upgrade the application decides what runs")
	}
	switch k := e.KeyProvider; {
	case k == nil:
		note("no key_provider: the application's keys may come from anybody")
	case k.AllowAnyID:
		note("key_provider.allow_any_id: every %s will do", k.Kind)
	}
}

func (t *Terms) notes(note func(format string, a ...any)) {
	for _, s := range t.TCBStatus {
		if s != dcap.UpToDate {
			note("tcb_status %s: its advisories still need advisories_allow", s)
		}
	}
	for _, n := range []struct {
		is   bool
		text string
	}{
		{t.AllowAnyAdvisory, "allow_any_advisory: every known vulnerability will do, but those in advisories_deny"},
		{t.AllowAnyCollateralAge, "allow_any_collateral_age: collateral may be as old as its nextUpdate lets it"},
		{t.AllowStaleCollateral, "allow_stale_collateral: collateral may have ended"},
		{t.AllowDebug, "allow_debug: the host can read and change the TD's memory"},
		{!t.RequireSEPTVEDisable, "require_sept_ve_disable = false: the host can inject #VE"},
		{t.AllowServiceTD, "allow_service_td: a service TD may be bound to the TD, and may migrate it"},
		{t.Era == "0.3", "era 0.3: without system-ready an application could have added identity events"},
		{len(t.RequireEvents) == 0, "require_events is empty: events that are missing are no failure"},
		{t.Require == requireCertificate, "require = \"certificate\": dstack's RA-TLS will do, whose evidence can be relayed and may be old, and a measured key in place of a quote, for key_ttl"},
		{t.Require == requireKey, "require = \"key\": a measured key will do in place of a quote, for key_ttl"},
		{!t.RequireMeasuredAgentKey, "require_measured_agent_key = false: whoever may ask the peer for raw quotes can pose as its agent"},
		{t.AllowUnattestedClients, "allow_unattested_clients: clients may prove nothing"},
		{t.MaxCollateralAge > 31*24*time.Hour, "max_collateral_age is longer than collateral lives"},
	} {
		if n.is {
			note("%s", n.text)
		}
	}
	if t.TCBGrace > 0 {
		note("tcb_grace %v: OutOfDate is tolerated for so long; its advisories still need advisories_allow", t.TCBGrace)
	}
}
