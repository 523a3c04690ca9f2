package image

import (
	"encoding/binary"
	"fmt"

	"tdx-agent/measure"
)

// TableLengths is what the digests of table loader and RSDP reveal: both depend on the
// lengths of the ACPI tables only, in bytes. A length is found by trying all.
type TableLengths struct {
	DSDT, APIC, SRAT int  // SRAT is 0 without one
	HPET             bool // whether there is an HPET table
	VCPUs            int  // implied by APIC
	Overrides        int  // interrupt overrides implied by APIC: 16 (QEMU 8) or 5 (9.2, 10)
}

func (t *TableLengths) String() string {
	s := fmt.Sprintf("DSDT of %d and APIC of %d bytes imply vCPUs = %d and %d interrupt overrides", t.DSDT, t.APIC, t.VCPUs, t.Overrides)
	if t.SRAT > 0 {
		s += fmt.Sprintf("; SRAT of %d bytes implies hugepages", t.SRAT)
	}
	if t.HPET {
		s += "; there is an HPET"
	}
	return s
}

const (
	lengthFACS, lengthFACP, lengthHPET, lengthMCFG, lengthWAET = 64, 244, 56, 60, 40

	maxTables        = 512 << 10 // bytes up to the RSDT
	maxAPICCPUs      = 255       // without x2APIC entries
	maxSRATRanges    = 8
	loaderFile       = 4096 // bytes, at least
	nameOfRSDPFile   = "etc/acpi/rsdp"
	nameOfTablesFile = "etc/acpi/tables"
)

// tableLengths finds the lengths that give these digests of loader and RSDP.
func tableLengths(loader, rsdp measure.Digest) *TableLengths {
	root := rsdtOffset(rsdp)
	if root == 0 {
		return nil
	}
	for _, hpet := range []bool{false, true} {
		for n := 1; n <= maxAPICCPUs; n++ {
			for ranges := 0; ranges <= maxSRATRanges; ranges++ {
				for overrides, apic := range map[int]int{16: 222 + 8*n, 5: 112 + 8*n} {
					t := TableLengths{APIC: apic, HPET: hpet, VCPUs: n, Overrides: overrides}
					if ranges > 0 {
						t.SRAT = 48 + 16*n + 40*ranges
					}
					if t.DSDT = root - t.others(); t.DSDT > 0 && sha384(t.loader()) == loader {
						return &t
					}
				}
			}
		}
	}
	return nil
}

// rsdtOffset finds the offset of the RSDT in the table file, 0 if there is none.
func rsdtOffset(rsdp measure.Digest) int {
	b := []byte("RSD PTR \x00BOCHS \x00\x00\x00\x00\x00")
	for r := 1; r < maxTables; r++ {
		binary.LittleEndian.PutUint32(b[16:], uint32(r))
		if sha384(b) == rsdp {
			return r
		}
	}
	return 0
}

// others is how many bytes the tables but the DSDT have.
func (t *TableLengths) others() int {
	n := lengthFACS + lengthFACP + t.APIC + t.SRAT + lengthMCFG + lengthWAET
	if t.HPET {
		n += lengthHPET
	}
	return n
}

// loader writes QEMU's table loader file for tables of these lengths (commands of
// bios-linker-loader: allocate, add pointer, add checksum).
func (t *TableLengths) loader() []byte {
	b := loaderCommand(make([]byte, 0, loaderFile), 1, nameOfRSDPFile, "", 16, 2)
	b = loaderCommand(b, 1, nameOfTablesFile, "", 64, 1)
	at, entries := lengthFACS, 0
	add := func(length int, pointers ...[2]int) {
		for _, p := range pointers {
			b = loaderCommand(b, 2, nameOfTablesFile, nameOfTablesFile, at+p[0], p[1])
		}
		b = loaderCommand(b, 3, nameOfTablesFile, "", at+9, at, length)
		at += length
		entries++
	}
	add(t.DSDT)
	add(lengthFACP, [2]int{36, 4}, [2]int{40, 4}, [2]int{140, 8})
	for _, length := range []int{t.APIC, t.hpet(), t.SRAT, lengthMCFG, lengthWAET} {
		if length > 0 {
			add(length)
		}
	}
	entries-- // the DSDT is not in the RSDT
	var pointers [][2]int
	for i := range entries {
		pointers = append(pointers, [2]int{36 + 4*i, 4})
	}
	add(36+4*entries, pointers...)
	b = loaderCommand(b, 2, nameOfRSDPFile, nameOfTablesFile, 16, 4)
	b = loaderCommand(b, 3, nameOfRSDPFile, "", 8, 0, 20)
	return append(b, make([]byte, max(0, loaderFile-len(b)))...)
}

func (t *TableLengths) hpet() int {
	if t.HPET {
		return lengthHPET
	}
	return 0
}

// loaderCommand appends one command of 128 bytes: its number, one file name or two, and
// numbers of 32 bits. The last number of commands 1 and 2 has 8 bits, with zeros behind.
func loaderCommand(b []byte, command uint32, file, second string, numbers ...int) []byte {
	const size, name = 128, 56
	end := len(b) + size
	b = binary.LittleEndian.AppendUint32(b, command)
	for _, s := range []string{file, second} {
		if s != "" {
			b = append(append(b, s...), make([]byte, name-len(s))...)
		}
	}
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
	}
	return append(b, make([]byte, end-len(b))...)
}
