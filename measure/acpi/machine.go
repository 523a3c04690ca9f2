package acpi

// Machine is the configuration QEMU derives its ACPI tables from: a q35 machine as
// dstack's VMM starts it. Every field is the host's word; Build judges whether it is a
// machine whose tables are known.
type Machine struct {
	QEMU   Profile // which QEMU wrote the tables; the zero Profile is refused
	CPUs   int     // virtual CPUs, 1 to 254; all present at boot
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

	PCIHole64 uint64 // pci-hole64-size in bytes; 0 is QEMU's default of 32 GiB
}

// Tables are the three files QEMU serves over fw_cfg, as the firmware reads and measures
// them: pointers are offsets, checksums are zero.
type Tables struct {
	Tables []byte // etc/acpi/tables
	RSDP   []byte // etc/acpi/rsdp
	Loader []byte // etc/table-loader
}
