package measure

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// The size caps of the files a dstack host shares with its guest; the first three
// are dstack's own.
const (
	maxAppCompose   = 50 << 20
	maxSysConfig    = 32 << 10
	maxInstanceInfo = 10 << 10
	maxAppKeys      = 256 << 10
	maxGPUPolicy    = 256 << 10
	maxInitScripts  = 5
)

// GuestFiles is what the host hands to a dstack guest. The host can write
// anything into these files: only what BootSequence measures from them becomes
// part of the TD's identity. VMConfig and SysConfig stay claims of the host.
type GuestFiles struct {
	AppCompose []byte       // the exact bytes of app-compose.json; compose_hash is their SHA-256
	Compose    AppCompose   // the keys of it that this agent reads
	SysConfig  SysConfig    // zero if .sys-config.json is absent and may be
	Instance   InstanceInfo // zero if .instance_info is absent
	AppKeys    *AppKeysInfo // nil if .appkeys.json is absent
}

// SysConfig is .sys-config.json, a claim of the host.
type SysConfig struct {
	Raw      []byte // the file
	VMConfig string // "vm_config", to the byte, unwrapped where an old host wrapped it; "" if absent
	MRConfig string // "mr_config", the document that MRCONFIGID version 3 hashes; "" if absent
}

// InstanceInfo is .instance_info, in which the host keeps a VM's identity across
// boots. Each member is 20 bytes or nil.
type InstanceInfo struct {
	AppID          []byte
	InstanceIDSeed []byte
	InstanceID     []byte
}

// AppKeysInfo is the public part of .appkeys.json: who provides this guest's
// keys. No secret of the file is kept.
type AppKeysInfo struct {
	KeyProvider KeyProvider
	CACert      string // PEM
}

// GuestFileOptions says where the files are if not in the usual place, and which
// may be missing.
type GuestFileOptions struct {
	// AppKeys is the path of the keys file, which must then exist (systemd hands
	// it over as a credential). Empty means .appkeys.json in the directory, which
	// may be missing.
	AppKeys string
	// SysConfigOptional allows .sys-config.json to be missing, as it is outside
	// dstack.
	SysConfigOptional bool
}

// ReadGuestFiles reads app-compose.json (at most 50 MiB), .sys-config.json
// (32 KiB), .instance_info (10 KiB) and .appkeys.json from dir. Only
// app-compose.json and, by default, .sys-config.json must exist. Every file must
// be a regular file and not a symbolic link. Errors name the file; a missing one
// satisfies errors.Is(err, fs.ErrNotExist).
func ReadGuestFiles(dir string, opt GuestFileOptions) (*GuestFiles, error) {
	var f GuestFiles
	var err error
	compose := filepath.Join(dir, "app-compose.json")
	if f.AppCompose, err = ReadGuestFile(compose, maxAppCompose); err != nil {
		return nil, err
	}
	if f.Compose, err = ParseAppCompose(f.AppCompose); err != nil {
		return nil, fmt.Errorf("%s: %v", compose, err)
	}
	err = guestParse(filepath.Join(dir, ".sys-config.json"), maxSysConfig, opt.SysConfigOptional, func(b []byte) (err error) {
		f.SysConfig, err = ParseSysConfig(b)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = guestParse(filepath.Join(dir, ".instance_info"), maxInstanceInfo, true, func(b []byte) (err error) {
		f.Instance, err = ParseInstanceInfo(b)
		return err
	})
	if err != nil {
		return nil, err
	}
	keys := opt.AppKeys
	if keys == "" {
		keys = filepath.Join(dir, ".appkeys.json")
	}
	err = guestParse(keys, maxAppKeys, opt.AppKeys == "", func(b []byte) (err error) {
		f.AppKeys, err = ParseAppKeys(b)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &f, nil
}

// guestParse reads one file and parses it; a missing optional file is no error.
func guestParse(path string, limit int64, optional bool, parse func([]byte) error) error {
	b, err := ReadGuestFile(path, limit)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := parse(b); err != nil {
		return fmt.Errorf("%s: %v", path, err)
	}
	return nil
}

// ReadGuestFile reads a whole regular file of at most limit bytes, one that somebody
// else has written. It does not follow
// a symbolic link and, by O_NONBLOCK, does not hang when opening a FIFO. The
// buffer is allocated once, so that a secret in it can be cleared.
func ReadGuestFile(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, syscall.ELOOP) {
			return nil, fmt.Errorf("%s: is a symbolic link, want a regular file", path)
		}
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: is a %v, want a regular file", path, st.Mode().Type())
	}
	if st.Size() > limit {
		return nil, fmt.Errorf("%s: has %d bytes, want at most %d", path, st.Size(), limit)
	}
	b := make([]byte, st.Size()+1) // one more, to notice growth
	n, err := io.ReadFull(f, b)
	switch {
	case err == nil || int64(n) != st.Size():
		return nil, fmt.Errorf("%s: its size changed while it was read; try again", path)
	case err != io.EOF && err != io.ErrUnexpectedEOF:
		return nil, err
	}
	return b[:n:n], nil
}

// ParseSysConfig parses .sys-config.json. Members that this agent does not use
// are left in Raw.
func ParseSysConfig(b []byte) (SysConfig, error) {
	o, err := parseGuestObject(b)
	if err != nil {
		return SysConfig{}, err
	}
	s := SysConfig{Raw: b}
	if err := o.optional("vm_config", &s.VMConfig); err != nil {
		return SysConfig{}, err
	}
	if err := o.optional("mr_config", &s.MRConfig); err != nil {
		return SysConfig{}, err
	}
	s.VMConfig, err = unwrapVMConfig(s.VMConfig)
	return s, err
}

// unwrapVMConfig returns the inner vm_config where an old host put a whole
// sys-config into the member. Anything else is passed through, whatever it is.
func unwrapVMConfig(s string) (string, error) {
	if !strings.HasPrefix(strings.TrimLeft(s, " \t\r\n"), "{") || !json.Valid([]byte(s)) {
		return s, nil
	}
	o, err := parseGuestObject([]byte(s))
	if err != nil {
		return "", fmt.Errorf("vm_config: %v", err)
	}
	if _, wrapped := o["vm_config"]; !wrapped {
		return s, nil
	}
	var inner string
	if err := o.member("vm_config", &inner); err != nil {
		return "", fmt.Errorf("wrapped vm_config: %v", err)
	}
	return inner, nil
}

// ParseInstanceInfo parses .instance_info. Each member is 40 hexadecimal digits,
// or absent or empty.
func ParseInstanceInfo(b []byte) (InstanceInfo, error) {
	o, err := parseGuestObject(b)
	if err != nil {
		return InstanceInfo{}, err
	}
	var i InstanceInfo
	for _, m := range []struct {
		key string
		dst *[]byte
	}{{"app_id", &i.AppID}, {"instance_id_seed", &i.InstanceIDSeed}, {"instance_id", &i.InstanceID}} {
		if *m.dst, err = o.hexMember(m.key); err != nil {
			return InstanceInfo{}, err
		}
		if n := len(*m.dst); n != 0 && n != 20 {
			return InstanceInfo{}, fmt.Errorf("%s has %d bytes, want 20 or none", m.key, n)
		}
	}
	return i, nil
}

// ParseAppKeys reads the public part of .appkeys.json and then overwrites b with
// zeros, so that no secret of the file stays in this process. Secrets are never
// copied out of b.
func ParseAppKeys(b []byte) (*AppKeysInfo, error) {
	defer clear(b)
	o, err := parseGuestObject(b)
	if err != nil {
		return nil, err
	}
	var k AppKeysInfo
	if err := o.member("ca_cert", &k.CACert); err != nil {
		return nil, err
	}
	if k.KeyProvider, err = parseAppKeysProvider(o["key_provider"]); err != nil {
		return nil, fmt.Errorf("key_provider: %v", err)
	}
	return &k, nil
}

func parseAppKeysProvider(b []byte) (KeyProvider, error) {
	if b == nil {
		return KeyProvider{}, errors.New("is missing, want an object")
	}
	variants, err := parseGuestObject(b)
	if err != nil {
		return KeyProvider{}, err
	}
	for name, value := range variants {
		if len(variants) > 1 {
			break
		}
		o, err := parseGuestObject(value)
		if err != nil {
			return KeyProvider{}, fmt.Errorf("%s: %v", name, err)
		}
		return appKeysProviderOf(name, o)
	}
	return KeyProvider{}, fmt.Errorf("has %d members, want one of None, Local, Tpm, Kms", len(variants))
}

// appKeysProviderOf maps a variant to the provider's kind and the id that the
// key-provider event carries. A KMS entry without pubkey (dstack 0.4.2) has no id.
func appKeysProviderOf(name string, o guestObject) (p KeyProvider, err error) {
	switch name {
	case "None":
		return KeyProvider{Kind: KeyProviderNone}, nil
	case "Tpm":
		return KeyProvider{Kind: KeyProviderTPM}, nil
	case "Local":
		p = KeyProvider{Kind: KeyProviderLocal}
		if p.ID, err = o.hexMember("mr"); err == nil && len(p.ID) != 32 {
			err = fmt.Errorf("variant Local: mr has %d bytes, want 32", len(p.ID))
		}
		return p, err
	case "Kms":
		p = KeyProvider{Kind: KeyProviderKMS}
		if p.ID, err = o.hexMember("pubkey"); err == nil && len(p.ID) > maxKeyProviderID {
			err = fmt.Errorf("variant Kms: pubkey has %d bytes, want at most %d", len(p.ID), maxKeyProviderID)
		}
		return p, err
	}
	return KeyProvider{}, fmt.Errorf("variant %q, want None, Local, Tpm or Kms", name)
}

// maxVMConfig bounds a vm_config that is looked into.
const maxVMConfig = 256 << 10

// OSImageHash returns the os_image_hash that a vm_config claims, 32 bytes; nil if it
// has none, or is none. Nothing proves it.
func OSImageHash(vmConfig string) []byte {
	if vmConfig == "" || len(vmConfig) > maxVMConfig {
		return nil
	}
	inner, err := unwrapVMConfig(vmConfig)
	if err != nil {
		return nil
	}
	o, err := parseGuestObject([]byte(inner))
	if err != nil {
		return nil
	}
	hash, err := o.hexMember("os_image_hash")
	if err != nil || len(hash) != 32 {
		return nil
	}
	return hash
}
