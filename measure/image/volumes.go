package image

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Contents is what a firmware's volume of drivers holds, as far as events depend on it.
type Contents struct {
	SecureBoot bool // built with Secure Boot: the variable SecureBoot exists, if only as 0
	SetupApp   bool // UiApp, which Boot0000 of pre202505 leads to
	BootMenu   bool // BootManagerMenuApp, which Boot0000 of stable202505 leads to
}

// Profile returns the firmware profile that the contents are of.
func (c *Contents) Profile() FirmwareProfile {
	if c.BootMenu {
		return Stable202505
	}
	return Pre202505
}

// Firmware volumes, files and sections (UEFI PI 1.8, volume 3).
const (
	fileHeader, largeFileHeader = 24, 32
	fileTypeVolume              = 0x0b // EFI_FV_FILETYPE_FIRMWARE_VOLUME_IMAGE
	fileLarge                   = 0x01 // FFS_ATTRIB_LARGE_FILE
	sectionGUIDDefined          = 0x02
	sectionVolume               = 0x17
	guidDefinedHeader           = 20 // GUID, offset of the data, attributes

	maxVolumes = 64 << 20 // bytes that come out of the compressed volumes
	maxFiles   = 1024     // of a volume
	filesAfter = 8        // files behind UiApp that BootManagerMenuApp is looked for in
)

// Inspect decompresses the firmware's volume of drivers as far as needed: in OVMF what
// depends on Secure Boot comes before UiApp, and BootManagerMenuApp near it. It is an
// error if there is no such volume in a form known here; the firmware may be good all
// the same.
func (t *TDVF) Inspect() (*Contents, error) { return t.inspect(filesAfter) }

// inspect looks at so many files behind UiApp. With 0, Contents' BootMenu and Profile are
// not to be used.
func (t *TDVF) inspect(behind int) (*Contents, error) {
	for i := range t.Sections {
		s := &t.Sections[i]
		if s.Type != SectionBFV {
			continue
		}
		compressed, err := compressedVolumes(s.data(t.fw))
		if err != nil {
			return nil, fmt.Errorf("firmware: %w", err)
		}
		stream, err := openLZMA(compressed, maxVolumes)
		if err != nil {
			return nil, fmt.Errorf("firmware: %w", err)
		}
		c, err := inspectDrivers(stream, behind)
		if err != nil {
			return nil, fmt.Errorf("firmware: %w", err)
		}
		return c, nil
	}
	return nil, errors.New("firmware: no code")
}

// source is bytes that may have to be made first.
type source interface {
	at(offset, n int) ([]byte, error)
}

// plain is bytes that are there.
type plain []byte

func (p plain) at(offset, n int) ([]byte, error) {
	if offset < 0 || n < 0 || offset > len(p)-n {
		return nil, fmt.Errorf("volume: %d bytes at %d are beyond its %d", n, offset, len(p))
	}
	return p[offset:][:n], nil
}

// compressedVolumes finds the LZMA section in the outer volume, which OVMF calls
// FVMAIN_COMPACT and which starts the code.
func compressedVolumes(code []byte) ([]byte, error) {
	var found []byte
	err := eachFile(plain(code), 0, nil, func(file volumeFile) (bool, error) {
		if file.typ != fileTypeVolume {
			return true, nil
		}
		return true, eachSection(plain(code), file.start, file.end, func(x fileSection) (bool, error) {
			head, err := plain(code).at(x.start, guidDefinedHeader)
			if x.typ != sectionGUIDDefined || err != nil || efiGUID(head[:16]) != guidLZMA {
				return true, nil
			}
			data := x.header + int(binary.LittleEndian.Uint16(head[16:]))
			if data > x.end {
				return false, fmt.Errorf("compressed section: its data at %#x is behind its end %#x", data, x.end)
			}
			if found == nil {
				found, err = plain(code).at(data, x.end-data)
			}
			return false, err
		})
	})
	if err == nil && found == nil {
		err = errors.New("no LZMA section in its first volume")
	}
	return found, err
}

// inspectDrivers looks through the volume of drivers among those that were compressed.
func inspectDrivers(s *lzmaStream, behind int) (*Contents, error) {
	var c *Contents
	err := eachSection(s, 0, s.size, func(x fileSection) (bool, error) {
		if x.typ != sectionVolume {
			return true, nil
		}
		var name efiGUID
		var found Contents
		after := 0
		err := eachFile(s, x.start, &name, func(file volumeFile) (bool, error) {
			if name != guidDXEVolume {
				return false, nil
			}
			found.SecureBoot = found.SecureBoot || file.name == guidSecureConfig
			found.BootMenu = found.BootMenu || file.name == guidBootMenuFile
			found.SetupApp = found.SetupApp || file.name == guidSetupApp
			if found.SetupApp {
				after++
			}
			return after <= behind, nil
		})
		if err == nil && name == guidDXEVolume {
			c = &found
		}
		return c == nil, err
	})
	if err == nil && c == nil {
		err = errors.New("no volume of drivers")
	}
	return c, err
}

// volumeFile is one file of a volume; start and end are those of its content.
type volumeFile struct {
	name       efiGUID
	typ        byte
	start, end int
}

// eachFile calls f for each file of the volume at an offset, after setting name to the
// volume's name, until f says no.
func eachFile(s source, offset int, name *efiGUID, f func(volumeFile) (bool, error)) error {
	le := binary.LittleEndian
	head, err := s.at(offset, volumeHeader)
	if err != nil {
		return err
	}
	size, first, extended := le.Uint64(head[32:]), int(le.Uint16(head[48:])), int(le.Uint16(head[52:]))
	if string(head[40:44]) != "_FVH" || size > maxVolumes || first < 56 {
		return errors.New("no firmware volume where one is expected")
	}
	if extended != 0 { // name, size of the extended header
		x, err := s.at(offset+extended, 20)
		if err != nil {
			return err
		}
		if name != nil {
			*name = efiGUID(x[:16])
		}
		if n := le.Uint32(x[16:]); n < 20 || n > 1<<16 {
			return fmt.Errorf("volume: extended header has %d bytes", n)
		}
		first = extended + int(le.Uint32(x[16:]))
	}
	at := (first + 7) &^ 7
	for range maxFiles {
		if at+fileHeader > int(size) {
			return nil
		}
		file, next, err := readFile(s, offset+at)
		if err != nil || next == 0 {
			return err
		}
		if more, err := f(file); err != nil || !more {
			return err
		}
		at = (next - offset + 7) &^ 7
	}
	return fmt.Errorf("volume has more than %d files", maxFiles)
}

// readFile reads a file's header. next is 0 where only erased flash follows.
func readFile(s source, at int) (file volumeFile, next int, err error) {
	head, err := s.at(at, fileHeader)
	if err != nil {
		return file, 0, err
	}
	erased := true
	for _, b := range head {
		erased = erased && b == 0xff
	}
	if erased {
		return file, 0, nil
	}
	file = volumeFile{name: efiGUID(head[:16]), typ: head[18], start: at + fileHeader}
	size := uint64(head[20]) | uint64(head[21])<<8 | uint64(head[22])<<16
	if head[19]&fileLarge != 0 {
		file.start = at + largeFileHeader
		if head, err = s.at(at, largeFileHeader); err != nil {
			return file, 0, err
		}
		size = binary.LittleEndian.Uint64(head[24:])
	}
	if size < uint64(file.start-at) || size > maxVolumes {
		return file, 0, fmt.Errorf("volume: file %v has %d bytes", file.name, size)
	}
	file.end = at + int(size)
	return file, file.end, nil
}

// fileSection is one section of a file: offsets of its header, its content and its end.
type fileSection struct {
	typ                byte
	header, start, end int
}

// eachSection calls f for each section between two offsets until f says no.
func eachSection(s source, at, end int, f func(fileSection) (bool, error)) error {
	for range maxFiles {
		if at+4 > end {
			return nil
		}
		head, err := s.at(at, 4)
		if err != nil {
			return err
		}
		start, size, typ := at+4, int(head[0])|int(head[1])<<8|int(head[2])<<16, head[3]
		if size == 0xffffff {
			if head, err = s.at(at, 8); err != nil {
				return err
			}
			start, size = at+8, int(binary.LittleEndian.Uint32(head[4:]))
		}
		if size < start-at || size > end-at {
			return fmt.Errorf("volume: section of type %#x has %d bytes, with %d left", typ, size, end-at)
		}
		if more, err := f(fileSection{typ, at, start, at + size}); err != nil || !more {
			return err
		}
		at = (at + size + 3) &^ 3
	}
	return fmt.Errorf("volume has more than %d sections", maxFiles)
}
