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

// Decode decodes the text of a file into v. later, which may be nil, decodes what v
// holds as toml.Primitive; whatever is unread after it is refused. hint ends the
// message, as "agent.toml.example lists every key". Errors start with path.
func Decode(path string, text []byte, v any, hint string, later func(toml.MetaData) error) error {
	meta, err := toml.Decode(string(text), v)
	if err == nil && later != nil {
		err = later(meta)
	}
	if pe := (toml.ParseError{}); errors.As(err, &pe) {
		return fmt.Errorf("%s: %s", path, pe.ErrorWithUsage())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var unknown []error
	for _, key := range meta.Undecoded() {
		unknown = append(unknown, fmt.Errorf("%s:%d: unknown key %q; %s", path, lineOf(text, key), key, hint))
	}
	return errors.Join(unknown...)
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
