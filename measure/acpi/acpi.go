// Package acpi builds the ACPI tables that QEMU gives the firmware of a q35 machine, byte
// for byte: the fw_cfg files etc/acpi/tables, etc/acpi/rsdp and etc/table-loader, whose
// digests the firmware of a TD measures into RTMR0. With them, RTMR0 is known from the
// configuration of the machine alone; no QEMU is run.
//
// [Build] is the call. It builds what is known and refuses the rest: a wrong guess would look
// like a manipulated machine. What a profile's bytes were held against is what
// [Profile.Proven] says; the tests do it again.
//
//   - QEMU 7.2, on which no TD ran: whole files of the stock QEMU, with up to 255 vCPUs.
//   - QEMU 8: event logs of dstack guests on TDX hardware.
//   - QEMU 9.2: RTMR0 that is published for a GPU guest. With hotplug, and for 9.0, 9.1 and
//     11.0, there are only digests that dstack publishes for its own model.
//   - QEMU 10 and 11.1: whole files of stock QEMUs, which the tests run over qtest, with up to
//     1300 vCPUs; 4096 by a digest that dstack publishes. RTMR0 of hardware has not been seen.
//   - SMM, HPET and hugepages on QEMU 8 and 9: what QEMU 7.2 and 10 have in common.
//   - GPUs and NVSwitches on QEMU 8, 9.0 and 9.1, without hotplug: unproven, as 9.2 has them;
//     7.2 has them in another form.
//   - The host bridge of a NUMA node on QEMU 8 and 9: refused, as 7.2 computes its interrupt
//     routes and 10 lists them.
//
// Two facts are taken as given that a configuration does not tell: the firmware is OVMF, which
// puts the 64-bit window where a processor of 46 address bits has its last eighth, and the
// machine has a device with a 64-bit BAR, as all virtio devices are.
package acpi

import "slices"

// Build returns the tables of m. A machine that QEMU would not start, or whose tables are
// not known, is an error that says what about it is.
func Build(m Machine) (*Tables, error) {
	d, err := m.check()
	if err != nil {
		return nil, err
	}
	f := files{m: &m, b: make([]byte, 0, tablesUnit)}
	f.s.allocate(rsdpFile, 16, fSegment)
	f.s.allocate(tablesFile, 64, highMemory)
	f.tables(d)
	return f.finish(), nil
}

// files collects the tables and, beside them, the script that links them.
type files struct {
	m       *Machine
	b       []byte
	s       script
	entries []uint32 // of the RSDT
}

func (f *files) tables(d dialect) {
	f.b = facs(f.b)
	const facsAt, dsdtAt = 0, 64
	f.add("DSDT", 1, func(b []byte) []byte {
		a := aml{b}
		a.dsdt(f.m, d)
		return a.b
	})
	at := f.here()
	for _, p := range [...]struct {
		offset uint32
		size   byte
	}{{36, 4}, {40, 4}, {140, 8}} { // FACS, DSDT and the 64-bit DSDT
		f.s.pointer(tablesFile, at+p.offset, p.size)
	}
	f.addEntry("FACP", 3, func(b []byte) []byte { return fadt(b, f.m, facsAt, dsdtAt) })
	f.addEntry("APIC", d.madtRevision(), func(b []byte) []byte { return madt(b, f.m, d) })
	if f.m.HPET {
		f.addEntry("HPET", 1, hpet)
	}
	if f.m.Hugepages {
		f.addEntry("SRAT", 1, func(b []byte) []byte { return srat(b, f.m) })
	}
	f.addEntry("MCFG", 1, mcfg)
	f.addEntry("WAET", 1, waet)
}

func (f *files) here() uint32 { return uint32(len(f.b)) }

// add appends a table and the command that checksums it.
func (f *files) add(signature string, revision byte, body func([]byte) []byte) {
	const checksumAt = 9
	at := f.here()
	f.b = table(f.b, signature, revision, body)
	f.s.checksum(tablesFile, at+checksumAt, at, f.here()-at)
}

// addEntry is add for a table that the RSDT lists.
func (f *files) addEntry(signature string, revision byte, body func([]byte) []byte) {
	f.entries = append(f.entries, f.here())
	f.add(signature, revision, body)
}

// finish writes the two roots, RSDT and RSDP (ACPI 6.5, sections 5.2.7 and 5.2.5), and fills
// the files up to the sizes QEMU gives them.
func (f *files) finish() *Tables {
	const headerSize, rsdpSize = 36, 20
	rsdt := f.here()
	for i := range f.entries {
		f.s.pointer(tablesFile, rsdt+headerSize+4*uint32(i), 4)
	}
	f.add("RSDT", 1, func(b []byte) []byte { return u32(b, f.entries...) })
	f.s.pointer(rsdpFile, 16, 4)
	f.s.checksum(rsdpFile, 8, 0, rsdpSize)

	rsdp := append(make([]byte, 0, rsdpSize), "RSD PTR "+"\x00"+"BOCHS "+"\x00"...)
	return &Tables{Tables: pad(f.b, tablesUnit), RSDP: u32(rsdp, rsdt), Loader: pad(f.s.b, loaderSize)}
}

// pad fills b with zeros to a multiple of unit.
func pad(b []byte, unit int) []byte {
	n := (len(b) + unit - 1) / unit * unit
	return append(slices.Grow(b, n-len(b)), make([]byte, n-len(b))...)
}
