package guestapi

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// field ties one member of a dstack message to the Go value that holds it. The
// value is a *[]byte (hexadecimal in JSON and in queries), a *string, a *bool, an
// **uint64 (nil: not there), a *[]string, or in answers a *[][]byte, a *logText, a
// *pemText or a *[]keys.Certificate.
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
	case *[]string:
		if !utf8.ValidString(s) {
			return badRequest("%s: not valid UTF-8", f.name)
		}
		*v = append(*v, s)
	default:
		return f.setLiteral(s)
	}
	return nil
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
	b = slices.Grow(b, m.sizeJSON())
	for i := range m {
		sep := byte(',')
		if i == 0 {
			sep = '{'
		}
		b = append(b, sep)
		b = appendQuoted(b, m[i].name)
		b = append(b, ':')
		b = appendValue(b, m[i].value)
	}
	return append(b, '}')
}

// sizeJSON estimates the JSON form, so that it is allocated once. Text that is JSON
// in itself grows by its quotation marks.
func (m message) sizeJSON() int {
	size := 2
	for i := range m {
		size += len(m[i].name) + 6
		switch v := m[i].value.(type) {
		case *[]byte:
			size += 2 * len(*v)
		case *string:
			size += len(*v) + strings.Count(*v, `"`) + strings.Count(*v, "\n") + 16
		default:
			size += sizeValue(v)
		}
	}
	return size
}

// appendQuoted appends s as a JSON string in ASCII. dstack's JavaScript SDK counts
// UTF-16 units against Content-Length and hangs on anything else.
//
// Info and GetQuote carry tens of kilobytes of text that is JSON in itself, so most
// of their time is spent here: what needs no escape is copied in runs.
func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); {
		run := i
		for i < len(s) && plainJSON[s[i]] {
			i++
		}
		b = append(b, s[run:i]...)
		if i < len(s) {
			r, size := utf8.DecodeRuneInString(s[i:])
			b = appendEscaped(b, r)
			i += size
		}
	}
	return append(b, '"')
}

// plainJSON holds the bytes that stand for themselves in a JSON string.
var plainJSON = func() (plain [256]bool) {
	for c := byte(0x20); c < utf8.RuneSelf; c++ {
		plain[c] = c != '"' && c != '\\'
	}
	return plain
}()

func appendEscaped(b []byte, r rune) []byte {
	switch r {
	case '"', '\\':
		return append(b, '\\', byte(r))
	case '\n':
		return append(b, `\n`...)
	case '\r':
		return append(b, `\r`...)
	case '\t':
		return append(b, `\t`...)
	case '\b':
		return append(b, `\b`...)
	case '\f':
		return append(b, `\f`...)
	}
	if r > 0xffff {
		hi, lo := utf16.EncodeRune(r)
		return fmt.Appendf(b, `\u%04x\u%04x`, hi, lo)
	}
	return fmt.Appendf(b, `\u%04x`, r)
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
		default:
			b = appendProtoValue(b, m[i].num, v)
		}
	}
	return b
}
