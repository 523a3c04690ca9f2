package image

import (
	"crypto/sha512"
	"fmt"

	"tdx-agent/measure/acpi"
)

// machineTables is the ACPI part of RTMR0: the three files that QEMU serves the tables
// in, in the order in which the firmware reads and measures them.
type machineTables struct {
	events []Event
	proven string // what the QEMU profile was proven against
}

// The names of the ACPI events, those of dstack 0.6.
const (
	nameLoader = "acpi-loader"
	nameRSDP   = "acpi-rsdp"
	nameTables = "acpi-tables"
)

func tablesOf(machine Machine, root RootDisk) (*machineTables, error) {
	t, built, err := buildTables(machine, root)
	if err != nil {
		return nil, err
	}
	file := func(name string, content []byte) Event {
		return Event{Type: typePlatformConfig, Name: name, Digest: sha512.Sum384(content), Payload: []byte("ACPI DATA"), DependsOn: []string{"vcpus", "memory", "qemu", "devices"}}
	}
	proven := built.Proven()
	if v, err := machine.version(); err == nil {
		if _, err := acpi.ParseProfile(v.String()); err != nil {
			proven = fmt.Sprintf("unproven: taken for %v", built.QEMU)
		}
	}
	if machine.Hugepages {
		proven += fmt.Sprintf("; unproven: that hugepages mean NUMA %v", machine.numa())
	}
	return &machineTables{[]Event{file(nameLoader, t.Loader), file(nameRSDP, t.RSDP), file(nameTables, t.Tables)}, proven}, nil
}

// Tables returns the ACPI tables of the machine as QEMU serves them, with the root disk
// of the machine, RootVirtio if it does not say.
func Tables(machine Machine) (*acpi.Tables, error) {
	if err := machine.Check(); err != nil {
		return nil, err
	}
	root := machine.Root
	if root == 0 {
		root = RootVirtio
	}
	t, _, err := buildTables(machine, root)
	return t, err
}

// buildTables returns the tables and the machine they are of.
func buildTables(machine Machine, root RootDisk) (*acpi.Tables, *acpi.Machine, error) {
	v, err := machine.version()
	if err != nil {
		return nil, nil, err
	}
	profile, err := acpi.ParseProfile(v.String())
	if err != nil && machine.AssumeProfile {
		profile, err = assumedProfile(v), nil
	}
	if err != nil {
		return nil, nil, unmodelled("qemu_version", "%v", err)
	}
	m := acpi.Machine{
		QEMU: profile, CPUs: machine.VCPUs, Memory: machine.MemoryBytes, PIC: machine.pic(v), HotplugOff: machine.HotplugOff,
		CDROM: root == RootCDROM, NICs: machine.NICs, Volumes: machine.Volumes, GPUs: machine.GPUs, NVSwitches: machine.NVSwitches,
		Hugepages: machine.numa() != NUMAOff, Expander: machine.numa() == NUMABridge, PCIHole64: machine.PCIHole64,
	}
	t, err := acpi.Build(m)
	if err != nil {
		return nil, nil, unmodelled("devices", "%v", err)
	}
	return t, &m, nil
}

// assumedProfile is the nearest profile of a version that has none of its own.
func assumedProfile(v qemuVersion) acpi.Profile {
	switch {
	case v.before(9, 0):
		return acpi.QEMU8
	case v.before(9, 2):
		return acpi.QEMU9_1
	case v.before(10, 0):
		return acpi.QEMU9_2
	case v.before(11, 0):
		return acpi.QEMU10
	}
	return acpi.QEMU11_1
}
