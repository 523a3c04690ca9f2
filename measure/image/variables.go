package image

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"

	"tdx-agent/measure"
)

// The variable store in a configuration firmware volume: a volume header, a store
// header, then variables at multiples of 4 bytes until erased flash (edk2,
// MdeModulePkg/Include/Guid/VariableFormat.h).
const (
	volumeHeader   = 72
	storeHeader    = 28
	variableHeader = 60
	variableStart  = 0x55aa
	storeFormatted = 0x5a
	storeHealthy   = 0xfe
	variableAdded  = 0x3f
	maxVariables   = 1024
)

type variableName struct {
	guid efiGUID
	name string
}

// secureVariables are measured in this order, whether they exist or not (edk2,
// MeasureAllSecureVariables).
var secureVariables = [5]variableName{
	{guidGlobal, "SecureBoot"}, {guidGlobal, "PK"}, {guidGlobal, "KEK"}, {guidImageDB, "db"}, {guidImageDB, "dbx"},
}

// parseVariableStore returns the live variables of a configuration firmware volume.
func parseVariableStore(cfv []byte) (map[variableName][]byte, error) {
	le := binary.LittleEndian
	if len(cfv) < volumeHeader+storeHeader || efiGUID(cfv[16:32]) != guidNVVolume || string(cfv[40:44]) != "_FVH" {
		return nil, errors.New("no firmware volume of variables")
	}
	head := int(le.Uint16(cfv[48:]))
	if head < volumeHeader || head > len(cfv)-storeHeader {
		return nil, fmt.Errorf("volume header has %d bytes, want %d to %d", head, volumeHeader, len(cfv)-storeHeader)
	}
	store := cfv[head:]
	if efiGUID(store[:16]) != guidAuthStore || store[20] != storeFormatted || store[21] != storeHealthy {
		return nil, errors.New("no healthy store of authenticated variables")
	}
	size := le.Uint32(store[16:])
	if size < storeHeader || uint64(size) > uint64(len(store)) {
		return nil, fmt.Errorf("store has %d bytes, want %d to %d", size, storeHeader, len(store))
	}
	return parseVariables(store[storeHeader:size])
}

func parseVariables(b []byte) (map[variableName][]byte, error) {
	le := binary.LittleEndian
	vars := map[variableName][]byte{}
	for n := 0; len(b) >= variableHeader && le.Uint16(b) == variableStart; n++ {
		if n == maxVariables {
			return nil, fmt.Errorf("more than %d variables", maxVariables)
		}
		nameSize, dataSize := uint64(le.Uint32(b[36:])), uint64(le.Uint32(b[40:]))
		end := variableHeader + nameSize + dataSize
		if end > uint64(len(b)) || nameSize%2 != 0 {
			return nil, fmt.Errorf("variable %d has a name of %d and data of %d bytes, with %d left", n, nameSize, dataSize, len(b))
		}
		if b[2] == variableAdded {
			name := variableName{efiGUID(b[44:60]), decodeUTF16(b[variableHeader:][:nameSize])}
			if _, twice := vars[name]; twice {
				return nil, fmt.Errorf("variable %q is there twice", name.name)
			}
			vars[name] = b[variableHeader+nameSize : end]
		}
		b = b[min(uint64(len(b)), (end+3)&^3):]
	}
	return vars, nil
}

// SecureBootVariables returns the data of SecureBoot, PK, KEK, db and dbx that follow from
// the variable store, nil for one that does not exist. SecureBoot is not stored: the
// firmware derives it from PK and SecureBootEnable. Without PK it exists, as 0, only in a
// firmware that is built with Secure Boot, which [TDVF.Inspect] tells.
func (t *TDVF) SecureBootVariables() (data [5][]byte) {
	for i, v := range secureVariables {
		data[i] = t.vars[v]
	}
	data[0] = nil
	if enable := t.vars[variableName{guidSecureEnable, "SecureBootEnable"}]; len(data[1]) > 0 {
		data[0] = []byte{0}
		if len(enable) == 0 || enable[0] == 1 {
			data[0] = []byte{1}
		}
	}
	return data
}

// measuredVariables returns the variables, and an error if the firmware has something
// that leads to further events or to other boot options. Its contents may be unknown.
func (t *TDVF) measuredVariables(c *Contents) ([5][]byte, error) {
	data := t.SecureBootVariables()
	for i, v := range secureVariables {
		if len(data[i]) > 0 {
			return data, unmodelled("firmware", "its variable store has %s; with Secure Boot keys more is measured than is known here", v.name)
		}
	}
	for v := range t.vars {
		if v.guid == guidGlobal && strings.HasPrefix(v.name, "Boot") {
			return data, unmodelled("firmware", "its variable store has boot options")
		}
	}
	if c == nil {
		return data, nil
	}
	if !c.SetupApp {
		return data, unmodelled("firmware", "it has no UiApp, so its boot options are not known")
	}
	if c.SecureBoot {
		data[0] = []byte{0}
	}
	return data, nil
}

// variableData returns UEFI_VARIABLE_DATA, what is hashed for an event of type
// EV_EFI_VARIABLE_DRIVER_CONFIG (TCG PFP, section 10.2.6).
func variableData(v variableName, data []byte) []byte {
	name := utf16.Encode([]rune(v.name))
	b := append([]byte(nil), v.guid[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	b = appendUTF16(b, v.name)
	return append(b, data...)
}

func appendUTF16(b []byte, s string) []byte {
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// decodeUTF16 drops the NUL at the end.
func decodeUTF16(b []byte) string {
	u := make([]uint16, 0, len(b)/2)
	for ; len(b) >= 2; b = b[2:] {
		u = append(u, binary.LittleEndian.Uint16(b))
	}
	if n := len(u); n > 0 && u[n-1] == 0 {
		u = u[:n-1]
	}
	return string(utf16.Decode(u))
}

// blankStore makes the volume of variables that OVMF's 4 MiB build starts with
// (OvmfPkg/VarStore.fdf.inc): an empty store, an event log area, and the working and
// spare blocks of the fault-tolerant write driver. dstack's images have it, and
// measurement.tdx.cbor, which says nothing of it, implies it.
func blankStore() []byte {
	const size, block, storeSize, working = 0x84000, 0x1000, 0x3ffb8, 0x41000
	le := binary.LittleEndian
	b := bytes.Repeat([]byte{0xff}, size)
	clear(b[:volumeHeader+storeHeader])
	copy(b[16:], guidNVVolume[:])
	le.PutUint64(b[32:], size)
	copy(b[40:], "_FVH")
	le.PutUint32(b[44:], 0x4feff) // attributes
	le.PutUint16(b[48:], volumeHeader)
	b[55] = 2 // revision
	le.PutUint32(b[56:], size/block)
	le.PutUint32(b[60:], block)
	var sum uint16
	for i := 0; i < volumeHeader; i += 2 {
		sum += le.Uint16(b[i:])
	}
	le.PutUint16(b[50:], -sum)

	store := b[volumeHeader:]
	copy(store, guidAuthStore[:])
	le.PutUint32(store[16:], storeSize)
	store[20], store[21] = storeFormatted, storeHealthy

	// EFI_FAULT_TOLERANT_WORKING_BLOCK_HEADER: signature, CRC-32, state, queue size.
	guid := newGUID(0x9e58292b, 0x7c68, 0x497d, [8]byte{0xa0, 0xce, 0x65, 0x00, 0xfd, 0x9f, 0x1b, 0x95})
	copy(b[working:], guid[:])
	le.PutUint32(b[working+16:], 0x642caf2c)
	le.PutUint32(b[working+20:], 0xfffffffe)
	le.PutUint64(b[working+24:], block-32)
	return b
}

func blankStoreDigest() measure.Digest { return sha512.Sum384(blankStore()) }
