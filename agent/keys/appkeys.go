package keys

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// maxAppKeys bounds .appkeys.json, in bytes.
const maxAppKeys = 256 << 10

// File is a .appkeys.json: the keys of any provider, as dstack's boot tools leave
// them. Path must be a regular file of at most 256 KiB that nobody but root and the
// agent's user can have written: whoever did has chosen the keys.
type File struct {
	Path string
	// KMS issues the certificates if the keys are a KMS's. Nil: nobody does.
	KMS *KMS
}

// App implements [Provider]. Errors name the file.
func (p File) App(context.Context) (*App, error) {
	b, err := measure.ReadGuestFile(p.Path, maxAppKeys)
	if err != nil {
		return nil, err
	}
	a, err := ParseAppKeys(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Path, err)
	}
	if err := p.ours(); err != nil {
		a.Zero()
		return nil, err
	}
	if a.provider.Kind == measure.KeyProviderKMS {
		a.kms = p.KMS
	}
	return a, nil
}

// ours demands that nobody else can have written the file.
func (p File) ours() error {
	var st unix.Stat_t
	if err := unix.Lstat(p.Path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: p.Path, Err: err}
	}
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: belongs to uid %d, want root or the agent's user (%d): its owner can choose the application's keys", p.Path, st.Uid, os.Geteuid())
	}
	if st.Mode&0o022 != 0 {
		return fmt.Errorf("%s: has mode %o, so others can choose the application's keys; want it writable by its owner alone (chmod go-w)", p.Path, st.Mode&0o777)
	}
	return nil
}

// Exposed says that everybody on this machine can read the keys; "" if not.
func (p File) Exposed() string {
	var st unix.Stat_t
	if unix.Lstat(p.Path, &st) != nil || st.Mode&0o004 == 0 {
		return ""
	}
	return fmt.Sprintf("%s has mode %o: every user that sees the path can read the application's keys (chmod o-r)", p.Path, st.Mode&0o777)
}

// ParseAppKeys reads the text of a .appkeys.json and overwrites b with zeros. Member
// names are exact and may not be there twice; unknown ones are ignored. Hexadecimal
// members have even length and no prefix: k256_key 32 bytes, k256_signature 65 or
// none, disk_crypt_key and env_crypt_key, which are checked and not kept, 64 at most.
// Unless the provider is a KMS, its key must be the one of ca_cert, and ca_cert an
// authority's.
func ParseAppKeys(b []byte) (*App, error) {
	defer clear(b)
	public, err := measure.ParseAppKeys(bytes.Clone(b)) // clears the clone
	if err != nil {
		return nil, err
	}
	doc, err := measure.ParseJSONObject(b)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"disk_crypt_key", "env_crypt_key"} {
		unused, err := secretHex(doc, name, 64)
		if err != nil {
			return nil, err
		}
		clear(unused)
	}
	signature, err := secretHex(doc, "k256_signature", 65)
	if err == nil && len(signature) != 0 && len(signature) != 65 {
		err = fmt.Errorf("k256_signature: %d bytes, want 65 or none", len(signature))
	}
	if err != nil {
		return nil, err
	}
	ca, err := authorityOf(doc["key_provider"], public)
	if err != nil {
		return nil, err
	}
	key, err := secretHex(doc, "k256_key", 32)
	if err == nil && len(key) != 32 {
		err = fmt.Errorf("k256_key: %d bytes, want 32", len(key))
	}
	if err != nil {
		return nil, err
	}
	app, err := newApp(public.KeyProvider, newSecret(key), signature, ca)
	if err != nil {
		return nil, fmt.Errorf("k256_key: %w", err)
	}
	return app, nil
}

// authorityOf returns the authority in the member key_provider, whose form
// measure.ParseAppKeys has checked. A KMS keeps its own.
func authorityOf(member []byte, public *measure.AppKeysInfo) (*authority, error) {
	if public.KeyProvider.Kind == measure.KeyProviderKMS {
		return nil, nil
	}
	variants, err := measure.ParseJSONObject(member)
	if err != nil {
		return nil, fmt.Errorf("key_provider: %w", err)
	}
	for _, value := range variants { // there is one
		o, err := measure.ParseJSONObject(value)
		if err != nil {
			return nil, fmt.Errorf("key_provider: %w", err)
		}
		text, err := secretText(o["key"])
		if err != nil {
			return nil, fmt.Errorf("key_provider: key: %w", err)
		}
		defer clear(text)
		return parseAuthority(text, []byte(public.CACert))
	}
	return nil, errors.New("key_provider: has no variant")
}

// secretHex decodes a hexadecimal member without leaving a copy that cannot be
// cleared. A member that is not there is an error, except that "" is legal.
func secretHex(doc map[string]json.RawMessage, name string, limit int) ([]byte, error) {
	v := doc[name]
	if len(v) < 2 || v[0] != '"' {
		return nil, fmt.Errorf("%s: want a string of hexadecimal digits", name)
	}
	digits := v[1 : len(v)-1]
	if len(digits) > 2*limit {
		return nil, fmt.Errorf("%s: %d digits, want at most %d", name, len(digits), 2*limit)
	}
	b := make([]byte, hex.DecodedLen(len(digits)))
	if _, err := hex.Decode(b, digits); err != nil {
		clear(b)
		return nil, fmt.Errorf("%s: is not an even number of hexadecimal digits", name) // the error would quote one
	}
	return b, nil
}

// secretText decodes a JSON string that holds PEM. encoding/json would make a string
// of it, which cannot be cleared.
func secretText(v []byte) ([]byte, error) {
	if len(v) < 2 || v[0] != '"' {
		return nil, errors.New("want a string")
	}
	escapes := map[byte]byte{'n': '\n', 'r': '\r', 't': '\t', '/': '/', '\\': '\\', '"': '"'}
	in := v[1 : len(v)-1]
	out := make([]byte, 0, len(in))
	for i := 0; i < len(in); i++ {
		c := in[i]
		if c == '\\' {
			i++ // valid JSON: something follows
			plain, ok := escapes[in[i]]
			if !ok {
				clear(out)
				return nil, fmt.Errorf("has the escape \\%c, which PEM does not need", in[i])
			}
			c = plain
		}
		out = append(out, c)
	}
	return out, nil
}
