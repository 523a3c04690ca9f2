package remote

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"tdx-agent/measure"
	"tdx-agent/remote/dcap"
	"tdx-agent/remote/tomlfile"
)

// Caps of a policy file.
const (
	MaxPolicy  = 1 << 20 // bytes
	maxEntries = 256
	maxImages  = 256
	maxValues  = 256 // of one list
)

// ParsePolicy reads a policy file of at most 1 MiB. name is for messages. Besides
// mistakes of form it refuses what would accept too much without saying so: an entry
// without an image or an application (unless allow_any_image, allow_any_app), an
// image without RTMR0 (unless allow_any_rtmr0), a root that is not Intel's (unless
// allow_simulated), a TCB status that never may be accepted. Every fault is listed.
func ParsePolicy(name string, text []byte) (*Policy, error) {
	if len(text) > MaxPolicy {
		return nil, fmt.Errorf("%s: policy of %d bytes, want at most %d", name, len(text), MaxPolicy)
	}
	var file struct {
		Version  int              `toml:"version"`
		Defaults toml.Primitive   `toml:"defaults"`
		Peer     []toml.Primitive `toml:"peer"`
		Image    map[string]Image `toml:"image"`
	}
	p := &Policy{ID: policyID(text)}
	form := tomlfile.File{Path: name, Hint: "tdx-agent policy from-evidence writes a file to start from", Named: "image"}
	form.Later = func(meta toml.MetaData) error {
		terms := defaultTerms()
		if meta.IsDefined("defaults") {
			if err := meta.PrimitiveDecode(file.Defaults, &terms); err != nil {
				return fmt.Errorf("defaults: %w", err)
			}
		}
		for i := range file.Peer[:min(len(file.Peer), maxEntries+1)] {
			e := Entry{Root: "intel", Terms: terms.clone()}
			if err := meta.PrimitiveDecode(file.Peer[i], &e); err != nil {
				return fmt.Errorf("peer %d: %w", i+1, err)
			}
			p.Entries = append(p.Entries, e)
		}
		return nil
	}
	if err := form.Decode(text, &file); err != nil {
		return nil, err
	}
	var faults []error
	fault := func(format string, a ...any) {
		faults = append(faults, fmt.Errorf("%s: %s", name, fmt.Sprintf(format, a...)))
	}
	if file.Version != 1 {
		fault("version is %d, want version = 1", file.Version)
	}
	if len(p.Entries) == 0 || len(p.Entries) > maxEntries || len(file.Image) > maxImages {
		fault("%d [[peer]] and %d [image] tables, want 1 to %d and at most %d", len(p.Entries), len(file.Image), maxEntries, maxImages)
	}
	for name, image := range file.Image {
		image.Name = name
		image.check(fault)
		file.Image[name] = image
	}
	names := map[string]bool{}
	for i := range p.Entries {
		e := &p.Entries[i]
		if names[e.Name] {
			fault("peer %q is there twice", e.Name)
		}
		names[e.Name] = true
		e.check(i, file.Image, fault)
	}
	if len(faults) == 0 {
		if _, err := p.Roots(); err != nil {
			fault("%v", err)
		}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	return p, nil
}

// clone keeps one entry's decoding from writing into another's lists.
func (t Terms) clone() Terms {
	t.TCBStatus = append([]dcap.Status(nil), t.TCBStatus...)
	t.AdvisoriesAllow, t.AdvisoriesDeny = append([]string(nil), t.AdvisoriesAllow...), append([]string(nil), t.AdvisoriesDeny...)
	t.FMSPC, t.FMSPCDeny = append([]Hex(nil), t.FMSPC...), append([]Hex(nil), t.FMSPCDeny...)
	t.MRSEAM, t.RequireEvents = append([]measure.Digest(nil), t.MRSEAM...), append([]string(nil), t.RequireEvents...)
	for _, m := range []**Mask{&t.TDAttributes, &t.XFAM} {
		if *m != nil {
			c := **m
			*m = &c
		}
	}
	return t
}

type faultFunc func(format string, a ...any)

func (image *Image) check(fault faultFunc) {
	where := fmt.Sprintf("image %q", image.Name)
	hasPins := len(image.MRTD)+len(image.RTMR0)+len(image.RTMR1)+len(image.RTMR2) > 0 || image.AllowAnyRTMR0
	switch {
	case image.Metadata != "" && image.Carried:
		fault("%s: metadata and carried exclude each other", where)
	case image.Calculated() && hasPins:
		fault("%s: metadata or carried give the registers: leave out mrtd, rtmr0, rtmr1, rtmr2 and allow_any_rtmr0", where)
	case image.Carried && len(image.OSImageHash) == 0:
		fault("%s: carried needs the os_image_hash that binds what the evidence carries", where)
	case image.Metadata != "" && !filepath.IsAbs(image.Metadata):
		fault("%s: metadata is %q, want an absolute path", where, image.Metadata)
	case image.Calculated():
	case image.AllowAnyPageOrder:
		fault("%s: allow_any_page_order goes with metadata or carried: list both values of mrtd", where)
	case len(image.MRTD) == 0 || len(image.RTMR1) == 0 || len(image.RTMR2) == 0:
		fault("%s: mrtd, rtmr1 and rtmr2 are what proves an image: give all three, or metadata", where)
	case len(image.RTMR0) == 0 && !image.AllowAnyRTMR0:
		fault("%s: give rtmr0 (firmware settings, ACPI tables, boot order), or write allow_any_rtmr0 = true", where)
	}
	for key, list := range map[string][]measure.Digest{"mrtd": image.MRTD, "rtmr0": image.RTMR0, "rtmr1": image.RTMR1, "rtmr2": image.RTMR2, "mr_seam": image.MRSEAM} {
		checkList(where, key, len(list), fault)
	}
	checkSize(where, "os_image_hash", image.OSImageHash, 32, fault)
	checkSVN(where, image.MinTEETCBSVN, fault)
	image.XFAM.check(where+": xfam", fault)
}

func checkList(where, key string, n int, fault faultFunc) {
	if n > maxValues {
		fault("%s: %s has %d values, want at most %d", where, key, n, maxValues)
	}
}

func checkSize(where, key string, h Hex, size int, fault faultFunc) {
	if len(h) != 0 && len(h) != size {
		fault("%s: %s has %d bytes, want %d", where, key, len(h), size)
	}
}

func checkSVN(where string, h Hex, fault faultFunc) {
	if len(h) > 16 {
		fault("%s: min_tee_tcb_svn has %d bytes, want at most 16", where, len(h))
	}
}

func (m *Mask) check(where string, fault faultFunc) {
	if m == nil {
		return
	}
	if len(m.Mask) != 8 || len(m.Value) != 8 {
		fault("%s: mask and value have %d and %d bytes, want 8", where, len(m.Mask), len(m.Value))
		return
	}
	for i := range m.Mask {
		if m.Value[i]&^m.Mask[i] != 0 {
			fault("%s: value %s has bits that mask %s leaves out, so nothing could match", where, m.Value, m.Mask)
			return
		}
	}
}

func (e *Entry) check(i int, images map[string]Image, fault faultFunc) {
	where := fmt.Sprintf("peer %q", e.Name)
	if e.Name == "" {
		where = fmt.Sprintf("peer %d", i+1)
		fault("%s: give it a name", where)
	}
	e.checkRoot(where, fault)
	switch {
	case len(e.Image) == 0 && !e.AllowAnyImage:
		fault("%s: name an image, or write allow_any_image = true", where)
	case len(e.Image) > 0 && e.AllowAnyImage:
		fault("%s: image and allow_any_image exclude each other", where)
	}
	for _, name := range e.Image {
		image, ok := images[name]
		if !ok {
			fault("%s: there is no [image.%q]", where, name)
			continue
		}
		e.images = append(e.images, image)
	}
	switch hasApp := len(e.AppID)+len(e.ComposeHash) > 0; {
	case !hasApp && !e.AllowAnyApp:
		fault("%s: give app_id or compose_hash, or write allow_any_app = true", where)
	case hasApp && e.AllowAnyApp:
		fault("%s: app_id or compose_hash and allow_any_app exclude each other", where)
	}
	for _, l := range []struct {
		key  string
		list []Hex
		size int
	}{{"app_id", e.AppID, 20}, {"compose_hash", e.ComposeHash, 32}, {"instance_id", e.InstanceID, 20}, {"device_id", e.DeviceID, 32},
		{"ppid", e.PPID, 16}, {"fmspc", e.FMSPC, 6}, {"fmspc_deny", e.FMSPCDeny, 6}} {
		checkList(where, l.key, len(l.list), fault)
		for _, h := range l.list {
			if len(h) != l.size {
				fault("%s: %s: %s has %d bytes, want %d", where, l.key, h, len(h), l.size)
			}
		}
	}
	e.KeyProvider.check(where, fault)
	e.Terms.check(where, fault)
}

func (e *Entry) checkRoot(where string, fault faultFunc) {
	intel := dcap.IntelRoot()
	if e.Root == "intel" {
		e.roots = [][32]byte{intel}
		if e.AllowSimulated {
			fault("%s: allow_simulated goes with a root that is not Intel's", where)
		}
		return
	}
	var h Hex
	digits, ok := strings.CutPrefix(e.Root, "sha256:")
	if !ok || h.UnmarshalText([]byte(digits)) != nil || len(h) != 32 {
		fault(`%s: root is %q, want "intel" or "sha256:" and the hash of a root certificate's DER`, where, e.Root)
		return
	}
	e.roots = [][32]byte{[32]byte(h)}
	switch {
	case e.roots[0] == intel:
		fault(`%s: that root is Intel's: write root = "intel"`, where)
	case !e.AllowSimulated:
		fault("%s: evidence below the root %s proves nothing about hardware: use root = \"intel\", or write allow_simulated = true", where, e.Root)
	}
}

func (k *KeyProviderTerm) check(where string, fault faultFunc) {
	if k == nil {
		return
	}
	switch k.Kind {
	case measure.KeyProviderNone, measure.KeyProviderTPM:
	case measure.KeyProviderKMS, measure.KeyProviderLocal:
		if len(k.ID) == 0 && !k.AllowAnyID {
			fault("%s: key_provider: give the id of the %s, or write allow_any_id = true", where, k.Kind)
		}
	default:
		fault(`%s: key_provider: kind is %q, want "none", "kms", "local" or "tpm"`, where, k.Kind)
	}
	checkList(where, "key_provider.id", len(k.ID), fault)
}

// acceptable are the TCB statuses that a policy may accept.
var acceptable = []dcap.Status{dcap.UpToDate, dcap.SWHardeningNeeded, dcap.ConfigurationNeeded, dcap.ConfigurationAndSWHardeningNeeded,
	dcap.OutOfDate, dcap.OutOfDateConfigurationNeeded, dcap.TDRelaunchAdvised, dcap.TDRelaunchAdvisedConfigurationNeeded}

func (t *Terms) check(where string, fault faultFunc) {
	if len(t.TCBStatus) == 0 {
		fault("%s: tcb_status is empty, so nothing could match", where)
	}
	for _, s := range t.TCBStatus {
		if !slices.Contains(acceptable, s) {
			fault("%s: tcb_status %q can never be accepted; want one of %v", where, s, acceptable)
		}
	}
	for key, d := range map[string]time.Duration{"tcb_grace": t.TCBGrace, "max_collateral_age": t.MaxCollateralAge, "max_cert_lifetime": t.MaxCertLifetime} {
		if d < 0 {
			fault("%s: %s is negative", where, key)
		}
	}
	if t.MaxCollateralAge == 0 && !t.AllowAnyCollateralAge {
		fault("%s: max_collateral_age is 0, so nothing could match; to accept every age write allow_any_collateral_age = true", where)
	}
	if t.MinTCBEvaluationNumber < 0 || t.MinQESVN < 0 || t.MinPCESVN < 0 {
		fault("%s: a minimum is negative", where)
	}
	for key, n := range map[string]int{"advisories_allow": len(t.AdvisoriesAllow), "advisories_deny": len(t.AdvisoriesDeny),
		"mr_seam": len(t.MRSEAM), "require_events": len(t.RequireEvents)} {
		checkList(where, key, n, fault)
	}
	t.TDAttributes.check(where+": td_attributes", fault)
	t.XFAM.check(where+": xfam", fault)
	checkSVN(where, t.MinTEETCBSVN, fault)
	for _, name := range t.RequireEvents {
		if !measure.ReservedEvent(name) {
			fault("%s: require_events: %q is no event that the boot measures", where, name)
		}
	}
	if t.Era != "" && t.Era != "0.3" {
		fault(`%s: era is %q, want "" or "0.3"`, where, t.Era)
	}
	if !slices.Contains(assurances, t.Require) {
		fault(`%s: require is %q, want "quote", "key" or "certificate"`, where, t.Require)
	}
}
