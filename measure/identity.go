package measure

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// The names of the events that carry a TD's identity (dstack, and the last two
// this agent's own).
const (
	EventSystemPreparing = "system-preparing"
	EventRootFSHash      = "rootfs-hash"
	EventAppID           = "app-id"
	EventComposeHash     = "compose-hash"
	EventCACertHash      = "ca-cert-hash"
	EventInitScriptHash  = "init-script-hash"
	EventGPUPolicyHash   = "gpu-policy-hash"
	EventGPUAttestation  = "gpu-attestation"
	EventInstanceID      = "instance-id"
	EventBootMRDone      = "boot-mr-done"
	EventMRKMS           = "mr-kms"
	EventOSImageHash     = "os-image-hash"
	EventKeyProvider     = "key-provider"
	EventStorageFS       = "storage-fs"
	EventSystemReady     = "system-ready"
	EventAgentConfig     = "agent-config" // the settings that are looser than their defaults
	EventAgentKey        = "agent-key"    // the hash of the key that signs channel bodies
)

// ReservedEvent reports whether a verifier trusts events of this name, so that no
// application may emit one.
func ReservedEvent(name string) bool {
	switch name {
	case EventSystemPreparing, EventRootFSHash, EventAppID, EventComposeHash, EventCACertHash,
		EventInitScriptHash, EventGPUPolicyHash, EventGPUAttestation, EventInstanceID,
		EventBootMRDone, EventMRKMS, EventOSImageHash, EventKeyProvider, EventStorageFS,
		EventSystemReady, EventAgentConfig, EventAgentKey:
		return true
	}
	return false
}

// PassesForReserved reports whether an event of this name can be passed off as a reserved
// one: "app-id:x" with the payload "y" has the version 1 digest of "app-id" with the payload
// "x:y", and RTMR3 tells no verifier which of them was recorded.
func PassesForReserved(name string) bool {
	before, _, isJoined := strings.Cut(name, ":")
	return isJoined && ReservedEvent(before)
}

// OnceOnly reports whether a boot has at most one event of this name: every
// reserved one but init-script-hash, of which there are up to 5.
func OnceOnly(name string) bool { return ReservedEvent(name) && name != EventInitScriptHash }

// KeyProviderKind says who provides an application's keys, in the words of
// app-compose.json. The zero value is no kind.
type KeyProviderKind string

// The kinds of key provider.
const (
	KeyProviderNone  KeyProviderKind = "none"
	KeyProviderLocal KeyProviderKind = "local" // an SGX enclave on the host; "local-sgx" in the event
	KeyProviderKMS   KeyProviderKind = "kms"
	KeyProviderTPM   KeyProviderKind = "tpm"
)

// maxKeyProviderID bounds the id; dstack's longest, a P-256 key, has 91 bytes.
const maxKeyProviderID = 512

// eventName returns the kind's name in the key-provider event, "" for no kind.
func (k KeyProviderKind) eventName() string {
	switch k {
	case KeyProviderNone, KeyProviderKMS, KeyProviderTPM:
		return string(k)
	case KeyProviderLocal:
		return "local-sgx"
	}
	return ""
}

// KeyProvider is who provides the keys. ID is the DER SubjectPublicKeyInfo of the
// KMS root CA, the 32-byte MRENCLAVE of a local provider, or empty.
type KeyProvider struct {
	Kind KeyProviderKind
	ID   []byte
}

// Payload returns the payload of the key-provider event.
func (p KeyProvider) Payload() []byte {
	return fmt.Appendf(nil, `{"name":"%s","id":"%x"}`, p.Kind.eventName(), p.ID)
}

// ParseKeyProvider parses the payload of a key-provider event, which must be
// exactly what Payload writes.
func ParseKeyProvider(payload []byte) (KeyProvider, error) {
	if len(payload) > 64+2*maxKeyProviderID {
		return KeyProvider{}, fmt.Errorf("key provider: %d bytes, want at most %d", len(payload), 64+2*maxKeyProviderID)
	}
	var doc struct{ Name, ID string }
	if err := json.Unmarshal(payload, &doc); err != nil {
		return KeyProvider{}, fmt.Errorf("key provider: %v", err)
	}
	p := KeyProvider{Kind: KeyProviderKind(doc.Name)}
	if doc.Name == "local-sgx" {
		p.Kind = KeyProviderLocal
	}
	var err error
	if p.ID, err = hex.DecodeString(doc.ID); err != nil {
		return KeyProvider{}, fmt.Errorf("key provider: id: %v", err)
	}
	if doc.Name == "" || string(p.Payload()) != string(payload) {
		return KeyProvider{}, fmt.Errorf(`key provider: %q is not of the form {"name":"kms|local-sgx|tpm|none","id":"<hex>"}`, payload)
	}
	return p, nil
}

// ComposeHash returns the compose_hash of an app-compose.json: SHA-256 of its exact
// bytes, which nobody normalises in the guest.
func ComposeHash(appCompose []byte) [32]byte { return sha256.Sum256(appCompose) }

// InstanceID returns SHA-256(seed || appID) cut to 20 bytes. Both are 20 bytes.
func InstanceID(seed, appID []byte) []byte {
	h := sha256.New()
	h.Write(seed)
	h.Write(appID)
	return h.Sum(nil)[:20]
}

// DeviceID returns SHA-256 of the platform's PPID. A guest has no PPID and uses
// nil.
func DeviceID(ppid []byte) [32]byte { return sha256.Sum256(ppid) }

// MRKeyProvider returns SHA-256 of the key-provider event's payload, or zeros if
// there is none.
func MRKeyProvider(payload []byte) [32]byte {
	if len(payload) == 0 {
		return [32]byte{}
	}
	return sha256.Sum256(payload)
}

// MRSystem returns dstack's mr_system, SHA-256(MRTD || RTMR0 || RTMR1 || RTMR2 ||
// mr_key_provider): the machine without the application. keyProvider is the
// payload of the key-provider event, empty if there is none.
func MRSystem(r Registers, keyProvider []byte) [32]byte {
	mr := MRKeyProvider(keyProvider)
	h := sha256.New()
	for _, d := range []Digest{r.MRTD, r.RTMR[0], r.RTMR[1], r.RTMR[2]} {
		h.Write(d[:])
	}
	h.Write(mr[:])
	return [32]byte(h.Sum(nil))
}

// MRAggregated returns dstack's mr_aggregated, SHA-256 over MRTD and the four
// RTMRs, followed by MRCONFIGID, MROWNER and MROWNERCONFIG if any of these is not
// zero (dstack 0.4.2 never adds them). r.RTMR[3] must be the value replayed from
// the event log: from all of it, or from [BootTimeEvents] for the value that a KMS
// sees.
func MRAggregated(r Registers) [32]byte {
	h := sha256.New()
	h.Write(r.MRTD[:])
	for _, d := range r.RTMR {
		h.Write(d[:])
	}
	if !r.MRConfigID.IsZero() || !r.MROwner.IsZero() || !r.MROwnerConfig.IsZero() {
		for _, d := range []Digest{r.MRConfigID, r.MROwner, r.MROwnerConfig} {
			h.Write(d[:])
		}
	}
	return [32]byte(h.Sum(nil))
}

// BootTimeEvents returns the events up to and including the first boot-mr-done,
// and whether there is one; without one it returns all of them.
func BootTimeEvents(events []Event) ([]Event, bool) {
	for i := range events {
		if events[i].IsRuntime() && events[i].Name == EventBootMRDone {
			return events[:i+1], true
		}
	}
	return events, false
}

// Identity is what the runtime events of a log say a TD is. A nil or empty member
// means that the log has no such event; whether that is acceptable is for the
// caller to say. It is worth as much as the log's replay against a verified quote.
type Identity struct {
	AppID, ComposeHash []byte
	InstanceID         []byte // not nil but empty: the application has none
	OSImageHash        []byte
	RootFSHash         []byte
	CACertHash         []byte
	MRKMS              []byte
	KeyProvider        string // the payload, JSON; see [ParseKeyProvider]
	StorageFS          string
	InitScriptHashes   [][]byte
	GPUPolicyHash      []byte
	GPUAttestation     []byte // JSON
	AgentConfig        []byte // JSON
	AgentKey           []byte // SHA-256 of the SubjectPublicKeyInfo

	// Ready says that system-ready was measured. Without it nothing separates boot
	// events from those of the application, except in dstack 0.3, which had none.
	Ready bool
	// Preparing and BootMRDone say that the two other marks of the boot are there.
	Preparing, BootMRDone bool
	// Late names the reserved events after system-ready. They count for nothing.
	Late []string
}

// Has reports whether the log has an event of this name that counts for the identity.
func (id *Identity) Has(name string) bool {
	switch name {
	case EventAppID:
		return id.AppID != nil
	case EventInstanceID:
		return id.InstanceID != nil
	case EventKeyProvider:
		return id.KeyProvider != ""
	case EventStorageFS:
		return id.StorageFS != ""
	case EventInitScriptHash:
		return id.InitScriptHashes != nil
	case EventGPUAttestation:
		return id.GPUAttestation != nil
	case EventAgentConfig:
		return id.AgentConfig != nil
	case EventSystemReady:
		return id.Ready
	case EventSystemPreparing:
		return id.Preparing
	case EventBootMRDone:
		return id.BootMRDone
	}
	hash := id.hash(name)
	return hash != nil && *hash != nil
}

// IdentityFinding is one contradiction in the identity events of a log.
type IdentityFinding struct {
	Index   int    // in the log
	Event   string // its name
	Problem string
}

// IdentityError lists everything wrong with a log's identity events.
type IdentityError struct{ Findings []IdentityFinding }

func (e *IdentityError) Error() string {
	var b strings.Builder
	b.WriteString("identity events: ")
	for i, f := range e.Findings {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "event %d (%s) %s", f.Index, f.Event, f.Problem)
	}
	return b.String()
}

// IdentityOf reads a TD's identity from its event log: from runtime events (RTMR3,
// type 0x08000001) before system-ready only, the first of a name winning. A second
// event of a once-only name, a payload of the wrong size or form, and a digest that
// does not follow from name and payload are all reported, in one *IdentityError;
// the Identity is then good for display only. So is what could hide an identity event
// from the reader: beside identity events one of RTMR3 of another type, whose digest
// says nothing of its name, and before system-ready a version 1 event whose name
// continues a reserved one after a colon, which has the digest of that one too.
func IdentityOf(events []Event) (Identity, error) {
	var id Identity
	var findings, opaque []IdentityFinding
	seen := map[string]bool{}
	for i := range events {
		e := &events[i]
		report := func(problem string) { findings = append(findings, IdentityFinding{i, e.Name, problem}) }
		switch {
		case e.IMR == RTMR3 && !e.IsRuntime():
			opaque = append(opaque, IdentityFinding{i, e.Name, fmt.Sprintf("is in RTMR3 with the type %#x, want %#x: it could be any event of the boot", e.Type, RuntimeEventType)})
			continue
		case !e.IsRuntime():
			continue
		case !id.Ready && hidesReserved(e):
			report("has the digest of a reserved event too, whose name ends at the colon")
			continue
		case !ReservedEvent(e.Name):
			continue
		case id.Ready:
			id.Late = append(id.Late, e.Name)
			continue
		}
		if err := e.Check(); err != nil {
			report("has a digest that its name and payload do not give")
		}
		if seen[e.Name] && OnceOnly(e.Name) {
			report("is there a second time")
			continue
		}
		seen[e.Name] = true
		if err := id.take(e); err != nil {
			report(err.Error())
		}
	}
	if len(seen) > 0 { // who logs otherwise than dstack claims no identity
		findings = append(findings, opaque...)
	}
	if findings != nil {
		return id, &IdentityError{findings}
	}
	return id, nil
}

// hidesReserved reports whether e's digest is also that of a reserved event: version 1
// joins name and payload by a colon, and does not say at which.
func hidesReserved(e *Event) bool { return e.Version != EventV2 && PassesForReserved(e.Name) }

// take stores the payload of one identity event if it is well formed.
func (id *Identity) take(e *Event) error {
	switch e.Name {
	case EventSystemReady:
		id.Ready = true
		return identityBytes(nil, e.Payload, 0)
	case EventSystemPreparing:
		id.Preparing = true
		return identityBytes(nil, e.Payload, 0)
	case EventBootMRDone:
		id.BootMRDone = true
		return identityBytes(nil, e.Payload, 0)
	case EventAppID:
		return identityBytes(&id.AppID, e.Payload, 20)
	case EventInstanceID:
		if len(e.Payload) == 0 {
			id.InstanceID = []byte{}
			return nil
		}
		return identityBytes(&id.InstanceID, e.Payload, 20)
	case EventKeyProvider:
		if _, err := ParseKeyProvider(e.Payload); err != nil {
			return err
		}
		id.KeyProvider = string(e.Payload)
	case EventStorageFS:
		if id.StorageFS = string(e.Payload); id.StorageFS != "zfs" && id.StorageFS != "ext4" {
			id.StorageFS = ""
			return fmt.Errorf("is %q, want zfs or ext4", e.Payload)
		}
	case EventInitScriptHash:
		if len(id.InitScriptHashes) == maxInitScripts {
			return fmt.Errorf("is there more than %d times", maxInitScripts)
		}
		var h []byte
		if err := identityBytes(&h, e.Payload, 32); err != nil {
			return err
		}
		id.InitScriptHashes = append(id.InitScriptHashes, h)
	case EventGPUAttestation:
		return identityJSON(&id.GPUAttestation, e.Payload)
	case EventAgentConfig:
		return identityJSON(&id.AgentConfig, e.Payload)
	default:
		return identityBytes(id.hash(e.Name), e.Payload, 32)
	}
	return nil
}

// hash returns the place of an event whose payload is a SHA-256.
func (id *Identity) hash(name string) *[]byte {
	return map[string]*[]byte{
		EventComposeHash:   &id.ComposeHash,
		EventOSImageHash:   &id.OSImageHash,
		EventRootFSHash:    &id.RootFSHash,
		EventCACertHash:    &id.CACertHash,
		EventMRKMS:         &id.MRKMS,
		EventGPUPolicyHash: &id.GPUPolicyHash,
		EventAgentKey:      &id.AgentKey,
	}[name]
}

func identityBytes(dst *[]byte, payload []byte, size int) error {
	if len(payload) != size {
		return fmt.Errorf("has a payload of %d bytes, want %d", len(payload), size)
	}
	if dst != nil {
		*dst = payload
	}
	return nil
}

func identityJSON(dst *[]byte, payload []byte) error {
	if len(payload) > 4096 {
		return fmt.Errorf("has a payload of %d bytes, want at most 4096", len(payload))
	}
	if _, err := parseGuestObject(payload); err != nil {
		return errors.New("has a payload that is not a JSON object: " + err.Error())
	}
	*dst = payload
	return nil
}
