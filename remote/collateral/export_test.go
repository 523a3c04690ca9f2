package collateral

import (
	"encoding/binary"
	"time"
)

// RecodeFloor decodes the file of a floor and encodes it again.
func RecodeFloor(text []byte) ([]byte, error) {
	m, err := decodeMarks(text)
	if err != nil {
		return nil, err
	}
	return m.encode()
}

// FloorOf is the file of a floor with n platforms.
func FloorOf(n int, at time.Time) ([]byte, error) {
	m := make(marks)
	for i := range n {
		k := floorKey{platform{ca: "platform"}, channelStandard}
		binary.BigEndian.PutUint32(k.fmspc[:], uint32(i))
		m[k] = [4]mark{{20, at}, {20, at}, {1, at}, {1, at}}
	}
	return m.encode()
}

// Waiting is how many fetches there are, and how many callers wait for them.
func (s *Store) Waiting() (flights, callers int) {
	s.flightsMu.Lock()
	defer s.flightsMu.Unlock()
	for _, f := range s.flights {
		callers += f.waiting
	}
	return len(s.flights), callers
}
