package dcap

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	maxDepth   = 16 // of values that are skipped
	maxMembers = 64 // of an object
)

// scanner reads JSON (RFC 8259) as a signer writes it: keys match by case, no key is
// twice in an object, numbers are whole. The standard decoder is laxer in all three,
// which has let forged members replace signed ones. The first error sticks, and every
// later call does nothing.
type scanner struct {
	text []byte
	at   int
	err  error
}

func newScanner(text []byte) *scanner {
	s := &scanner{text: text}
	if !utf8.Valid(text) {
		s.fail("the text is not UTF-8")
	}
	return s
}

func (s *scanner) fail(format string, a ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("byte %d: %s", s.at, fmt.Sprintf(format, a...))
	}
}

// peek returns the next byte that is not white space, 0 at the end.
func (s *scanner) peek() byte {
	for ; s.at < len(s.text); s.at++ {
		switch c := s.text[s.at]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// take consumes c if it is next.
func (s *scanner) take(c byte) bool {
	if s.err != nil || s.peek() != c || s.at == len(s.text) {
		return false
	}
	s.at++
	return true
}

func (s *scanner) expect(c byte) {
	if s.err == nil && !s.take(c) {
		s.fail("want %q", c)
	}
}

// end says that nothing may follow.
func (s *scanner) end() error {
	if s.err == nil && (s.peek() != 0 || s.at < len(s.text)) {
		s.fail("more text follows the document")
	}
	return s.err
}

// members are the keys of a kind of object.
type members struct {
	what               string
	required, optional []string
	closed             bool // no other keys; else they are skipped
}

// object calls read for each known member, with its value next.
func (s *scanner) object(m *members, read func(key string)) {
	s.expect('{')
	seen := make([]string, 0, 16)
	for first := true; s.err == nil && !s.take('}'); first = false {
		if !first {
			s.expect(',')
		}
		key := s.string()
		s.expect(':')
		if s.err != nil {
			return
		}
		for _, k := range seen {
			// A second spelling of a key is what a lax reader would take for the key.
			if strings.EqualFold(k, key) {
				s.fail("%s has %q twice", m.what, key)
				return
			}
		}
		if len(seen) == maxMembers {
			s.fail("%s has more than %d members", m.what, maxMembers)
			return
		}
		seen = append(seen, key)
		s.member(m, key, read)
	}
	s.required(m, seen)
}

func (s *scanner) member(m *members, key string, read func(string)) {
	for _, known := range [2][]string{m.required, m.optional} {
		for _, k := range known {
			if k == key {
				read(k)
				return
			}
			if strings.EqualFold(k, key) {
				s.fail("%s has %q, want %q", m.what, key, k)
				return
			}
		}
	}
	if m.closed {
		s.fail("%s has the unknown key %.40q", m.what, key)
		return
	}
	s.skip(maxDepth)
}

func (s *scanner) required(m *members, seen []string) {
	if s.err != nil {
		return
	}
next:
	for _, k := range m.required {
		for _, has := range seen {
			if has == k {
				continue next
			}
		}
		s.fail("%s has no %q", m.what, k)
		return
	}
}

// array calls read for each element, and returns how many there were: at most limit.
func (s *scanner) array(what string, limit int, read func(i int)) int {
	s.expect('[')
	n := 0
	for ; s.err == nil && !s.take(']'); n++ {
		if n > 0 {
			s.expect(',')
		}
		if n == limit {
			s.fail("%s: more than %d elements", what, limit)
			return n
		}
		if s.err == nil {
			read(n)
		}
	}
	return n
}

// string reads a string.
func (s *scanner) string() string {
	s.expect('"')
	if s.err != nil {
		return ""
	}
	start := s.at
	for ; s.at < len(s.text); s.at++ {
		switch c := s.text[s.at]; {
		case c == '"':
			s.at++
			return string(s.text[start : s.at-1])
		case c == '\\':
			return s.escaped(start)
		case c < ' ':
			s.fail("a control character in a string")
			return ""
		}
	}
	s.fail("a string does not end")
	return ""
}

// escaped goes on with a string from its first backslash.
func (s *scanner) escaped(start int) string {
	b := make([]byte, 0, 2*(s.at-start)+256)
	for i := s.at; i < len(s.text); i++ {
		switch c := s.text[i]; {
		case c == '"':
			s.at = i + 1
			return string(append(b, s.text[start:i]...))
		case c < ' ':
			s.at = i
			s.fail("a control character in a string")
			return ""
		case c == '\\':
			b = append(b, s.text[start:i]...)
			s.at = i + 1
			if b = s.escape(b); s.err != nil {
				return ""
			}
			start, i = s.at, s.at-1
		}
	}
	s.fail("a string does not end")
	return ""
}

// escape reads what follows a backslash.
func (s *scanner) escape(b []byte) []byte {
	if s.at == len(s.text) {
		s.fail("a string does not end")
		return b
	}
	c := s.text[s.at]
	s.at++
	if i := strings.IndexByte(`"\/bfnrt`, c); i >= 0 {
		return append(b, "\"\\/\b\f\n\r\t"[i])
	}
	if c != 'u' {
		s.fail("unknown escape \\%c", c)
		return b
	}
	r := s.hex4()
	if utf16.IsSurrogate(r) {
		if s.at+2 <= len(s.text) && s.text[s.at] == '\\' && s.text[s.at+1] == 'u' {
			s.at += 2
			r = utf16.DecodeRune(r, s.hex4())
		} else {
			r = utf8.RuneError
		}
		if r == utf8.RuneError {
			s.fail("half a surrogate pair")
		}
	}
	return utf8.AppendRune(b, r)
}

func (s *scanner) hex4() rune {
	if s.at+4 > len(s.text) {
		s.fail("a string does not end")
		return 0
	}
	v, err := strconv.ParseUint(string(s.text[s.at:s.at+4]), 16, 16)
	if err != nil {
		s.fail("\\u without four hexadecimal digits")
	}
	s.at += 4
	return rune(v)
}

// number reads a whole number from 0 to limit.
func (s *scanner) number(what string, limit int) int {
	if s.err != nil {
		return 0
	}
	s.peek()
	start, v := s.at, 0
	for ; s.at < len(s.text) && s.text[s.at] >= '0' && s.text[s.at] <= '9'; s.at++ {
		if v = v*10 + int(s.text[s.at]-'0'); v > limit {
			s.fail("%s is more than %d", what, limit)
			return 0
		}
	}
	if digits := s.text[start:s.at]; len(digits) == 0 || len(digits) > 1 && digits[0] == '0' {
		s.fail("%s is not a whole number from 0 to %d", what, limit)
		return 0
	}
	if s.at < len(s.text) && strings.IndexByte(".eE", s.text[s.at]) >= 0 {
		s.fail("%s is not a whole number", what)
		return 0
	}
	return v
}

// hex reads a string of exactly this many bytes in hexadecimal of either case.
func (s *scanner) hex(what string, into []byte) {
	text := s.string()
	if s.err != nil {
		return
	}
	if len(text) != 2*len(into) {
		s.fail("%s has %d characters, want %d hexadecimal digits", what, len(text), 2*len(into))
		return
	}
	if _, err := hex.Decode(into, []byte(text)); err != nil {
		s.fail("%s: %v", what, err)
	}
}

// date reads an RFC 3339 time.
func (s *scanner) date(what string) time.Time {
	text := s.string()
	if s.err != nil {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		s.fail("%s is %.40q, want an RFC 3339 time", what, text)
	}
	return t.UTC()
}

// skip reads any value.
func (s *scanner) skip(depth int) {
	if depth == 0 {
		s.fail("nested too deep")
	}
	if s.err != nil {
		return
	}
	switch c := s.peek(); {
	case c == '"':
		s.string()
	case c == '[':
		s.array("array", len(s.text), func(int) { s.skip(depth - 1) })
	case c == '{':
		s.at++
		for first := true; s.err == nil && !s.take('}'); first = false {
			if !first {
				s.expect(',')
			}
			s.string()
			s.expect(':')
			s.skip(depth - 1)
		}
	default:
		s.literal()
	}
}

// literal reads true, false, null or a number that nobody needs.
func (s *scanner) literal() {
	start := s.at
	for s.at < len(s.text) && strings.IndexByte(",]} \t\r\n", s.text[s.at]) < 0 {
		s.at++
	}
	text := string(s.text[start:s.at])
	switch text {
	case "true", "false", "null":
		return
	}
	if !isNumber(text) {
		s.fail("%.40q is no JSON value", text)
	}
}

// isNumber is the grammar of RFC 8259, section 6.
func isNumber(t string) bool {
	digits := func() bool {
		n := len(t)
		t = strings.TrimLeft(t, "0123456789")
		return len(t) < n
	}
	t = strings.TrimPrefix(t, "-")
	if rest, zero := strings.CutPrefix(t, "0"); zero {
		t = rest
	} else if !digits() {
		return false
	}
	if rest, point := strings.CutPrefix(t, "."); point {
		if t = rest; !digits() {
			return false
		}
	}
	if t != "" && (t[0] == 'e' || t[0] == 'E') {
		if t = t[1:]; t != "" && (t[0] == '+' || t[0] == '-') {
			t = t[1:]
		}
		if !digits() {
			return false
		}
	}
	return t == ""
}
