package measure

import (
	"crypto/sha512"
	"encoding/hex"
	"fmt"
)

// Digest is a SHA-384 value: a measurement register (MRTD, RTMR0 to RTMR3,
// MRCONFIGID, ...) or the digest of an event. Its text form, also in JSON, is 96
// lowercase hexadecimal digits.
type Digest [48]byte

// Extend returns the register that d becomes when e is extended into it,
// SHA-384(d || e) (Intel TDX Module ABI, TDG.MR.RTMR.EXTEND). d is unchanged.
func (d Digest) Extend(e Digest) Digest {
	var in [2 * len(d)]byte
	copy(in[:], d[:])
	copy(in[len(d):], e[:])
	return sha512.Sum384(in[:])
}

// IsZero reports whether every byte is zero, as in a register that nothing was
// extended into and in a field that a TD does not use.
func (d Digest) IsZero() bool { return d == Digest{} }

// String returns the hexadecimal form.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. It takes exactly 96
// hexadecimal digits of either case.
func (d *Digest) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(d)) {
		return fmt.Errorf("digest has %d characters, want %d hexadecimal digits", len(text), hex.EncodedLen(len(d)))
	}
	if _, err := hex.Decode(d[:], text); err != nil {
		return fmt.Errorf("digest: %v", err)
	}
	return nil
}

// ReportData is the 64 bytes a requester has bound into a quote.
type ReportData [64]byte

// String returns the hexadecimal form.
func (r ReportData) String() string { return hex.EncodeToString(r[:]) }

// NewReportData returns b padded with zeros on the right, as dstack's GetQuote
// does. It is an error if b is longer than 64 bytes.
func NewReportData(b []byte) (ReportData, error) {
	var r ReportData
	if len(b) > len(r) {
		return r, fmt.Errorf("report data has %d bytes, want at most %d", len(b), len(r))
	}
	copy(r[:], b)
	return r, nil
}

// Registers are the measurement registers of a TD at one moment, in the order of
// the TD report's TDINFO structure.
type Registers struct {
	MRTD          Digest    `json:"mrtd"`
	MRConfigID    Digest    `json:"mr_config_id"`
	MROwner       Digest    `json:"mr_owner"`
	MROwnerConfig Digest    `json:"mr_owner_config"`
	RTMR          [4]Digest `json:"rtmr"`
}
