package tsm

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tdx-agent/measure"
)

// quoteV5 is a version 5 quote of 5000 bytes with this body.
func quoteV5(kind uint16, size uint32, rd measure.ReportData) []byte {
	q := make([]byte, 5000)
	q[0], q[2], q[4] = 5, 2, 0x81
	binary.LittleEndian.PutUint16(q[48:], kind)
	binary.LittleEndian.PutUint32(q[50:], size)
	copy(q[54+520:], rd[:])
	return q
}

func TestCheckQuote(t *testing.T) {
	with := func(offset int, v byte) []byte {
		q := goodQuote(someData[:])
		q[offset] = v
		return q
	}
	for _, c := range []struct {
		name  string
		quote []byte
		want  string // in the error; "" is none
	}{
		{"version 4", goodQuote(someData[:]), ""},
		{"version 5, TD 1.0", quoteV5(2, 584, someData), ""},
		{"version 5, TD 1.5", quoteV5(3, 648, someData), ""},
		{"shortest", goodQuote(someData[:])[:1020], ""},
		{"longest", append(goodQuote(someData[:]), make([]byte, 131048-5000)...), ""},
		{"nothing", nil, "no bytes"},
		{"one byte short", goodQuote(someData[:])[:1019], "1019 bytes"},
		{"one byte long", append(goodQuote(someData[:]), make([]byte, 131049-5000)...), "131049 bytes"},
		{"version 3", with(0, 3), "version is 3"},
		{"version 6", with(0, 6), "version is 6"},
		{"version 4 in the low byte", with(1, 1), "version is 260"},
		{"SGX", with(4, 0), "TEE type is 0x0"},
		{"TEE type in the low byte", with(7, 1), "TEE type is 0x1000081"},
		{"version 5, SGX body", quoteV5(1, 384, someData), "type 1 and 384"},
		{"version 5, wrong size", quoteV5(3, 584, someData), "type 3 and 584"},
		{"version 5, size 4 GiB", quoteV5(2, 1<<32-1, someData), "type 2 and 4294967295"},
		{"first byte of the report data", with(568, 0), "other report data"},
		{"last byte of the report data", with(631, 0), "other report data"},
		{"version 4 data in a version 5 quote", with(0, 5), "body"},
	} {
		err := checkQuote(c.quote, someData)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
}

// TestCheckQuoteReal looks at quotes of real machines. Their report data is taken
// from the place that Intel's specification names, so a wrong offset would show only
// as a version 5 quote that is refused.
func TestCheckQuoteReal(t *testing.T) {
	dir := os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = "../../../shared/fixtures"
	}
	files, _ := filepath.Glob(filepath.Join(dir, "quotes", "*.bin"))
	if len(files) == 0 {
		t.Skipf("no quotes in %s; set TDX_AGENT_FIXTURES", dir)
	}
	for _, f := range files {
		q, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		at := 568
		if q[0] == 5 {
			at = 574
		}
		if err := checkQuote(q, measure.ReportData(q[at:at+64])); err != nil {
			t.Errorf("%s: %v", filepath.Base(f), err)
		}
		if err := checkQuote(q, measure.ReportData{0xaa}); err == nil {
			t.Errorf("%s: passed with other report data", filepath.Base(f))
		}
	}
}

func FuzzCheckQuote(f *testing.F) {
	f.Add(goodQuote(someData[:])[:1020])
	f.Add(quoteV5(3, 648, someData)[:1020])
	f.Add([]byte{5})
	f.Fuzz(func(t *testing.T, q []byte) {
		if checkQuote(q, someData) == nil && !strings.Contains(string(q), string(someData[:])) {
			t.Error("a quote without our report data was accepted")
		}
	})
}

// Every errno the contract names has an explanation that says what to do.
func TestQuoteErrorReasons(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EINVAL, syscall.EBUSY, syscall.EINTR, syscall.EIO, syscall.ETIMEDOUT, syscall.EFBIG, syscall.ENXIO} {
		e := newQuoteError(errno)
		if e.Errno != errno || !strings.ContainsAny(e.Reason, ";") {
			t.Errorf("%v: %q", errno, e.Reason)
		}
	}
}
