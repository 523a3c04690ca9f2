package image

import (
	"cmp"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"tdx-agent/measure"
)

// Layout is where a firmware's TD HOB and its temporary memory are: all that the TD
// HOB depends on besides the size of memory. A Layout from [TDVF.Layout] or
// [ParseWitness] is checked; the zero value is of no firmware.
type Layout struct {
	HOB    uint64        // address of the TD HOB
	Ranges []MemoryRange // HOB and temporary memory, by address, not empty
}

// MemoryRange is a range of guest memory in bytes, aligned to 4 KiB pages.
type MemoryRange struct{ Start, Size uint64 }

// DstackLayout03 and DstackLayout05 return the layouts of the firmwares of dstack's
// images, until 0.4 and since 0.5. Debian's OVMF 2025.02 has the first, its 2022.11
// the second.
func DstackLayout03() Layout { return dstackLayout(MemoryRange{0x811000, 0xf000}) }

// DstackLayout05 returns the layout of dstack's firmware since 0.5.
func DstackLayout05() Layout { return dstackLayout(MemoryRange{0x810000, 0x10000}) }

func dstackLayout(last MemoryRange) Layout {
	return Layout{HOB: 0x809000, Ranges: []MemoryRange{{0x800000, 0x6000}, {0x809000, 0x2000}, {0x80b000, 0x2000}, last}}
}

// Layout returns the memory layout of the firmware's sections.
func (t *TDVF) Layout() Layout {
	l := Layout{HOB: t.section(SectionTDHOB).Address}
	for _, s := range t.Sections {
		if s.Type == SectionTDHOB || s.Type == SectionTempMem {
			l.Ranges = append(l.Ranges, MemoryRange{s.Address, s.MemorySize})
		}
	}
	slices.SortFunc(l.Ranges, func(a, b MemoryRange) int { return cmp.Compare(a.Start, b.Start) })
	return l
}

// end returns the end of the last range.
func (l Layout) end() uint64 {
	if len(l.Ranges) == 0 {
		return 0
	}
	last := l.Ranges[len(l.Ranges)-1]
	return last.Start + last.Size
}

const (
	lowMemoryLimit = 0xB0000000  // q35 with as much RAM or more has a hole below 4 GiB
	lowMemorySplit = 0x80000000  // where the hole starts then
	highMemory     = 0x100000000 // where the rest of RAM is then
	maxMemory      = 1 << 46     // bytes; the address width that is modelled

	hobHandoff, hobResource   = 1, 3 // types of HOB (UEFI PI, volume 3)
	resourceSystem            = 0    // EFI_RESOURCE_SYSTEM_MEMORY
	resourceUnaccepted        = 7
	resourcePresentTested     = 7 // present, initialized, tested
	handoffSize, resourceSize = 56, 48
	endOfListSize             = 8
)

// TDHOB returns the bytes of the TD HOB that QEMU makes for memory bytes of RAM and
// OVMF measures: the handoff HOB and one resource HOB for each range, without the HOB
// that ends the list. Memory is a multiple of 1 MiB and reaches beyond the layout.
func (l Layout) TDHOB(memory uint64) ([]byte, error) {
	switch {
	case len(l.Ranges) == 0:
		return nil, errors.New("memory layout is empty")
	case memory%(1<<20) != 0:
		return nil, fmt.Errorf("memory is %d bytes, want whole MiB", memory)
	case memory <= l.end() || memory > maxMemory:
		return nil, fmt.Errorf("memory is %d bytes, want more than %d and at most %d", memory, l.end(), uint64(maxMemory))
	}
	hob := make([]byte, handoffSize, 512)
	at := uint64(0)
	for _, r := range l.Ranges {
		if r.Start > at {
			hob = appendResource(hob, resourceUnaccepted, at, r.Start)
		}
		hob = appendResource(hob, resourceSystem, r.Start, r.Start+r.Size)
		at = r.Start + r.Size
	}
	if memory >= lowMemoryLimit && at < lowMemorySplit {
		hob = appendResource(hob, resourceUnaccepted, at, lowMemorySplit)
		hob = appendResource(hob, resourceUnaccepted, highMemory, highMemory+memory-lowMemorySplit)
	} else if memory >= lowMemoryLimit {
		return nil, fmt.Errorf("memory layout ends at %#x, want it below %#x", at, lowMemorySplit)
	} else {
		hob = appendResource(hob, resourceUnaccepted, at, memory)
	}
	le := binary.LittleEndian
	le.PutUint16(hob, hobHandoff)
	le.PutUint16(hob[2:], handoffSize)
	le.PutUint32(hob[8:], 9) // EFI_HOB_HANDOFF_TABLE_VERSION
	le.PutUint64(hob[48:], l.HOB+uint64(len(hob))+endOfListSize)
	return hob, nil
}

func appendResource(b []byte, typ uint32, start, end uint64) []byte {
	le := binary.LittleEndian
	b = le.AppendUint16(b, hobResource)
	b = le.AppendUint16(b, resourceSize)
	b = append(b, make([]byte, 4+16)...) // reserved, no owner
	b = le.AppendUint32(b, typ)
	b = le.AppendUint32(b, resourcePresentTested)
	b = le.AppendUint64(b, start)
	return le.AppendUint64(b, end-start)
}

// tdHOBDigest returns the digest of the TD HOB event.
func (l Layout) tdHOBDigest(memory uint64) (measure.Digest, error) {
	hob, err := l.TDHOB(memory)
	return sha512.Sum384(hob), err
}

const (
	maxWitness = 512 // bytes; that of a real firmware has 12
	maxPage    = 1 << 32
)

// Witness returns the compact form of a layout that measurement.tdx.cbor carries,
// dstack's td_hob_witness_v1: numbers in ULEB128, in pages: the lowest start, the HOB
// relative to it, how many ranges, and each range's relative start and size.
func (l Layout) Witness() []byte {
	if len(l.Ranges) == 0 {
		return nil
	}
	base := l.Ranges[0].Start / pageSize
	b := binary.AppendUvarint(nil, base)
	b = binary.AppendUvarint(b, l.HOB/pageSize-base)
	b = binary.AppendUvarint(b, uint64(len(l.Ranges)))
	for _, r := range l.Ranges {
		b = binary.AppendUvarint(b, r.Start/pageSize-base)
		b = binary.AppendUvarint(b, r.Size/pageSize)
	}
	return b
}

// ParseWitness is the inverse of [Layout.Witness]. The ranges must be in order and
// apart, the HOB must be the start of one, and the encoding the shortest.
func ParseWitness(b []byte) (Layout, error) {
	if len(b) > maxWitness {
		return Layout{}, fmt.Errorf("TD HOB witness has %d bytes, want at most %d", len(b), maxWitness)
	}
	r := witnessReader{b: b}
	base, hob, n := r.page(), r.page(), r.page()
	if r.err == nil && (n == 0 || n > maxSection) {
		return Layout{}, fmt.Errorf("TD HOB witness has %d ranges, want 1 to %d", n, maxSection)
	}
	l := Layout{HOB: (base + hob) * pageSize}
	end, found := uint64(0), false
	for i := uint64(0); i < n && r.err == nil; i++ {
		m := MemoryRange{(base + r.page()) * pageSize, r.page() * pageSize}
		if r.err == nil && (m.Size == 0 || m.Start < end || i == 0 && m.Start != base*pageSize) {
			return Layout{}, fmt.Errorf("TD HOB witness: range %#x+%#x is empty or out of order", m.Start, m.Size)
		}
		end, found = m.Start+m.Size, found || m.Start == l.HOB
		l.Ranges = append(l.Ranges, m)
	}
	switch {
	case r.err != nil:
		return Layout{}, fmt.Errorf("TD HOB witness: %w", r.err)
	case len(r.b) > 0:
		return Layout{}, fmt.Errorf("TD HOB witness: %d bytes follow it", len(r.b))
	case !found:
		return Layout{}, fmt.Errorf("TD HOB witness: HOB at %#x is not in it", l.HOB)
	}
	return l, nil
}

type witnessReader struct {
	b   []byte
	err error
}

func (r *witnessReader) page() uint64 {
	v, n := binary.Uvarint(r.b)
	switch {
	case r.err != nil:
		return 0
	case n <= 0 || v > maxPage:
		r.err = errors.New("a number is cut off or too large")
		return 0
	case n != len(binary.AppendUvarint(nil, v)):
		r.err = errors.New("a number is not in its shortest form")
		return 0
	}
	r.b = r.b[n:]
	return v
}
