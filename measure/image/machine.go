package image

import (
	"fmt"
	"strconv"
	"strings"

	"tdx-agent/measure"
)

// UnmodelledError says that an input is well formed but that its effect on the
// registers is not known here. There is no value then, rather than a guess.
type UnmodelledError struct {
	Input  string // which: "qemu_version", "swtpm", "kernel", ...
	Reason string
}

func (e *UnmodelledError) Error() string {
	return fmt.Sprintf("not modelled: %s: %s", e.Input, e.Reason)
}

func unmodelled(input, format string, a ...any) error {
	return &UnmodelledError{input, fmt.Sprintf(format, a...)}
}

// Bounds of a machine. Those of the devices are of the slots that the bus has.
const (
	MaxVCPUs    = 4096
	maxDevices  = 24
	defaultQEMU = "9.1.0" // what dstack assumes of a host that does not say
)

// RootDisk says how the root file system is attached.
type RootDisk int

// The root disks. The zero value is none: the image decides, by the name of its root file
// system, its version, or the memory layout of its firmware.
const (
	RootVirtio RootDisk = 1 + iota // a virtio disk, which takes a slot (dstack 0.5 and later)
	RootCDROM                      // -cdrom on the chipset's own controller (dstack 0.3 and 0.4)
)

func (r RootDisk) String() string {
	switch r {
	case RootVirtio:
		return "virtio"
	case RootCDROM:
		return "cdrom"
	}
	return "unspecified"
}

// Machine is a virtual machine as far as the registers depend on it. VCPUs and
// MemoryBytes must be set and NICs says how many there are, usually 1; the rest may be
// zero.
type Machine struct {
	VCPUs       int
	MemoryBytes uint64 // whole MiB
	QEMU        string // version, "8.2.2"; "" is 9.1.0
	PageOrder   PageOrder
	PIC         *bool // nil: the QEMU version decides

	PCIHole64  uint64 // size of the 64-bit PCI window in bytes; 0: QEMU's default
	HotplugOff bool   // ACPI PCI hotplug
	Hugepages  bool   // memory comes from huge pages
	NUMA       NUMA   // what they make of the machine

	NICs, Volumes    int // Volumes: verity volumes besides the root disk
	GPUs, NVSwitches int
	Root             RootDisk

	Firmware FirmwareProfile // "": what the image or its firmware says, else Pre202505
	Kernel   KernelMode

	// SMBIOS is the digest of the event that Stable202505 cannot predict. It is the
	// policy's word: never take it from the log that is compared.
	SMBIOS *measure.Digest

	// AssumeProfile uses the tables of the nearest QEMU where those of the version are not
	// known; the Result says that they are unproven.
	AssumeProfile bool
}

// Check says what no machine can be, and what is not modelled.
func (m *Machine) Check() error {
	switch {
	case m.VCPUs < 1 || m.VCPUs > MaxVCPUs:
		return fmt.Errorf("machine has %d vCPUs, want 1 to %d", m.VCPUs, MaxVCPUs)
	case m.MemoryBytes == 0 || m.MemoryBytes%(1<<20) != 0 || m.MemoryBytes > maxMemory:
		return fmt.Errorf("machine has %d bytes of memory, want whole MiB, at most %d bytes", m.MemoryBytes, uint64(maxMemory))
	case m.NICs < 0 || m.Volumes < 0 || m.GPUs < 0 || m.NVSwitches < 0:
		return fmt.Errorf("machine has a negative number of devices")
	case m.NICs > maxDevices || m.Volumes > maxDevices || m.GPUs > maxDevices || m.NVSwitches > maxDevices:
		return fmt.Errorf("machine has more than %d devices of a kind", maxDevices)
	case m.PageOrder < 0 || m.PageOrder > SinglePass:
		return fmt.Errorf("page order %d, want two-pass or single-pass", int(m.PageOrder))
	case m.Root < 0 || m.Root > RootCDROM:
		return fmt.Errorf("root disk %d, want virtio or cdrom", int(m.Root))
	case m.Kernel < 0 || m.Kernel > KernelNormalized:
		return fmt.Errorf("kernel mode %d, want patched, raw or normalized", int(m.Kernel))
	}
	if err := m.checkNUMA(); err != nil {
		return err
	}
	if _, err := ParseFirmwareProfile(string(m.Firmware)); err != nil {
		return err
	}
	_, err := m.version()
	return err
}

// qemuVersion is a version of QEMU.
type qemuVersion struct{ major, minor, patch int }

func (v qemuVersion) String() string { return fmt.Sprintf("%d.%d.%d", v.major, v.minor, v.patch) }

func (v qemuVersion) before(major, minor int) bool {
	return v.major < major || v.major == major && v.minor < minor
}

// version parses the QEMU version: two or three numbers.
func (m *Machine) version() (qemuVersion, error) {
	text := m.QEMU
	if text == "" {
		text = defaultQEMU
	}
	parts := strings.Split(text, ".")
	if len(parts) != 2 && len(parts) != 3 {
		return qemuVersion{}, fmt.Errorf("QEMU version is %q, want three numbers such as 8.2.2", text)
	}
	var n [3]int
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 10, 10)
		if err != nil {
			return qemuVersion{}, fmt.Errorf("QEMU version is %q, want three numbers such as 8.2.2", text)
		}
		n[i] = int(v)
	}
	v := qemuVersion{n[0], n[1], n[2]}
	if v.before(8, 0) {
		return v, unmodelled("qemu_version", "%v has no TDX; want 8.0 or later", v)
	}
	return v, nil
}

// pageOrder and pic follow dstack's defaults: QEMU 8 is the TDX staging line.
func (m *Machine) pageOrder(v qemuVersion) PageOrder {
	switch {
	case m.PageOrder != 0:
		return m.PageOrder
	case v.before(9, 0):
		return TwoPass
	}
	return SinglePass
}

func (m *Machine) pic(v qemuVersion) bool {
	if m.PIC != nil {
		return *m.PIC
	}
	return v.before(9, 0)
}

// kernelMode follows image, QEMU and firmware: QEMU 10.0 began to offer the file as it is
// beside the patched one, edk2-stable202505 prefers that, and QEMU 10.2 patches no more.
func (m *Machine) kernelMode(v qemuVersion, normalized bool, firmware FirmwareProfile) KernelMode {
	switch {
	case m.Kernel != 0:
		return m.Kernel
	case normalized:
		return KernelNormalized
	case v.before(10, 0) || v.before(10, 2) && firmware == Pre202505:
		return KernelPatched
	}
	return KernelRaw
}
