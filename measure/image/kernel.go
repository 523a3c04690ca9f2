package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"tdx-agent/measure"
)

// MaxKernel and MaxInitrd are the sizes in bytes of the largest kernel and initrd that
// are read. QEMU keeps the initrd's in 32 bits.
const (
	MaxKernel = 256 << 20
	MaxInitrd = 1<<32 - 1
)

// KernelMode is which bytes of the kernel the firmware measures. The zero value is
// none: the image and the QEMU version decide.
type KernelMode int

// The kernel modes.
const (
	// KernelPatched is the file with the setup header as QEMU until 10.1 fills it in.
	KernelPatched KernelMode = 1 + iota
	// KernelRaw is the file: QEMU since 10.2 leaves a confidential guest's alone.
	KernelRaw
	// KernelNormalized is a file that already has the header of KernelPatched, which
	// its firmware writes again whatever QEMU did.
	KernelNormalized
)

func (m KernelMode) String() string {
	switch m {
	case KernelPatched:
		return "patched"
	case KernelRaw:
		return "raw"
	case KernelNormalized:
		return "normalized"
	}
	return "unspecified"
}

// ParseKernelMode is the inverse of String. "" is the zero value.
func ParseKernelMode(s string) (KernelMode, error) {
	if s == "" {
		return 0, nil
	}
	for m := KernelPatched; m <= KernelNormalized; m++ {
		if s == m.String() {
			return m, nil
		}
	}
	return 0, fmt.Errorf("kernel mode is %q, want patched, raw or normalized", s)
}

// Fields of the setup header (Linux, Documentation/arch/x86/boot.rst).
const (
	setupSectors    = 0x1f1
	setupBootFlag   = 0x1fe
	setupMagic      = 0x202
	setupProtocol   = 0x206
	setupLoader     = 0x210
	setupLoadFlags  = 0x211
	setupRamdisk    = 0x218
	setupRamdiskLen = 0x21c
	setupHeapEnd    = 0x224
	setupCmdline    = 0x228
	setupInitrdMax  = 0x22c
	setupXLoadFlags = 0x236
	setupSize       = 0x400 // read here; the shortest that a kernel can have

	loadedHigh   = 1 << 0
	canUseHeap   = 1 << 7
	above4G      = 1 << 1 // XLF_CAN_BE_LOADED_ABOVE_4G
	qemuLoader   = 0xb0
	acpiReserved = 0x28000 // q35's acpi_data_size, kept free below the end of low RAM
	realMode     = 0x10000 // where QEMU puts setup code and command line
	cmdlineAt    = 0x20000
)

// patchSetup returns the first bytes of the kernel as QEMU (hw/i386, x86_load_linux)
// serves them to a guest with memory bytes of RAM.
func patchSetup(kernel []byte, initrdSize uint32, memory uint64) ([]byte, error) {
	if len(kernel) < setupSize {
		return nil, fmt.Errorf("kernel has %d bytes, want at least %d", len(kernel), setupSize)
	}
	le := binary.LittleEndian
	head := bytes.Clone(kernel[:setupSize])
	if le.Uint16(head[setupBootFlag:]) != 0xaa55 || string(head[setupMagic:][:4]) != "HdrS" {
		return nil, errors.New("kernel has no setup header; want a bzImage")
	}
	protocol := le.Uint16(head[setupProtocol:])
	if protocol < 0x203 || head[setupLoadFlags]&loadedHigh == 0 {
		return nil, unmodelled("kernel", "boot protocol %d.%02d, load flags %#x; want a bzImage of protocol 2.03 or later", protocol>>8, protocol&0xff, head[setupLoadFlags])
	}
	if n := int(head[setupSectors]); (n+1)*512 > len(kernel) {
		return nil, fmt.Errorf("kernel's setup code of %d sectors does not fit into %d bytes", n, len(kernel))
	}
	at, err := initrdAddress(head, protocol, initrdSize, memory)
	if err != nil {
		return nil, err
	}
	head[setupLoader] = qemuLoader
	head[setupLoadFlags] |= canUseHeap
	le.PutUint16(head[setupHeapEnd:], cmdlineAt-realMode-0x200)
	le.PutUint32(head[setupCmdline:], cmdlineAt)
	le.PutUint32(head[setupRamdisk:], at)
	le.PutUint32(head[setupRamdiskLen:], initrdSize)
	return head, nil
}

// initrdAddress is as high as kernel and low RAM allow.
func initrdAddress(head []byte, protocol uint16, size uint32, memory uint64) (uint32, error) {
	le := binary.LittleEndian
	limit := uint64(le.Uint32(head[setupInitrdMax:]))
	if protocol >= 0x20c && le.Uint16(head[setupXLoadFlags:])&above4G != 0 {
		limit = 1<<32 - 1
	}
	low := lowMemory(memory)
	if low <= acpiReserved {
		return 0, fmt.Errorf("memory of %d bytes has no room for an initrd", memory)
	}
	if limit >= low-acpiReserved {
		limit = low - acpiReserved - 1
	}
	if uint64(size) >= limit {
		return 0, fmt.Errorf("initrd of %d bytes does not fit below %#x", size, limit)
	}
	return uint32((limit - uint64(size)) &^ (pageSize - 1)), nil
}

// lowMemory is how much RAM q35 puts below 4 GiB.
func lowMemory(memory uint64) uint64 {
	if memory >= lowMemoryLimit {
		return lowMemorySplit
	}
	return memory
}

// kernelFile is a kernel in memory, and what its digest depends on.
type kernelFile struct {
	bytes      []byte
	initrdSize uint32
}

func (k *kernelFile) raw() (measure.Digest, error) { return authenticode(k.bytes, nil) }

func (k *kernelFile) patched(memory uint64) (measure.Digest, error) {
	head, err := patchSetup(k.bytes, k.initrdSize, memory)
	if err != nil {
		return measure.Digest{}, err
	}
	return authenticode(k.bytes, head)
}

// normalized reports whether patching for low memory of 2 GiB changes nothing.
func (k *kernelFile) normalized() (bool, error) {
	head, err := patchSetup(k.bytes, k.initrdSize, lowMemorySplit)
	return err == nil && bytes.Equal(head, k.bytes[:len(head)]), err
}
