package tdxsim

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"unicode/utf16"

	"tdx-agent/measure"
)

// ccelSize is the length of the log area that the firmware reserves.
const ccelSize = 64 << 10

// Event types (TCG PC Client Platform Firmware Profile, 10.4.1).
const (
	evNoAction           = 0x00000003
	evSeparator          = 0x00000004
	evEventTag           = 0x00000006
	evPlatformConfig     = 0x0000000a
	evEFIVariableDriver  = 0x80000001
	evEFIVariableBoot    = 0x80000002
	evEFIBootApplication = 0x80000003
	evEFIAction          = 0x80000007
	evEFIFirmwareBlob2   = 0x8000000a
	evEFIHandoffTables2  = 0x8000000b
)

// Vendor GUIDs of EFI variables, device paths and tables, as they are stored.
var (
	guidGlobalVariable = []byte("\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c") // 8be4df61-93ca-11d2-aa0d-00e098032b8c
	guidImageSecurity  = []byte("\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f") // d719b2cb-3d3a-4596-a3bc-dad00e67656f
	guidTDTable        = []byte("\xaf\x96\xbb\x93\xf2\xb9\xb8\x4e\x94\x62\xe0\xba\x74\x56\x42\x36") // 93bb96af-b9f2-4eb8-9462-e0ba74564236
	guidKernelLoader   = []byte("\x72\xf7\x28\x14\x4a\xb6\x1e\x44\xb8\xc3\x9e\xbd\xd7\xf8\x93\xc7") // 1428f772-b64a-441e-b8c3-9ebdd7f893c7
	guidUIVolume       = []byte("\xc9\xbd\xb8\x7c\xeb\xf8\x34\x4f\xaa\xea\x3e\xe4\xaf\x65\x16\xa1") // 7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1
	guidUIApp          = []byte("\x21\xaa\x2c\x46\x14\x76\x03\x45\x83\x6e\x8a\xb6\xf4\x66\x23\x31") // 462caa21-7614-4503-836e-8ab6f4662331
)

// endOfPath is the device path node that ends every path (UEFI, 10.3.1).
const endOfPath = "\x7f\xff\x04\x00"

// synthetic is the digest of a part of the simulated image that does not exist.
func synthetic(what string) measure.Digest {
	return sha512.Sum384([]byte("tdx-agent SIMULATED image: " + what))
}

// bootEvents are the events of the simulated boot, in the order in which OVMF and
// the kernel's boot stub measure a direct kernel boot. Where the payload holds what
// is measured the digest follows from it, as in a real log; the others stand for
// content that is not in the log.
func bootEvents() []measure.Event {
	events := []measure.Event{
		{IMR: 0, Type: evEFIHandoffTables2, Payload: handoffTables(), Digest: synthetic("TD HOB")},
		{IMR: 0, Type: evEFIFirmwareBlob2, Payload: firmwareBlob(), Digest: synthetic("configuration firmware volume")},
		variable(evEFIVariableDriver, guidGlobalVariable, "SecureBoot", nil),
		variable(evEFIVariableDriver, guidGlobalVariable, "PK", nil),
		variable(evEFIVariableDriver, guidGlobalVariable, "KEK", nil),
		variable(evEFIVariableDriver, guidImageSecurity, "db", nil),
		variable(evEFIVariableDriver, guidImageSecurity, "dbx", nil),
		hashed(0, evSeparator, "\x00\x00\x00\x00"),
	}
	for _, table := range []string{"ACPI table loader", "ACPI RSDP", "ACPI tables"} {
		events = append(events, measure.Event{IMR: 0, Type: evPlatformConfig, Payload: []byte("ACPI DATA"), Digest: synthetic(table)})
	}
	return append(events,
		measure.Event{IMR: 1, Type: evEFIBootApplication, Payload: kernelImage(), Digest: synthetic("kernel")},
		variable(evEFIVariableBoot, guidGlobalVariable, "BootOrder", []byte{0, 0}),
		variable(evEFIVariableBoot, guidGlobalVariable, "Boot0000", loadOption()),
		hashed(1, evEFIAction, "Calling EFI Application from Boot Option"),
		hashed(1, evSeparator, "\x00\x00\x00\x00"),
		measure.Event{IMR: 2, Type: evEventTag, Payload: tagged(0x8f3b22ed, "LOADED_IMAGE::LoadOptions\x00"), Digest: synthetic("kernel command line")},
		measure.Event{IMR: 2, Type: evEventTag, Payload: tagged(0x8f3b22ec, "Linux initrd\x00"), Digest: synthetic("initrd")},
		hashed(1, evEFIAction, "Exit Boot Services Invocation"),
		hashed(1, evEFIAction, "Exit Boot Services Returned with Success"),
	)
}

// hashed is an event whose payload is what was measured.
func hashed(imr int, eventType uint32, payload string) measure.Event {
	return measure.Event{IMR: imr, Type: eventType, Payload: []byte(payload), Digest: sha512.Sum384([]byte(payload))}
}

// variable is UEFI_VARIABLE_DATA. Secure Boot's variables are measured whole, the
// boot variables by their data alone.
func variable(eventType uint32, vendor []byte, name string, data []byte) measure.Event {
	units := utf16.Encode([]rune(name))
	b := bytes.Clone(vendor)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(units)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	b = appendUTF16(b, units)
	b = append(b, data...)
	e := measure.Event{IMR: 0, Type: eventType, Payload: b, Digest: sha512.Sum384(b)}
	if eventType == evEFIVariableBoot {
		e.Digest = sha512.Sum384(data)
	}
	return e
}

func appendUTF16(b []byte, units []uint16) []byte {
	for _, u := range units {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// tagged is TCG_PCClientTaggedEvent, in which Linux's boot stub names what it
// measured.
func tagged(id uint32, description string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(description)))
	return append(b, description...)
}

// handoffTables is UEFI_HANDOFF_TABLE_POINTERS2 with the TD HOB alone.
func handoffTables() []byte {
	b := append([]byte{9}, "TdxTable\x00"...)
	b = binary.LittleEndian.AppendUint64(b, 1)
	b = append(b, guidTDTable...)
	return binary.LittleEndian.AppendUint64(b, 0x809000)
}

// firmwareBlob is UEFI_PLATFORM_FIRMWARE_BLOB2 of OVMF's variable volume. OVMF
// prints a volume without a name as a GUID of X.
func firmwareBlob() []byte {
	name := "Fv(XXXXXXXX-XXXX-XXXX-XXXX-XXXXXXXXXXXX)"
	b := append([]byte{byte(len(name) + 1)}, name...)
	b = append(b, 0)
	b = binary.LittleEndian.AppendUint64(b, 0xffc00000)
	return binary.LittleEndian.AppendUint64(b, 0x84000)
}

// kernelImage is UEFI_IMAGE_LOAD_EVENT of the kernel that QEMU hands over.
func kernelImage() []byte {
	path := append([]byte("\x04\x03\x14\x00"), guidKernelLoader...)
	path = append(path, "\x04\x04\x12\x00"...)
	path = appendUTF16(path, utf16.Encode([]rune("kernel\x00")))
	path = append(path, endOfPath...)
	b := binary.LittleEndian.AppendUint64(nil, 0x7b000000)
	b = binary.LittleEndian.AppendUint64(b, 0x00d00000)
	b = binary.LittleEndian.AppendUint64(b, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(path)))
	return append(b, path...)
}

// loadOption is EFI_LOAD_OPTION of OVMF's built-in UiApp.
func loadOption() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0x109)
	b = binary.LittleEndian.AppendUint16(b, 44)
	b = appendUTF16(b, utf16.Encode([]rune("UiApp\x00")))
	b = append(append(b, "\x04\x07\x14\x00"...), guidUIVolume...)
	b = append(append(b, "\x04\x06\x14\x00"...), guidUIApp...)
	return append(b, endOfPath...)
}

// encodeCCEL writes the log as the firmware does: a TCG_EfiSpecIDEvent that names
// SHA-384 as the only algorithm, TCG_PCR_EVENT2 records with measurement register
// index 1 for RTMR0, and 0xff to the end (TCG PFP 10.2 and 10.4.5; CC measurement
// register indices of UEFI 38.4.1).
func encodeCCEL(events []measure.Event) []byte {
	const algorithmSHA384 = 0x000c
	b := make([]byte, 0, ccelSize)
	put32 := func(v uint32) { b = binary.LittleEndian.AppendUint32(b, v) }
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, algorithmSHA384, 0, 48, 0, 0)
	put32(1)
	put32(evNoAction)
	b = append(b, make([]byte, 20)...)
	put32(uint32(len(spec)))
	b = append(b, spec...)
	for i := range events {
		e := &events[i]
		put32(uint32(e.IMR) + 1)
		put32(e.Type)
		put32(1)
		b = binary.LittleEndian.AppendUint16(b, algorithmSHA384)
		b = append(b, e.Digest[:]...)
		put32(uint32(len(e.Payload)))
		b = append(b, e.Payload...)
	}
	return append(b, bytes.Repeat([]byte{0xff}, ccelSize-len(b))...)
}

// afterBoot returns RTMR0 to RTMR3 as the boot leaves them.
func afterBoot(events []measure.Event) (rtmr [4]measure.Digest) {
	for i := range events {
		e := &events[i]
		rtmr[e.IMR] = rtmr[e.IMR].Extend(e.Digest)
	}
	return rtmr
}
