package acpi_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"tdx-agent/measure/acpi"
)

// The tests here show why Build refuses two kinds of machines: what QEMU writes for them
// depends on what the firmware makes of devices that a configuration says too little about.

const (
	testPort   = 6 << 3 // devfn of the first free slot of dstack's plain machine
	lowestGPU  = 0x3800 << 32
	expanderAt = 5 // bus number of the NUMA node's host bridge
)

// start runs a stock QEMU with more devices than the plain machine.
func start(t *testing.T, qemu string, devices ...string) *qtestMachine {
	t.Helper()
	args := arguments(acpi.Machine{CPUs: 2, Memory: 2 << 30, NICs: 1, HotplugOff: true, Hugepages: true})
	q, err := startQEMU(qemu, append(args, devices...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.close)
	return q
}

// TestWindowFollowsBARs puts a device with 128 GiB of memory behind a root port, as a GPU
// is: the 64-bit window then ends where the last BAR does, whatever the hole's size.
func TestWindowFollowsBARs(t *testing.T) {
	for _, qemu := range qemus(t) {
		q := start(t, qemu, "-object", "memory-backend-ram,id=vram,size=128G,reserve=off",
			"-device", "pcie-root-port,id=gpu0,bus=pcie.0,chassis=1", "-device", "ivshmem-plain,memdev=vram,bus=gpu0")
		const size = 128 << 30
		q.firmware(lowestGPU + size)
		q.pci(testPort, 0x18, "l", 1<<16|1<<8) // secondary and subordinate bus 1
		q.pci(testPort, 0x24, "l", 0xfff1_0001)
		q.pci(testPort, 0x28, "l", lowestGPU>>32)
		q.pci(testPort, 0x2c, "l", (lowestGPU+size-1)>>32)
		q.pci(testPort, 0x04, "w", 7)
		const device = 1 << 8
		q.pci(device, 0x18, "l", 0) // BAR 2
		q.pci(device, 0x1c, "l", lowestGPU>>32)
		q.pci(device, 0x04, "w", 7)
		tables := q.file("etc/acpi/tables")
		if q.err != nil {
			t.Fatal(q.err)
		}
		window := tables[bytes.Index(tables, []byte("\x8a\x2b\x00\x00\x0c\x03")):] // a QWordMemory descriptor
		first, last := binary.LittleEndian.Uint64(window[14:]), binary.LittleEndian.Uint64(window[22:])
		if first != lowestGPU || last < lowestGPU+size || last-first+1 == 32<<30 {
			t.Errorf("%s: window %#x to %#x: it no longer follows the BARs", qemu, first, last)
		}
	}
}

// TestExpanderFollowsFirmware has a GPU behind the host bridge of a NUMA node, as machines
// on hugepages do: that bridge's _CRS lists the buses the firmware gave the root port.
func TestExpanderFollowsFirmware(t *testing.T) {
	for _, qemu := range qemus(t) {
		buses := func(subordinate uint64) []byte {
			q := start(t, qemu, "-device", "pxb-pcie,id=node,bus=pcie.0,addr=10,numa_node=0,bus_nr=5",
				"-device", "pcie-root-port,id=gpu0,bus=node,chassis=1", "-device", "virtio-rng-pci,bus=gpu0")
			q.firmware(lowestGPU)
			q.pci(expanderAt<<8, 0x18, "l", subordinate<<16|subordinate<<8|expanderAt)
			tables := q.file("etc/acpi/tables")
			if q.err != nil {
				t.Fatal(q.err)
			}
			bridge := tables[max(0, bytes.Index(tables, []byte("PC05"))):]
			return bridge[max(0, bytes.Index(bridge, []byte("_CRS"))):][:40]
		}
		if bytes.Equal(buses(6), buses(7)) {
			t.Errorf("%s: the expander's resources no longer follow the firmware", qemu)
		}
	}
}
