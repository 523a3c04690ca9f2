package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/status"
	"tdx-agent/measure"
)

// The bounds of what agent.toml may declare. What loosens is measured, and travels
// with every quote.
const (
	maxApplications = 16
	maxPrefixes     = 8
	maxPrefix       = 64 // bytes
	maxUIDs         = 16
	maxAgentConfig  = 4 << 10 // bytes of event agent-config
)

// ApplicationConfig declares one application: a socket of its own, what it gives, and
// to whom.
type ApplicationConfig struct {
	Name   string   `toml:"name"`
	Grants []string `toml:"grants"`
	// Who may call: UIDs, or with AllowAnyUID whoever can open the socket.
	UIDs        []uint32 `toml:"uids,omitempty"`
	AllowAnyUID bool     `toml:"allow_any_uid"`
	// KeyPaths and Events are prefixes; the default is the name and a slash.
	KeyPaths []string `toml:"key_paths,omitempty"`
	Events   []string `toml:"events,omitempty"`
	// MaxEvents bounds its part of the log; 0 is defaultMaxEvents.
	MaxEvents int `toml:"max_events,omitempty"`
	// Limits replace those of the agent for this socket's callers, class by class. Names
	// and not fields: what is not there must differ from zeros.
	Limits map[string]guestapi.Rate `toml:"limits,omitempty"`
}

// grantRaw is the one grant that is no class of methods.
const grantRaw = "raw_report_data"

// grantNames are what an application may be granted.
var grantNames = []string{guestapi.ClassRead.String(), guestapi.ClassQuote.String(), grantRaw, guestapi.ClassCert.String(),
	guestapi.ClassKey.String(), guestapi.ClassSign.String(), guestapi.ClassMeasure.String()}

var applicationName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

func (a *ApplicationConfig) has(grant string) bool { return slices.Contains(a.Grants, grant) }

// grants translates the configuration.
func (a *ApplicationConfig) grants() guestapi.Grants {
	g := guestapi.Grants{Read: a.has("read"), Quote: a.has("quote"), RawReportData: a.has(grantRaw), Cert: a.has("cert"), Sign: a.has("sign")}
	if a.has("key") {
		g.Keys = a.prefixes(a.KeyPaths)
	}
	if a.has("measure") {
		g.Measure = a.prefixes(a.Events)
	}
	return g
}

func (a *ApplicationConfig) prefixes(given []string) guestapi.Names {
	if len(given) == 0 {
		return guestapi.Names{a.Name + "/"}
	}
	return given
}

// callers are the users that may call; nil is everybody.
func (a *ApplicationConfig) callers() []uint32 {
	if a.AllowAnyUID {
		return nil
	}
	return a.UIDs
}

func (a *ApplicationConfig) check() error {
	if !applicationName.MatchString(a.Name) {
		return fmt.Errorf("name is %q, want 1 to 32 of a-z, 0-9 and, inside, -", a.Name)
	}
	if len(a.Grants) == 0 {
		return fmt.Errorf("grants is empty, want some of %s", strings.Join(grantNames, ", "))
	}
	for i, g := range a.Grants {
		switch {
		case !slices.Contains(grantNames, g):
			return fmt.Errorf("grants: %q is none of %s", g, strings.Join(grantNames, ", "))
		case slices.Contains(a.Grants[:i], g):
			return fmt.Errorf("grants: %q is there twice", g)
		}
	}
	if a.has(grantRaw) && !a.has("quote") {
		return fmt.Errorf(`grants: %q does nothing without "quote"`, grantRaw)
	}
	if err := a.checkCallers(); err != nil {
		return err
	}
	if err := checkPrefixes("key_paths", a.KeyPaths, a.has("key"), "key"); err != nil {
		return err
	}
	for _, p := range a.KeyPaths {
		if p != "" && !strings.HasSuffix(p, "/") {
			return fmt.Errorf(`key_paths: %q does not end in "/": as a prefix it would open %q too`, p, p+"2/x")
		}
	}
	if err := checkPrefixes("events", a.Events, a.has("measure"), "measure"); err != nil {
		return err
	}
	for _, p := range a.Events {
		if strings.Contains(p, ":") {
			return fmt.Errorf(`events: %q has a colon, which RTMR3 does not tell from the one between name and payload: events of other names could be made of these`, p)
		}
	}
	if err := a.checkMaxEvents(); err != nil {
		return err
	}
	return checkNamedLimits(a.Limits)
}

func (a *ApplicationConfig) checkCallers() error {
	switch {
	case a.AllowAnyUID && len(a.UIDs) > 0:
		return fmt.Errorf("uids and allow_any_uid = true are both given, want one of them")
	case !a.AllowAnyUID && len(a.UIDs) == 0:
		return fmt.Errorf("nobody may call: want uids, or allow_any_uid = true to let in whoever can open the socket")
	case len(a.UIDs) > maxUIDs:
		return fmt.Errorf("uids has %d members, want at most %d", len(a.UIDs), maxUIDs)
	}
	return nil
}

func checkPrefixes(key string, prefixes []string, granted bool, grant string) error {
	if len(prefixes) > 0 && !granted {
		return fmt.Errorf("%s is given without the grant %q", key, grant)
	}
	if prefixes != nil && len(prefixes) == 0 {
		return fmt.Errorf("%s is empty, so nothing could match: leave it out for the default, or remove the grant %q", key, grant)
	}
	if len(prefixes) > maxPrefixes {
		return fmt.Errorf("%s has %d members, want at most %d", key, len(prefixes), maxPrefixes)
	}
	for _, p := range prefixes {
		if len(p) > maxPrefix {
			return fmt.Errorf("%s: a prefix has %d bytes, want at most %d", key, len(p), maxPrefix)
		}
	}
	return nil
}

func checkApplications(all []ApplicationConfig) error {
	if len(all) > maxApplications {
		return fmt.Errorf("%d applications are declared, want at most %d", len(all), maxApplications)
	}
	for i := range all {
		if err := all[i].check(); err != nil {
			return fmt.Errorf("application %d (%q): %w", i+1, all[i].Name, err)
		}
		if slices.ContainsFunc(all[:i], func(o ApplicationConfig) bool { return o.Name == all[i].Name }) {
			return fmt.Errorf("application %q is declared twice", all[i].Name)
		}
	}
	return checkParts(all)
}

// loosened adds to m what the application is given beyond reading and hashed quotes,
// and who then may have it.
func (a *ApplicationConfig) loosened(m map[string]any) {
	at, g, before := "application."+a.Name+".", a.grants(), len(m)
	if g.RawReportData {
		m[at+grantRaw] = true
	}
	if g.Cert {
		m[at+"cert"] = true
	}
	if g.Sign {
		m[at+"sign"] = true
	}
	if len(g.Keys) > 0 {
		m[at+"key_paths"] = []string(g.Keys)
	}
	if len(g.Measure) > 0 {
		m[at+"events"] = []string(g.Measure)
		if n := a.maxEvents(); n != defaultMaxEvents {
			m[at+"max_events"] = n
		}
	}
	if len(m) == before {
		return
	}
	if a.AllowAnyUID {
		m[at+"allow_any_uid"] = true
	} else {
		m[at+"uids"] = a.UIDs
	}
}

// givesKeys tells whether any socket gives something of the application's keys.
func (c *Config) givesKeys() bool {
	return c.Compat.FullAccess || slices.ContainsFunc(c.Applications, func(a ApplicationConfig) bool { return a.has("key") || a.has("sign") || a.has("cert") })
}

// tightened returns the applications without what loosened lists.
func tightened(all []ApplicationConfig) []ApplicationConfig {
	out := slices.Clone(all)
	for i := range out {
		out[i].Grants = slices.DeleteFunc(slices.Clone(out[i].Grants), func(g string) bool { return g != "read" && g != "quote" })
	}
	return out
}

// socketOf is the name of an application's socket, for systemd too, and tappdOf that of its
// second, where old SDKs look (TappdClient).
func socketOf(application string) string { return "app-" + application }
func tappdOf(application string) string  { return "tappd-" + application }

func (d runtimeDir) applicationSocket(application string) string {
	return filepath.Join(d.path("app"), application, "dstack.sock")
}

func (d runtimeDir) applicationTappd(application string) string {
	return filepath.Join(d.path("app"), application, "tappd.sock")
}

// compatGrants are those of dstack.sock and tappd.sock.
func (c *CompatConfig) grants() guestapi.Grants {
	g := guestapi.Grants{Read: true, Quote: true, RawReportData: c.RawReportData}
	if c.FullAccess {
		g.Cert, g.Sign, g.Keys, g.ReservedKeys, g.Measure = true, true, guestapi.AllNames, true, guestapi.AllNames
	}
	return g
}

// guestSocket is one socket of the guest API.
type guestSocket struct {
	name        string
	listener    net.Listener
	surface     guestapi.Surface
	application string // "" for dstack's own sockets
	grants      guestapi.Grants
	callers     []uint32 // nil is everybody
	part        measure.Part
	limits      *guestapi.Limiter
}

// guestSockets are all sockets of the guest API.
func (d *daemon) guestSockets(listeners map[string]net.Listener) []guestSocket {
	open, limits, part := d.cfg.Compat.grants(), d.cfg.Limits.limiter(), undeclaredPart(d.cfg.Applications)
	all := []guestSocket{{name: socketDstack, listener: listeners[socketDstack], surface: guestapi.Dstack, grants: open, part: part, limits: limits},
		{name: socketTappd, listener: listeners[socketTappd], surface: guestapi.Tappd, grants: open, part: part, limits: limits}}
	for i := range d.cfg.Applications {
		a := &d.cfg.Applications[i]
		s := guestSocket{name: socketOf(a.Name), listener: listeners[socketOf(a.Name)], surface: guestapi.Dstack, application: a.Name, grants: a.grants(), callers: a.callers(), part: a.part(), limits: limits}
		if len(a.Limits) > 0 {
			own := d.cfg.Limits.with(a.Limits)
			s.limits = own.limiter()
		}
		all = append(all, s)
		if l := listeners[tappdOf(a.Name)]; l != nil { // a unit of before may pass none
			s.name, s.listener, s.surface = tappdOf(a.Name), l, guestapi.Tappd
			all = append(all, s)
		}
	}
	return all
}

// guestServer makes the server of a socket.
func (d *daemon) guestServer(s guestSocket) *guestapi.Server {
	return guestapi.NewServer(guestapi.Config{Surface: s.surface, Grants: s.grants, OnlyUIDs: s.callers, Limits: s.limits, Guest: &socketGuest{d, s.part}, Keys: d.appKeys,
		Audit: func(r guestapi.Record) error { return d.record(s.name, r) }, Version: version(), Revision: revision(), Logger: d.log, CallTimeout: quoteWait,
		Observe: func(method string, status int, isThrottled bool) {
			d.metrics.called(cmp.Or(s.application, s.surface.String()), method, status, isThrottled)
		}})
}

// access says what the socket gives, for status.
func (s guestSocket) access() status.Access {
	return status.Access{Socket: s.listener.Addr().String(), Application: s.application, Grants: describe(s.grants), UIDs: s.callers}
}

// keyNotes says which sockets give keys without saying so: a provider that hands out
// keys for evidence cannot tell the agent's from what a caller has asked for. A KMS
// takes that of any certificate's key, and a local provider only report data of its own.
func (d *daemon) keyNotes(keyProvider string) (notes []string) {
	var p struct{ Name string }
	if json.Unmarshal([]byte(keyProvider), &p) != nil {
		return nil
	}
	opens := map[string][]string{"kms": {describeRaw, describeCert, describeEvidence}, "local-sgx": {describeRaw}}[p.Name]
	for _, a := range d.access {
		for _, grant := range opens {
			if slices.Contains(a.Grants, grant) {
				notes = append(notes, fmt.Sprintf("socket %s: the grant of %s equals access to the application's keys, since key provider %q gives them for such evidence", a.Socket, grant, p.Name))
			}
		}
	}
	return notes
}

// What a key provider may take for the agent's own evidence.
const (
	describeRaw      = "raw report data"
	describeCert     = "certificates"
	describeEvidence = "RA-TLS certificate evidence"
)

// describe lists grants for people.
func describe(g guestapi.Grants) []string {
	var names []string
	add := func(on bool, name string) {
		if on {
			names = append(names, name)
		}
	}
	add(g.Read, "read")
	add(g.Quote, "quote")
	add(g.RawReportData, describeRaw)
	add(g.Cert, describeCert)
	add(g.Sign, "signatures")
	add(len(g.Keys) > 0, "keys of "+g.Keys.String())
	add(len(g.Measure) > 0, "events of "+g.Measure.String())
	return names
}
