package image_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure/image"
)

// firmware makes firmware files: a variable store, code, TDVF metadata and the table of
// GUIDs at the end, each of which a test may spoil.
type firmware struct {
	size     int
	sections []image.Section
	version  uint32
	count    uint32 // of sections; 0: as many as there are
	length   uint32 // 0: the right one
	magic    string
	guid     []byte // before the metadata
	entry    []byte // of the metadata in the table of GUIDs
	distance uint32 // from the end to the metadata; 0: the right one
	others   []byte // table entries behind it
	total    uint16 // length of the table; 0: the right one
	footer   []byte
	store    []byte // of variables
	code     []byte // what the code begins with
}

const (
	testStore = 0x1000
	testCode  = 0x2000
)

func newFirmware() *firmware {
	return &firmware{
		size: testStore + testCode,
		sections: []image.Section{
			{DataOffset: testStore, RawDataSize: testCode, Address: 0xfffc0000, MemorySize: testCode, Type: image.SectionBFV, Attributes: image.AttributeExtend},
			{DataOffset: 0, RawDataSize: testStore, Address: 0xfffa0000, MemorySize: testStore, Type: image.SectionCFV},
			{Address: 0x810000, MemorySize: 0x10000, Type: image.SectionTempMem},
			{Address: 0x80b000, MemorySize: 0x2000, Type: image.SectionTempMem},
			{Address: 0x809000, MemorySize: 0x2000, Type: image.SectionTDHOB},
			{Address: 0x800000, MemorySize: 0x6000, Type: image.SectionTempMem},
		},
		version: 1, magic: "TDVF",
		guid:   []byte("\xf3\xf9\xea\xe9\x8e\x16\xd5\x44\xa8\xeb\x7f\x4d\x87\x38\xf6\xae"),
		entry:  []byte("\x35\x65\x7a\xe4\x4a\x98\x98\x47\x86\x5e\x46\x85\xa7\xbf\x8e\xc2"),
		footer: []byte("\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d"),
		store:  blankStore(testStore),
	}
}

// blankStore makes an empty variable store.
func blankStore(size int) []byte {
	b := bytes.Repeat([]byte{0xff}, size)
	clear(b[:100])
	copy(b[16:], "\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50")
	copy(b[40:], "_FVH")
	b[48] = 72
	copy(b[72:], "\x78\x2c\xf3\xaa\x7b\x94\x9a\x43\xa1\x80\x2e\x14\x4e\xc3\x77\x92")
	binary.LittleEndian.PutUint32(b[88:], uint32(size/2))
	b[92], b[93] = 0x5a, 0xfe
	return b
}

// add appends a live variable to a blank store.
func addVariable(store []byte, guid, name string, data []byte) {
	at := 100
	for binary.LittleEndian.Uint16(store[at:]) == 0x55aa {
		at += (60 + int(binary.LittleEndian.Uint32(store[at+36:])+binary.LittleEndian.Uint32(store[at+40:])) + 3) &^ 3
	}
	v := store[at:]
	clear(v[:60])
	v[0], v[1], v[2] = 0xaa, 0x55, 0x3f
	binary.LittleEndian.PutUint32(v[36:], uint32(2*len(name)+2))
	binary.LittleEndian.PutUint32(v[40:], uint32(len(data)))
	copy(v[44:], guid)
	for i, c := range []byte(name + "\x00") {
		v[60+2*i], v[61+2*i] = c, 0
	}
	copy(v[60+2*len(name)+2:], data)
}

const (
	globalGUID = "\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c"
	enableGUID = "\xc7\x0b\xa3\xf0\x08\xaf\x56\x45\x99\xc4\x00\x10\x09\xc9\x3a\x44"
)

func (f *firmware) bytes() []byte {
	le := binary.LittleEndian
	b := make([]byte, f.size)
	for i := range b {
		b[i] = byte(i>>8) ^ byte(i)
	}
	copy(b, f.store)
	copy(b[len(f.store):f.size-0x1000-16], f.code)
	meta := f.size - 0x1000
	copy(b[meta-16:], f.guid)
	copy(b[meta:], f.magic)
	count := f.count
	if count == 0 {
		count = uint32(len(f.sections))
	}
	length := f.length
	if length == 0 {
		length = 16 + 32*count
	}
	le.PutUint32(b[meta+4:], length)
	le.PutUint32(b[meta+8:], f.version)
	le.PutUint32(b[meta+12:], count)
	for i, s := range f.sections {
		p := b[meta+16+32*i:]
		le.PutUint32(p, s.DataOffset)
		le.PutUint32(p[4:], s.RawDataSize)
		le.PutUint64(p[8:], s.Address)
		le.PutUint64(p[16:], s.MemorySize)
		le.PutUint32(p[24:], uint32(s.Type))
		le.PutUint32(p[28:], s.Attributes)
	}
	distance := f.distance
	if distance == 0 {
		distance = 0x1000
	}
	table := le.AppendUint32(nil, distance)
	table = append(le.AppendUint16(table, 4+18), f.entry...)
	table = append(table, f.others...)
	total := f.total
	if total == 0 {
		total = uint16(len(table) + 18)
	}
	table = append(le.AppendUint16(table, total), f.footer...)
	copy(b[f.size-32-len(table):], table)
	return b
}

// TestFirmwareRefused has one firmware for each thing that may be wrong.
func TestFirmwareRefused(t *testing.T) {
	for _, v := range []struct {
		name  string
		spoil func(*firmware)
		want  string
	}{
		{"footer", func(f *firmware) { f.footer[0]++ }, "no table of GUIDs"},
		{"table too short", func(f *firmware) { f.total = 17 }, "table of GUIDs has a length of 17"},
		{"table too long", func(f *firmware) { f.total = testStore + testCode }, "table of GUIDs has a length"},
		{"table cuts entry", func(f *firmware) { f.total = 18 + 10 }, "want an entry"},
		{"entry too short", func(f *firmware) { f.others = append([]byte{17, 0}, make([]byte, 16)...) }, "entry has a length of 17"},
		{"entry too long", func(f *firmware) { f.others = append([]byte{200, 0}, make([]byte, 16)...) }, "entry has a length of 200"},
		{"not for TDX", func(f *firmware) { f.entry[0]++ }, "no TDX metadata"},
		{"metadata outside", func(f *firmware) { f.distance = 1 << 30 }, "outside the file"},
		{"metadata at the end", func(f *firmware) { f.distance = 8 }, "outside the file"},
		{"metadata's GUID", func(f *firmware) { f.guid[0]++ }, "has the GUID"},
		{"signature", func(f *firmware) { f.magic = "TDVG" }, `signature is "TDVG"`},
		{"version", func(f *firmware) { f.version = 2 }, "version is 2"},
		{"no sections", func(f *firmware) { f.sections = nil }, "0 sections"},
		{"too many sections", func(f *firmware) { f.count = 65 }, "65 sections"},
		{"length", func(f *firmware) { f.length = 48 }, "length is 48"},
		{"type", func(f *firmware) { f.sections[2].Type = 4 }, "type is not modelled"},
		{"attributes", func(f *firmware) { f.sections[2].Attributes = 4 }, "attributes are 0x4"},
		{"address", func(f *firmware) { f.sections[2].Address++ }, "not aligned"},
		{"memory size", func(f *firmware) { f.sections[2].MemorySize++ }, "not aligned"},
		{"no memory", func(f *firmware) { f.sections[2].MemorySize = 0 }, "is empty"},
		{"huge memory", func(f *firmware) { f.sections[2].MemorySize = 1 << 62 }, "too large"},
		{"huge address", func(f *firmware) { f.sections[2].Address = 1<<64 - 4096 }, "too large"},
		{"memory in sum", func(f *firmware) {
			f.sections[2].MemorySize, f.sections[3].MemorySize = 1<<30, 1<<30
			f.sections[3].Address = 1 << 40
		}, "more than 1024 MiB"},
		{"data beyond memory", func(f *firmware) { f.sections[0].MemorySize -= 4096 }, "do not fit into"},
		{"data beyond file", func(f *firmware) { f.sections[1].DataOffset = 0xffffffff }, "outside the file"},
		{"measured but short", func(f *firmware) { f.sections[0].RawDataSize -= 4096 }, "is measured, but has"},
		{"measured and late", func(f *firmware) { f.sections[0].Attributes = 3 }, "also added later"},
		{"code without data", func(f *firmware) { f.sections[0].RawDataSize, f.sections[0].Attributes = 0, 0 }, "has no data"},
		{"HOB with data", func(f *firmware) { f.sections[4].RawDataSize = 16 }, "want none"},
		{"no HOB", func(f *firmware) { f.sections[4].Type = image.SectionTempMem }, "0 TD_HOB"},
		{"two HOBs", func(f *firmware) { f.sections[5].Type = image.SectionTDHOB }, "2 TD_HOB"},
		{"no code", func(f *firmware) { f.sections = f.sections[1:] }, "0 BFV"},
		{"no variables", func(f *firmware) { f.sections = slices.Delete(f.sections, 1, 2) }, "0 CFV"},
		{"overlap", func(f *firmware) { f.sections[3].Address = 0x80a000 }, "overlaps"},
		{"store's volume", func(f *firmware) { f.store[16]++ }, "no firmware volume"},
		{"store's header", func(f *firmware) { f.store[48] = 20 }, "volume header has 20 bytes"},
		{"store's state", func(f *firmware) { f.store[93] = 0 }, "no healthy store"},
		{"store's size", func(f *firmware) { binary.LittleEndian.PutUint32(f.store[88:], 1<<31) }, "store has"},
		{"variable's size", func(f *firmware) {
			addVariable(f.store, globalGUID, "PK", nil)
			binary.LittleEndian.PutUint32(f.store[100+40:], 1<<32-1)
		}, "variable 0 has"},
		{"variable twice", func(f *firmware) {
			addVariable(f.store, globalGUID, "PK", nil)
			addVariable(f.store, globalGUID, "PK", nil)
		}, `"PK" is there twice`},
	} {
		f := newFirmware()
		v.spoil(f)
		if _, err := image.ParseTDVF(f.bytes()); err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
	for _, n := range []int{0, 1, 31, 32, 47, 48, 49, 50, 51} {
		if _, err := image.ParseTDVF(newFirmware().bytes()[testStore+testCode-n:]); err == nil {
			t.Errorf("the last %d bytes of a firmware are parsed", n)
		}
	}
	if _, err := image.ParseTDVF(make([]byte, image.MaxFirmware+1)); err == nil || !strings.Contains(err.Error(), "want at most") {
		t.Errorf("too large: got %v", err)
	}
}

// TestFirmware reads a good one, with another entry in its table of GUIDs.
func TestFirmware(t *testing.T) {
	f := newFirmware()
	f.others = append([]byte("other data\x1c\x00"), make([]byte, 16)...)
	fw, err := image.ParseTDVF(f.bytes())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(fw.Sections, f.sections) {
		t.Errorf("sections are %v, want %v", fw.Sections, f.sections)
	}
	if got, want := fw.Layout().Witness(), image.DstackLayout05().Witness(); !bytes.Equal(got, want) {
		t.Errorf("layout is %x, want that of dstack 0.5, %x", got, want)
	}
	one, err1 := fw.MRTD(image.SinglePass)
	two, err2 := fw.MRTD(image.TwoPass)
	if _, err := fw.MRTD(0); err1 != nil || err2 != nil || err == nil || one == two {
		t.Errorf("MRTD in both orders: %v, %v (%v, %v); in none: %v", one, two, err1, err2, err)
	}
	f.sections[2].Attributes = image.AttributeAug
	aug, err := image.ParseTDVF(f.bytes())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := aug.MRTD(image.TwoPass); err != nil || got == two {
		t.Errorf("a section that is added later is in MRTD (%v)", err)
	}
	if got := fw.SecureBootVariables(); !slices.EqualFunc(got[:], make([][]byte, 5), bytes.Equal) {
		t.Errorf("a blank store has variables %q", got)
	}
}

// TestSecureBootVariables derives SecureBoot as edk2 does.
func TestSecureBootVariables(t *testing.T) {
	for _, v := range []struct {
		name   string
		enable []byte
		want   byte
	}{{"enabled", []byte{1}, 1}, {"disabled", []byte{0}, 0}, {"by default", nil, 1}} {
		f := newFirmware()
		addVariable(f.store, globalGUID, "PK", []byte("key"))
		if v.enable != nil {
			addVariable(f.store, enableGUID, "SecureBootEnable", v.enable)
		}
		fw, err := image.ParseTDVF(f.bytes())
		if err != nil {
			t.Fatal(err)
		}
		if got := fw.SecureBootVariables(); !bytes.Equal(got[0], []byte{v.want}) || string(got[1]) != "key" || got[2] != nil {
			t.Errorf("%s: got %q", v.name, got)
		}
	}
}

// patched changes single bytes of a file, in parts of 256 bytes that matter: each change
// is a part, an offset in it and a value. Inputs stay small, and most reach far.
func patched(file []byte, parts []int, changes []byte) []byte {
	b := bytes.Clone(file)
	for ; len(changes) >= 3; changes = changes[3:] {
		if at := parts[int(changes[0])%len(parts)] + int(changes[1]); at < len(b) {
			b[at] = changes[2]
		}
	}
	return b
}

func FuzzTDVF(f *testing.F) {
	file := newFirmware()
	addVariable(file.store, globalGUID, "PK", []byte("key"))
	addVariable(file.store, enableGUID, "SecureBootEnable", []byte{1})
	content := file.bytes()
	parts := []int{0, 100, len(content) - 0x1000 - 16, len(content) - 256}
	f.Add([]byte{}, uint16(0))
	f.Add([]byte{2, 32, 9, 3, 200, 1}, uint16(1))
	f.Fuzz(func(t *testing.T, changes []byte, cut uint16) {
		b := patched(content, parts, changes)
		fw, err := image.ParseTDVF(b[min(int(cut), len(b)):])
		if err != nil {
			return
		}
		if one, err := fw.MRTD(image.SinglePass); err != nil || one.IsZero() {
			t.Errorf("no MRTD (%v)", err)
		}
		fw.SecureBootVariables()
		if _, err := fw.Layout().TDHOB(1 << 32); err == nil {
			if _, err := image.ParseWitness(fw.Layout().Witness()); err != nil {
				t.Errorf("witness of a firmware does not parse: %v", err)
			}
		}
	})
}
