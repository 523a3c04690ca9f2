package measure_test

import (
	"crypto/sha512"
	"fmt"
	"testing"

	"tdx-agent/measure"
)

// BenchmarkReplay replays a log of 1,000 events beside its floor: the same sequence of
// SHA-384 calls, two an event, over the same bytes.
func BenchmarkReplay(b *testing.B) {
	for _, version := range []int{measure.EventV1, measure.EventV2} {
		var events []measure.Event
		var preimages [][]byte
		for i := range 1000 {
			e, err := measure.NewRuntimeEvent(fmt.Sprintf("event-%d", i), make([]byte, 32), version)
			if err != nil {
				b.Fatal(err)
			}
			events, preimages = append(events, e), append(preimages, e.Preimage())
		}
		var want measure.Digest
		b.Run(fmt.Sprintf("floor/version-%d", version), func(b *testing.B) {
			for b.Loop() {
				want = measure.Digest{}
				for _, p := range preimages {
					e := sha512.Sum384(p)
					var in [96]byte
					copy(in[:], want[:])
					copy(in[48:], e[:])
					want = sha512.Sum384(in[:])
				}
			}
		})
		b.Run(fmt.Sprintf("1000-events/version-%d", version), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				got, err := measure.Replay(events)
				if err != nil || want != (measure.Digest{}) && got[measure.RTMR3] != want {
					b.Fatalf("got %v, %v, want %s", got, err, want)
				}
			}
		})
	}
}
