package image_test

import (
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/acpi"
	"tdx-agent/measure/image"
)

// TestKernelDecision shows which bytes of the kernel are taken for measured.
func TestKernelDecision(t *testing.T) {
	normalized := newKernel()
	normalized[0x210], normalized[0x211] = 0xb0, 0x81
	binary.LittleEndian.PutUint16(normalized[0x224:], 0xfe00)
	binary.LittleEndian.PutUint32(normalized[0x228:], 0x20000)
	binary.LittleEndian.PutUint32(normalized[0x218:], 0x7ffd6000)
	binary.LittleEndian.PutUint32(normalized[0x21c:], 5000)
	for _, v := range []struct {
		name     string
		kernel   []byte
		metadata map[string]any
		qemu     string
		firmware image.FirmwareProfile
		want     image.KernelMode
	}{
		{"8.2.2", newKernel(), nil, "8.2.2", "", image.KernelPatched},
		{"10.1.0", newKernel(), nil, "10.1.0", "", image.KernelPatched},
		{"10.2.0", newKernel(), nil, "10.2.0", "", image.KernelRaw},
		{"10.0.2, a firmware that prefers the file", newKernel(), nil, "10.0.2", image.Stable202505, image.KernelRaw},
		{"8.2.2, a firmware that would", newKernel(), nil, "8.2.2", image.Stable202505, image.KernelPatched},
		{"normalized", normalized, map[string]any{"kernel_header_normalized": true}, "8.2.2", "", image.KernelNormalized},
		{"normalized, 10.2.0", normalized, map[string]any{"kernel_header_normalized": true}, "10.2.0", "", image.KernelNormalized},
	} {
		m, err := static(t, imageOf(t, v.kernel, v.metadata))
		if err != nil {
			t.Fatal(err)
		}
		r, err := m.Measure(image.Machine{VCPUs: 1, MemoryBytes: 1 << 30, NICs: 1, QEMU: v.qemu, Firmware: v.firmware, SMBIOS: &measure.Digest{}})
		if err != nil {
			t.Errorf("%s: %v", v.name, err)
			continue
		}
		if r.Kernel != v.want {
			t.Errorf("%s: kernel is %v, want %v", v.name, r.Kernel, v.want)
		}
	}
	m, err := static(t, imageOf(t, newKernel(), map[string]any{"kernel_header_normalized": true}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Measure(image.Machine{VCPUs: 1, MemoryBytes: 1 << 30, NICs: 1, QEMU: "8.2.2"}); err == nil || !strings.Contains(err.Error(), "not normalized") {
		t.Errorf("an image that says wrongly that it is normalized: got %v", err)
	}
	if _, err := m.Material(); err == nil {
		t.Error("a normalized image has a document of version 3, which cannot say so")
	}
}

// TestStoreUnmodelled has no RTMR0 for a firmware whose variables lead to more events, but
// measures what else it can.
func TestStoreUnmodelled(t *testing.T) {
	for name, variable := range map[string]string{"keys": "PK", "boot option": "Boot0007", "boot order": "BootOrder"} {
		f := newFirmware()
		addVariable(f.store, globalGUID, variable, []byte{1, 2})
		path := imageOf(t, newKernel(), nil)
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), "ovmf.fd"), f.bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := static(t, path)
		if err != nil {
			t.Fatal(err)
		}
		var not *image.UnmodelledError
		if _, err := m.Measure(image.Machine{VCPUs: 1, MemoryBytes: 4 << 30, NICs: 1, QEMU: "8.2.2"}); !errors.As(err, &not) || not.Input != "firmware" {
			t.Errorf("%s: got %v, want an UnmodelledError about the firmware", name, err)
		}
	}
}

// TestMachineRefused has one machine for each thing that may be wrong.
func TestMachineRefused(t *testing.T) {
	p := platform(t, image.DstackLayout05())
	for name, spoil := range map[string]func(*image.Machine){
		"no vCPUs":      func(m *image.Machine) { m.VCPUs = 0 },
		"vCPUs":         func(m *image.Machine) { m.VCPUs = 1 << 20 },
		"no memory":     func(m *image.Machine) { m.MemoryBytes = 0 },
		"little memory": func(m *image.Machine) { m.MemoryBytes = 1 << 20 },
		"odd memory":    func(m *image.Machine) { m.MemoryBytes++ },
		"much memory":   func(m *image.Machine) { m.MemoryBytes = 1 << 60 },
		"negative":      func(m *image.Machine) { m.GPUs = -1 },
		"devices":       func(m *image.Machine) { m.NICs = 1000 },
		"many devices":  func(m *image.Machine) { m.NICs, m.Volumes = 20, 20 },
		"page order":    func(m *image.Machine) { m.PageOrder = 7 },
		"kernel mode":   func(m *image.Machine) { m.Kernel = 7 },
		"root disk":     func(m *image.Machine) { m.Root = 7 },
		"firmware":      func(m *image.Machine) { m.Firmware = "x" },
		"QEMU":          func(m *image.Machine) { m.QEMU = "8.2.2.2" },
		"NUMA form":     func(m *image.Machine) { m.Hugepages, m.NUMA = true, 7 },
		"node for none": func(m *image.Machine) { m.NUMA = image.NUMANode },
		"QEMU 8 bridge": func(m *image.Machine) { m.Hugepages, m.NUMA = true, image.NUMABridge },
		"GPU on a node": func(m *image.Machine) { m.QEMU, m.Hugepages, m.GPUs, m.PCIHole64 = "10.0.2", true, 1, 1<<40 },
	} {
		m := image.Machine{VCPUs: 1, MemoryBytes: 4 << 30, NICs: 1, QEMU: "8.2.2"}
		spoil(&m)
		if r, err := p.Measure(m); err == nil {
			t.Errorf("%s: got %v", name, r.RTMR)
		}
	}
}

// TestNUMA has the tables of the form that is asked for, and says that none is proven.
func TestNUMA(t *testing.T) {
	p := platform(t, image.DstackLayout05())
	for _, v := range []struct {
		numa image.NUMA
		want acpi.Machine
	}{
		{0, acpi.Machine{Hugepages: true}},
		{image.NUMAOff, acpi.Machine{}},
		{image.NUMANode, acpi.Machine{Hugepages: true}},
		{image.NUMABridge, acpi.Machine{Hugepages: true, Expander: true}},
	} {
		m := image.Machine{QEMU: "10.0.2", VCPUs: 4, MemoryBytes: 8 << 30, NICs: 1, Root: image.RootVirtio, Hugepages: true, NUMA: v.numa, Kernel: image.KernelPatched}
		r, err := p.Measure(m)
		if err != nil {
			t.Fatal(err)
		}
		v.want.QEMU, v.want.CPUs, v.want.Memory, v.want.NICs = acpi.QEMU10, m.VCPUs, m.MemoryBytes, m.NICs
		tables, err := acpi.Build(v.want)
		if err != nil {
			t.Fatal(err)
		}
		found := slices.ContainsFunc(r.Log, func(e image.Event) bool { return e.Name == "acpi-tables" && e.Digest == sha512.Sum384(tables.Tables) })
		if !found || !strings.Contains(r.Proven, "unproven: that hugepages mean NUMA") {
			t.Errorf("%v: tables of another machine, or no word on it: %s", v.numa, r.Proven)
		}
	}
}
