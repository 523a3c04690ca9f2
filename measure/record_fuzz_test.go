package measure

import (
	"testing"
)

// FuzzParseRecords reads a log that anything may have happened to. What it takes for
// whole records is a chain from zero, also when written back.
func FuzzParseRecords(f *testing.F) {
	w, l := prepared(f, f.TempDir())
	l.lock.close()
	f.Add(w.disk)
	f.Add(w.disk[:len(w.disk)-3])
	f.Add([]byte("00000000 {}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		records, _, _ := parseRecords(b)
		var again []byte
		var at Digest
		for i := range records {
			if records[i].Prev != at {
				t.Fatalf("record %d does not follow", i)
			}
			at = at.Extend(records[i].Digest)
			line, err := records[i].line()
			if err != nil {
				t.Fatal(err)
			}
			again = append(again, line...)
		}
		same, whole, err := parseRecords(again)
		if err != nil || whole != len(again) || len(same) != len(records) {
			t.Fatalf("%d records were written back as %d (%v)", len(records), len(same), err)
		}
	})
}
