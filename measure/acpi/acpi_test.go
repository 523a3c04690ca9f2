package acpi_test

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"tdx-agent/measure/acpi"
)

// sample is a machine that Build takes.
func sample() acpi.Machine {
	return acpi.Machine{QEMU: acpi.QEMU10, CPUs: 2, Memory: 2 << 30, NICs: 1}
}

// TestUnknown holds one machine for each reason not to build tables.
func TestUnknown(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*acpi.Machine)
		want string
	}{
		{"no profile", func(m *acpi.Machine) { m.QEMU = 0 }, "unknown QEMU profile 0"},
		{"profile of the future", func(m *acpi.Machine) { m.QEMU = acpi.QEMU11_1 + 1 }, "unknown QEMU profile 8"},
		{"negative profile", func(m *acpi.Machine) { m.QEMU = -1 }, "unknown QEMU profile -1"},
		{"no vCPU", func(m *acpi.Machine) { m.CPUs = 0 }, "0 vCPUs"},
		{"vCPUs before QEMU 10", func(m *acpi.Machine) { m.QEMU, m.PIC, m.CPUs = acpi.QEMU8, true, 255 }, "255 vCPUs: tables of QEMU 8 are known for 1 to 254"},
		{"vCPUs beyond the machine", func(m *acpi.Machine) { m.CPUs = 4097 }, "4097 vCPUs"},
		{"no RAM", func(m *acpi.Machine) { m.Memory = 0 }, "0 bytes of RAM"},
		{"RAM below the firmware's needs", func(m *acpi.Machine) { m.Memory = 15 << 20 }, "15728640 bytes of RAM"},
		{"RAM given in MiB", func(m *acpi.Machine) { m.Memory = 2048 }, "2048 bytes of RAM"},
		{"half a MiB", func(m *acpi.Machine) { m.Memory += 1 << 19 }, "whole MiB"},
		{"RAM up to the 64-bit window", func(m *acpi.Machine) { m.Memory = 16 << 40 }, "bytes of RAM"},
		{"a window beyond all addresses", func(m *acpi.Machine) { m.PCIHole64 = 1<<50 + 1 }, "pci-hole64-size"},
		{"the largest window", func(m *acpi.Machine) { m.PCIHole64 = 1<<64 - 1 }, "pci-hole64-size"},
		{"QEMU 8 without pic", func(m *acpi.Machine) { m.QEMU = acpi.QEMU8 }, "without pic"},
		{"fewer than no NICs", func(m *acpi.Machine) { m.NICs = -1 }, "-1 NICs"},
		{"fewer than no volumes", func(m *acpi.Machine) { m.Volumes = -1 }, "-1 volumes"},
		{"fewer than no GPUs", func(m *acpi.Machine) { m.GPUs = -1 }, "-1 GPUs"},
		{"fewer than no NVSwitches", func(m *acpi.Machine) { m.NVSwitches = -1 }, "-1 NVSwitches"},
		{"counts whose sum overflows", func(m *acpi.Machine) { m.NICs, m.Volumes = 1<<63-1, 1<<63-1 }, "NICs"},
		{"a slot too few", func(m *acpi.Machine) { m.NICs = 27 }, "31 devices: the root bus has 30 slots"},
		{"hotplug of GPUs before QEMU 10", func(m *acpi.Machine) {
			m.QEMU, m.GPUs, m.PCIHole64 = acpi.QEMU9_2, 1, 8<<40
		}, "QEMU 9.2 with hotplug and GPUs"},
		{"GPUs without a window", func(m *acpi.Machine) { m.GPUs = 1 }, "GPUs without a pci-hole64-size"},
		{"an expander without a node", func(m *acpi.Machine) { m.Expander = true }, "expander without hugepages"},
		{"an expander before QEMU 10", func(m *acpi.Machine) { m.QEMU, m.Hugepages, m.Expander = acpi.QEMU9_2, true, true }, "QEMU 9.2 with an expander"},
		{"a device where the expander goes", func(m *acpi.Machine) { m.NICs, m.Hugepages, m.Expander = 12, true, true }, "slot 16"},
		{"a slot too few beside an expander", func(m *acpi.Machine) { m.NVSwitches, m.Hugepages, m.Expander = 25, true, true }, "31 devices"},
		{"GPUs and hugepages", func(m *acpi.Machine) { m.GPUs, m.PCIHole64, m.Hugepages = 1, 8<<40, true }, "hugepages with GPUs"},
	} {
		m := sample()
		c.edit(&m)
		tables, err := acpi.Build(m)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", c.name, err, c.want)
		}
		if tables != nil {
			t.Errorf("%s: tables beside an error", c.name)
		}
	}
}

func TestParseProfile(t *testing.T) {
	for version, want := range map[string]acpi.Profile{
		"7.2.22": acpi.QEMU7_2, "8.0.0": acpi.QEMU8, "8.2": acpi.QEMU8, "8.2.2": acpi.QEMU8, "8.2.2+tdx1.0": acpi.QEMU8, "8.2.8": acpi.QEMU8,
		"9.0.2": acpi.QEMU9_1, "9.1.0": acpi.QEMU9_1, "9.1.2": acpi.QEMU9_1,
		"9.2.1": acpi.QEMU9_2, "9.2.4 (v9.2.4)": acpi.QEMU9_2,
		"10.0.3": acpi.QEMU10, "10.2.0": acpi.QEMU10, "10.0.2-2~bpo": acpi.QEMU10,
		"11.0.3": acpi.QEMU11_0, "11.1.0": acpi.QEMU11_1,
	} {
		if got, err := acpi.ParseProfile(version); got != want || err != nil {
			t.Errorf("%q: %v, %v, want %v", version, got, err, want)
		}
	}
	for version, want := range map[string]string{
		"": "want major.minor", "10": "want major.minor", "10.0.0.1": "want major.minor", "10.x": "want major.minor",
		"-1.0": "want major.minor", "10.256": "want major.minor", "v10.0": "want major.minor", "10..0": "want major.minor",
		// not known, each of another table than its neighbours
		"7.1.0": "not known", "8.2.9": "not known", "8.3.0": "not known", "9.1.3": "not known", "9.2.0": "not known",
		"9.2": "not known", "9.3.0": "not known", "10.3.0": "not known", "11.2.0": "not known", "12.0.0": "not known",
	} {
		if p, err := acpi.ParseProfile(version); p != 0 || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v, want an error with %q", version, p, err, want)
		}
	}
}

// TestProven wants an honest word on every profile, and none of proof on what is none.
func TestProven(t *testing.T) {
	for p, want := range map[acpi.Profile]string{
		0: "unproven", acpi.QEMU7_2: "qtest", acpi.QEMU8: "hardware", acpi.QEMU9_1: "unproven", acpi.QEMU9_2: "registers",
		acpi.QEMU10: "qtest", acpi.QEMU11_0: "unproven", acpi.QEMU11_1: "qtest", acpi.QEMU11_1 + 1: "unproven",
	} {
		if got := p.Proven(); !strings.Contains(got, want) {
			t.Errorf("%v: %q, want a word of %q", p, got, want)
		}
	}
}

// TestProvenMachine has a word on what a profile's proof does not cover.
func TestProvenMachine(t *testing.T) {
	for _, p := range []acpi.Profile{acpi.QEMU8, acpi.QEMU9_1, acpi.QEMU9_2, acpi.QEMU10} {
		m := acpi.Machine{QEMU: p, CPUs: 1, Memory: 2 << 30, NICs: 1, PIC: true}
		if got := m.Proven(); got != p.Proven() {
			t.Errorf("%v: plain machine: %q", p, got)
		}
		m.NVSwitches, m.HotplugOff = 1, true
		build(t, m)
		if got, want := strings.Contains(m.Proven(), "unproven: GPUs"), p < acpi.QEMU9_2; got != want {
			t.Errorf("%v with a root port: %q", p, m.Proven())
		}
	}
}

// FuzzBuild wants an error or whole tables of any machine, never a panic, and bounded files.
func FuzzBuild(f *testing.F) {
	add := func(m acpi.Machine, flags uint8) {
		f.Add(int(m.QEMU), m.CPUs, m.Memory, flags, m.NICs, m.Volumes, m.GPUs, m.NVSwitches, m.PCIHole64)
	}
	add(sample(), 0)
	add(acpi.Machine{QEMU: acpi.QEMU8, CPUs: 254, Memory: 8 << 40, NICs: 20}, 0x7f)
	add(acpi.Machine{QEMU: acpi.QEMU11_1, CPUs: 1, Memory: 16 << 20, GPUs: 8, NVSwitches: 4, PCIHole64: 1 << 43}, 0x08)
	f.Fuzz(func(t *testing.T, profile, cpus int, memory uint64, flags uint8, nics, volumes, gpus, switches int, hole uint64) {
		bit := func(n int) bool { return flags>>n&1 > 0 }
		got, err := acpi.Build(acpi.Machine{
			QEMU: acpi.Profile(profile), CPUs: cpus, Memory: memory, NICs: nics, Volumes: volumes, GPUs: gpus, NVSwitches: switches,
			PIC: bit(0), SMM: bit(1), HPET: bit(2), HotplugOff: bit(3), CDROM: bit(4), Hugepages: bit(5), Expander: bit(6), PCIHole64: hole,
		})
		if err != nil {
			return
		}
		if n := len(got.Tables); n == 0 || n > 1<<20 || n%0x20000 != 0 || len(got.RSDP) != 20 || len(got.Loader) != 4096 {
			t.Fatalf("files of %d, %d and %d bytes", len(got.Tables), len(got.RSDP), len(got.Loader))
		}
		walk(t, got)
	})
}

// walk follows the RSDP to the RSDT and from there every table.
func walk(t *testing.T, files *acpi.Tables) {
	le := binary.LittleEndian
	table := func(at uint32) []byte {
		b := files.Tables[at:]
		return b[:le.Uint32(b[4:])]
	}
	rsdt := table(le.Uint32(files.RSDP[16:]))
	if !bytes.HasPrefix(rsdt, []byte("RSDT")) {
		t.Fatalf("the RSDP points to %q", rsdt[:4])
	}
	var names []string
	for entries := rsdt[36:]; len(entries) > 0; entries = entries[4:] {
		entry := table(le.Uint32(entries))
		names = append(names, string(entry[:4]))
		if dsdt := entry; names[len(names)-1] == "FACP" {
			if dsdt = table(le.Uint32(entry[40:])); !bytes.HasPrefix(dsdt, []byte("DSDT")) {
				t.Fatalf("the FADT points to %q", dsdt[:4])
			}
		}
	}
	if got := strings.Join(names, " "); !strings.HasPrefix(got, "FACP APIC ") || !strings.HasSuffix(got, " MCFG WAET") {
		t.Fatalf("tables %s", got)
	}
}

// BenchmarkACPI builds the tables of a common machine and of the largest.
func BenchmarkACPI(b *testing.B) {
	large := sample()
	large.CPUs, large.GPUs, large.NVSwitches, large.PCIHole64 = 254, 8, 4, 8<<40
	for name, m := range map[string]acpi.Machine{"4-vcpus": {QEMU: acpi.QEMU10, CPUs: 4, Memory: 8 << 30, NICs: 1}, "254-vcpus-8-gpus": large} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := acpi.Build(m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
