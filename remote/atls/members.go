package atls

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// member is one of a JSON object: its value is as it stands there and not checked.
type member struct {
	name  string
	value []byte
}

// members splits a JSON object. No member may be there twice, in any case of its
// letters, among which encoding/json has the long s: it would take the last. The object
// is well formed if every value is.
func members(body []byte) (all []member, err error) {
	s := scanner{body}
	if !s.take('{') {
		return nil, &formError{"no JSON object"}
	}
	for !s.take('}') {
		if len(all) > 0 && !s.take(',') {
			return nil, &formError{"no comma between two members"}
		}
		var m member
		isText := s.take('"')
		m.name = string(s.text())
		if !isText || !s.take(':') {
			return nil, &formError{"a member has no name, or no value"}
		}
		if strings.ContainsFunc(m.name, isUnusual) || slices.ContainsFunc(all, func(other member) bool { return other.name == m.name }) {
			return nil, &formError{fmt.Sprintf("member %.40q is there twice, or not in lower case ASCII", m.name)}
		}
		if m.value = s.value(); len(m.value) == 0 {
			return nil, &formError{fmt.Sprintf("member %.40q has no value", m.name)}
		}
		if len(all) == maxList {
			return nil, &formError{"too many members"}
		}
		all = append(all, m)
	}
	if s.peek(); len(s.rest) > 0 {
		return nil, &formError{"something follows the object"}
	}
	return all, nil
}

// isUnusual is what no member's name needs, and two parsers might take differently.
func isUnusual(r rune) bool {
	return r < ' ' || r > unicode.MaxASCII || r == '\\' || 'A' <= r && r <= 'Z'
}

// scanner finds the ends of JSON values.
type scanner struct{ rest []byte }

// peek is the next byte that is no space; 0 at the end.
func (s *scanner) peek() byte {
	s.rest = bytes.TrimLeft(s.rest, " \t\r\n")
	if len(s.rest) == 0 {
		return 0
	}
	return s.rest[0]
}

// take takes the next byte that is no space, if it is c.
func (s *scanner) take(c byte) bool {
	if s.peek() != c {
		return false
	}
	s.rest = s.rest[1:]
	return true
}

// text takes what is left of a string and its quote, and returns it without.
func (s *scanner) text() []byte {
	n := stringEnd(s.rest)
	text := s.rest[:n]
	s.rest = s.rest[min(n+1, len(s.rest)):]
	return text
}

// stringEnd is where the quote is that ends a string, or the length if there is none.
func stringEnd(b []byte) int {
	for i := 0; i < len(b); i++ {
		n := bytes.IndexAny(b[i:], `"\`)
		if n < 0 {
			break
		}
		if i += n; b[i] == '"' {
			return i
		}
		i++ // and what is escaped
	}
	return len(b)
}

// value takes a value up to the comma or bracket behind it.
func (s *scanner) value() []byte {
	s.peek()
	depth, i := 0, 0
	for ; i < len(s.rest); i++ {
		switch s.rest[i] {
		case '"':
			i++
			i += stringEnd(s.rest[i:])
			continue
		case '{', '[':
			depth++
			continue
		case ',':
			if depth > 0 {
				continue
			}
		case '}', ']':
			if depth > 0 {
				depth--
				continue
			}
		default:
			continue
		}
		break
	}
	i = min(i, len(s.rest))
	value := bytes.TrimRight(s.rest[:i], " \t\r\n")
	s.rest = s.rest[i:]
	return value
}
