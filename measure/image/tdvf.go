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

// MaxFirmware is the size in bytes of the largest firmware that is read.
const MaxFirmware = 64 << 20

const (
	pageSize   = 4096
	maxSection = 64 // real firmware has 6 or 7

	// The guest memory that sections may claim, so that a short file cannot ask for
	// unbounded hashing: each 4 KiB page costs 128 bytes of it.
	maxSectionMemory = 1 << 30
)

// SectionType says what a TDVF section is (TDVF Design Guide, table 11-2).
type SectionType uint32

// The section types that OVMF has. td-shim's further types are refused.
const (
	SectionBFV     SectionType = 0 // boot firmware volume: code
	SectionCFV     SectionType = 1 // configuration firmware volume: variables
	SectionTDHOB   SectionType = 2 // where the VMM puts the TD HOB
	SectionTempMem SectionType = 3 // heap, stack, mailbox
)

func (t SectionType) String() string {
	switch t {
	case SectionBFV:
		return "BFV"
	case SectionCFV:
		return "CFV"
	case SectionTDHOB:
		return "TD_HOB"
	case SectionTempMem:
		return "TEMP_MEM"
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// Attributes of a TDVF section.
const (
	AttributeExtend = 1 << 0 // MR.EXTEND: the content is measured into MRTD
	AttributeAug    = 1 << 1 // PAGE.AUG: pages are added later and not measured
)

// Section is one entry of the TDVF metadata. Offsets and sizes are in bytes.
type Section struct {
	DataOffset, RawDataSize uint32 // in the firmware file
	Address, MemorySize     uint64 // in guest memory
	Type                    SectionType
	Attributes              uint32
}

// TDVF is a firmware image with checked metadata. It refers to the bytes it was
// parsed from.
type TDVF struct {
	Sections []Section // in the order of the metadata, which is that of measurement
	fw       []byte
	vars     map[variableName][]byte
}

// ParseTDVF parses the TDX metadata of a firmware file of at most 64 MiB, as QEMU's
// -bios takes it: OVMF.fd with the variable store in it, not OVMF_CODE.fd.
//
// The metadata must have exactly one TD_HOB and one CFV section, at least one BFV,
// page-aligned memory that does not overlap, and data within the file. The firmware
// is not trusted by being parsed: that its MRTD is the expected one says what it is.
func ParseTDVF(fw []byte) (*TDVF, error) {
	if len(fw) > MaxFirmware {
		return nil, fmt.Errorf("firmware has %d bytes, want at most %d", len(fw), MaxFirmware)
	}
	at, err := metadataOffset(fw)
	if err != nil {
		return nil, fmt.Errorf("firmware: %w", err)
	}
	t := &TDVF{fw: fw}
	if t.Sections, err = parseSections(fw, at); err != nil {
		return nil, fmt.Errorf("firmware: TDVF metadata: %w", err)
	}
	if err := t.check(); err != nil {
		return nil, fmt.Errorf("firmware: TDVF metadata: %w", err)
	}
	if t.vars, err = parseVariableStore(t.cfv()); err != nil {
		return nil, fmt.Errorf("firmware: variable store: %w", err)
	}
	return t, nil
}

const (
	resetVector  = 32 // bytes between the table and the end of the file
	tableEntry   = 18 // u16 length, GUID
	metadataHead = 16 // "TDVF", length, version, number of sections
	sectionSize  = 32
)

// metadataOffset walks OVMF's table of GUIDs, which ends 32 bytes before the end of
// the file and is read backwards, to the entry that says where the metadata is.
func metadataOffset(fw []byte) (int, error) {
	end := len(fw) - resetVector
	if end < tableEntry || efiGUID(fw[end-16:end]) != guidTableFooter {
		return 0, errors.New("no table of GUIDs at its end; it must be a combined OVMF.fd, not OVMF_CODE.fd")
	}
	total := int(binary.LittleEndian.Uint16(fw[end-tableEntry:]))
	if total < tableEntry || total > end {
		return 0, fmt.Errorf("table of GUIDs has a length of %d bytes, want %d to %d", total, tableEntry, end)
	}
	start := end - total
	for p := end - tableEntry; p > start; {
		if p-start < tableEntry {
			return 0, fmt.Errorf("table of GUIDs: %d bytes are left, want an entry of at least %d", p-start, tableEntry)
		}
		n := int(binary.LittleEndian.Uint16(fw[p-tableEntry:]))
		if n < tableEntry || n > p-start {
			return 0, fmt.Errorf("table of GUIDs: entry has a length of %d bytes, want %d to %d", n, tableEntry, p-start)
		}
		if efiGUID(fw[p-16:p]) == guidTDXOffset {
			if n < tableEntry+4 {
				return 0, fmt.Errorf("table of GUIDs: TDX entry has a length of %d bytes, want at least %d", n, tableEntry+4)
			}
			return descriptor(fw, binary.LittleEndian.Uint32(fw[p-tableEntry-4:]))
		}
		p -= n
	}
	return 0, errors.New("no TDX metadata; it is not built for TDX")
}

// descriptor turns a distance from the end of the file into an offset.
func descriptor(fw []byte, distance uint32) (int, error) {
	at := int64(len(fw)) - int64(distance)
	if at < int64(len(guidTDXMetadata)) || distance < metadataHead {
		return 0, fmt.Errorf("TDX metadata is %d bytes before the end of %d, outside the file", distance, len(fw))
	}
	if g := efiGUID(fw[at-16 : at]); g != guidTDXMetadata {
		return 0, fmt.Errorf("TDX metadata has the GUID %v before it, want %v", g, guidTDXMetadata)
	}
	return int(at), nil
}

func parseSections(fw []byte, at int) ([]Section, error) {
	le := binary.LittleEndian
	head := fw[at:]
	if string(head[:4]) != "TDVF" {
		return nil, fmt.Errorf("signature is %q, want \"TDVF\"", head[:4])
	}
	length, version, n := le.Uint32(head[4:]), le.Uint32(head[8:]), le.Uint32(head[12:])
	if version != 1 {
		return nil, fmt.Errorf("version is %d, want 1", version)
	}
	if n == 0 || n > maxSection {
		return nil, fmt.Errorf("%d sections, want 1 to %d", n, maxSection)
	}
	if length != metadataHead+sectionSize*n {
		return nil, fmt.Errorf("length is %d, want %d for %d sections", length, metadataHead+sectionSize*n, n)
	}
	if uint64(length) > uint64(len(head)) {
		return nil, fmt.Errorf("%d bytes of metadata do not fit into the %d that are left", length, len(head))
	}
	sections := make([]Section, n)
	for i := range sections {
		b := head[metadataHead+sectionSize*i:]
		sections[i] = Section{
			DataOffset: le.Uint32(b), RawDataSize: le.Uint32(b[4:]),
			Address: le.Uint64(b[8:]), MemorySize: le.Uint64(b[16:]),
			Type: SectionType(le.Uint32(b[24:])), Attributes: le.Uint32(b[28:]),
		}
	}
	return sections, nil
}

func (t *TDVF) check() error {
	count := map[SectionType]int{}
	var memory uint64
	for i := range t.Sections {
		s := &t.Sections[i]
		if err := s.check(len(t.fw)); err != nil {
			return fmt.Errorf("section %d (%v): %w", i, s.Type, err)
		}
		count[s.Type]++
		if memory += s.MemorySize; memory > maxSectionMemory {
			return fmt.Errorf("sections claim more than %d MiB of memory", maxSectionMemory>>20)
		}
	}
	if count[SectionTDHOB] != 1 || count[SectionCFV] != 1 || count[SectionBFV] == 0 {
		return fmt.Errorf("%d TD_HOB, %d CFV and %d BFV sections, want one, one and at least one", count[SectionTDHOB], count[SectionCFV], count[SectionBFV])
	}
	sorted := slices.SortedFunc(slices.Values(t.Sections), func(a, b Section) int { return cmp.Compare(a.Address, b.Address) })
	for i := 1; i < len(sorted); i++ {
		if a, b := sorted[i-1], sorted[i]; a.Address+a.MemorySize > b.Address {
			return fmt.Errorf("%v at %#x overlaps %v at %#x", a.Type, a.Address, b.Type, b.Address)
		}
	}
	return nil
}

// check holds one section to the rules of the TDVF Design Guide, section 11.2, and to
// its file of size bytes.
func (s *Section) check(size int) error {
	switch {
	case s.Type > SectionTempMem:
		return errors.New("type is not modelled")
	case s.Attributes&^(AttributeExtend|AttributeAug) != 0:
		return fmt.Errorf("attributes are %#x, want bits 0 and 1 only", s.Attributes)
	case s.MemorySize == 0 || s.Address%pageSize != 0 || s.MemorySize%pageSize != 0:
		return fmt.Errorf("memory %#x+%#x is empty or not aligned to pages", s.Address, s.MemorySize)
	case s.MemorySize > maxSectionMemory || s.Address > 1<<52:
		return fmt.Errorf("memory %#x+%#x is too large", s.Address, s.MemorySize)
	case uint64(s.RawDataSize) > s.MemorySize:
		return fmt.Errorf("%#x bytes of data do not fit into %#x of memory", s.RawDataSize, s.MemorySize)
	case uint64(s.DataOffset)+uint64(s.RawDataSize) > uint64(size):
		return fmt.Errorf("data %#x+%#x is outside the file of %#x bytes", s.DataOffset, s.RawDataSize, size)
	case s.Attributes&AttributeExtend != 0 && uint64(s.RawDataSize) != s.MemorySize:
		return fmt.Errorf("is measured, but has %#x bytes of data for %#x of memory", s.RawDataSize, s.MemorySize)
	case s.Attributes == AttributeExtend|AttributeAug:
		return errors.New("is measured and also added later")
	case (s.Type == SectionBFV || s.Type == SectionCFV) && s.RawDataSize == 0:
		return errors.New("has no data")
	case (s.Type == SectionTDHOB || s.Type == SectionTempMem) && s.RawDataSize != 0:
		return fmt.Errorf("has %#x bytes of data, want none", s.RawDataSize)
	}
	return nil
}

func (s *Section) data(fw []byte) []byte { return fw[s.DataOffset:][:s.RawDataSize] }

// section returns the only section of a type that there is one of.
func (t *TDVF) section(typ SectionType) *Section {
	i := slices.IndexFunc(t.Sections, func(s Section) bool { return s.Type == typ })
	return &t.Sections[i]
}

// CFV returns the digest of the configuration firmware volume, that of the CFV event.
func (t *TDVF) CFV() measure.Digest { return sha512.Sum384(t.cfv()) }

func (t *TDVF) cfv() []byte { return t.section(SectionCFV).data(t.fw) }
