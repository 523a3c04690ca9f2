package acpi

import (
	"errors"
	"fmt"
)

const (
	mib = 1 << 20
	gib = 1 << 30

	// Up to here tables were compared with a stock QEMU's.
	minMemory = 16 * mib
	maxMemory = 8 << 40
	maxHole64 = 1 << 50
	maxSlots  = chipsetSlot - 1
)

// Machine is the configuration QEMU derives its ACPI tables from: a q35 machine as
// dstack's VMM starts it. Every field is the host's word; Build judges whether it is a
// machine whose tables are known.
type Machine struct {
	QEMU   Profile // which QEMU wrote the tables; the zero Profile is refused
	CPUs   int     // virtual CPUs, all present at boot: 1 to 254, from QEMU 10 on to 4096
	Memory uint64  // guest RAM in bytes

	PIC        bool // the 8259 interrupt controllers exist (dstack: on for 8.x)
	SMM        bool // System Management Mode; TDX forbids it, so a TD has none
	HPET       bool // the HPET timer exists; dstack's machines have none
	HotplugOff bool // no ACPI hotplug of PCI devices

	CDROM      bool // the root file system is a CD-ROM on the AHCI controller (dstack <= v0.4)
	NICs       int  // virtio network cards
	Volumes    int  // virtio disks beside dstack's own, such as verity volumes
	GPUs       int  // passed-through GPUs, each behind a PCIe root port
	NVSwitches int  // passed-through NVSwitches, each behind a PCIe root port
	Hugepages  bool // RAM comes from hugepages, which gives the machine a NUMA node and an SRAT
	Expander   bool // the node has its own host bridge: dstack's VMM gives all machines on hugepages one

	// PCIHole64 is the machine's pci-hole64-size in bytes; 0 is QEMU's default of 32 GiB. QEMU
	// makes the window larger where the BARs of GPUs need it, which cannot be known here: with
	// GPUs, 0 is refused, and another size is taken as large enough.
	PCIHole64 uint64
}

// Tables are the three files QEMU serves over fw_cfg, as the firmware reads and measures
// them: pointers are offsets, checksums are zero.
type Tables struct {
	Tables []byte // etc/acpi/tables
	RSDP   []byte // etc/acpi/rsdp
	Loader []byte // etc/table-loader
}

// check refuses what QEMU would not start and what has no known tables, and finds the
// dialect of the rest.
func (m *Machine) check() (dialect, error) {
	d, known := m.QEMU.dialect()
	switch {
	case !known:
		return d, fmt.Errorf("acpi: %v", m.QEMU)
	case m.CPUs < 1 || m.CPUs > d.maxCPUs:
		return d, fmt.Errorf("acpi: %d vCPUs: tables of %v are known for 1 to %d", m.CPUs, m.QEMU, d.maxCPUs)
	case m.Memory < minMemory || m.Memory > maxMemory || m.Memory%mib != 0:
		return d, fmt.Errorf("acpi: %d bytes of RAM: want whole MiB, %d MiB to %d TiB", m.Memory, minMemory/mib, maxMemory>>40)
	case m.PCIHole64 > maxHole64:
		return d, fmt.Errorf("acpi: a pci-hole64-size of %d bytes: tables are known up to %d TiB", m.PCIHole64, maxHole64>>40)
	case d.needsPIC && !m.PIC:
		return d, fmt.Errorf("acpi: %v without pic: not known what its MADT says", m.QEMU)
	}
	return d, m.checkDevices(d)
}

func (m *Machine) checkDevices(d dialect) error {
	for _, c := range [...]struct {
		what  string
		count int
	}{{"NICs", m.NICs}, {"volumes", m.Volumes}, {"GPUs", m.GPUs}, {"NVSwitches", m.NVSwitches}} {
		if c.count < 0 || c.count > maxSlots {
			return fmt.Errorf("acpi: %d %s: the root bus has %d slots", c.count, c.what, maxSlots)
		}
	}
	devices, ports := m.slots()
	all := devices + ports
	if m.Expander {
		all++
	}
	switch {
	case all > maxSlots:
		return fmt.Errorf("acpi: %d devices: the root bus has %d slots", all, maxSlots)
	case m.Expander && devices >= expanderSlot:
		return fmt.Errorf("acpi: %d devices: one is in slot %d, where the expander has to be", devices, expanderSlot)
	case m.Expander && !m.Hugepages:
		return errors.New("acpi: an expander without hugepages: there is no NUMA node it could be of")
	case m.Expander && !d.routedExpander:
		return fmt.Errorf("acpi: %v with an expander, as machines on hugepages have: tables not known", m.QEMU)
	case ports > 0 && !m.HotplugOff && d.portsNoHotplug:
		return fmt.Errorf("acpi: %v with hotplug and GPUs or NVSwitches: tables not known", m.QEMU)
	case m.GPUs > 0 && m.PCIHole64 == 0:
		return errors.New("acpi: GPUs without a pci-hole64-size: the 64-bit window follows the GPUs' BARs")
	case m.GPUs > 0 && m.Hugepages:
		return errors.New("acpi: hugepages with GPUs: the tables follow the buses and windows the firmware gives the GPUs")
	}
	return nil
}

// lowMemory is the RAM below 4 GiB: all of it, unless there is so much that it is split.
func (m *Machine) lowMemory() uint32 {
	if m.Memory >= lowestSplit {
		return splitLowSize
	}
	return uint32(m.Memory)
}

// hole64 is the length of the 64-bit window, which QEMU rounds up to GiB.
func (m *Machine) hole64() uint64 {
	if m.PCIHole64 == 0 {
		return 32 * gib
	}
	return (m.PCIHole64 + gib - 1) &^ (gib - 1)
}

// slots counts the devices of the root bus, which are in its first slots, and the root
// ports, which come after them.
func (m *Machine) slots() (devices, ports int) {
	devices = 3 + m.Volumes + m.NICs // dstack's data disk, vsock, the host share
	if !m.CDROM {
		devices++
	}
	return devices, m.GPUs + m.NVSwitches
}

// portSlot is the slot of root port number i: the next free one.
func (m *Machine) portSlot(i int) int {
	devices, _ := m.slots()
	slot := 1 + devices + i
	if m.Expander && slot >= expanderSlot {
		slot++
	}
	return slot
}
