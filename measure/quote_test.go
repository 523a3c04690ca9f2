package measure_test

import (
	"encoding/binary"
	"errors"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// simulatedQuotes are one signed quote of each form.
func simulatedQuotes(tb testing.TB) map[string][]byte {
	tb.Helper()
	quotes := map[string][]byte{}
	for name, cfg := range map[string]tdxsim.Config{
		"v4": {QuoteVersion: 4}, "v5 type 2": {QuoteVersion: 5, BodyType: 2}, "v5 type 3": {QuoteVersion: 5, BodyType: 3},
	} {
		td, err := tdxsim.New(tb.TempDir(), cfg)
		if err != nil {
			tb.Fatal(err)
		}
		c := td.Client()
		const entry = "/sys/kernel/config/tsm/report/x"
		if err := errors.Join(c.Mkdir(entry), c.WriteFile(entry+"/inblob", make([]byte, 64))); err != nil {
			tb.Fatal(err)
		}
		if quotes[name], err = c.ReadFile(entry + "/outblob"); err != nil {
			tb.Fatal(err)
		}
		td.Close()
	}
	return quotes
}

func TestQuoteForms(t *testing.T) {
	for name, b := range simulatedQuotes(t) {
		q, err := measure.ParseQuote(append(b[:len(b):len(b)], 0, 0, 7))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(q.Trailing) != 3 || len(q.Signed)+4+len(q.SignatureData) != len(b) {
			t.Errorf("%s: %d signed, %d signature, %d trailing of %d", name, len(q.Signed), len(q.SignatureData), len(q.Trailing), len(b))
		}
		for n := range b {
			if q, err := measure.ParseQuote(b[:n]); err == nil {
				t.Fatalf("%s cut to %d bytes is accepted, with %d of signature", name, n, len(q.SignatureData))
			}
		}
	}
}

func TestQuoteIsRefused(t *testing.T) {
	quotes := simulatedQuotes(t)
	put16 := func(at int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint16(b[at:], v); return b }
	}
	put32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[at:], v); return b }
	}
	for _, tc := range []struct {
		name, form, field string
		edit              func([]byte) []byte
	}{
		{"version 3", "v4", "version", put16(0, 3)},
		{"SGX", "v4", "TEE type", put32(4, 0)},
		{"no signature", "v4", "signed data size", put32(632, 0)},
		{"signature one too long", "v4", "signed data size", func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[632:], uint32(len(b)-636+1))
			return b
		}},
		{"signature of 4 GiB", "v4", "signed data size", put32(632, 0xffffffff)},
		{"signature of 2 GiB in version 5", "v5 type 3", "signed data size", put32(702, 0x80000000)},
		{"SGX body in version 5", "v5 type 2", "body type", put16(48, 1)},
		{"unknown body", "v5 type 3", "body type", put16(48, 4)},
		{"body type 3 of the size of type 2", "v5 type 2", "body size", put16(48, 3)},
		{"body of 4 GiB", "v5 type 3", "body size", put32(50, 0xffffffff)},
		{"oversize", "v4", "length", func(b []byte) []byte { return append(b, make([]byte, 128<<10)...) }},
		{"empty", "v4", "length", func([]byte) []byte { return nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := measure.ParseQuote(tc.edit(append([]byte(nil), quotes[tc.form]...)))
			var parse *measure.QuoteParseError
			if !errors.As(err, &parse) || parse.Field != tc.field {
				t.Errorf("got %v, want a QuoteParseError of %q", err, tc.field)
			}
		})
	}
}

func FuzzParseQuote(f *testing.F) {
	for _, b := range simulatedQuotes(f) {
		f.Add(b[:min(len(b), 800)])
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := measure.ParseQuote(b)
		if err == nil && len(q.Signed)+4+len(q.SignatureData)+len(q.Trailing) != len(b) {
			t.Errorf("parts of %d, %d and %d bytes do not make %d", len(q.Signed), len(q.SignatureData), len(q.Trailing), len(b))
		}
	})
}
