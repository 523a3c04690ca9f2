package acpi

import "encoding/binary"

// Resource descriptors (ACPI 6.5, section 6.4).
const (
	readOnlyMemory32 = "\x86\x09\x00\x00" // 6.4.3.4 Memory32Fixed; base and length follow
	endTag           = "\x79\x00"         // 6.4.2.9; a zero checksum is taken as right
)

// Types and flags of the address space descriptors (6.4.3.5).
const (
	memoryRange = 0
	ioRange     = 1
	busRange    = 2

	fixedRange    = 0x0c // minimum and maximum address are both fixed
	readWrite     = 0x01
	cacheable     = 0x02
	entireIORange = 0x03 // ISA and non-ISA ports
)

// resources names a buffer of descriptors.
func (a *aml) resources(name string, descriptors func()) {
	a.put(nameOp)
	a.put(name)
	a.block(bufferOp, "", func() {
		// The size comes before the bytes. All templates here are smaller than 256 bytes,
		// where a size takes two bytes.
		start := len(a.b)
		a.put(bytePrefix + "\x00")
		descriptors()
		a.put(endTag)
		a.b[start+1] = byte(len(a.b) - start - 2)
	})
}

// ports is an I/O port descriptor (6.4.2.5) for 16-bit decoding at one fixed base.
func (a *aml) ports(base uint16, align, length byte) {
	a.put("\x47\x01")
	a.b = binary.LittleEndian.AppendUint16(a.b, base)
	a.b = binary.LittleEndian.AppendUint16(a.b, base)
	a.b = append(a.b, align, length)
}

// irq is an IRQ descriptor (6.4.2.1) without flags: edge, active high, exclusive.
func (a *aml) irq(n int) {
	a.put("\x22")
	a.b = binary.LittleEndian.AppendUint16(a.b, 1<<n)
}

// interrupts is an extended interrupt descriptor (6.4.3.6).
func (a *aml) interrupts(flags byte, numbers ...uint32) {
	a.put("\x89")
	a.b = binary.LittleEndian.AppendUint16(a.b, uint16(2+4*len(numbers)))
	a.b = append(a.b, flags, byte(len(numbers)))
	for _, n := range numbers {
		a.b = binary.LittleEndian.AppendUint32(a.b, n)
	}
}

// word, dword and qword are address space descriptors of their width for the fixed range
// from first to last.
func (a *aml) word(kind, specific byte, first, last uint16) {
	a.put("\x88\x0d\x00")
	a.b = append(a.b, kind, fixedRange, specific)
	for _, v := range [5]uint16{0, first, last, 0, last - first + 1} { // granularity, range, translation, length
		a.b = binary.LittleEndian.AppendUint16(a.b, v)
	}
}

func (a *aml) dword(specific byte, first, last uint32) {
	a.put("\x87\x17\x00")
	a.b = append(a.b, memoryRange, fixedRange, specific)
	for _, v := range [5]uint32{0, first, last, 0, last - first + 1} {
		a.b = binary.LittleEndian.AppendUint32(a.b, v)
	}
}

func (a *aml) qword(specific byte, first, last uint64) {
	a.put("\x8a\x2b\x00")
	a.b = append(a.b, memoryRange, fixedRange, specific)
	for _, v := range [5]uint64{0, first, last, 0, last - first + 1} {
		a.b = binary.LittleEndian.AppendUint64(a.b, v)
	}
}
