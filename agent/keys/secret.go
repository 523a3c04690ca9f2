package keys

import (
	"fmt"
	"io"
	"log/slog"
	"slices"
)

const redacted = "[redacted]"

// redacts, embedded, keeps a type's content out of everything that prints, logs or
// marshals it.
type redacts struct{}

// String implements fmt.Stringer.
func (redacts) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (redacts) GoString() string { return redacted }

// Format implements fmt.Formatter: every verb gives the same.
func (redacts) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (redacts) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler.
func (redacts) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON implements json.Marshaler.
func (redacts) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// box keeps a value behind two pointers. fmt calls no methods on what an unexported
// field of somebody's structure holds: there it prints addresses, and follows one
// pointer when the verb is wrong.
type box[T any] struct{ v *T }

// Secret is 32 bytes of key material.
type Secret struct {
	redacts
	in *box[[32]byte]
}

func (s *Secret) bytes() []byte { return s.in.v[:] }

// newSecret takes over b, which must have 32 bytes: it is overwritten.
func newSecret(b []byte) *Secret {
	s := &Secret{in: &box[[32]byte]{(*[32]byte)(slices.Clone(b))}}
	clear(b)
	return s
}

// Bytes returns a copy, which is the caller's to clear.
func (s *Secret) Bytes() []byte { return slices.Clone(s.bytes()) }

// Zero overwrites the secret. It is all zeros afterwards, and of no use.
func (s *Secret) Zero() { clear(s.bytes()) }
