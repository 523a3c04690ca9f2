package image

import (
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"hash"

	"tdx-agent/measure"
)

// PageOrder is the order in which a VMM adds and measures the initial pages of a TD.
// MRTD depends on it. The zero value is none: the QEMU version decides.
type PageOrder int

// The page orders.
const (
	// TwoPass adds all pages of a section, then measures them: the TDX staging line
	// of QEMU 8.2 and its kernel.
	TwoPass PageOrder = 1 + iota
	// SinglePass measures each page as it adds it: upstream KVM, so QEMU 9 and later.
	SinglePass
)

func (o PageOrder) String() string {
	switch o {
	case TwoPass:
		return "two-pass"
	case SinglePass:
		return "single-pass"
	}
	return "unspecified"
}

const (
	recordSize = 128 // of TDH.MEM.PAGE.ADD and of the head of TDH.MR.EXTEND
	chunkSize  = 256 // of data in TDH.MR.EXTEND
)

// MRTD returns the measurement of the TD's initial pages (Intel TDX Module ABI,
// TDH.MEM.PAGE.ADD and TDH.MR.EXTEND): one SHA-384 over a record for every 4 KiB page
// of the sections that are not PAGE.AUG, and one with its data for every 256 bytes of
// those that are MR.EXTEND. It is an error if order is neither of the two.
func (t *TDVF) MRTD(order PageOrder) (measure.Digest, error) {
	if order != TwoPass && order != SinglePass {
		return measure.Digest{}, fmt.Errorf("page order %d, want two-pass or single-pass", int(order))
	}
	m := mrtdHash{hash: sha512.New384()}
	for i := range t.Sections {
		s := &t.Sections[i]
		var data []byte
		if s.Attributes&AttributeExtend != 0 {
			data = s.data(t.fw)
		}
		add := s.Attributes&AttributeAug == 0
		if order == SinglePass {
			m.pages(s, data, add, true)
			continue
		}
		m.pages(s, data, add, false)
		m.pages(s, data, false, true)
	}
	return measure.Digest(m.hash.Sum(nil)), nil
}

// mrtdHash collects the records of a page, so that the hash is fed whole blocks.
type mrtdHash struct {
	hash hash.Hash
	buf  [recordSize + pageSize/chunkSize*(recordSize+chunkSize)]byte
}

func (m *mrtdHash) pages(s *Section, data []byte, add, extend bool) {
	for off := uint64(0); off < s.MemorySize; off += pageSize {
		b := m.buf[:0]
		if add {
			b = appendRecord(b, "MEM.PAGE.ADD", s.Address+off)
		}
		if extend && data != nil {
			for c := off; c < off+pageSize; c += chunkSize {
				b = appendRecord(b, "MR.EXTEND", s.Address+c)
				b = append(b, data[c:c+chunkSize]...)
			}
		}
		m.hash.Write(b)
	}
}

func appendRecord(b []byte, name string, address uint64) []byte {
	var r [recordSize]byte
	copy(r[:], name)
	binary.LittleEndian.PutUint64(r[16:], address)
	return append(b, r[:]...)
}
