package measure

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

// guestObject is one JSON object: its members by exact name, each a part of the
// parsed bytes. encoding/json alone would do for none of these files: it matches
// names regardless of case and lets the last of two equal names win, where other
// readers of the same file do not.
type guestObject map[string]json.RawMessage

// ParseJSONObject returns the members of one JSON object by their exact names.
// Duplicate names are refused with a [*DuplicateMemberError]. The values are parts of b, not copies, so that whoever
// clears b has cleared them; nested objects are not looked into.
func ParseJSONObject(b []byte) (map[string]json.RawMessage, error) { return parseGuestObject(b) }

// DuplicateMemberError says that an object has a name twice: two readers may not agree
// on which of them counts.
type DuplicateMemberError struct{ Name string }

func (e *DuplicateMemberError) Error() string { return fmt.Sprintf("member %q is there twice", e.Name) }

// parseGuestObject parses one JSON object of valid UTF-8 without copying values.
// Nested objects are not looked into.
func parseGuestObject(b []byte) (guestObject, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not valid UTF-8")
	}
	if !json.Valid(b) {
		return nil, errors.New("not valid JSON")
	}
	i := skipJSONSpace(b, 0)
	if b[i] != '{' {
		return nil, errors.New("want a JSON object")
	}
	o := guestObject{}
	for i = skipJSONSpace(b, i+1); b[i] != '}'; {
		end := skipJSONValue(b, i)
		var name string
		if err := json.Unmarshal(b[i:end], &name); err != nil {
			return nil, err
		}
		if _, dup := o[name]; dup {
			return nil, &DuplicateMemberError{name}
		}
		i = skipJSONSpace(b, skipJSONSpace(b, end)+1) // the colon
		end = skipJSONValue(b, i)
		o[name] = b[i:end:end]
		if i = skipJSONSpace(b, end); b[i] == ',' {
			i = skipJSONSpace(b, i+1)
		}
	}
	return o, nil
}

func skipJSONSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\n' || b[i] == '\r') {
		i++
	}
	return i
}

// skipJSONValue returns the end of the value that starts at b[i]. b is valid JSON.
func skipJSONValue(b []byte, i int) int {
	depth := 0
	for ; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			depth--
		default:
			if depth > 0 {
				continue
			}
			for i < len(b) && bytes.IndexByte([]byte(" \t\r\n,]}"), b[i]) < 0 {
				i++
			}
			return i
		}
		if depth == 0 {
			return i + 1
		}
	}
	return i
}

// optional decodes a member if there is one. A null is refused: dstack's own
// reader takes it for some members only.
func (o guestObject) optional(name string, dst any) error {
	v, ok := o[name]
	if !ok {
		return nil
	}
	if string(v) == "null" {
		return fmt.Errorf("%s is null; leave it out instead", name)
	}
	if err := json.Unmarshal(v, dst); err != nil {
		return fmt.Errorf("%s: %v", name, err)
	}
	return nil
}

// member decodes a member that must be there.
func (o guestObject) member(name string, dst any) error {
	if _, ok := o[name]; !ok {
		return fmt.Errorf("%s is missing", name)
	}
	return o.optional(name, dst)
}

// hexMember decodes a string of hexadecimal digits; absent and "" give nil.
func (o guestObject) hexMember(name string) ([]byte, error) {
	var s string
	if err := o.optional(name, &s); err != nil || s == "" {
		return nil, err
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %v", name, err)
	}
	return b, nil
}

// optionalOrNull is optional for the members whose null dstack reads as absent.
func (o guestObject) optionalOrNull(name string, dst any) error {
	if string(o[name]) == "null" {
		return nil
	}
	return o.optional(name, dst)
}
