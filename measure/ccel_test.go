package measure_test

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// simulatedCCEL is a log without its padding.
func simulatedCCEL(tb testing.TB) []byte {
	tb.Helper()
	td, err := tdxsim.New(tb.TempDir(), tdxsim.Config{Seed: []byte("ccel")})
	if err != nil {
		tb.Fatal(err)
	}
	defer td.Close()
	return bytes.TrimRight(td.CCEL(), "\xff")
}

func TestCCELPadding(t *testing.T) {
	log := simulatedCCEL(t)
	for name, b := range map[string][]byte{
		"none": log, "0xff": append(log[:len(log):len(log)], bytes.Repeat([]byte{0xff}, 999)...),
		"three bytes of 0xff": append(log[:len(log):len(log)], 0xff, 0xff, 0xff), "zeros": append(log[:len(log):len(log)], make([]byte, 77)...),
	} {
		if events, err := measure.ParseCCEL(b); err != nil || len(events) != 20 {
			t.Errorf("padding %s: %d events, %v; want 20", name, len(events), err)
		}
	}
}

func TestCCELIsRefused(t *testing.T) {
	log := simulatedCCEL(t)
	first := 32 + int(binary.LittleEndian.Uint32(log[28:])) // where the events begin
	put32 := func(at int, v uint32) []byte {
		b := bytes.Clone(log)
		binary.LittleEndian.PutUint32(b[at:], v)
		return b
	}
	for _, tc := range []struct {
		name string
		log  []byte
		want string
	}{
		{"empty", nil, "middle of it"},
		{"not a log", bytes.Repeat([]byte("x"), 100), "EV_NO_ACTION"},
		{"another specification", bytes.Replace(log, []byte("Spec ID Event03"), []byte("Spec ID Event02"), 1), "Spec ID Event03"},
		{"a million algorithms", put32(32+24, 1<<20), "algorithms"},
		{"no SHA-384", put32(32+28, 0x0020000b), "SHA-384"},
		{"header of 4 GiB", put32(28, 0xffffffff), "middle of it"},
		{"register 5", put32(first, 5), "register index"},
		{"no digest", put32(first+8, 0), "want one"},
		{"two digests", put32(first+8, 2), "want one"},
		{"SHA-256 digest", func() []byte { b := bytes.Clone(log); b[first+12] = 0x0b; return b }(), "digest algorithm"},
		{"event of 4 GiB", put32(first+12+50, 0xffffffff), "middle of it"},
		{"oversize", make([]byte, 16<<20+1), "at most"},
		{"bytes that are not UTF-8", append(bytes.Clone(log), bytes.Repeat([]byte{0x80, 0xfe, 0xc0}, 20)...), "register index"},
		{"one byte more", append(bytes.Clone(log), 0xfe), "middle of it"},
		{"too many events", append(bytes.Clone(log), bytes.Repeat(log[first:first+66+int(binary.LittleEndian.Uint32(log[first+62:]))], 4096)...), "more than 4096"},
		{"zeros and then something", append(append(bytes.Clone(log), make([]byte, 40)...), 1), "want one"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := measure.ParseCCEL(tc.log); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
	whole := 0
	for n := range log {
		if _, err := measure.ParseCCEL(log[:n]); err == nil {
			whole++
		}
	}
	if whole != 20 { // after the header, and after every event but the last
		t.Errorf("%d truncations are accepted, want those 20 that end with a whole event", whole)
	}
}

func FuzzParseCCEL(f *testing.F) {
	f.Add(simulatedCCEL(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		events, err := measure.ParseCCEL(b)
		for _, e := range events {
			if err == nil && (e.IMR < 0 || e.IMR > 3) {
				t.Errorf("event of register %d", e.IMR)
			}
		}
	})
}
