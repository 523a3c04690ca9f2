package image

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// maxVMConfig bounds a vm_config in bytes. Carried measurements make up most of one.
const maxVMConfig = 256 << 10

// VMConfig is dstack's vm_config: what the host says of the machine. It is a claim that
// holds only if the registers computed from it are those of a verified quote.
type VMConfig struct {
	OSImageHash    []byte // 32 bytes, or nil
	CPUCount       uint32
	MemorySize     uint64 // bytes
	QEMUVersion    string
	PIC            *bool
	PCIHole64Size  uint64 // bytes; 0: QEMU's default
	Hugepages      bool
	NumGPUs        uint32
	NumNVSwitches  uint32
	NumNICs        uint32 // 1 where the member is left out
	NumVolumes     uint32 // num_verity_volumes
	SWTPM          bool
	HotplugOff     bool
	Image          string // name, such as "dstack-0.5.4"
	HostShareMode  string // "", "9p", "vvfat", "vhd"
	OVMFVariant    string
	Variant        string // tdx_attestation_variant: "", "legacy", "lite", ...
	Material       []byte // measurement.tdx.cbor, or nil
	ChecksumFile   []byte // the manifest that binds Material to OSImageHash, or nil
	UnknownMembers []string

	// TwoPassAddPages is the member qemu_single_pass_add_pages, whose value means the
	// opposite of its name: hosts send true where QEMU adds pages in two passes, and
	// dstack's verifier reads it so. nil: the QEMU version decides.
	TwoPassAddPages *bool
}

// ParseVMConfig parses a vm_config of at most 256 KiB, or a whole .sys-config.json with
// one in it. Members of another type than dstack writes and duplicate members are
// errors; unknown members are listed.
func ParseVMConfig(b []byte) (*VMConfig, error) {
	c, err := parseVMConfig(b)
	if err != nil {
		return nil, fmt.Errorf("vm_config: %w", err)
	}
	return c, nil
}

func parseVMConfig(b []byte) (*VMConfig, error) {
	if len(b) > maxVMConfig {
		return nil, fmt.Errorf("%d bytes, want at most %d", len(b), maxVMConfig)
	}
	o, err := parseObject(b)
	if err != nil {
		return nil, err
	}
	if inner, ok := o["vm_config"]; ok {
		var text string
		if err := json.Unmarshal(inner, &text); err != nil {
			return nil, fmt.Errorf("member vm_config: %v", err)
		}
		if o, err = parseObject([]byte(text)); err != nil {
			return nil, err
		}
		if _, again := o["vm_config"]; again {
			return nil, errors.New("a vm_config is in a vm_config in a vm_config")
		}
	}
	c := &VMConfig{NumNICs: 1}
	spec := uint32(1)
	var hash string
	var material, other json.RawMessage
	known := map[string]any{
		"os_image_hash": &hash, "cpu_count": &c.CPUCount, "memory_size": &c.MemorySize, "qemu_version": &c.QEMUVersion,
		"qemu_single_pass_add_pages": &c.TwoPassAddPages, "pic": &c.PIC, "pci_hole64_size": &c.PCIHole64Size, "hugepages": &c.Hugepages,
		"num_gpus": &c.NumGPUs, "num_nvswitches": &c.NumNVSwitches, "num_nics": &c.NumNICs, "num_verity_volumes": &c.NumVolumes,
		"swtpm": &c.SWTPM, "hotplug_off": &c.HotplugOff, "image": &c.Image, "host_share_mode": &c.HostShareMode,
		"ovmf_variant": &c.OVMFVariant, "tdx_attestation_variant": &c.Variant, "tdx_measurement": &material, "spec_version": &spec,
		"gcp_measurement": &other, "aws_measurement": &other, "sev_snp_measurement": &other,
	}
	if c.UnknownMembers, err = o.decode(known); err != nil {
		return nil, err
	}
	if spec != 1 {
		return nil, fmt.Errorf("spec_version is %d, want 1", spec)
	}
	for _, must := range []string{"cpu_count", "memory_size"} {
		if _, ok := o[must]; !ok {
			return nil, fmt.Errorf("%s is missing", must)
		}
	}
	if c.OSImageHash, err = hexHash("os_image_hash", hash); err != nil {
		return nil, err
	}
	return c, c.takeMaterial(material)
}

func hexHash(name, s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	b, err := hex.DecodeString(strings.TrimPrefix(s, "0x"))
	if err != nil || len(b) != 32 {
		return nil, fmt.Errorf("%s is %.80q, want 64 hexadecimal digits", name, s)
	}
	return b, nil
}

// takeMaterial reads tdx_measurement: base64 with the manifest, or in the version
// before that hexadecimal and without.
func (c *VMConfig) takeMaterial(doc json.RawMessage) error {
	if doc == nil {
		return nil
	}
	o, err := parseObject(doc)
	if err != nil {
		return fmt.Errorf("tdx_measurement: %w", err)
	}
	var m, sums, hash string
	var version uint32
	if _, err := o.decode(map[string]any{"measurement": &m, "checksum_file": &sums, "version": &version, "os_image_hash": &hash}); err != nil {
		return fmt.Errorf("tdx_measurement: %w", err)
	}
	if version == 2 {
		c.Material, err = hex.DecodeString(m)
	} else if c.Material, err = base64.StdEncoding.DecodeString(m); err == nil {
		c.ChecksumFile, err = base64.StdEncoding.DecodeString(sums)
	}
	if err != nil {
		return fmt.Errorf("tdx_measurement: %v", err)
	}
	return nil
}

// Machine returns the machine that the configuration describes. It does not say how
// the root disk is attached: that depends on the image.
func (c *VMConfig) Machine() (Machine, error) {
	m, err := c.machine()
	if err != nil {
		return Machine{}, fmt.Errorf("vm_config: %w", err)
	}
	return m, nil
}

func (c *VMConfig) machine() (Machine, error) {
	if c.SWTPM {
		return Machine{}, unmodelled("swtpm", "the ACPI tables of a TPM device")
	}
	if !slices.Contains([]string{"", "9p", "vvfat", "vhd"}, c.HostShareMode) {
		return Machine{}, unmodelled("host_share_mode", "%.40q", c.HostShareMode)
	}
	profile, err := ParseFirmwareProfile(c.OVMFVariant)
	if err != nil {
		return Machine{}, unmodelled("ovmf_variant", "%.40q", c.OVMFVariant)
	}
	if c.OVMFVariant == "" {
		profile = ""
	}
	for _, n := range []uint32{c.NumGPUs, c.NumNVSwitches, c.NumNICs, c.NumVolumes} {
		if n > maxDevices {
			return Machine{}, fmt.Errorf("%d devices of a kind, want at most %d", n, maxDevices)
		}
	}
	if c.CPUCount > MaxVCPUs {
		return Machine{}, fmt.Errorf("cpu_count is %d, want at most %d", c.CPUCount, MaxVCPUs)
	}
	m := Machine{
		VCPUs: int(c.CPUCount), MemoryBytes: c.MemorySize, QEMU: c.QEMUVersion, PIC: c.PIC,
		PCIHole64: c.PCIHole64Size, HotplugOff: c.HotplugOff, Hugepages: c.Hugepages,
		NICs: int(c.NumNICs), Volumes: int(c.NumVolumes), GPUs: int(c.NumGPUs), NVSwitches: int(c.NumNVSwitches),
		Firmware: profile,
	}
	if two := c.TwoPassAddPages; two != nil {
		if m.PageOrder = SinglePass; *two {
			m.PageOrder = TwoPass
		}
	}
	return m, m.Check()
}
