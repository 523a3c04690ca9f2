package measure

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/gowebpki/jcs"
)

// AppCompose holds the keys of app-compose.json that this agent acts on, with
// dstack's defaults filled in. Everything else in the file is measured with it
// and otherwise left to others.
type AppCompose struct {
	ManifestVersion string // "manifest_version", a number or a string in the file
	Name            string
	Runner          string
	KeyProvider     KeyProviderKind // from key_provider, else kms_enabled, else local_key_provider_enabled, else none
	KeyProviderID   []byte          // nil: any
	NoInstanceID    bool
	EventLogVersion int             // EventV1 (the default) or EventV2
	InitScripts     []string        // "init_script", one string or at most 5
	GPUPolicy       json.RawMessage // requirements.gpu_policy; nil if absent
	StorageFS       string          // "" if absent
	PublicTCBInfo   bool            // true unless the file says otherwise
	PublicLogs      bool
	PublicSysInfo   bool
}

// ParseAppCompose reads app-compose.json. Keys match exactly; one that is there
// twice, or has another type than dstack's, is an error. Unknown keys are not.
func ParseAppCompose(b []byte) (AppCompose, error) {
	o, err := parseGuestObject(b)
	if err != nil {
		return AppCompose{}, err
	}
	c := AppCompose{EventLogVersion: EventV1, PublicTCBInfo: true}
	for _, m := range []struct {
		key string
		dst any
	}{
		{"runner", &c.Runner},
		{"no_instance_id", &c.NoInstanceID},
		{"event_log_version", &c.EventLogVersion},
		{"public_tcbinfo", &c.PublicTCBInfo},
		{"public_logs", &c.PublicLogs},
		{"public_sysinfo", &c.PublicSysInfo},
	} {
		if err := o.optional(m.key, m.dst); err != nil {
			return AppCompose{}, err
		}
	}
	if err := o.member("name", &c.Name); err != nil {
		return AppCompose{}, err
	}
	if c.EventLogVersion != EventV1 && c.EventLogVersion != EventV2 {
		return AppCompose{}, fmt.Errorf("event_log_version is %d, want %d or %d", c.EventLogVersion, EventV1, EventV2)
	}
	for _, f := range []func(guestObject, *AppCompose) error{
		composeManifest, composeKeyProvider, composeStorage, composeInitScripts, composeGPUPolicy,
	} {
		if err := f(o, &c); err != nil {
			return AppCompose{}, err
		}
	}
	return c, nil
}

func composeManifest(o guestObject, c *AppCompose) error {
	var n uint32
	if err := o.optional("manifest_version", &n); err == nil {
		if _, ok := o["manifest_version"]; ok {
			c.ManifestVersion = fmt.Sprint(n)
		}
		return nil
	}
	return o.optional("manifest_version", &c.ManifestVersion)
}

func composeKeyProvider(o guestObject, c *AppCompose) (err error) {
	var kms, local bool
	if err := o.optional("kms_enabled", &kms); err != nil {
		return err
	}
	if err := o.optional("local_key_provider_enabled", &local); err != nil {
		return err
	}
	var kind string
	if err := o.optionalOrNull("key_provider", &kind); err != nil {
		return err
	}
	switch {
	case kind != "":
		c.KeyProvider = KeyProviderKind(kind)
	case kms:
		c.KeyProvider = KeyProviderKMS
	case local:
		c.KeyProvider = KeyProviderLocal
	default:
		c.KeyProvider = KeyProviderNone
	}
	if c.KeyProvider.eventName() == "" {
		return fmt.Errorf("key_provider is %q, want none, kms, local or tpm", kind)
	}
	if c.KeyProviderID, err = o.hexMember("key_provider_id"); err == nil && len(c.KeyProviderID) > maxKeyProviderID {
		err = fmt.Errorf("key_provider_id has %d bytes, want at most %d", len(c.KeyProviderID), maxKeyProviderID)
	}
	return err
}

func composeStorage(o guestObject, c *AppCompose) error {
	if err := o.optionalOrNull("storage_fs", &c.StorageFS); err != nil {
		return err
	}
	switch c.StorageFS {
	case "", "zfs", "ext4":
		return nil
	}
	return fmt.Errorf("storage_fs is %q, want zfs or ext4", c.StorageFS)
}

func composeInitScripts(o guestObject, c *AppCompose) error {
	var script string
	if v := o["init_script"]; v != nil && v[0] == '"' {
		if err := o.optional("init_script", &script); err != nil {
			return err
		}
		c.InitScripts = []string{script}
		return nil
	}
	if err := o.optionalOrNull("init_script", &c.InitScripts); err != nil {
		return err
	}
	if n := len(c.InitScripts); n > maxInitScripts {
		return fmt.Errorf("init_script has %d scripts, want at most %d", n, maxInitScripts)
	}
	return nil
}

// composeGPUPolicy keeps the policy's own text: its RFC 8785 form is measured. That
// form has no place for a key that is there twice, at any depth.
func composeGPUPolicy(o guestObject, c *AppCompose) error {
	v, ok := o["requirements"]
	if !ok || string(v) == "null" {
		return nil
	}
	requirements, err := parseGuestObject(v)
	if err != nil {
		return fmt.Errorf("requirements: %v", err)
	}
	policy, ok := requirements["gpu_policy"]
	if !ok {
		return nil
	}
	if policy[0] != '{' {
		return errors.New("requirements.gpu_policy: want an object")
	}
	if len(policy) > maxGPUPolicy {
		return fmt.Errorf("requirements.gpu_policy has %d bytes, want at most %d", len(policy), maxGPUPolicy)
	}
	if _, err := jcs.Transform(policy); err != nil {
		return fmt.Errorf("requirements.gpu_policy: %v", err)
	}
	c.GPUPolicy = policy
	return nil
}

// KeyProvider returns the provider that the app-compose asks for, with the id that
// .appkeys.json gives it. Without that file the id is the key_provider_id of the
// app-compose, which may be empty: whoever gets the keys later must get them from that
// one. It is an error if the two name different kinds.
func (f *GuestFiles) KeyProvider() (KeyProvider, error) {
	p := KeyProvider{Kind: f.Compose.KeyProvider}
	if p.Kind.eventName() == "" {
		return KeyProvider{}, fmt.Errorf("key provider %q, want none, kms, local or tpm", p.Kind)
	}
	if f.AppKeys == nil {
		if p.Kind == KeyProviderKMS || p.Kind == KeyProviderLocal {
			p.ID = f.Compose.KeyProviderID
		}
		return p, nil
	}
	if got := f.AppKeys.KeyProvider.Kind; got != p.Kind {
		return KeyProvider{}, fmt.Errorf("app-compose.json asks for key provider %s, but .appkeys.json comes from %s", p.Kind, got)
	}
	return f.AppKeys.KeyProvider, nil
}
