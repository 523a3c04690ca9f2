package measure

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"golang.org/x/crypto/sha3"
)

// MRConfigIDV1 returns the MRCONFIGID by which a host commits to an app-compose.json:
// 01 || compose_hash || zeros.
func MRConfigIDV1(composeHash [32]byte) Digest { return mrConfigID(1, composeHash[:]) }

// MRConfigIDV2 returns the MRCONFIGID that also commits to the app_id and the key
// provider: 02 || Keccak-256(compose_hash || app_id || kind || id) || zeros.
func MRConfigIDV2(composeHash [32]byte, appID [20]byte, p KeyProvider) (Digest, error) {
	var kind byte
	switch p.Kind {
	case KeyProviderNone:
	case KeyProviderLocal:
		kind = 1
	case KeyProviderKMS:
		kind = 2
	case KeyProviderTPM:
		kind = 3
	default:
		return Digest{}, fmt.Errorf("key provider %q, want none, kms, local or tpm", p.Kind)
	}
	h := sha3.NewLegacyKeccak256()
	h.Write(composeHash[:])
	h.Write(appID[:])
	h.Write([]byte{kind})
	h.Write(p.ID)
	return mrConfigID(2, h.Sum(nil)), nil
}

// MRConfigIDV3 returns the MRCONFIGID that commits to a JSON document, to the byte:
// 03 || SHA-256("dstack-mr-config-v3:" || 00 || document) || zeros.
func MRConfigIDV3(document string) Digest {
	h := sha256.Sum256([]byte("dstack-mr-config-v3:\x00" + document))
	return mrConfigID(3, h[:])
}

func mrConfigID(version byte, hash []byte) Digest {
	var d Digest
	d[0] = version
	copy(d[1:], hash)
	return d
}

// MRConfigClaims is what a TD says of itself that its MRCONFIGID may commit to.
type MRConfigClaims struct {
	ComposeHash      [32]byte
	AppID            [20]byte
	InstanceID       []byte // 20 bytes, or empty
	KeyProvider      KeyProvider
	GPUPolicyHash    []byte   // 32 bytes
	InitScriptHashes [][]byte // 32 bytes each
	Document         string   // "mr_config" of .sys-config.json, for version 3
}

// CheckMRConfigID compares an MRCONFIGID with what the TD claims and returns the
// version of it that holds, 1 to 3, or 0 if it is all zero: the host committed to
// nothing, which proves nothing. Any other value is an error, and so is a version 3
// document with a member that the claims contradict or that is not known.
func CheckMRConfigID(got Digest, c MRConfigClaims) (version int, err error) {
	var want Digest
	switch {
	case got.IsZero():
		return 0, nil
	case got[0] == 1:
		want = MRConfigIDV1(c.ComposeHash)
	case got[0] == 2:
		want, err = MRConfigIDV2(c.ComposeHash, c.AppID, c.KeyProvider)
	case got[0] == 3 && c.Document == "":
		err = errors.New("version 3 needs the mr_config document of .sys-config.json")
	case got[0] == 3:
		want = MRConfigIDV3(c.Document)
	default:
		err = fmt.Errorf("unknown version %d in %s, want 1 to 3", got[0], got)
	}
	if err == nil && got != want {
		err = fmt.Errorf("is %s, but the claims give %s", got, want)
	}
	if err == nil && got[0] == 3 {
		err = checkMRConfigDocument(c)
	}
	if err != nil {
		return 0, fmt.Errorf("MRCONFIGID: %w", err)
	}
	return int(got[0]), nil
}

// checkMRConfigDocument compares the members of a version 3 document; dstack
// requires two of them and refuses unknown ones.
func checkMRConfigDocument(c MRConfigClaims) error {
	if len(c.Document) > maxSysConfig {
		return fmt.Errorf("the document has %d bytes, want at most %d", len(c.Document), maxSysConfig)
	}
	o, err := parseGuestObject([]byte(c.Document))
	if err != nil {
		return fmt.Errorf("document: %v", err)
	}
	for _, name := range []string{"compose_hash", "key_provider"} {
		if _, ok := o[name]; !ok {
			return fmt.Errorf("document: %s is missing", name)
		}
	}
	for name := range o {
		if err := checkMRConfigMember(o, name, c); err != nil {
			return fmt.Errorf("document: %w", err)
		}
	}
	return nil
}

func checkMRConfigMember(o guestObject, name string, c MRConfigClaims) error {
	var want []byte
	switch name {
	case "version":
		var n int
		if err := o.optional(name, &n); err != nil || n != 3 {
			return fmt.Errorf("version is %s, want 3", o[name])
		}
		return nil
	case "key_provider":
		var kind string
		if err := o.optional(name, &kind); err != nil || kind != string(c.KeyProvider.Kind) {
			return fmt.Errorf("key_provider is %s, but the TD's is %q", o[name], c.KeyProvider.Kind)
		}
		return nil
	case "init_script_hashes":
		return checkMRConfigScripts(o, c.InitScriptHashes)
	case "compose_hash":
		want = c.ComposeHash[:]
	case "app_id":
		want = c.AppID[:]
	case "instance_id":
		want = c.InstanceID
	case "key_provider_id":
		want = c.KeyProvider.ID
	case "gpu_policy_hash":
		want = c.GPUPolicyHash
	default:
		return fmt.Errorf("unknown member %q", name)
	}
	got, err := o.hexMember(name)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s is %x, but the TD's is %x", name, got, want)
	}
	return nil
}

func checkMRConfigScripts(o guestObject, want [][]byte) error {
	var got []string
	if err := o.optional("init_script_hashes", &got); err != nil {
		return err
	}
	ok := len(got) == len(want)
	for i := 0; ok && i < len(got); i++ {
		ok = got[i] == fmt.Sprintf("%x", want[i])
	}
	if !ok {
		return fmt.Errorf("init_script_hashes are %q, but the TD's are %x", got, want)
	}
	return nil
}
