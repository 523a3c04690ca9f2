package acpi_test

import (
	"crypto/sha256"
	"fmt"
	"testing"

	"tdx-agent/measure/acpi"
)

// measured are machines with every knob at work, and the SHA-256 of what a stock QEMU serves
// for them (tables, RSDP and loader, one after the other), so that this is held to without a
// QEMU too.
var measured = []struct {
	name    string
	machine acpi.Machine
	want    string
}{
	{"7.2: hotplug, and all knobs of the chipset", acpi.Machine{QEMU: acpi.QEMU7_2, CPUs: 9, Memory: 4 << 30, NICs: 1, PIC: true, SMM: true, HPET: true, NVSwitches: 3},
		"87da720ea6d0f154830d909466d8f31dce2aeaaddabace615ecae7d89bcdd430"},
	{"7.2: hugepages with an expander, no hotplug", acpi.Machine{QEMU: acpi.QEMU7_2, CPUs: 16, Memory: 64 << 30, NICs: 1, Hugepages: true, Expander: true, NVSwitches: 2, HotplugOff: true},
		"17ed9e45bbfb0352479d0802046138be56901b5894282be3a4cdc4efdd5e753b"},
	{"7.2: as many vCPUs as it starts", acpi.Machine{QEMU: acpi.QEMU7_2, CPUs: 255, Memory: 2049 << 20, CDROM: true},
		"24a72f2abbdb25cf3e42143d68e35bd92681cd145156381487716bdaeb8c294e"},
	{"10: all knobs of the chipset", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 9, Memory: 4 << 30, NICs: 1, PIC: true, SMM: true, HPET: true},
		"263d785c30eace62df763c4877617fc6846376ebdc5c8f7be0a1ce30f00fc424"},
	{"10: CD-ROM, volumes, little RAM", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 1, Memory: 16 << 20, NICs: 2, Volumes: 3, CDROM: true},
		"25db67171482fab4c88fcb13ae9e1a164f6e7666a379decfb78e3eb72bce6b8c"},
	{"10: hotplug of GPUs and NVSwitches", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 48, Memory: 512 << 30, NICs: 1, GPUs: 8, NVSwitches: 4, PCIHole64: 8 << 40},
		"4d302fafedea0825324cadfece3d03906ff0477a37dcb37c209ca5c0b38463c5"},
	{"10: GPUs without hotplug", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 48, Memory: 512 << 30, NICs: 1, GPUs: 8, NVSwitches: 4, HotplugOff: true, PCIHole64: 8<<40 + 1<<20},
		"100329bd25aff0001b6a1bf645cb2f9c94341bf809e69a3ea94cfc7934af5203"},
	{"10: hugepages", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 254, Memory: 2815 << 20, NICs: 1, Hugepages: true},
		"aa679dfd16a5d57033e835531c10fe36c950586a14cab7c5d7cbf71081e11a19"},
	{"10: hugepages with an expander", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 16, Memory: 64 << 30, NICs: 1, Hugepages: true, Expander: true},
		"54ff48bb1d229cca9e10cdc3a16ca7a97317d5e0c8c1843e83f06f16c23192d0"},
	{"10: NVSwitches around the expander", acpi.Machine{QEMU: acpi.QEMU10, CPUs: 2, Memory: 4 << 30, NICs: 7, NVSwitches: 6, Hugepages: true, Expander: true},
		"60060d23d7f1ef49b902167db1a27e91ee46bf5ce0648a0356f361d225275a22"},
	{"11.1: x2APIC", acpi.Machine{QEMU: acpi.QEMU11_1, CPUs: 300, Memory: 2816 << 20, NICs: 1, Hugepages: true},
		"dbfe5d3257d22bb37efb9034d3a1126f509ee65f572a98520927bd6c8d278c3b"},
	{"11.1: all knobs", acpi.Machine{QEMU: acpi.QEMU11_1, CPUs: 33, Memory: 3 << 30, NICs: 3, Volumes: 1, NVSwitches: 2, PIC: true, SMM: true, HPET: true, Hugepages: true},
		"e9fbdc1c2f626cf57ba8b2a4b825aa8be8c6deb5cf3505cc00d466686327c828"},
	{"11.1: no hotplug", acpi.Machine{QEMU: acpi.QEMU11_1, CPUs: 4, Memory: 2049 << 20, HotplugOff: true},
		"18a10ad66e6e8b5387d231110d6e62f2187939ccb6895a917e8e00fbe858baaa"},
}

func TestMeasured(t *testing.T) {
	for _, c := range measured {
		got := build(t, c.machine)
		if digest := fingerprint(got); digest != c.want {
			t.Errorf("%s: files are %s, want %s", c.name, digest, c.want)
		}
	}
}

func fingerprint(files *acpi.Tables) string {
	h := sha256.New()
	h.Write(files.Tables)
	h.Write(files.RSDP)
	h.Write(files.Loader)
	return fmt.Sprintf("%x", h.Sum(nil))
}
