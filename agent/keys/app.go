package keys

import (
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"slices"
	"sync"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"golang.org/x/crypto/sha3"

	"tdx-agent/measure"
)

// RequestError says that the caller has asked for something that cannot be had.
type RequestError struct{ Text string }

func (e *RequestError) Error() string { return e.Text }

// ExitCode is the program's exit status for this error: wrong usage.
func (e *RequestError) ExitCode() int { return 2 }

var errDropped = errors.New("the agent is stopping: its keys are gone")

// App is the keys of one application. Its methods may be called concurrently.
type App struct {
	redacts
	provider     measure.KeyProvider
	kmsSignature []byte // of the KMS root over this application's key; 65 bytes or empty
	authority    *authority
	// kms issues the certificates in the authority's place; nil if nobody asks it.
	kms *KMS

	mu  sync.RWMutex // held for reading while a secret is used
	key *Secret      // nil once dropped
	// omitLegacy is set by OmitLegacyOIDs.
	omitLegacy bool
	// k256 is key as a scalar.
	k256 *secp256k1.PrivateKey
}

// newApp takes over key.
func newApp(provider measure.KeyProvider, key *Secret, kmsSignature []byte, ca *authority) (*App, error) {
	k256, err := key.k256()
	if err != nil {
		return nil, err
	}
	return &App{provider: provider, key: key, k256: k256, kmsSignature: kmsSignature, authority: ca}, nil
}

// Provider is who provides the keys, as the key-provider event says it.
func (a *App) Provider() measure.KeyProvider { return a.provider }

// OmitLegacyOIDs leaves what only verifiers before dstack 0.5.9 read out of the
// certificates that are made from now on.
func (a *App) OmitLegacyOIDs() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.omitLegacy = true
}

// PublicKey returns the application's secp256k1 key, which begins every signature
// chain: 33 bytes, SEC 1 compressed.
func (a *App) PublicKey() ([]byte, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.key == nil {
		return nil, errDropped
	}
	return a.k256.PubKey().SerializeCompressed(), nil
}

// Zero overwrites the keys. Later calls fail.
func (a *App) Zero() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.key == nil {
		return
	}
	a.key.Zero()
	a.k256.Zero()
	a.key = nil
	a.authority = nil
}

// The algorithms of derived keys and of signatures.
const (
	Secp256k1          = "secp256k1" // also "k256"; for Sign and Verify, over SHA-256 of the data
	Ed25519            = "ed25519"
	Secp256k1Prehashed = "secp256k1_prehashed" // the data is the digest; for Sign and Verify only
)

// baseAlgorithm returns the algorithm of a key by any of its names. "" is what callers
// send who know of one algorithm only.
func baseAlgorithm(name string) (string, error) {
	switch name {
	case "", Secp256k1, "k256":
		return Secp256k1, nil
	case Ed25519:
		return Ed25519, nil
	}
	return "", &RequestError{"Unsupported algorithm"}
}

// Derived is the key of one path, with what proves where it comes from.
type Derived struct {
	*Secret
	Algorithm string // Secp256k1 or Ed25519
	PublicKey []byte // 33 bytes SEC 1 compressed, or 32 bytes
	// Chain is the application key's signature of this key's public half for the
	// purpose it was asked for, and the KMS root's of the application key. Each has
	// 65 bytes (r, s, recovery id), the second none without a KMS.
	Chain [2][]byte
}

// Derive returns the key of a path: HKDF of the application's key. The same bytes are
// the secp256k1 scalar and the ed25519 seed. An algorithm other than "", "secp256k1",
// "k256" and "ed25519" is a [*RequestError].
func (a *App) Derive(path, purpose, algorithm string) (*Derived, error) {
	algorithm, err := baseAlgorithm(algorithm)
	if err != nil {
		return nil, err
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.key == nil {
		return nil, errDropped
	}
	secret, err := derive(a.key.bytes(), path)
	if err != nil {
		return nil, err
	}
	public, err := secret.public(algorithm)
	if err != nil {
		secret.Zero()
		return nil, err
	}
	text := hex.AppendEncode([]byte(purpose+":"), public)
	return &Derived{Secret: secret, Algorithm: algorithm, PublicKey: public, Chain: [2][]byte{signRecoverable(a.k256, text), a.kmsSignature}}, nil
}

func (s *Secret) public(algorithm string) ([]byte, error) {
	if algorithm == Ed25519 {
		key := ed25519.NewKeyFromSeed(s.bytes())
		defer clear(key)
		return slices.Clone(key[ed25519.SeedSize:]), nil
	}
	key, err := s.k256()
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	return key.PubKey().SerializeCompressed(), nil
}

// signRecoverable signs Keccak-256 of text, as Ethereum does: r, s in the lower half,
// recovery id 0 or 1. The nonce is that of RFC 6979.
func signRecoverable(key *secp256k1.PrivateKey, text []byte) []byte {
	h := sha3.NewLegacyKeccak256()
	h.Write(text)
	compact := ecdsa.SignCompact(key, h.Sum(nil), true)
	const compactBase = 27 + 4 // what comes first in this form, besides the recovery id
	return append(compact[1:], compact[0]-compactBase)
}
