package acpi_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"tdx-agent/measure/acpi"
)

// TestOlder shows what QEMU 7.2 shares with QEMU 9.2: the tables and devices that SMM, HPET
// and hugepages change. As stock QEMUs confirm both 7.2 and 10, this is the proof for these
// knobs on the profiles between the two. (The MADT, which they do not change, became revision
// 3 after 7.2.)
func TestOlder(t *testing.T) {
	for cpus := range 16 {
		m := acpi.Machine{
			QEMU: acpi.QEMU9_2, CPUs: 1 + cpus*16, Memory: 3 << 30, NICs: 1, PIC: true,
			SMM: cpus&1 > 0, HPET: cpus&2 > 0, Hugepages: cpus&4 > 0, HotplugOff: cpus&8 > 0,
		}
		ours := split(build(t, m).Tables)
		m.QEMU = acpi.QEMU7_2
		older := split(build(t, m).Tables)
		if (ours["HPET"] != nil) != m.HPET || (ours["SRAT"] != nil) != m.Hugepages {
			t.Fatalf("%+v: not the tables it should have", m)
		}
		for _, name := range []string{"FACS", "FACP", "HPET", "SRAT", "MCFG", "WAET"} {
			if !bytes.Equal(older[name], ours[name]) {
				t.Errorf("%+v: %s differs:\nolder % x\nours  % x", m, name, older[name], ours[name])
			}
		}
		for _, device := range devices(ours["DSDT"], "HPET", "C000", "GPE0", "FWCF", "LNKA", "GSIH", "SF8_") {
			if !bytes.Contains(older["DSDT"], device) {
				t.Errorf("%+v: the older DSDT has no % x", m, device)
			}
		}
	}
}

// split finds the tables of a file by their names.
func split(file []byte) map[string][]byte {
	tables := make(map[string][]byte)
	for len(file) >= 8 && file[0] != 0 {
		n := binary.LittleEndian.Uint32(file[4:])
		tables[string(file[:4])] = file[:n]
		file = file[n:]
	}
	return tables
}

// devices cuts the named devices and processors out of a definition block.
func devices(dsdt []byte, names ...string) (found [][]byte) {
	for _, name := range names {
		for _, op := range []string{"\x5b\x82", "\x5b\x83"} { // Device, Processor
			for lengthBytes := 1; lengthBytes <= 2; lengthBytes++ {
				for at := 0; at+8 < len(dsdt); at++ {
					if string(dsdt[at:at+2]) != op || string(dsdt[at+2+lengthBytes:at+6+lengthBytes]) != name {
						continue
					}
					n := int(dsdt[at+2])
					if lengthBytes == 2 {
						n = n&0xf | int(dsdt[at+3])<<4
					}
					found = append(found, dsdt[at:at+2+n])
				}
			}
		}
	}
	return found
}
