package main

import (
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"tdx-agent/measure/image"
)

// machineFlags are the flags that describe a VM: one by one, or by its vm_config.
type machineFlags struct {
	cpu                                  int
	memory, ram                          string
	qemu, pic, hotplug, hole, root       string
	profile, kernel, smbios, numa        string
	gpus, nvswitches, nics, volumes      int
	twoPass, singlePass, hugepages, near bool
	vmConfig                             string
}

func (f *machineFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.vmConfig, "vm-config", "", "vm_config of the VM (JSON), instead of the flags that describe it")
	fs.IntVar(&f.cpu, "cpu", 0, "number of vCPUs")
	fs.StringVar(&f.memory, "memory", "", "size of memory: 4G, 4096M, or a number of MiB")
	fs.StringVar(&f.ram, "ram", "", "the same as --memory")
	fs.StringVar(&f.qemu, "qemu", "", "QEMU's version (default 9.1.0, as dstack assumes)")
	fs.BoolVar(&f.twoPass, "two-pass", false, "QEMU adds all pages before it measures them (default: by QEMU's version)")
	fs.BoolVar(&f.singlePass, "single-pass", false, "QEMU measures each page as it adds it (default: by QEMU's version)")
	fs.StringVar(&f.pic, "pic", "", "on or off: whether the VM has a PIC (default: by QEMU's version)")
	fs.StringVar(&f.hotplug, "hotplug", "on", "on or off: ACPI hotplug of PCI devices")
	fs.IntVar(&f.gpus, "gpus", 0, "number of GPUs passed through")
	fs.IntVar(&f.nvswitches, "nvswitches", 0, "number of NVSwitches passed through")
	fs.IntVar(&f.nics, "nics", 1, "number of network cards")
	fs.IntVar(&f.volumes, "volumes", 0, "number of verity volumes besides the root disk")
	fs.StringVar(&f.hole, "pci-hole64", "", "size of the 64-bit PCI window, with a unit: 64G (default, and 0: QEMU's)")
	fs.BoolVar(&f.hugepages, "hugepages", false, "memory comes from huge pages")
	fs.StringVar(&f.numa, "numa", "", "off, node or bridge: what huge pages make of the VM (default: node, as dstack's verifier; its VMM adds a bridge)")
	fs.StringVar(&f.root, "root", "", "virtio or cdrom: how the root file system is attached (default: by the image; virtio)")
	fs.StringVar(&f.profile, "firmware-profile", "", "pre202505 or stable202505 (default: by the image; pre202505)")
	fs.StringVar(&f.kernel, "kernel-mode", "", "patched, raw or normalized (default: by image and QEMU's version)")
	fs.StringVar(&f.smbios, "smbios", "", "digest of the SMBIOS event of stable202505, which cannot be calculated")
	fs.BoolVar(&f.near, "assume-profile", false, "use the nearest known QEMU for one that is too new")
	cmd.MarkFlagsMutuallyExclusive("two-pass", "single-pass")
	for _, name := range []string{"cpu", "memory", "ram", "qemu", "two-pass", "single-pass", "pic", "hotplug", "gpus", "nvswitches", "nics", "volumes", "pci-hole64", "hugepages"} {
		cmd.MarkFlagsMutuallyExclusive("vm-config", name)
	}
}

// machine returns the VM that the flags describe, and its vm_config if they name one.
func (f *machineFlags) machine() (image.Machine, *image.VMConfig, error) {
	var m image.Machine
	var c *image.VMConfig
	var err error
	if f.vmConfig != "" {
		if c, err = readVMConfig(f.vmConfig); err == nil {
			m, err = c.Machine()
		}
	} else {
		m, err = f.described()
	}
	if err == nil {
		err = f.refine(&m)
	}
	if err == nil {
		err = m.Check()
	}
	return m, c, usageUnlessCoded(err)
}

// unknownMembers says which members of a vm_config were not considered, "" if all were:
// one of a newer dstack may stand for a device that is in the tables.
func unknownMembers(c *image.VMConfig) string {
	if c == nil || len(c.UnknownMembers) == 0 {
		return ""
	}
	shown := c.UnknownMembers[:min(len(c.UnknownMembers), 8)]
	return fmt.Sprintf("vm_config: members that are not known here (%d) were not considered: %.80q", len(c.UnknownMembers), shown)
}

func readVMConfig(path string) (*image.VMConfig, error) {
	b, err := readCapped(path, 1<<20)
	if err != nil {
		return nil, err
	}
	c, err := image.ParseVMConfig(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func (f *machineFlags) described() (image.Machine, error) {
	m := image.Machine{VCPUs: f.cpu, QEMU: f.qemu, GPUs: f.gpus, NVSwitches: f.nvswitches, NICs: f.nics, Volumes: f.volumes, Hugepages: f.hugepages}
	if f.cpu == 0 || f.memory+f.ram == "" {
		return m, errors.New("want --cpu and --memory, or --vm-config")
	}
	var err error
	for _, s := range []string{f.memory, f.ram} {
		if s == "" {
			continue
		}
		size, err := parseSize(s, 1<<20)
		if err != nil {
			return m, fmt.Errorf("--memory: %v", err)
		}
		if m.MemoryBytes != 0 && m.MemoryBytes != size {
			return m, fmt.Errorf("--memory is %s and --ram is %s; want one of them", f.memory, f.ram)
		}
		m.MemoryBytes = size
	}
	if f.hole != "" && f.hole != "0" {
		if m.PCIHole64, err = parseSize(f.hole, 0); err != nil {
			return m, fmt.Errorf("--pci-hole64: %v", err)
		}
	}
	hotplug, err := onOff("--hotplug", f.hotplug)
	if err != nil {
		return m, err
	}
	m.HotplugOff = !*hotplug
	if f.pic != "" {
		m.PIC, err = onOff("--pic", f.pic)
	}
	switch {
	case f.twoPass:
		m.PageOrder = image.TwoPass
	case f.singlePass:
		m.PageOrder = image.SinglePass
	}
	return m, err
}

// refine sets what a vm_config does not say.
func (f *machineFlags) refine(m *image.Machine) (err error) {
	m.AssumeProfile = f.near
	switch f.root {
	case "":
	case "virtio":
		m.Root = image.RootVirtio
	case "cdrom":
		m.Root = image.RootCDROM
	default:
		return fmt.Errorf("--root is %q, want virtio or cdrom", f.root)
	}
	if f.profile != "" {
		if m.Firmware, err = image.ParseFirmwareProfile(f.profile); err != nil {
			return err
		}
	}
	if m.Kernel, err = image.ParseKernelMode(f.kernel); err != nil {
		return err
	}
	if m.NUMA, err = image.ParseNUMA(f.numa); err != nil {
		return fmt.Errorf("--numa: %v", err)
	}
	if f.smbios != "" {
		m.SMBIOS, err = parseDigest(f.smbios)
	}
	return err
}

func onOff(name, s string) (*bool, error) {
	on := s == "on"
	if !on && s != "off" {
		return nil, fmt.Errorf("%s is %q, want on or off", name, s)
	}
	return &on, nil
}

// parseSize parses a size in bytes with a unit K, M, G or T. A number without one counts
// in units of plain bytes, or is an error if plain is 0.
func parseSize(s string, plain uint64) (uint64, error) {
	digits := strings.TrimRight(s, "iBKMGTkmgt")
	unit := plain
	switch strings.ToUpper(strings.TrimSuffix(strings.TrimSuffix(s[len(digits):], "B"), "i")) {
	case "":
		if s[len(digits):] != "" || plain == 0 {
			return 0, fmt.Errorf("%q is no size; want a number with K, M, G or T", s)
		}
	case "K":
		unit = 1 << 10
	case "M":
		unit = 1 << 20
	case "G":
		unit = 1 << 30
	case "T":
		unit = 1 << 40
	default:
		return 0, fmt.Errorf("%q is no size; want a number with K, M, G or T", s)
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is no size; want a number with K, M, G or T", s)
	}
	high, size := bits.Mul64(n, unit)
	if high != 0 {
		return 0, fmt.Errorf("%q is too large", s)
	}
	return size, nil
}

// usageUnlessCoded makes an error one of usage: what was asked for is wrong, or not
// modelled.
func usageUnlessCoded(err error) error {
	var coded interface{ ExitCode() int }
	if err == nil || errors.As(err, &coded) {
		return err
	}
	return withExit(exitUsage, err)
}
