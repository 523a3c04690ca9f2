package acpi

import "encoding/binary"

// Addresses of the q35 machine.
const (
	configBase   = 0xe0000000 // PCIe configuration space, set by the firmware
	configSize   = 0x10000000
	hpetBase     = 0xfed00000
	hpetSize     = 0x400
	localAPIC    = 0xfee00000
	ioAPIC       = 0xfec00000
	pmBase       = 0x600 // power management block, set by the firmware
	hole64Base   = 0x3800_0000_0000
	lowestSplit  = 0xb000_0000 // RAM of this size and more is split
	splitLowSize = 0x8000_0000
)

// table appends a table with its header (ACPI 6.5, section 5.2.6), checksum zero.
func table(b []byte, signature string, revision byte, body func([]byte) []byte) []byte {
	start := len(b)
	b = append(b, signature...)
	b = append(b, 0, 0, 0, 0, revision, 0)
	b = append(b, "BOCHS "+"BXPC    "+"\x01\x00\x00\x00"+"BXPC"+"\x01\x00\x00\x00"...)
	b = body(b)
	binary.LittleEndian.PutUint32(b[start+4:], uint32(len(b)-start))
	return b
}

func u16(b []byte, v ...uint16) []byte {
	for _, v := range v {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}

func u32(b []byte, v ...uint32) []byte {
	for _, v := range v {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

func u64(b []byte, v ...uint64) []byte {
	for _, v := range v {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// facs is the Firmware ACPI Control Structure (section 5.2.10): all zero but its name.
func facs(b []byte) []byte {
	b = append(b, "FACS"...)
	b = u32(b, 64)
	return append(b, make([]byte, 56)...)
}

// fadt is the body of the Fixed ACPI Description Table (section 5.2.9) in revision 3.
// Pointers are offsets into the same file.
func fadt(b []byte, m *Machine, facsAt, dsdtAt uint32) []byte {
	b = u32(b, facsAt, dsdtAt)
	b = append(b, 1, 0) // interrupt model, as ACPI 1.0 had it; no preferred profile
	b = u16(b, 9)       // SCI
	if m.SMM {
		b = u32(b, 0xb2)          // SMI command port,
		b = append(b, 2, 3, 0, 0) // the commands to take and give up ACPI mode
	} else {
		b = u32(b, 0)
		b = append(b, 0, 0, 0, 0)
	}
	b = u32(b, pmBase, 0, pmBase+4, 0, 0, pmBase+8, pmBase+0x20, 0) // PM1 events, PM1 control, PM2, timer, GPE0 and 1
	b = append(b, 4, 2, 0, 4, 16, 0, 0, 0)                          // their lengths
	b = u16(b, 0xfff, 0xfff, 0, 0)                                  // no C2, no C3, no flushing
	b = append(b, 0, 0, 0, 0, 0x32)                                 // duty, alarms; the RTC's century
	b = u16(b, 2)                                                   // boot architecture: an 8042 keyboard controller
	b = append(b, 0)
	flags := uint32(0x84a5) // WBINVD, C1, no fixed sleep button, RTC wake, reset register, platform clock
	if m.CPUs > 8 {
		flags |= 1 << 18 // logical destinations of interrupts need the cluster model
	}
	b = u32(b, flags)
	b = address(b, 8, 0xcf9)      // reset register
	b = append(b, 0x0f, 0, 0, 0)  // and its value
	b = u64(b, 0, uint64(dsdtAt)) // 64-bit FACS and DSDT
	b = address(b, 32, pmBase)    // PM1a events
	b = append(b, make([]byte, 12)...)
	b = address(b, 16, pmBase+4) // PM1a control
	b = append(b, make([]byte, 24)...)
	b = address(b, 32, pmBase+8)     // timer
	b = address(b, 128, pmBase+0x20) // GPE0
	return append(b, make([]byte, 12)...)
}

// address is a Generic Address Structure (section 5.2.3.2) for I/O ports.
func address(b []byte, width byte, port uint64) []byte {
	return u64(append(b, 1, width, 0, 0), port)
}

// madt is the body of the Multiple APIC Description Table (section 5.2.12).
func madt(b []byte, m *Machine, d dialect) []byte {
	const pcatCompatible = 1
	b = u32(b, localAPIC)
	if m.PIC || d.before8 {
		b = u32(b, pcatCompatible)
	} else {
		b = u32(b, 0)
	}
	for i := range m.CPUs {
		b = appendLocalAPIC(b, i)
	}
	b = u32(append(b, 1, 12, 0, 0), ioAPIC, 0)
	b = d.overrides(b)
	// NMI at LINT1 of all processors; one structure for both kinds (5.2.12.7 and 5.2.12.13).
	if m.CPUs > firstX2APIC {
		b = u32(append(b, 10, 12, 0, 0), allProcessors)
		return append(b, 1, 0, 0, 0)
	}
	return append(b, 4, 6, 0xff, 0, 0, 1)
}

const (
	firstX2APIC   = 255 // the first APIC ID that does not fit into eight bits
	allProcessors = 0xffff_ffff
)

// appendLocalAPIC is a Processor Local APIC or x2APIC structure (sections 5.2.12.2 and
// 5.2.12.12), enabled.
func appendLocalAPIC(b []byte, i int) []byte {
	if i >= firstX2APIC {
		return u32(append(b, 9, 16, 0, 0), uint32(i), 1, uint32(i))
	}
	return append(b, 0, 8, byte(i), byte(i), 1, 0, 0, 0)
}

// interruptOverride says that ISA interrupt irq comes as global interrupt gsi (section
// 5.2.12.5). Flags: bits 0 and 1 polarity, 2 and 3 trigger; 5 is edge, high; 13 level, high.
func interruptOverride(b []byte, irq byte, gsi uint32, flags uint16) []byte {
	b = u32(append(b, 2, 10, 0, irq), gsi)
	return u16(b, flags)
}

// chipsetOverrides are those of a stock QEMU: the timer, and the interrupts PCI may use.
func chipsetOverrides(b []byte) []byte {
	b = interruptOverride(b, 0, 2, 0)
	for _, irq := range [...]byte{5, 9, 10, 11} {
		b = interruptOverride(b, irq, uint32(irq), 13)
	}
	return b
}

// edgeOverrides are those of the TDX line of QEMU 8, whose split I/O APIC takes no level
// interrupts: all sixteen, as edges.
func edgeOverrides(b []byte) []byte {
	b = interruptOverride(b, 0, 2, 5)
	for irq := byte(1); irq < 16; irq++ {
		b = interruptOverride(b, irq, uint32(irq), 5)
	}
	return b
}

// hpet is the body of the HPET table (IA-PC HPET Specification 1.0a, section 3.2.4).
func hpet(b []byte) []byte {
	b = u32(b, 0x8086a201)
	b = u64(append(b, 0, 0, 0, 0), hpetBase)
	return append(b, 0, 0, 0, 0)
}

// srat is the body of the System Resource Affinity Table (section 5.2.16): all processors
// and RAM in proximity domain 0.
func srat(b []byte, m *Machine) []byte {
	b = u32(b, 1)
	b = u64(b, 0)
	for i := range m.CPUs {
		if i >= firstX2APIC {
			b = u32(append(b, 2, 24, 0, 0), 0, uint32(i), 1, 0, 0)
			continue
		}
		b = append(b, 0, 16, 0, byte(i), 1, 0, 0, 0)
		b = u64(b, 0)
	}
	const hole, holeEnd, above = 0xa0000, 0x100000, 1 << 32 // the VGA hole; where RAM goes on
	low := uint64(m.lowMemory())
	b = memoryAffinity(b, 0, hole)
	b = memoryAffinity(b, holeEnd, low-holeEnd)
	if m.Memory > low {
		return memoryAffinity(b, above, m.Memory-low)
	}
	return memoryAffinity(b, 0, 0) // QEMU writes a fixed number of them
}

func memoryAffinity(b []byte, base, length uint64) []byte {
	b = u32(append(b, 1, 40), 0)
	b = u64(u16(b, 0), base, length)
	enabled := uint32(1)
	if length == 0 {
		enabled = 0
	}
	b = u32(b, 0, enabled)
	return u64(b, 0)
}

// mcfg is the body of the MCFG table (PCI Firmware Specification 3.3, section 4.1.2).
func mcfg(b []byte) []byte {
	b = u64(b, 0, configBase)
	return u32(b, 0xff<<24, 0) // segment 0, buses 0 to 255
}

// waet is the body of the Windows ACPI Emulated Devices Table: the timer needs one read.
func waet(b []byte) []byte { return u32(b, 2) }
