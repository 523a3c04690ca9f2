package acpi_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"tdx-agent/measure/acpi"
)

// arguments is the command line of dstack's VMM for m, as far as the tables know it. What a
// stock QEMU without KVM cannot have is replaced by devices that look the same to ACPI:
// virtio-rng for vhost-vsock and 9p, and for GPUs and NVSwitches.
func arguments(m acpi.Machine) []string {
	onOff := map[bool]string{true: "on", false: "off"}
	args := []string{
		"-machine", fmt.Sprintf("q35,smm=%s,hpet=%s,pic=%s", onOff[m.SMM], onOff[m.HPET], onOff[m.PIC]),
		// An Intel processor: with AMD's, QEMU leaves a hole below 1 TiB.
		"-cpu", "qemu64,vendor=GenuineIntel,phys-bits=52,x2apic=on", "-smp", fmt.Sprint(m.CPUs), "-m", fmt.Sprintf("%dK", m.Memory>>10),
		"-object", fmt.Sprintf("memory-backend-ram,id=mem0,size=%dK,reserve=off", m.Memory>>10),
		"-nodefaults",
	}
	device := func(s string) { args = append(args, "-device", s) }
	rng := func() { device("virtio-rng-pci") }
	rng() // hd1
	for range m.Volumes {
		rng()
	}
	for range m.NICs {
		device("virtio-net-pci,romfile=")
	}
	rng() // vhost-vsock
	rng() // the host share
	if !m.CDROM {
		rng() // hd0
	}
	if m.Hugepages {
		args = append(args, "-numa", fmt.Sprintf("node,nodeid=0,cpus=0-%d,memdev=mem0", m.CPUs-1))
	} else {
		args = append(args, "-machine", "memory-backend=mem0")
	}
	if m.Expander {
		device("pxb-pcie,id=node,bus=pcie.0,addr=10,numa_node=0,bus_nr=5")
	}
	for port := range m.GPUs + m.NVSwitches {
		device(fmt.Sprintf("pcie-root-port,id=pci.%d,bus=pcie.0,chassis=%d", port, port))
		device(fmt.Sprintf("virtio-rng-pci,bus=pci.%d", port))
	}
	if m.HotplugOff {
		args = append(args, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
	}
	if m.PCIHole64 != 0 {
		args = append(args, "-global", fmt.Sprintf("q35-pcihost.pci-hole64-size=%d", m.PCIHole64))
	}
	return args
}

const (
	hostBridge = 0
	firstSlot  = 1 << 3
	lpc        = 0x1f << 3
)

// dump is what a stock QEMU serves for m.
func dump(qemu string, m acpi.Machine) (*acpi.Tables, error) {
	q, err := startQEMU(qemu, arguments(m))
	if err != nil {
		return nil, err
	}
	defer q.close()
	q.firmware(0x3800_0000_0000)
	t := &acpi.Tables{
		Loader: q.file("etc/table-loader"),
		RSDP:   q.file("etc/acpi/rsdp"),
		Tables: q.file("etc/acpi/tables"),
	}
	return t, q.err
}

// firmware sets up what the tables tell of: the configuration window, the power management
// block and the 64-bit BAR of the first virtio device.
func (m *qtestMachine) firmware(bar uint64) {
	m.pci(hostBridge, 0x64, "l", 0)
	m.pci(hostBridge, 0x60, "l", 0xe0000001) // PCIEXBAR
	m.pci(lpc, 0x40, "l", 0x600)             // PMBASE
	m.pci(lpc, 0x44, "b", 0x80)              // ACPI_CNTL
	m.pci(firstSlot, 0x20, "l", bar&0xffff_ffff)
	m.pci(firstSlot, 0x24, "l", bar>>32)
	m.pci(firstSlot, 0x04, "w", 7)
}

// matrix is the machines to compare: each knob over its range on a small machine, then
// all of them together at random, the same ones every time.
func matrix() (machines []acpi.Machine) {
	add := func(edits ...func(*acpi.Machine)) {
		m := acpi.Machine{CPUs: 2, Memory: 2 << 30, NICs: 1}
		for _, edit := range edits {
			edit(&m)
		}
		machines = append(machines, m)
	}
	for cpus := 1; cpus <= 254; cpus += 1 + cpus/16 {
		add(func(m *acpi.Machine) { m.CPUs = cpus })
		add(func(m *acpi.Machine) { m.CPUs, m.Hugepages = cpus, true })
	}
	for _, cpus := range []int{254, 255, 256, 257, 300, 512} { // from 256 on, some need an x2APIC
		add(func(m *acpi.Machine) { m.CPUs = cpus })
		add(func(m *acpi.Machine) { m.CPUs, m.Hugepages = cpus, true })
	}
	for _, mib := range []uint64{16, 64, 1024, 2047, 2048, 2049, 2815, 2816, 2817, 4096, 4097, 65536, 1 << 20, 8 << 20} {
		add(func(m *acpi.Machine) { m.Memory = mib << 20 })
		add(func(m *acpi.Machine) { m.Memory, m.Hugepages = mib<<20, true })
	}
	for nics := range 27 {
		add(func(m *acpi.Machine) { m.NICs = nics })
	}
	for _, mib := range []uint64{1, 1024, 1025, 2048, 32768, 33792, 33793, 1 << 20, 8 << 20, 1 << 30} {
		add(func(m *acpi.Machine) { m.PCIHole64 = mib << 20 })
	}
	for bits := range 64 {
		add(func(m *acpi.Machine) {
			m.PIC, m.SMM, m.HPET, m.HotplugOff = bits&1 > 0, bits&2 > 0, bits&4 > 0, bits&8 > 0
			m.CDROM, m.Hugepages, m.Expander = bits&16 > 0, bits&32 > 0, bits&36 == 36
		})
	}
	for ports := 1; ports <= 25; ports++ {
		add(func(m *acpi.Machine) { m.GPUs, m.PCIHole64 = ports, 8<<40 })
		add(func(m *acpi.Machine) {
			m.GPUs, m.NVSwitches, m.HotplugOff, m.PCIHole64 = (ports+1)/2, ports/2, true, 8<<40
		})
	}
	for devices := 1; devices <= 12; devices++ {
		add(func(m *acpi.Machine) { m.NICs, m.Hugepages, m.Expander = devices-1, true, true })
		add(func(m *acpi.Machine) { m.NVSwitches, m.Hugepages, m.Expander, m.CDROM = devices, true, true, true })
		add(func(m *acpi.Machine) {
			m.NVSwitches, m.Hugepages, m.Expander, m.HotplugOff = 2*devices, true, true, true
		})
	}
	random := rand.New(rand.NewPCG(8, 16))
	coin := func() bool { return random.IntN(2) == 0 }
	for range 100 {
		add(func(m *acpi.Machine) {
			*m = acpi.Machine{
				CPUs: 1 + random.IntN(254), Memory: (16 + random.Uint64N(16384)) << 20,
				PIC: coin(), SMM: coin(), HPET: coin(), HotplugOff: coin(), CDROM: coin(), Hugepages: coin(),
				NICs: random.IntN(8), Volumes: random.IntN(8), NVSwitches: random.IntN(5),
				PCIHole64: random.Uint64N(64) << 30,
			}
			if m.PCIHole64 > 0 && !m.Hugepages {
				m.GPUs = random.IntN(7)
			}
			m.Expander = m.Hugepages && m.NICs+m.Volumes < 12 && coin()
		})
	}
	return machines
}

// qemus finds the stock QEMUs to compare with: those TDX_AGENT_QEMU lists, else those that
// packaging/testbed/qemu.sh has unpacked.
func qemus(t *testing.T) []string {
	list := filepath.SplitList(os.Getenv("TDX_AGENT_QEMU"))
	if len(list) == 0 {
		list, _ = filepath.Glob("../../packaging/testbed/work/qemu/*/qemu")
	}
	if len(list) == 0 {
		t.Skip("no stock QEMU: run packaging/testbed/qemu.sh, or list programs in TDX_AGENT_QEMU")
	}
	return list
}

// version asks a QEMU for its version.
func version(t *testing.T, qemu string) string {
	t.Helper()
	out, err := exec.Command(qemu, "--version").Output()
	if err != nil {
		t.Fatalf("%s: %v", qemu, err)
	}
	_, after, _ := strings.Cut(string(out), "version ")
	number, _, _ := strings.Cut(after, " ")
	return strings.TrimSpace(number)
}

// TestDifferential compares whole files with what stock QEMUs serve. The first QEMU of a
// profile meets every machine if TDX_AGENT_QEMU names it; a further one, and one that only
// happens to be there, meet every eighth. QEMU 7.2 starts no more than 255 vCPUs.
func TestDifferential(t *testing.T) {
	seen := make(map[acpi.Profile]bool)
	for _, qemu := range qemus(t) {
		number := version(t, qemu)
		t.Run(number, func(t *testing.T) {
			profile, err := acpi.ParseProfile(number)
			if err != nil {
				t.Skip(err)
			}
			stride := 1
			if seen[profile] || os.Getenv("TDX_AGENT_QEMU") == "" {
				stride = 8
			}
			seen[profile] = true
			jobs := make(chan acpi.Machine)
			var workers sync.WaitGroup
			for range 4 {
				workers.Go(func() {
					for m := range jobs {
						compare(t, qemu, m)
					}
				})
			}
			count := 0
			for i, m := range matrix() {
				if i%stride == 0 && (m.CPUs <= 255 || profile != acpi.QEMU7_2) {
					m.QEMU = profile
					jobs <- m
					count++
				}
			}
			close(jobs)
			workers.Wait()
			t.Logf("%v: %d machines compared", profile, count)
		})
	}
}

func compare(t *testing.T, qemu string, m acpi.Machine) {
	want, err := dump(qemu, m)
	if err != nil {
		t.Errorf("%+v: QEMU: %v", m, err)
		return
	}
	got, err := acpi.Build(m)
	if err != nil {
		t.Errorf("%+v: %v", m, err)
		return
	}
	for _, f := range []struct {
		name      string
		want, got []byte
	}{{"tables", want.Tables, got.Tables}, {"rsdp", want.RSDP, got.RSDP}, {"loader", want.Loader, got.Loader}} {
		if !bytes.Equal(f.want, f.got) {
			at := 0
			for at < min(len(f.want), len(f.got)) && f.want[at] == f.got[at] {
				at++
			}
			t.Errorf("%+v: %s differ at %#x (of %#x and %#x)\nwant ... % x\ngot  ... % x", m, f.name, at, len(f.want), len(f.got),
				f.want[max(0, at-24):min(at+16, len(f.want))], f.got[max(0, at-24):min(at+16, len(f.got))])
			return
		}
	}
}
