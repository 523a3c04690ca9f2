package keys

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
)

// derive is dstack's key derivation: HKDF-SHA256 with the salt "RATLS" and, as info,
// the contexts one after the other. Nothing separates these: ("a", "b") gives what
// ("ab") gives.
func derive(ikm []byte, contexts ...string) (*Secret, error) {
	b, err := hkdf.Key(sha256.New, ikm, []byte("RATLS"), strings.Join(contexts, ""), 32)
	if err != nil {
		return nil, fmt.Errorf("key derivation: %w", err)
	}
	return newSecret(b), nil
}

// p256 takes the secret as the scalar of a P-256 key. About one secret in 2^32 is out
// of range; dstack derives no second one, so neither is there one here.
func (s *Secret) p256() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), s.bytes())
	if err != nil {
		return nil, errors.New("the derived secret is not the scalar of a P-256 key")
	}
	return key, nil
}

// k256 takes the secret as the scalar of a secp256k1 key.
func (s *Secret) k256() (*secp256k1.PrivateKey, error) {
	var key secp256k1.PrivateKey
	if overflow := key.Key.SetByteSlice(s.bytes()); overflow || key.Key.IsZero() {
		key.Zero()
		return nil, errors.New("the secret is not the scalar of a secp256k1 key")
	}
	return &key, nil
}

// DHSecret returns what dstack calls a DH secret: SHA-256 of the PKCS #8 form of the
// P-256 key that is derived from root, the 32-byte scalar of another, under the
// contexts. Disk and environment keys are made so.
func DHSecret(root []byte, contexts ...string) (*Secret, error) {
	s, err := derive(root, contexts...)
	if err != nil {
		return nil, err
	}
	defer s.Zero()
	key, err := s.p256()
	if err != nil {
		return nil, err
	}
	der, err := s.pkcs8(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	sum := sha256.Sum256(der)
	return newSecret(sum[:]), nil
}
