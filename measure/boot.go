package measure

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/gowebpki/jcs"
)

// Era names the generation of dstack whose order of boot events is measured. A
// verifier's Reference Values decide which one an image must use.
type Era string

// The eras. Each is named after the first release that used its order.
const (
	Era03   Era = "0.3"
	Era040  Era = "0.4.0"  // dev-v0.4.0.0; adds the marker events and key-provider
	Era042  Era = "0.4.2"  // and 0.5.0; rootfs-hash is gone, the kernel command line binds it
	Era051  Era = "0.5.1"  // to 0.5.4; adds os-image-hash
	Era0511 Era = "0.5.11" // from 0.5.5; adds storage-fs. The default
	Era06   Era = "0.6"    // adds init scripts and the GPU, drops mr-kms
)

// ParseEra returns the era of a configured name; "0.5.0" is Era042.
func ParseEra(name string) (Era, error) {
	switch e := Era(name); e {
	case Era03, Era040, Era042, Era051, Era0511, Era06:
		return e, nil
	case "0.5.0":
		return Era042, nil
	}
	return "", fmt.Errorf("event order %q, want 0.3, 0.4.0, 0.4.2, 0.5.0, 0.5.1, 0.5.11 or 0.6", name)
}

// order returns the names of the era's boot events. Whether an event is there at
// all depends on the input.
func (e Era) order() []string {
	switch e {
	case Era03:
		return []string{EventRootFSHash, EventAppID, EventComposeHash, EventCACertHash, EventInstanceID,
			EventAgentConfig, EventAgentKey}
	case Era040:
		return []string{EventSystemPreparing, EventRootFSHash, EventAppID, EventComposeHash, EventInstanceID,
			EventBootMRDone, EventMRKMS, EventKeyProvider, EventAgentConfig, EventAgentKey, EventSystemReady}
	case Era042:
		return []string{EventSystemPreparing, EventAppID, EventComposeHash, EventInstanceID,
			EventBootMRDone, EventMRKMS, EventKeyProvider, EventAgentConfig, EventAgentKey, EventSystemReady}
	case Era051:
		return []string{EventSystemPreparing, EventAppID, EventComposeHash, EventInstanceID,
			EventBootMRDone, EventMRKMS, EventOSImageHash, EventKeyProvider,
			EventAgentConfig, EventAgentKey, EventSystemReady}
	case Era0511:
		return []string{EventSystemPreparing, EventAppID, EventComposeHash, EventInstanceID,
			EventBootMRDone, EventMRKMS, EventOSImageHash, EventKeyProvider, EventStorageFS,
			EventAgentConfig, EventAgentKey, EventSystemReady}
	case Era06:
		return []string{EventSystemPreparing, EventAppID, EventComposeHash,
			EventInitScriptHash, EventGPUPolicyHash, EventGPUAttestation, EventInstanceID,
			EventBootMRDone, EventOSImageHash, EventKeyProvider, EventStorageFS,
			EventAgentConfig, EventAgentKey, EventSystemReady}
	}
	return nil
}

// BootInput is everything that is measured at boot. Inputs that the era has no
// event for are ignored, except GPUAttestation, which is then an error.
type BootInput struct {
	Files *GuestFiles
	Era   Era

	OSImageHash []byte // 32 bytes, as the KMS returned it; required with a KMS from 0.5.1 on
	RootFSHash  []byte // 32 bytes; required in 0.3 and 0.4.0
	CACertHash  []byte // 32 bytes, SHA-256 of the KMS CA certificate file; required with a KMS in 0.3
	MRKMS       []byte // 32 bytes, the KMS's mr_aggregated; required with a KMS in 0.5.x, optional in 0.4.x
	// StorageFS is "zfs" or "ext4"; "" means what the app-compose says. Required
	// in either place from 0.5.5 on.
	StorageFS string
	// GPUAttestation is the JSON payload of gpu-attestation; empty: no such event.
	GPUAttestation []byte

	// InstanceIDSeed is the seed already chosen in this boot (see
	// [InstanceIDSeed]), so that a second run measures the same instance. When
	// nil, BootSequence chooses one, taking fresh bytes from Rand.
	InstanceIDSeed []byte
	Rand           io.Reader

	// AgentConfig is the RFC 8785 form of the settings that are looser than their
	// defaults, an object of at most 4096 bytes. Empty: no agent-config event.
	AgentConfig []byte
	// AgentKey is the P-256 key that signs channel bodies. Nil: no agent-key event.
	AgentKey *ecdsa.PublicKey
}

// BootEvent is one runtime event still to be measured.
type BootEvent struct {
	Name    string
	Payload []byte
}

// BootSequence returns the events to extend into RTMR3 at boot, in the order of
// the era. agent-config and agent-key are the last before system-ready; era 0.3
// has no system-ready and ends with them. What the era needs and the input lacks
// is an error that says what to supply.
func BootSequence(in BootInput) ([]BootEvent, error) {
	b, err := newBoot(in)
	if err != nil {
		return nil, err
	}
	if len(in.GPUAttestation) > 0 && !slices.Contains(in.Era.order(), EventGPUAttestation) {
		return nil, fmt.Errorf("event order %s has no %s event, but one was given: use event order %s", in.Era, EventGPUAttestation, Era06)
	}
	var events []BootEvent
	for _, name := range in.Era.order() {
		payloads, err := b.payloads(name)
		if err != nil {
			return nil, fmt.Errorf("%s event of event order %s: %w", name, in.Era, err)
		}
		for _, p := range payloads {
			events = append(events, BootEvent{name, p})
		}
	}
	return events, nil
}

// boot is a BootInput with the identity worked out.
type boot struct {
	BootInput
	provider    KeyProvider
	composeHash [32]byte
	appID       []byte
}

func newBoot(in BootInput) (*boot, error) {
	if in.Files == nil || len(in.Files.AppCompose) == 0 {
		return nil, errors.New("no app-compose.json was given")
	}
	if in.Era.order() == nil {
		return nil, fmt.Errorf("unknown event order %q", in.Era)
	}
	b := &boot{BootInput: in, composeHash: ComposeHash(in.Files.AppCompose)}
	var err error
	if b.provider, err = in.Files.KeyProvider(); err != nil {
		return nil, err
	}
	b.appID, err = bootAppID(in.Era, in.Files.Instance.AppID, b.composeHash, b.usesKMS())
	return b, err
}

func (b *boot) usesKMS() bool { return b.provider.Kind == KeyProviderKMS }

// bootAppID applies the era's rule for an app_id that is not the one the compose
// file gives. Only a KMS can vouch for one before 0.6: releases up to 0.5.4 do not
// boot, later ones ignore it.
func bootAppID(era Era, given []byte, composeHash [32]byte, kms bool) ([]byte, error) {
	own := composeHash[:20]
	switch {
	case len(given) == 0 || bytes.Equal(given, own):
		return own, nil
	case len(given) != 20:
		return nil, fmt.Errorf("app_id has %d bytes, want 20", len(given))
	case kms || era == Era06:
		return given, nil
	case era == Era0511:
		return own, nil
	}
	return nil, fmt.Errorf("app_id is %x, but without a KMS event order %s allows only the one of app-compose.json, %x: correct .instance_info", given, era, own)
}

// payloads returns the payloads of one kind of event: usually one, none if the
// event does not apply.
func (b *boot) payloads(name string) ([][]byte, error) {
	kms := b.usesKMS()
	switch name {
	case EventSystemPreparing, EventBootMRDone, EventSystemReady:
		return [][]byte{{}}, nil
	case EventAppID:
		return [][]byte{b.appID}, nil
	case EventComposeHash:
		return [][]byte{b.composeHash[:]}, nil
	case EventInstanceID:
		return one(b.instanceID())
	case EventRootFSHash:
		return one(bootHash(b.RootFSHash, "the root file system hash of the image"))
	case EventCACertHash:
		if !kms {
			none := sha256.Sum256(nil)
			return [][]byte{none[:]}, nil
		}
		return one(bootHash(b.CACertHash, "the SHA-256 of the KMS CA certificate file"))
	case EventMRKMS:
		if !kms || len(b.MRKMS) == 0 && (b.Era == Era040 || b.Era == Era042) {
			return nil, nil
		}
		return one(bootHash(b.MRKMS, "the KMS's mr_aggregated"))
	case EventOSImageHash:
		if !kms {
			return nil, nil
		}
		return one(bootHash(b.OSImageHash, "the os_image_hash that the KMS returned"))
	case EventKeyProvider:
		return one(b.keyProvider())
	case EventStorageFS:
		return one(b.storageFS())
	case EventInitScriptHash:
		return b.initScripts(), nil
	case EventGPUPolicyHash:
		return one(GPUPolicyHash(b.Files.Compose.GPUPolicy))
	case EventGPUAttestation:
		return b.gpuAttestation()
	case EventAgentConfig:
		return b.agentConfig()
	case EventAgentKey:
		return b.agentKey()
	}
	return nil, errors.New("has no known payload")
}

func one(payload []byte, err error) ([][]byte, error) { return [][]byte{payload}, err }

func bootHash(h []byte, what string) ([]byte, error) {
	if len(h) != 32 {
		return nil, fmt.Errorf("needs %s: got %d bytes, want 32", what, len(h))
	}
	return h, nil
}

// instanceID derives the instance id. Eras 0.3 and 0.4.0 kept the id itself
// between boots, later ones the seed.
func (b *boot) instanceID() ([]byte, error) {
	f := b.Files
	if f.Compose.NoInstanceID {
		return []byte{}, nil
	}
	keepsID := b.Era == Era03 || b.Era == Era040
	if keepsID && b.provider.Kind != KeyProviderNone && len(f.Instance.InstanceID) == 20 {
		return f.Instance.InstanceID, nil
	}
	seed := b.InstanceIDSeed
	if seed == nil {
		var err error
		if seed, err = InstanceIDSeed(f, b.Rand); err != nil {
			return nil, err
		}
	}
	if len(seed) != 20 {
		return nil, fmt.Errorf("instance id seed has %d bytes, want 20", len(seed))
	}
	return InstanceID(seed, b.appID), nil
}

func (b *boot) keyProvider() ([]byte, error) {
	p := b.provider
	if len(p.ID) == 0 && (p.Kind == KeyProviderKMS || p.Kind == KeyProviderLocal) {
		return nil, fmt.Errorf("needs the id of the %s key provider: supply .appkeys.json with it, or key_provider_id in app-compose.json", p.Kind)
	}
	if want := b.Files.Compose.KeyProviderID; len(want) > 0 && !bytes.Equal(want, p.ID) {
		return nil, fmt.Errorf("key provider is %x, but app-compose.json demands key_provider_id %x", p.ID, want)
	}
	return p.Payload(), nil
}

func (b *boot) storageFS() ([]byte, error) {
	fs, declared := b.StorageFS, b.Files.Compose.StorageFS
	if fs == "" {
		fs = declared
	}
	if declared != "" && fs != declared {
		return nil, fmt.Errorf("configured as %q, but app-compose.json says %q", fs, declared)
	}
	if fs != "zfs" && fs != "ext4" {
		return nil, fmt.Errorf("got %q, want zfs or ext4: supply the storage file system, here or as storage_fs in app-compose.json", fs)
	}
	return []byte(fs), nil
}

func (b *boot) initScripts() [][]byte {
	var hashes [][]byte
	for _, script := range b.Files.Compose.InitScripts {
		h := sha256.Sum256([]byte(script))
		hashes = append(hashes, h[:])
	}
	return hashes
}

// gpuAttestation checks the payload only for what keeps it readable; its claims
// come from whoever attested the GPU.
func (b *boot) gpuAttestation() ([][]byte, error) {
	switch p := b.GPUAttestation; {
	case len(p) == 0:
		return nil, nil
	case len(p) > 4096:
		return nil, fmt.Errorf("has %d bytes, want at most 4096", len(p))
	default:
		_, err := parseGuestObject(p)
		return [][]byte{p}, err
	}
}

func (b *boot) agentConfig() ([][]byte, error) {
	if len(b.AgentConfig) == 0 {
		return nil, nil
	}
	if err := checkAgentConfig(b.AgentConfig); err != nil {
		return nil, err
	}
	return [][]byte{b.AgentConfig}, nil
}

// checkAgentConfig demands the one encoding that a verifier can compare.
func checkAgentConfig(p []byte) error {
	if len(p) > 4096 {
		return fmt.Errorf("has %d bytes, want at most 4096", len(p))
	}
	o, err := parseGuestObject(p)
	if err != nil {
		return err
	}
	if len(o) == 0 {
		return errors.New("is an empty object; leave the event out instead")
	}
	canonical, err := jcs.Transform(p)
	if err != nil {
		return err
	}
	if !bytes.Equal(canonical, p) {
		return errors.New("is not in RFC 8785 form")
	}
	return nil
}

func (b *boot) agentKey() ([][]byte, error) {
	if b.AgentKey == nil {
		return nil, nil
	}
	return one(AgentKeyPayload(b.AgentKey))
}

// AgentKeyPayload returns the payload of the agent-key event: the SHA-256 of the
// key's DER SubjectPublicKeyInfo. The key must be on P-256.
func AgentKeyPayload(key *ecdsa.PublicKey) ([]byte, error) {
	if key == nil || key.Curve != elliptic.P256() {
		return nil, errors.New("agent key: want an ECDSA key on P-256")
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("agent key: %v", err)
	}
	h := sha256.Sum256(spki)
	return h[:], nil
}

// InstanceIDSeed returns the 20-byte seed of this boot's instance id, or nil if
// the application has none. Without a key provider nothing on disk survives a
// boot, so the seed is fresh from rand then, and also when the host keeps none;
// otherwise it is the kept one. The caller stores a fresh seed for as long as the
// boot lasts.
func InstanceIDSeed(f *GuestFiles, rand io.Reader) ([]byte, error) {
	if f.Compose.NoInstanceID {
		return nil, nil
	}
	if f.Compose.KeyProvider != KeyProviderNone && len(f.Instance.InstanceIDSeed) > 0 {
		return f.Instance.InstanceIDSeed, nil
	}
	if rand == nil {
		return nil, errors.New("instance id: no seed is kept and no source of random bytes was given")
	}
	seed := make([]byte, 20)
	if _, err := io.ReadFull(rand, seed); err != nil {
		return nil, fmt.Errorf("instance id seed: %v", err)
	}
	return seed, nil
}

// GPUPolicyHash returns SHA-256 over the RFC 8785 form of requirements.gpu_policy;
// an absent policy (nil) counts as {}.
func GPUPolicyHash(policy json.RawMessage) ([]byte, error) {
	if policy == nil {
		policy = json.RawMessage("{}")
	}
	canonical, err := jcs.Transform(policy)
	if err != nil {
		return nil, fmt.Errorf("gpu_policy: %v", err)
	}
	h := sha256.Sum256(canonical)
	return h[:], nil
}
