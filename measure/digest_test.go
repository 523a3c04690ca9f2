package measure_test

import (
	"crypto/sha512"
	"encoding/json"
	"strings"
	"testing"

	"tdx-agent/measure"
)

func TestExtendHashesOldThenNew(t *testing.T) {
	var d, e measure.Digest
	d[0], e[47] = 1, 2
	want := measure.Digest(sha512.Sum384(append(append([]byte(nil), d[:]...), e[:]...)))
	if got := d.Extend(e); got != want || d[0] != 1 {
		t.Errorf("got %s, want %s, and the receiver as it was", got, want)
	}
	if (measure.Digest{}).Extend(e).IsZero() || !(measure.Digest{}).IsZero() {
		t.Error("only the register that nothing was extended into is zero")
	}
}

func TestDigestText(t *testing.T) {
	hex := strings.Repeat("0aF", 32)
	var d measure.Digest
	if err := json.Unmarshal([]byte(`"`+hex+`"`), &d); err != nil {
		t.Fatal(err)
	}
	if out, err := json.Marshal(d); err != nil || string(out) != `"`+strings.ToLower(hex)+`"` {
		t.Errorf("%s is written as %s (%v)", hex, out, err)
	}
	for name, text := range map[string]string{"empty": "", "short": hex[:95], "long": hex + "0", "0x": "0x" + hex, "no hexadecimal": "g" + hex[1:]} {
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestReportDataIsPaddedOnTheRight(t *testing.T) {
	r, err := measure.NewReportData([]byte{0xab, 0xcd})
	if want := "abcd" + strings.Repeat("00", 62); err != nil || r.String() != want {
		t.Errorf("got %s (%v), want %s", r, err, want)
	}
	for n, ok := range map[int]bool{0: true, 64: true, 65: false} {
		if _, err := measure.NewReportData(make([]byte, n)); (err == nil) != ok {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}
