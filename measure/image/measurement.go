package image

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"

	"tdx-agent/measure"
)

// Measurement is what an image contributes to the registers whatever machine it runs
// on: measured once by [Image.Static], or read by [ParseMaterial]. It may be used by
// several goroutines.
type Measurement struct {
	Layout         Layout
	CFV            measure.Digest // of the configuration firmware volume
	MRTDTwoPass    measure.Digest
	MRTDSinglePass measure.Digest
	Kernel         measure.Digest  // patched for a guest with 2 GiB or at least 2816 MiB
	CommandLine    measure.Digest  // with " initrd=initrd", as measured
	Initrd         measure.Digest  //
	Firmware       FirmwareProfile // of the image's metadata, else of its firmware's drivers; "" if neither says
	Root           RootDisk        // zero where the image does not say
	OSImageHash    []byte          // 32 bytes, or nil

	cfvAt      MemoryRange
	variables  [5][]byte // data of the measured variables
	assumed    []string  // see Result
	storeErr   error     // why the variable store makes RTMR0 unknown
	normalized bool      // metadata.json: kernel_header_normalized
	kernelErr  error     // why there is no patched kernel
	served     *servedKernel
}

// servedKernel keeps the kernel, whose digest depends on the size of memory.
type servedKernel struct {
	file *kernelFile

	mu      sync.Mutex
	raw     *measure.Digest
	patched map[uint64]measure.Digest // by size of low memory in bytes
}

// maxKernelDigests bounds the digests that are kept: one for each size of memory below
// 2816 MiB that is asked for.
const maxKernelDigests = 64

func (k *servedKernel) patchedDigest(memory uint64) (measure.Digest, error) {
	low := lowMemory(memory)
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.patched[low]; ok {
		return d, nil
	}
	d, err := k.file.patched(memory)
	if err == nil && len(k.patched) < maxKernelDigests {
		k.patched[low] = d
	}
	return d, err
}

func (k *servedKernel) rawDigest() (measure.Digest, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.raw == nil {
		d, err := k.file.raw()
		if err != nil {
			return d, err
		}
		k.raw = &d
	}
	return *k.raw, nil
}

// KernelDigest returns the digest of the kernel event: of the kernel in a mode, for a
// guest with memory bytes of RAM. A Measurement from [ParseMaterial] has only that of
// KernelPatched, and only for 2 GiB and from 2816 MiB; else it is an [*UnmodelledError].
func (m *Measurement) KernelDigest(mode KernelMode, memory uint64) (measure.Digest, error) {
	switch {
	case mode < KernelPatched || mode > KernelNormalized:
		return measure.Digest{}, fmt.Errorf("kernel mode %d, want patched, raw or normalized", int(mode))
	case mode == KernelPatched && lowMemory(memory) == lowMemorySplit:
		return m.Kernel, m.kernelErr
	case m.served == nil:
		return measure.Digest{}, unmodelled("kernel", "the measurement document has no digest of a %v kernel for %d MiB of memory; this needs the image", mode, memory>>20)
	case mode == KernelPatched:
		return m.served.patchedDigest(memory)
	case mode == KernelNormalized:
		if m.kernelErr != nil {
			return measure.Digest{}, m.kernelErr
		}
		if ok, err := m.served.file.normalized(); err != nil || !ok {
			return measure.Digest{}, fmt.Errorf("kernel's setup header is not normalized, so what is measured depends on the firmware")
		}
	}
	return m.served.rawDigest()
}

func (m *Measurement) mrtd(order PageOrder) measure.Digest {
	if order == TwoPass {
		return m.MRTDTwoPass
	}
	return m.MRTDSinglePass
}

// Result is what the registers of a TD must be, and why.
type Result struct {
	MRTD measure.Digest
	RTMR [3]measure.Digest
	Log  []Event // RTMR0's events, then RTMR1's, then RTMR2's

	// How open inputs were decided.
	QEMU      string
	PageOrder PageOrder
	PIC       bool
	Kernel    KernelMode
	Firmware  FirmwareProfile
	Root      RootDisk
	Proven    string // what the QEMU profile was proven against

	// Assumed is what was taken for granted and could not be looked at.
	Assumed []string

	// OtherMRTD is MRTD in the other page order: the usual mistake. It is a hint, not
	// a second accepted value.
	OtherMRTD measure.Digest

	OSImageHash []byte // 32 bytes, or nil
}

// Registers returns MRTD and RTMR0 to RTMR2; everything else is zero.
func (r *Result) Registers() measure.Registers {
	return measure.Registers{MRTD: r.MRTD, RTMR: [4]measure.Digest{r.RTMR[0], r.RTMR[1], r.RTMR[2]}}
}

// MRImage returns SHA-256(MRTD || RTMR1 || RTMR2): the image without the machine.
func (r *Result) MRImage() [32]byte {
	h := sha256.New()
	for _, d := range []measure.Digest{r.MRTD, r.RTMR[1], r.RTMR[2]} {
		h.Write(d[:])
	}
	return [32]byte(h.Sum(nil))
}

// MRSystem returns dstack's mr_system, which older tools call mr_enclave; keyProvider
// is the payload of the key-provider event, empty if there is none.
func (r *Result) MRSystem(keyProvider []byte) [32]byte {
	return measure.MRSystem(r.Registers(), keyProvider)
}

// MRAggregated returns dstack's mr_aggregated for a TD whose RTMR3 and configuration
// identities are those of rest; MRTD and RTMR0 to RTMR2 are taken from r.
func (r *Result) MRAggregated(rest measure.Registers) [32]byte {
	rest.MRTD = r.MRTD
	copy(rest.RTMR[:], r.RTMR[:])
	return measure.MRAggregated(rest)
}

// Measure returns the registers of a TD that runs the image on machine. An input that
// is not modelled is an [*UnmodelledError].
func (m *Measurement) Measure(machine Machine) (*Result, error) {
	if err := machine.Check(); err != nil {
		return nil, err
	}
	v, err := machine.version()
	if err != nil {
		return nil, err
	}
	r := &Result{QEMU: v.String(), PageOrder: machine.pageOrder(v), PIC: machine.pic(v), OSImageHash: m.OSImageHash, Assumed: m.assumed}
	r.Root, r.Firmware = m.rootDisk(machine), m.firmware(machine)
	r.Kernel = machine.kernelMode(v, m.normalized, r.Firmware)
	r.MRTD, r.OtherMRTD = m.mrtd(r.PageOrder), m.mrtd(TwoPass+SinglePass-r.PageOrder)
	kernel, err := m.KernelDigest(r.Kernel, machine.MemoryBytes)
	if err != nil {
		return nil, err
	}
	platform, proven, err := m.rtmr0Events(machine)
	if err != nil {
		return nil, err
	}
	r.Proven = proven
	r.Log = append(platform, rtmr1Events(kernel)...)
	r.Log = append(r.Log, rtmr2Events(m.CommandLine, m.Initrd)...)
	for i := range r.RTMR {
		r.RTMR[i] = replay(r.Log, i)
	}
	return r, nil
}

// rootDisk is the machine's, the image's, or where neither says so that of the dstack
// images with the firmware's memory layout.
func (m *Measurement) rootDisk(machine Machine) RootDisk {
	switch {
	case machine.Root != 0:
		return machine.Root
	case m.Root != 0:
		return m.Root
	case slices.Equal(m.Layout.Ranges, DstackLayout03().Ranges):
		return RootCDROM
	}
	return RootVirtio
}

func (m *Measurement) firmware(machine Machine) FirmwareProfile {
	switch {
	case machine.Firmware != "":
		return machine.Firmware
	case m.Firmware != "":
		return m.Firmware
	}
	return Pre202505
}

// RTMR1 returns RTMR1 for a kernel event with this digest, as [Measurement.KernelDigest]
// returns.
func RTMR1(kernel measure.Digest) measure.Digest { return replay(rtmr1Events(kernel), 1) }

// RTMR0 returns the events of RTMR0 alone, which depend on firmware and machine but not
// on kernel, command line and initrd.
func (m *Measurement) RTMR0(machine Machine) ([]Event, error) {
	if err := machine.Check(); err != nil {
		return nil, err
	}
	events, _, err := m.rtmr0Events(machine)
	return events, err
}

// rtmr0Events returns the platform's events in the order of the firmware profile, and
// what the ACPI tables in it were proven against.
func (m *Measurement) rtmr0Events(machine Machine) ([]Event, string, error) {
	if m.storeErr != nil {
		return nil, "", m.storeErr
	}
	hob, err := m.Layout.tdHOBDigest(machine.MemoryBytes)
	if err != nil {
		return nil, "", err
	}
	tables, err := tablesOf(machine, m.rootDisk(machine))
	if err != nil {
		return nil, "", err
	}
	profile := m.firmware(machine)
	events := []Event{hobEvent(hob, m.Layout.HOB), cfvEvent(m.CFV, m.cfvAt)}
	if profile == Stable202505 {
		events = append(events, fwCfgEvents()...)
	}
	for i, v := range secureVariables {
		events = append(events, variableEvent(v, m.variables[i]))
	}
	events = append(append(events, separator(0)), tables.events...)
	if profile == Stable202505 {
		if machine.SMBIOS == nil {
			return nil, "", unmodelled("firmware_profile", "%s measures an SMBIOS table that depends on the host; its digest must come from a policy", profile)
		}
		events = append(events, Event{Type: typeHandoffTables, Name: "SMBIOS", Digest: *machine.SMBIOS, DependsOn: []string{"policy"}, Opaque: true})
	}
	return append(events, profile.bootEvents()...), tables.proven, nil
}
