package guestapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"tdx-agent/measure"
)

// encoding is how a request and its answer are written.
type encoding int

const (
	encodingProtobuf encoding = iota
	encodingJSON
	encodingQuery // arguments in the query of a GET; the answer is JSON
)

// encodingOf applies dstack's rules: GET, ?json and the JSON content type mean JSON,
// everything else is protobuf.
func encodingOf(r *http.Request) encoding {
	if r.Method == http.MethodGet {
		return encodingQuery
	}
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if strings.EqualFold(strings.TrimSpace(media), "application/json") || queryAsksJSON(r.URL.RawQuery) {
		return encodingJSON
	}
	return encodingProtobuf
}

func queryAsksJSON(query string) bool {
	for pair := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if name == "json" && (value == "" || value == "1" || value == "true") {
			return true
		}
	}
	return false
}

// arguments is the payload of a request, not decoded yet.
type arguments struct {
	encoding encoding
	payload  []byte // the body, or the raw query
}

// decode stores the payload in m. Fields that are not there keep their value.
func (a *arguments) decode(m message) error {
	switch a.encoding {
	case encodingQuery:
		return decodeQuery(string(a.payload), m)
	case encodingJSON:
		return decodeJSON(a.payload, m)
	}
	err := decodeProto(a.payload, m)
	if err != nil && a.looksLikeJSON() {
		return badRequest("the body looks like JSON, but the request does not say so: send Content-Type: application/json, or add ?json to the path")
	}
	return err
}

// looksLikeJSON reports whether a protobuf payload begins as JSON does.
func (a *arguments) looksLikeJSON() bool {
	b := bytes.TrimLeft(a.payload, " \t\r\n")
	return len(b) > 0 && (b[0] == '{' || b[0] == '[') || bytes.Equal(bytes.TrimSpace(b), []byte("null"))
}

// decodeJSON takes one JSON object. Unknown keys are ignored and duplicate keys
// refused, since two parsers may not agree on which of them counts.
func decodeJSON(body []byte, m message) error {
	text := bytes.TrimSpace(body)
	if len(m) == 0 && (len(text) == 0 || string(text) == "null") {
		return nil
	}
	if len(text) == 0 {
		return badRequest("the request has no body: want a JSON object with the member %q", m[0].name)
	}
	members, err := measure.ParseJSONObject(body) // not text: there is other space than JSON's
	if twice, ok := errors.AsType[*measure.DuplicateMemberError](err); ok {
		return badRequest("duplicate field %q", clip(twice.Name))
	}
	if err != nil {
		return whyNotObject(body)
	}
	for i := range m {
		if value, ok := members[m[i].name]; ok {
			if err := m[i].setJSON(value); err != nil {
				return err
			}
		}
	}
	return nil
}

// whyNotObject guesses what is wrong with a body that is no JSON object.
func whyNotObject(body []byte) error {
	if json.Valid(body) {
		if !utf8.Valid(body) {
			return badRequest("the body is not valid UTF-8")
		}
		return badRequest("the body is JSON, but not an object")
	}
	var whole json.RawMessage
	err := json.Unmarshal(body, &whole)
	if !isASCII(body) {
		return badRequest("the body is not JSON: %v; it has characters beyond ASCII, so check that Content-Length counts bytes and not characters, or write them as \\uXXXX", err)
	}
	return badRequest("the body is not JSON: %v", err)
}

func isASCII(b []byte) bool {
	for _, c := range b {
		if c >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// setJSON stores a JSON value.
func (f *field) setJSON(value json.RawMessage) error {
	switch f.value.(type) {
	case *[]string:
		return f.setJSONList(value)
	case *bool, **uint64:
		return f.setJSONLiteral(value)
	}
	return f.setJSONString(value)
}

func (f *field) setJSONString(value json.RawMessage) error {
	var s string
	if value[0] != '"' || json.Unmarshal(value, &s) != nil {
		return badRequest("%s: want a string, got %s", f.name, kindOf(value))
	}
	if strings.ContainsRune(s, utf8.RuneError) {
		return badRequest("%s: has half a surrogate pair or U+FFFD", f.name)
	}
	return f.setText(s)
}

// kindOf names the kind of a JSON value. The value itself may be secret, as report data
// can be, and errors are logged.
func kindOf(value json.RawMessage) string {
	switch value[0] {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a malformed string"
	case 't', 'f':
		return "true or false"
	case 'n':
		return "null"
	}
	return "a number"
}

// decodeQuery takes the arguments of a GET: name=value pairs, percent-encoded.
func decodeQuery(query string, m message) error {
	seen := make(map[string]bool)
	for pair := range strings.SplitSeq(query, "&") {
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(rawName)
		if err != nil {
			return badRequest("the query is malformed: %v", err)
		}
		base, _, list := strings.Cut(name, "[")
		f := m.named(base)
		if f == nil {
			continue
		}
		if err := f.checkIndex(name[len(base):], list); err != nil {
			return err
		}
		if seen[name] && !strings.HasSuffix(name, "[]") {
			return badRequest("duplicate field %q", name)
		}
		seen[name] = true
		value, err := url.QueryUnescape(rawValue)
		if err != nil {
			return badRequest("%s: the query is malformed: %v", f.name, err)
		}
		if err := f.setText(value); err != nil {
			return err
		}
	}
	return nil
}

// decodeProto takes a proto3 message. Unknown fields are skipped; groups, which
// proto3 does not have, are refused. Of a scalar field that is there more than once
// the last one counts.
func decodeProto(b []byte, m message) error {
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return badProto(n)
		}
		if kind == protowire.StartGroupType || kind == protowire.EndGroupType {
			return badRequest("the body is not a proto3 message: field %d is a group", num)
		}
		b = b[n:]
		f := m.numbered(num)
		if f == nil {
			if n = protowire.ConsumeFieldValue(num, kind, b); n < 0 {
				return badProto(n)
			}
			b = b[n:]
			continue
		}
		n, err := f.setProto(kind, b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func badProto(n int) error {
	err := protowire.ParseError(n)
	if inner := errors.Unwrap(err); inner != nil {
		err = inner
	}
	return badRequest("the body is not a protobuf message: %v", err)
}
