package guestapi

import (
	"encoding/hex"
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// field ties one member of a dstack message to the Go value that holds it. The
// value is a *[]byte (hexadecimal in JSON and in queries) or a *string.
type field struct {
	name  string
	num   protowire.Number
	value any
}

// message is a dstack request or answer: its fields in the order of the protobuf
// definition, which is also the order of the keys in JSON. The nil message is
// google.protobuf.Empty.
type message []field

func (m message) named(name string) *field {
	for i := range m {
		if m[i].name == name {
			return &m[i]
		}
	}
	return nil
}

func (m message) numbered(num protowire.Number) *field {
	for i := range m {
		if m[i].num == num {
			return &m[i]
		}
	}
	return nil
}

// setText stores a value that came as text.
func (f *field) setText(s string) error {
	switch v := f.value.(type) {
	case *[]byte:
		b, err := decodeHex(s)
		if err != nil {
			return badRequest("%s: %v", f.name, err)
		}
		*v = b
	case *string:
		if !utf8.ValidString(s) {
			return badRequest("%s: not valid UTF-8", f.name)
		}
		*v = s
	}
	return nil
}

// setBytes stores a value that came as protobuf bytes.
func (f *field) setBytes(b []byte) error {
	if v, ok := f.value.(*[]byte); ok {
		*v = b
		return nil
	}
	return f.setText(string(b))
}

// decodeHex takes what dstack's codec takes: any number of leading 0x, digits of
// either case, an even number of them.
func decodeHex(s string) ([]byte, error) {
	for strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X") {
		s = s[2:]
	}
	if len(s)%2 != 0 {
		return nil, fmt.Errorf("invalid hex: %d digits, want an even number", len(s))
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("invalid hex: %v", err)
	}
	return b, nil
}

// appendJSON appends the compact JSON form of m: every field is there, even when
// empty, and Empty is null.
func (m message) appendJSON(b []byte) []byte {
	if len(m) == 0 {
		return append(b, "null"...)
	}
	for i := range m {
		sep := byte(',')
		if i == 0 {
			sep = '{'
		}
		b = append(b, sep)
		b = appendQuoted(b, m[i].name)
		b = append(b, ':')
		switch v := m[i].value.(type) {
		case *[]byte:
			b = append(b, '"')
			b = hex.AppendEncode(b, *v)
			b = append(b, '"')
		case *string:
			b = appendQuoted(b, *v)
		}
	}
	return append(b, '}')
}

// appendQuoted appends s as a JSON string in ASCII. dstack's JavaScript SDK counts
// UTF-16 units against Content-Length and hangs on anything else.
func appendQuoted(b []byte, s string) []byte {
	const short = "\b\f\n\r\t\"\\"
	const letter = `bfnrt"\`
	b = append(b, '"')
	for _, r := range s {
		switch i := strings.IndexRune(short, r); {
		case i >= 0 && r < utf8.RuneSelf:
			b = append(b, '\\', letter[i])
		case r < 0x20 || r >= utf8.RuneSelf && r <= 0xffff:
			b = fmt.Appendf(b, `\u%04x`, r)
		case r > 0xffff:
			r -= 0x10000
			b = fmt.Appendf(b, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			b = append(b, byte(r))
		}
	}
	return append(b, '"')
}

// appendProto appends the proto3 form of m: empty fields are left out.
func (m message) appendProto(b []byte) []byte {
	for i := range m {
		switch v := m[i].value.(type) {
		case *[]byte:
			if len(*v) > 0 {
				b = protowire.AppendTag(b, m[i].num, protowire.BytesType)
				b = protowire.AppendBytes(b, *v)
			}
		case *string:
			if *v != "" {
				b = protowire.AppendTag(b, m[i].num, protowire.BytesType)
				b = protowire.AppendString(b, strings.ToValidUTF8(*v, "\ufffd"))
			}
		}
	}
	return b
}
