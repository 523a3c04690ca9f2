package image

import (
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"tdx-agent/measure"
)

// Types of event (TCG PFP, section 10.4.1).
const (
	typeSeparator      = 0x00000004
	typeEventTag       = 0x00000006
	typePlatformConfig = 0x0000000a
	typeVariable       = 0x80000001 // EV_EFI_VARIABLE_DRIVER_CONFIG
	typeBootVariable   = 0x80000002
	typeBootServices   = 0x80000003 // EV_EFI_BOOT_SERVICES_APPLICATION
	typeAction         = 0x80000007
	typeHandoffTables  = 0x80000009
	typeFirmwareBlob2  = 0x8000000a
	typeHandoffTables2 = 0x8000000b
)

// Event is one predicted event of RTMR0, RTMR1 or RTMR2.
type Event struct {
	IMR    int    // 0 to 2
	Type   uint32 // TCG event type
	Name   string // what it measures, in the words of this package: "TD HOB", "acpi-tables"
	Digest measure.Digest

	// Payload is the event data the firmware logs, where it is known. It is not in
	// general what Digest is of.
	Payload []byte

	// DependsOn names the inputs that move Digest: "firmware", "memory", "vcpus",
	// "qemu", "devices", "kernel", "initrd", "cmdline", "policy". Empty: constant.
	DependsOn []string

	// Opaque says that Digest was not computed but given by the policy.
	Opaque bool
}

// FirmwareProfile names the sequence of events that a line of edk2 measures.
type FirmwareProfile string

// The firmware profiles, named as in dstack's ovmf_variant.
const (
	// Pre202505 is every dstack image but those of 0.5.10 and the first of 0.6.0.
	Pre202505 FirmwareProfile = "pre202505"
	// Stable202505 is edk2-stable202505, which measures fw_cfg items and an SMBIOS
	// table too. The latter depends on the host and cannot be predicted.
	Stable202505 FirmwareProfile = "stable202505"
)

// ParseFirmwareProfile returns the profile of this name, Pre202505 for "".
func ParseFirmwareProfile(s string) (FirmwareProfile, error) {
	switch p := FirmwareProfile(s); p {
	case "":
		return Pre202505, nil
	case Pre202505, Stable202505:
		return p, nil
	}
	return "", fmt.Errorf("firmware profile is %q, want %s or %s", s, Pre202505, Stable202505)
}

func event(imr int, typ uint32, name string, measured []byte, dependsOn ...string) Event {
	return Event{IMR: imr, Type: typ, Name: name, Digest: sha512.Sum384(measured), DependsOn: dependsOn}
}

// logged is an event whose data is what is measured.
func logged(imr int, typ uint32, name string, measured []byte, dependsOn ...string) Event {
	e := event(imr, typ, name, measured, dependsOn...)
	e.Payload = measured
	return e
}

func separator(imr int) Event { return logged(imr, typeSeparator, "separator", make([]byte, 4)) }

// bootOption is a Boot#### variable that leads to an application in the firmware.
type bootOption struct {
	attributes  uint32
	description string
	file        efiGUID
}

const (
	optionActive = 0x001
	optionHidden = 0x008
	optionApp    = 0x100
)

// bootOptions returns the options that OVMF creates before it measures them.
func (p FirmwareProfile) bootOptions() []bootOption {
	if p == Stable202505 {
		return []bootOption{
			{optionActive | optionHidden | optionApp, "BootManagerMenuApp", guidBootMenuFile},
			{optionActive | optionApp, "EFI Firmware Setup", guidSetupApp},
		}
	}
	return []bootOption{{optionActive | optionHidden | optionApp, "UiApp", guidSetupApp}}
}

// encode returns the EFI_LOAD_OPTION (UEFI 2.10, section 3.1.3) whose device path
// leads to a file of the volume of drivers.
func (o bootOption) encode() []byte {
	var path []byte
	for i, g := range []efiGUID{guidDXEVolume, o.file} {
		subtype := byte(7 - i)                 // MEDIA_PIWG_FW_VOL_DP, MEDIA_PIWG_FW_FILE_DP
		path = append(path, 4, subtype, 20, 0) // MEDIA_DEVICE_PATH, length
		path = append(path, g[:]...)
	}
	path = append(path, 0x7f, 0xff, 4, 0)
	b := binary.LittleEndian.AppendUint32(nil, o.attributes)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(path)))
	b = append(appendUTF16(b, o.description), 0, 0)
	return append(b, path...)
}

// bootEvents returns BootOrder and the options it lists. The digest of a boot
// variable is of its data alone.
func (p FirmwareProfile) bootEvents() []Event {
	var order []byte
	var events []Event
	for i, o := range p.bootOptions() {
		order = binary.LittleEndian.AppendUint16(order, uint16(i))
		events = append(events, bootEvent(fmt.Sprintf("Boot%04X", i), o.encode()))
	}
	return append([]Event{bootEvent("BootOrder", order)}, events...)
}

func bootEvent(name string, data []byte) Event {
	e := event(0, typeBootVariable, name, data, "firmware")
	e.Payload = variableData(variableName{guidGlobal, name}, data)
	return e
}

// fwCfgEvents are the two items that stable202505 measures: no boot menu, and the
// boot order QEMU makes of -kernel.
func fwCfgEvents() []Event {
	return []Event{
		event(0, typePlatformConfig, "fw_cfg BootMenu", make([]byte, 2), "qemu"),
		event(0, typePlatformConfig, "fw_cfg bootorder", []byte("/rom@genroms/linuxboot_dma.bin\x00"), "qemu"),
	}
}

func hobEvent(d measure.Digest, hob uint64) Event {
	// EFI_HANDOFF_TABLE_POINTERS2 with one table (OvmfPkg, SecTdxHelperLib).
	table := newGUID(0x93bb96af, 0xb9f2, 0x4eb8, [8]byte{0x94, 0x62, 0xe0, 0xba, 0x74, 0x56, 0x42, 0x36})
	b := append([]byte{9}, "TdxTable\x00"...)
	b = binary.LittleEndian.AppendUint64(b, 1)
	b = append(b, table[:]...)
	b = binary.LittleEndian.AppendUint64(b, hob)
	return Event{Type: typeHandoffTables2, Name: "TD HOB", Digest: d, Payload: b, DependsOn: []string{"memory", "firmware"}}
}

func cfvEvent(d measure.Digest, at MemoryRange) Event {
	// UEFI_PLATFORM_FIRMWARE_BLOB2; the description is fixed in OVMF.
	const text = "Fv(XXXXXXXX-XXXX-XXXX-XXXX-XXXXXXXXXXXX)\x00"
	b := append([]byte{byte(len(text))}, text...)
	b = binary.LittleEndian.AppendUint64(b, at.Start)
	b = binary.LittleEndian.AppendUint64(b, at.Size)
	return Event{Type: typeFirmwareBlob2, Name: "CFV", Digest: d, Payload: b, DependsOn: []string{"firmware"}}
}

func variableEvent(v variableName, data []byte) Event {
	return logged(0, typeVariable, v.name, variableData(v, data), "firmware")
}

// rtmr1Events returns the events of a kernel that OVMF starts: the kernel's
// Authenticode digest, then what edk2 says of the attempt.
func rtmr1Events(kernel measure.Digest) []Event {
	action := func(s string) Event { return logged(1, typeAction, s, []byte(s)) }
	return []Event{
		{IMR: 1, Type: typeBootServices, Name: "kernel", Digest: kernel, DependsOn: []string{"kernel", "initrd", "memory", "qemu"}},
		action("Calling EFI Application from Boot Option"),
		separator(1),
		action("Exit Boot Services Invocation"),
		action("Exit Boot Services Returned with Success"),
	}
}

// Tags of the events that Linux's EFI stub measures (drivers/firmware/efi/libstub).
const (
	tagInitrd      = 0x8f3b22ec
	tagLoadOptions = 0x8f3b22ed
)

// rtmr2Events returns the events of Linux's EFI stub.
func rtmr2Events(commandLine, initrd measure.Digest) []Event {
	tagged := func(name string, d measure.Digest, tag uint32, text, input string) Event {
		b := binary.LittleEndian.AppendUint32(nil, tag)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(text)+1))
		return Event{IMR: 2, Type: typeEventTag, Name: name, Digest: d, Payload: append(append(b, text...), 0), DependsOn: []string{input}}
	}
	return []Event{
		tagged("cmdline", commandLine, tagLoadOptions, "LOADED_IMAGE::LoadOptions", "cmdline"),
		tagged("initrd", initrd, tagInitrd, "Linux initrd", "initrd"),
	}
}

// commandLineDigest is over what the EFI stub receives: the command line with the
// initrd option that OVMF's kernel loader needs, in UTF-16 with a NUL.
func commandLineDigest(commandLine string) measure.Digest {
	return sha512.Sum384(append(appendUTF16(nil, commandLine+" initrd=initrd"), 0, 0))
}

// replay extends the digests of one register's events.
func replay(events []Event, imr int) (d measure.Digest) {
	for _, e := range events {
		if e.IMR == imr {
			d = d.Extend(e.Digest)
		}
	}
	return d
}
