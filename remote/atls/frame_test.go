package atls_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// TestMembers has objects that two parsers might read differently.
func TestMembers(t *testing.T) {
	for body, want := range map[string]string{
		`{}`: "",
		` {"a" : 1 , "b_2":[1,{"a":"}"},"]"] , "c":{"x":"\\\"}"}}` + "\n": "a b_2 c",
		`{"a":"\\","b":1}`: "a b",
		`[]`:               "!", `null`: "!", ``: "!", `{`: "!", `{"a"`: "!", `{"a":`: "!", `{"a":1`: "!", `{"a":1,}`: "!", `{,"a":1}`: "!", `{"a":1 "b":2}`: "!",
		`{"a":,"b":1}`: "!", `{"a":1}{}`: "!", `{"a":1} x`: "!", `{a:1}`: "!", `{"a" 1}`: "!", `{"a":"`: "!", `{"a":"\"`: "!",
		`{"a":1,"a":2}`: "!", `{"a":1,"A":2}`: "!", `{"\u0061":1}`: "!", `{"service":1,"ſervice":2}`: "!", "{\"a\x00\":1}": "!", `{"a":1}]`: "!",
	} {
		names, values, err := atls.Members([]byte(body))
		isObject := err == nil && !slices.ContainsFunc(values, func(v []byte) bool { return !json.Valid(v) })
		if got := strings.Join(names, " "); isObject != (want != "!") || isObject && got != want {
			t.Errorf("%s: got %q, %v, want %q", body, got, err, want)
		}
	}
}

// FuzzMembers holds the splitter against encoding/json.
func FuzzMembers(f *testing.F) {
	f.Add([]byte(`{"a":1,"b":[{"c":"\"}"}]}`))
	f.Add([]byte(hello()))
	f.Fuzz(func(t *testing.T, body []byte) {
		names, values, err := atls.Members(body)
		valid := err == nil && !slices.ContainsFunc(values, func(v []byte) bool { return !json.Valid(v) })
		var want map[string]json.RawMessage
		isObject := bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) && json.Unmarshal(body, &want) == nil
		switch {
		case valid && !isObject:
			t.Fatalf("%q is taken for an object", body)
		case valid && !slices.Equal(slices.Sorted(maps.Keys(want)), slices.Sorted(slices.Values(names))):
			t.Fatalf("%q has the members %q, want %q", body, names, slices.Sorted(maps.Keys(want)))
		}
		for i, v := range values {
			if valid && !bytes.Equal(v, want[names[i]]) {
				t.Fatalf("%q: %s is %q, want %q", body, names[i], v, want[names[i]])
			}
		}
	})
}

// FuzzEvidence takes whatever evidence a peer may send: what is read can be written, and
// is the same then.
func FuzzEvidence(f *testing.F) {
	e, err := measure.NewRuntimeEvent("app-id", []byte{1}, measure.EventV1)
	if err != nil {
		f.Fatal(err)
	}
	st := &atls.Statement{Evidence: &measure.Evidence{Quote: []byte("quote"), Events: []measure.Event{e}, VMConfig: `{"a":"ä\n"}`}, AgentKey: []byte("key"), Signature: []byte("sig")}
	body, err := atls.EncodeStatement(st, "key")
	if err != nil {
		f.Fatal(err)
	}
	if !json.Valid(body) {
		f.Fatalf("%s is no JSON", body)
	}
	f.Add(body)
	f.Add([]byte(`{"format":"dstack-tdx/1","event_log":[]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		st, err := atls.DecodeEvidence(body)
		if err != nil {
			return
		}
		if !json.Valid(body) {
			t.Fatalf("%q is no JSON and was taken", body)
		}
		written, err := atls.EncodeStatement(st, "")
		if err != nil {
			return // too large, or a log that is not what we would write
		}
		again, err := atls.DecodeEvidence(written)
		if err != nil || !bytes.Equal(again.Evidence.Quote, st.Evidence.Quote) || again.Evidence.VMConfig != st.Evidence.VMConfig || again.RTMR3 != st.RTMR3 ||
			!bytes.Equal(again.Signature, st.Signature) || len(again.Evidence.Events) != len(st.Evidence.Events) {
			t.Fatalf("%q was read as %+v, written as %q and read as %+v, %v", body, st, written, again, err)
		}
	})
}
