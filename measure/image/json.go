package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"
)

// object is a JSON object's members by exact name. encoding/json alone matches names
// whatever their case and lets the last of two equal names win: two readers of one
// file could then see two machines.
type object map[string]json.RawMessage

func parseObject(b []byte) (object, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("want a JSON object")
	}
	o := object{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("not valid JSON: %v", err)
		}
		name, ok := t.(string)
		if _, twice := o[name]; twice || !ok {
			return nil, fmt.Errorf("member %.80q is there twice", name)
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, fmt.Errorf("member %.80q: %v", name, err)
		}
		o[name] = v
	}
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("not valid JSON: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	return o, nil
}

// decode stores the members that are known and not null, and names the others.
func (o object) decode(known map[string]any) (unknown []string, err error) {
	for name, v := range o {
		dst, ok := known[name]
		if !ok {
			unknown = append(unknown, name)
			continue
		}
		if string(v) == "null" {
			continue
		}
		if err := json.Unmarshal(v, dst); err != nil {
			return nil, fmt.Errorf("%s: %v", name, err)
		}
	}
	slices.Sort(unknown)
	return unknown, nil
}
