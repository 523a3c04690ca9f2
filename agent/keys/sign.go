package keys

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"fmt"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"

	"tdx-agent/measure"
)

// The path and the purpose of the key that [App.Sign] signs with.
const (
	signPath    = "vms"
	signPurpose = "signing"
)

// Signed is a signature and what proves whose it is.
type Signed struct {
	Signature []byte    // 64 bytes: r and s, or RFC 8032
	PublicKey []byte    // of the key that signed: 33 or 32 bytes
	Chain     [3][]byte // Signature, then the chain of [Derived]
}

// Sign signs data with the key of the path "vms" and the purpose "signing". For
// "secp256k1_prehashed" data is the digest itself and must have 32 bytes. ECDSA is
// deterministic (RFC 6979) with s in the lower half. What cannot be signed is a
// [*RequestError].
func (a *App) Sign(algorithm string, data []byte) (*Signed, error) {
	base, err := signAlgorithm(algorithm)
	if err != nil {
		return nil, err
	}
	if algorithm == Secp256k1Prehashed && len(data) != sha256.Size {
		return nil, &RequestError{fmt.Sprintf("Pre-hashed signing requires a 32-byte digest, but received %d bytes", len(data))}
	}
	key, err := a.Derive(signPath, signPurpose, base)
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	signature, err := key.sign(algorithm, data)
	if err != nil {
		return nil, err
	}
	return &Signed{Signature: signature, PublicKey: key.PublicKey, Chain: [3][]byte{signature, key.Chain[0], key.Chain[1]}}, nil
}

// signAlgorithm returns the algorithm of the key for one of a signature. Unlike
// GetKey's, it has to be named.
func signAlgorithm(name string) (string, error) {
	switch name {
	case Secp256k1Prehashed:
		return Secp256k1, nil
	case "":
		return "", &RequestError{"Unsupported algorithm"}
	}
	return baseAlgorithm(name)
}

func (d *Derived) sign(algorithm string, data []byte) ([]byte, error) {
	if d.Algorithm == Ed25519 {
		key := ed25519.NewKeyFromSeed(d.bytes())
		defer clear(key)
		return ed25519.Sign(key, data), nil
	}
	key, err := d.k256()
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	return ecdsa.SignCompact(key, digestOf(algorithm, data), true)[1:], nil
}

// digestOf returns what ECDSA signs.
func digestOf(algorithm string, data []byte) []byte {
	if algorithm == Secp256k1Prehashed {
		return data
	}
	sum := sha256.Sum256(data)
	return sum[:]
}

// Verify reports whether signature is publicKey's over data, by the rules of
// [App.Sign]. An ECDSA signature with s in the upper half is not valid. It is a
// [*RequestError] if the algorithm is not known, and if key, signature or digest are
// malformed: a secp256k1 key may have any SEC 1 form.
func Verify(algorithm string, data, signature, publicKey []byte) (bool, error) {
	base, err := signAlgorithm(algorithm)
	if err != nil {
		return false, err
	}
	if len(signature) != 64 {
		return false, &RequestError{fmt.Sprintf("invalid %s signature: %d bytes, want 64", base, len(signature))}
	}
	if base == Ed25519 {
		if err := checkEd25519(publicKey); err != nil {
			return false, err
		}
		return ed25519.Verify(publicKey, data, signature), nil
	}
	if algorithm == Secp256k1Prehashed && len(data) != sha256.Size {
		return false, &RequestError{fmt.Sprintf("Pre-hashed verification requires a 32-byte digest, but received %d bytes", len(data))}
	}
	key, err := secp256k1.ParsePubKey(publicKey)
	if err != nil {
		return false, &RequestError{"invalid secp256k1 public key: want a SEC 1 point of 33 or 65 bytes on the curve"}
	}
	var r, s secp256k1.ModNScalar
	if r.SetByteSlice(signature[:32]) || s.SetByteSlice(signature[32:]) || r.IsZero() || s.IsZero() {
		return false, &RequestError{"invalid secp256k1 signature: r or s is not in the range of the curve's order"}
	}
	return !s.IsOverHalfOrder() && ecdsa.NewSignature(&r, &s).Verify(digestOf(algorithm, data), key), nil
}

// AttestationReportData returns the report data with which a quote vouches for the key
// that [App.Sign] uses: "dip1::ed25519-pk:" or "dip1::secp256k1c-pk:" and the public
// key in unpadded base64url, as ASCII, with zeros to the right.
func (a *App) AttestationReportData(algorithm string) (measure.ReportData, error) {
	base, err := signAlgorithm(algorithm)
	if err != nil {
		return measure.ReportData{}, err
	}
	key, err := a.Derive(signPath, signPurpose, base)
	if err != nil {
		return measure.ReportData{}, err
	}
	defer key.Zero()
	tag := "dip1::secp256k1c-pk:"
	if base == Ed25519 {
		tag = "dip1::ed25519-pk:"
	}
	return measure.NewReportData(base64.RawURLEncoding.AppendEncode([]byte(tag), key.PublicKey))
}
