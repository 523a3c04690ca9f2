package remote

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/dcap"
)

// Policy is an Appraisal Policy (RFC 9334): who is accepted. Evidence is accepted if
// one entry accepts it; within an entry every term must hold, and a list of values
// means any of them. The zero value accepts nothing. It is immutable.
type Policy struct {
	// ID tells policies apart: "built-in", or "sha256:" and the start of the hash of
	// the file.
	ID      string
	Entries []Entry
}

// BuiltinPolicy is what applies where nobody gives a policy: TCB status UpToDate by
// complete and current collateral, no debug, SEPT_VE_DISABLE, no service TD. It pins no
// image and no application, which a [Result] then lists as not checked. roots are the
// SHA-256 values of the root certificates to trust; none means Intel's.
func BuiltinPolicy(roots ...[32]byte) *Policy {
	if len(roots) == 0 {
		roots = [][32]byte{dcap.IntelRoot()}
	}
	terms := defaultTerms()
	terms.AllowAnyCollateralAge, terms.RequireEvents = true, nil
	return &Policy{ID: "built-in", Entries: []Entry{{Name: "built-in", Terms: terms, roots: roots, AllowAnyImage: true, AllowAnyApp: true,
		AllowSimulated: slices.ContainsFunc(roots, func(pin [32]byte) bool { return pin != dcap.IntelRoot() })}}}
}

// Roots returns every root that an entry trusts.
func (p *Policy) Roots() (*dcap.Roots, error) {
	var pins [][32]byte
	seen := map[[32]byte]bool{}
	for i := range p.Entries {
		for _, pin := range p.Entries[i].roots {
			if !seen[pin] {
				seen[pin] = true
				pins = append(pins, pin)
			}
		}
	}
	return dcap.PinnedRoots(pins...)
}

// Has reports whether there is an entry of this name.
func (p *Policy) Has(name string) bool {
	return slices.ContainsFunc(p.Entries, func(e Entry) bool { return e.Name == name })
}

// Lets reports whether there is an entry of this name whose peers may reach a service.
func (p *Policy) Lets(name, service string) bool {
	return slices.ContainsFunc(p.Entries, func(e Entry) bool { return e.Name == name && slices.Contains(e.Service, service) })
}

// AllowsKeys reports whether an entry accepts a measured key in place of a quote.
func (p *Policy) AllowsKeys() bool {
	return slices.ContainsFunc(p.Entries, func(e Entry) bool { return slices.Index(assurances, e.Require) >= slices.Index(assurances, requireKey) })
}

// AllowsUnattested reports whether an entry says that clients of this service may prove
// nothing.
func (p *Policy) AllowsUnattested(service string) bool {
	return slices.ContainsFunc(p.Entries, func(e Entry) bool { return e.AllowUnattestedClients && slices.Contains(e.Service, service) })
}

// Simulated names the entries that trust another root than Intel's.
func (p *Policy) Simulated() (names []string) {
	for i := range p.Entries {
		if p.Entries[i].AllowSimulated {
			names = append(names, p.Entries[i].Name)
		}
	}
	return names
}

// Entry is one kind of peer: a [[peer]] table.
type Entry struct {
	Name string `toml:"name"`
	// Service lists the local services that the peer may reach (the attested channel
	// enforces it).
	Service []string `toml:"service"`
	// Root is "intel", or "sha256:" and the hash of the DER of another root
	// certificate, which needs AllowSimulated.
	Root           string `toml:"root"`
	AllowSimulated bool   `toml:"allow_simulated"`

	Image         []string `toml:"image"` // names of [image."..."] tables
	AllowAnyImage bool     `toml:"allow_any_image"`

	AppID       []Hex `toml:"app_id"`       // 20 bytes
	ComposeHash []Hex `toml:"compose_hash"` // 32 bytes
	AllowAnyApp bool  `toml:"allow_any_app"`

	InstanceID  []Hex            `toml:"instance_id"` // 20 bytes
	DeviceID    []Hex            `toml:"device_id"`   // 32 bytes: SHA-256 of the PPID
	PPID        []Hex            `toml:"ppid"`        // 16 bytes
	KeyProvider *KeyProviderTerm `toml:"key_provider"`
	MRConfigID  []measure.Digest `toml:"mr_config_id"`
	RTMR3       []measure.Digest `toml:"rtmr3"`

	Terms // the keys of [defaults], which an entry may replace one by one

	roots  [][32]byte
	images []Image
}

// KeyProviderTerm says who may provide the application's keys.
type KeyProviderTerm struct {
	Kind measure.KeyProviderKind `toml:"kind"`
	ID   []Hex                   `toml:"id"` // as in the key-provider event
	// AllowAnyID accepts every KMS, or every local provider.
	AllowAnyID bool `toml:"allow_any_id"`
}

// Image is the Reference Values of an OS image. A list holds the values of its
// variants: RTMR0 changes with the number of processors and the size of memory.
type Image struct {
	Name          string           `toml:"-"`
	MRTD          []measure.Digest `toml:"mrtd"`
	RTMR0         []measure.Digest `toml:"rtmr0"`
	RTMR1         []measure.Digest `toml:"rtmr1"`
	RTMR2         []measure.Digest `toml:"rtmr2"`
	AllowAnyRTMR0 bool             `toml:"allow_any_rtmr0"`
	// Metadata is the path of the image's metadata.json, or of its
	// measurement.tdx.cbor, from which all four registers are calculated for the
	// machine of the evidence's own vm_config, see [Policy.LoadImages].
	Metadata string `toml:"metadata"`
	// Carried calculates them from the measurement document that the evidence carries in
	// its vm_config, if that is bound to OSImageHash.
	Carried bool `toml:"carried"`
	// AllowAnyPageOrder accepts MRTD for either order in which QEMU may add pages.
	AllowAnyPageOrder bool `toml:"allow_any_page_order"`
	// OSImageHash is compared with the os-image-hash event and with the vm_config's
	// claim, which prove nothing by themselves: it never stands alone.
	OSImageHash  Hex              `toml:"os_image_hash"`
	MRSEAM       []measure.Digest `toml:"mr_seam"`
	MinTEETCBSVN Hex              `toml:"min_tee_tcb_svn"` // up to 16 bytes, compared byte by byte
	XFAM         *Mask            `toml:"xfam"`

	calculated *calculation // of Metadata
}

// Terms are what an entry demands of the platform, beyond a genuine quote.
type Terms struct {
	TCBStatus              []dcap.Status `toml:"tcb_status"`
	TCBGrace               time.Duration `toml:"tcb_grace"` // OutOfDate is tolerated this long after Report.NewestTCBDate
	AdvisoriesAllow        []string      `toml:"advisories_allow"`
	AllowAnyAdvisory       bool          `toml:"allow_any_advisory"`
	AdvisoriesDeny         []string      `toml:"advisories_deny"`
	MinTCBDate             time.Time     `toml:"min_tcb_date"`
	MinTCBEvaluationNumber int           `toml:"min_tcb_eval_number"`
	MaxCollateralAge       time.Duration `toml:"max_collateral_age"` // since the oldest of TCB info, QE identity and PCK CRL was issued
	AllowAnyCollateralAge  bool          `toml:"allow_any_collateral_age"`
	AllowStaleCollateral   bool          `toml:"allow_stale_collateral"`
	FMSPC                  []Hex         `toml:"fmspc"` // 6 bytes
	FMSPCDeny              []Hex         `toml:"fmspc_deny"`

	AllowDebug           bool             `toml:"allow_debug"`
	RequireSEPTVEDisable bool             `toml:"require_sept_ve_disable"`
	AllowServiceTD       bool             `toml:"allow_service_td"`
	TDAttributes         *Mask            `toml:"td_attributes"` // 8 bytes, in the quote's byte order
	XFAM                 *Mask            `toml:"xfam"`          // 8 bytes, in the quote's byte order
	MRSEAM               []measure.Digest `toml:"mr_seam"`
	MinTEETCBSVN         Hex              `toml:"min_tee_tcb_svn"` // up to 16 bytes, compared byte by byte
	MinQESVN             int              `toml:"min_qe_svn"`
	MinPCESVN            int              `toml:"min_pce_svn"`

	// MaxCertLifetime is how long a certificate with evidence may be valid, from its
	// first to its last moment. Zero is for ever: dstack's are for ten years, from 1975.
	// It keeps honest peers to short ones; whoever holds the key can sign any.
	MaxCertLifetime time.Duration `toml:"max_cert_lifetime"`

	RequireEvents []string `toml:"require_events"`
	// Era "0.3" accepts a log without system-ready, as dstack 0.3 wrote it: nothing
	// then separates what was measured at boot from what an application could add.
	Era string `toml:"era"`

	// What follows is enforced by the attested channel.
	Require                 string `toml:"require"` // "quote", or more weakly "key" or "certificate"
	RequireMeasuredAgentKey bool   `toml:"require_measured_agent_key"`
	AllowUnattestedClients  bool   `toml:"allow_unattested_clients"`
}

// defaultTerms are the terms of a policy file that says nothing.
func defaultTerms() Terms {
	return Terms{
		TCBStatus: []dcap.Status{dcap.UpToDate}, MaxCollateralAge: 168 * time.Hour, RequireSEPTVEDisable: true,
		RequireEvents: []string{measure.EventAppID, measure.EventComposeHash},
		Require:       requireQuote, RequireMeasuredAgentKey: true,
	}
}

// Mask selects bits and says which value they must have.
type Mask struct {
	Mask  Hex `toml:"mask"`
	Value Hex `toml:"value"`
}

func (m *Mask) matches(b []byte) bool {
	for i := range b {
		if b[i]&m.Mask[i] != m.Value[i] {
			return false
		}
	}
	return true
}

// Hex is bytes that are written as hexadecimal digits, of either case and perhaps
// after 0x.
type Hex []byte

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex) UnmarshalText(text []byte) error {
	s := string(text)
	if len(s) > 1 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X') {
		s = s[2:]
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		return fmt.Errorf("%.80q is not hexadecimal: %v", text, err)
	}
	*h = b
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (h Hex) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

func (h Hex) String() string { return hex.EncodeToString(h) }

// policyID names a policy after its text.
func policyID(text []byte) string {
	sum := sha256.Sum256(text)
	return "sha256:" + hex.EncodeToString(sum[:8])
}
