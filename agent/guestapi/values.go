package guestapi

import (
	"encoding/hex"
	"encoding/json"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
)

// This file is the kinds of field that few messages have: numbers, truth values,
// lists, event logs, and text that is overwritten after use.

// logText is the text of an event log, and that text once more as a JSON string.
type logText struct{ plain, quoted string }

// writeLog writes dstack's JSON of these events, with boot payloads stripped.
func writeLog(events []measure.Event) (logText, error) {
	b, err := measure.FormatEventLog(events, true)
	if err != nil {
		return logText{}, err
	}
	return logText{plain: string(b), quoted: string(appendQuoted(nil, string(b)))}, nil
}

// pemText is PEM text with a key in it. Unlike a string it can be cleared.
type pemText []byte

// clear overwrites what a message holds, but for strings.
func (m message) clear() {
	for i := range m {
		switch v := m[i].value.(type) {
		case *[]byte:
			clear(*v)
		case *pemText:
			clear(*v)
		}
	}
}

// setLiteral stores a number or a truth value that came as text.
func (f *field) setLiteral(s string) error {
	switch v := f.value.(type) {
	case *bool:
		if s != "true" && s != "false" {
			return badRequest("%s: want true or false, got %q", f.name, clip(s))
		}
		*v = s == "true"
	case **uint64:
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return badRequest("%s: want a whole number of 0 to 2^64-1, got %q", f.name, clip(s))
		}
		*v = &n
	}
	return nil
}

// setJSONLiteral stores a JSON number or truth value. null stands for a number that is
// not there.
func (f *field) setJSONLiteral(value json.RawMessage) error {
	if _, optional := f.value.(**uint64); optional && string(value) == "null" {
		return nil
	}
	return f.setLiteral(string(value))
}

// setJSONList stores a JSON array of strings.
func (f *field) setJSONList(value json.RawMessage) error {
	var list []json.RawMessage
	if len(value) == 0 || value[0] != '[' || json.Unmarshal(value, &list) != nil {
		return badRequest("%s: want an array of strings, got %s", f.name, clip(string(value)))
	}
	for _, element := range list {
		if err := f.setJSONString(element); err != nil {
			return err
		}
	}
	return nil
}

// checkIndex judges what follows a field's name in a query. Elements of a list are
// written name[0]=a&name[1]=b, in order, or name[]=a&name[]=b.
func (f *field) checkIndex(index string, listed bool) error {
	list, isList := f.value.(*[]string)
	switch {
	case !isList && listed:
		return badRequest("%s: want one value, not a list", f.name)
	case isList && !listed:
		return badRequest("%s: want a list, as in %s[0]=", f.name, f.name)
	case isList && index != "[]" && index != "["+strconv.Itoa(len(*list))+"]":
		return badRequest("%s: want the list's elements in order, next %s[%d]", f.name, f.name, len(*list))
	}
	return nil
}

// setProto stores the protobuf value that b begins with and returns its length.
func (f *field) setProto(kind protowire.Type, b []byte) (int, error) {
	want := protowire.BytesType
	switch f.value.(type) {
	case *bool, **uint64:
		want = protowire.VarintType
	}
	if kind != want {
		return 0, badRequest("%s: protobuf wire type %d, want %d", f.name, kind, want)
	}
	if want == protowire.VarintType {
		number, n := protowire.ConsumeVarint(b)
		if n < 0 {
			return 0, badProto(n)
		}
		switch v := f.value.(type) {
		case *bool:
			*v = protowire.DecodeBool(number)
		case **uint64:
			*v = &number
		}
		return n, nil
	}
	value, n := protowire.ConsumeBytes(b)
	if n < 0 {
		return 0, badProto(n)
	}
	if v, ok := f.value.(*[]byte); ok {
		*v = value
		return n, nil
	}
	return n, f.setText(string(value))
}

// appendValue appends the JSON form of a field's value.
func appendValue(b []byte, value any) []byte {
	switch v := value.(type) {
	case *[]byte:
		b = appendHex(b, *v)
	case *string:
		b = appendQuoted(b, *v)
	case *bool:
		b = strconv.AppendBool(b, *v)
	case **uint64:
		if *v == nil {
			return append(b, "null"...)
		}
		b = strconv.AppendUint(b, **v, 10)
	case *logText:
		b = append(b, v.quoted...)
	case *pemText:
		b = append(appendPEM(append(b, '"'), *v), '"')
	case *[]keys.Certificate:
		b = append(b, '[')
		for i := range *v {
			b = append((*v)[i].AppendJSON(append(appendComma(b, i), '"')), '"')
		}
		b = append(b, ']')
	case *[]string:
		b = append(b, '[')
		for i, s := range *v {
			b = appendQuoted(appendComma(b, i), s)
		}
		b = append(b, ']')
	case *[][]byte:
		b = append(b, '[')
		for i, s := range *v {
			b = appendHex(appendComma(b, i), s)
		}
		b = append(b, ']')
	}
	return b
}

func appendComma(b []byte, i int) []byte {
	if i == 0 {
		return b
	}
	return append(b, ',')
}

func appendHex(b, v []byte) []byte {
	b = append(b, '"')
	b = hex.AppendEncode(b, v)
	return append(b, '"')
}

// appendPEM appends PEM text as the inside of a JSON string. All of it is ASCII, and of
// what JSON escapes it has only the ends of lines.
func appendPEM(b []byte, text pemText) []byte {
	for _, c := range text {
		if c == '\n' {
			b = append(b, '\\', 'n')
		} else {
			b = append(b, c)
		}
	}
	return b
}

// sizeValue bounds the JSON form, so that no copy of a secret is left behind where a
// buffer grew.
func sizeValue(value any) int {
	size := 24
	switch v := value.(type) {
	case *logText:
		size += len(v.quoted)
	case *pemText:
		size += 2 * len(*v)
	case *[]keys.Certificate:
		for i := range *v {
			size += (*v)[i].SizeJSON() + 3
		}
	case *[]string:
		for _, s := range *v {
			size += 2*len(s) + 3
		}
	case *[][]byte:
		for _, s := range *v {
			size += 2*len(s) + 3
		}
	}
	return size
}

// appendProtoValue appends the proto3 form of a field. The elements of a list are all
// there, empty ones too.
func appendProtoValue(b []byte, num protowire.Number, value any) []byte {
	switch v := value.(type) {
	case *bool:
		if *v {
			b = protowire.AppendTag(b, num, protowire.VarintType)
			b = protowire.AppendVarint(b, 1)
		}
	case **uint64:
		if *v != nil {
			b = protowire.AppendTag(b, num, protowire.VarintType)
			b = protowire.AppendVarint(b, **v)
		}
	case *logText:
		if v.plain != "" {
			b = protowire.AppendTag(b, num, protowire.BytesType)
			b = protowire.AppendString(b, v.plain)
		}
	case *pemText:
		b = protowire.AppendTag(b, num, protowire.BytesType)
		b = protowire.AppendBytes(b, *v)
	case *[]keys.Certificate:
		for i := range *v {
			b = protowire.AppendTag(b, num, protowire.BytesType)
			b = protowire.AppendString(b, (*v)[i].PEM())
		}
	case *[]string:
		for _, s := range *v {
			b = protowire.AppendTag(b, num, protowire.BytesType)
			b = protowire.AppendString(b, s)
		}
	case *[][]byte:
		for _, s := range *v {
			b = protowire.AppendTag(b, num, protowire.BytesType)
			b = protowire.AppendBytes(b, s)
		}
	}
	return b
}
