// Package tomlfile reads the project's TOML files strictly: a key that nobody reads is
// an error that names file, line and key, since a misspelled setting would otherwise
// leave its default in force unseen.
package tomlfile

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/BurntSushi/toml"
)

// File is how a file is read.
type File struct {
	Path string // errors start with it
	Hint string // ends the message about an unknown key: "agent.toml.example lists every key"
	// Named is the table whose members have names of the author's choice, "" if there
	// is none. All other keys are in lower case.
	Named string
	// Later, which may be nil, decodes what v holds as toml.Primitive. Whatever is
	// unread after it is refused.
	Later func(toml.MetaData) error
}

// Decode decodes the text of a file into v.
func (f *File) Decode(text []byte, v any) error {
	meta, err := toml.Decode(string(text), v)
	if err == nil && f.Later != nil {
		err = f.Later(meta)
	}
	if pe := (toml.ParseError{}); errors.As(err, &pe) {
		return fmt.Errorf("%s: %s", f.Path, pe.ErrorWithUsage())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	var unknown []error
	for _, key := range append(meta.Undecoded(), f.otherCase(meta)...) {
		unknown = append(unknown, fmt.Errorf("%s:%d: unknown key %q; %s", f.Path, lineOf(text, key), key, f.Hint))
	}
	return errors.Join(unknown...)
}

// otherCase lists the keys that only the decoder takes for known, since it does not
// tell upper from lower case: beside one in lower case, such a key could replace it
// unseen. So could one with the long s, which has no other lower case.
func (f *File) otherCase(meta toml.MetaData) (keys []toml.Key) {
	for _, key := range meta.Keys() {
		isName := len(key) == 2 && key[0] == f.Named
		if last := key[len(key)-1]; !isName && (last != strings.ToLower(last) || strings.ContainsRune(last, 'ſ')) {
			keys = append(keys, key)
		}
	}
	return keys
}

// lineOf finds the first line that sets key, since the decoder does not tell.
func lineOf(text []byte, key toml.Key) int {
	table, name := key[:len(key)-1].String(), key[len(key)-1]
	var in string
	s := bufio.NewScanner(bytes.NewReader(text))
	for line := 1; s.Scan(); line++ {
		text := strings.TrimSpace(s.Text())
		if h, ok := strings.CutPrefix(text, "["); ok {
			in = strings.Trim(h, "[] ")
			if in == key.String() {
				return line
			}
			continue
		}
		left, _, ok := strings.Cut(text, "=")
		if left = strings.Trim(strings.TrimSpace(left), `"'`); ok && (in == table && left == name || in == "" && left == key.String()) {
			return line
		}
	}
	return 0
}
