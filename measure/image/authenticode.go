package image

import (
	"cmp"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"slices"

	"tdx-agent/measure"
)

// authenticode returns the SHA-384 that edk2 measures for a PE image
// (SecurityPkg, MeasurePeImageAndExtend): the file without its checksum, its
// certificate table and the entry that points to that. Unlike Authenticode as
// Windows signs it, nothing is padded to 8 bytes. head replaces the first bytes of
// file, so that a patched header needs no copy of the rest.
func authenticode(file, head []byte) (measure.Digest, error) {
	if len(head) > len(file) {
		return measure.Digest{}, errors.New("PE: header is longer than the file")
	}
	p := peFile{file: file, head: head}
	if err := p.parse(); err != nil {
		return measure.Digest{}, fmt.Errorf("PE: %w", err)
	}
	h := sha512.New384()
	p.write(h, 0, p.checksum)
	if p.certEntry == 0 {
		p.write(h, p.checksum+4, p.headers)
	} else {
		p.write(h, p.checksum+4, p.certEntry)
		p.write(h, p.certEntry+8, p.headers)
	}
	sum := p.headers
	for _, s := range p.sections {
		p.write(h, s.offset, s.offset+s.size)
		sum += s.size
	}
	p.write(h, sum, int64(len(file))-p.certSize)
	return measure.Digest(h.Sum(nil)), nil
}

// peFile is the part of a PE image's structure that decides what is hashed. All are
// offsets and sizes in the file.
type peFile struct {
	file, head []byte
	checksum   int64 // offset of the 4-byte CheckSum
	certEntry  int64 // offset of the certificate table's directory entry, 0 without one
	certSize   int64
	headers    int64 // SizeOfHeaders
	sections   []peSection
}

type peSection struct{ offset, size int64 }

// write hashes [from, to), of which head overlays the beginning.
func (p *peFile) write(h hash.Hash, from, to int64) {
	n := int64(len(p.head))
	if from < n && from < to {
		h.Write(p.head[from:min(to, n)])
		from = n
	}
	if from < to {
		h.Write(p.file[from:to])
	}
}

// field returns a little-endian number of size bytes.
func (p *peFile) field(at int64, size int) (uint32, error) {
	var b [4]byte
	if at < 0 || at+int64(size) > int64(len(p.file)) {
		return 0, fmt.Errorf("field at %#x is outside the file of %d bytes", at, len(p.file))
	}
	copy(b[:size], p.file[at:])
	if at < int64(len(p.head)) {
		copy(b[:size], p.head[at:])
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

// fields reads several numbers; the first error wins.
func (p *peFile) fields(list ...peField) error {
	for _, f := range list {
		v, err := p.field(f.at, f.size)
		if err != nil {
			return err
		}
		*f.dst = int64(v)
	}
	return nil
}

type peField struct {
	dst  *int64
	at   int64
	size int
}

const (
	peFileHeader    = 20
	peSectionHeader = 40
	peSecurity      = 4 // index of the certificate table's directory entry
)

func (p *peFile) parse() error {
	var at, signature, count, optional, magic, directories int64
	if err := p.fields(peField{&at, 0x3c, 4}); err != nil {
		return err
	}
	if err := p.fields(peField{&signature, at, 4}, peField{&count, at + 4 + 2, 2}, peField{&optional, at + 4 + 16, 2}, peField{&magic, at + 4 + peFileHeader, 2}); err != nil {
		return err
	}
	if signature != 'P'|'E'<<8 {
		return fmt.Errorf("signature is %#x, want %#x", signature, 'P'|'E'<<8)
	}
	head := at + 4 + peFileHeader
	var table int64 // offset of the data directory
	switch magic {
	case 0x10b: // PE32
		table = head + 96
	case 0x20b: // PE32+
		table = head + 112
	default:
		return fmt.Errorf("optional header's magic is %#x, want 0x10b or 0x20b", magic)
	}
	p.checksum = head + 64
	if err := p.fields(peField{&p.headers, head + 60, 4}, peField{&directories, table - 4, 4}); err != nil {
		return err
	}
	minimum := p.checksum + 4
	if directories > peSecurity {
		p.certEntry = table + 8*peSecurity
		minimum = p.certEntry + 8
		if err := p.fields(peField{&p.certSize, p.certEntry + 4, 4}); err != nil {
			return err
		}
	}
	if p.headers < minimum || p.headers > int64(len(p.file)) {
		return fmt.Errorf("SizeOfHeaders is %d, want %d to %d", p.headers, minimum, len(p.file))
	}
	return p.parseSections(head+optional, int(count))
}

// parseSections demands that the sections lie in the file and are together not longer
// than it: overlapping ones would be hashed again and again.
func (p *peFile) parseSections(at int64, count int) error {
	sum := p.headers
	for i := range count {
		var s peSection
		if err := p.fields(peField{&s.size, at + 16, 4}, peField{&s.offset, at + 20, 4}); err != nil {
			return err
		}
		at += peSectionHeader
		if s.size == 0 {
			continue
		}
		if s.offset+s.size > int64(len(p.file)) {
			return fmt.Errorf("section %d, %#x+%#x, is outside the file of %#x bytes", i, s.offset, s.size, len(p.file))
		}
		sum += s.size
		p.sections = append(p.sections, s)
	}
	if sum+p.certSize > int64(len(p.file)) {
		return fmt.Errorf("headers, sections and certificates have %d bytes, but the file has %d", sum+p.certSize, len(p.file))
	}
	slices.SortStableFunc(p.sections, func(a, b peSection) int { return cmp.Compare(a.offset, b.offset) })
	return nil
}
