package image_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/measure/image"
)

// rangeEncoder writes LZMA with literals only: enough to make volumes for tests. Real
// firmware, which has matches of every kind, is in the tests that want Debian's.
type rangeEncoder struct {
	low     uint64
	width   uint32
	cache   byte
	pending int
	out     []byte
}

func (e *rangeEncoder) shift() {
	if e.low < 0xff000000 || e.low > 0xffffffff {
		for ; e.pending > 0; e.pending-- {
			e.out = append(e.out, e.cache+byte(e.low>>32))
			e.cache = 0xff
		}
		e.cache = byte(e.low >> 24)
	}
	e.pending++
	e.low = e.low & 0xffffff << 8
}

func (e *rangeEncoder) bit(p *uint16, b int) {
	bound := (e.width >> 11) * uint32(*p)
	if b == 0 {
		e.width = bound
		*p += (1<<11 - *p) >> 5
	} else {
		e.low += uint64(bound)
		e.width -= bound
		*p -= *p >> 5
	}
	for e.width < 1<<24 {
		e.width <<= 8
		e.shift()
	}
}

// compress writes an .lzma stream with lc = 3, lp = 0, pb = 2.
func compress(b []byte) []byte {
	literal, match := make([]uint16, 0x300<<3), make([]uint16, 4)
	for _, t := range [][]uint16{literal, match} {
		for i := range t {
			t[i] = 1 << 10
		}
	}
	e := rangeEncoder{width: 1<<32 - 1, pending: 1}
	previous := byte(0)
	for i, c := range b {
		e.bit(&match[i&3], 0)
		t := literal[0x300*int(previous>>5):]
		symbol := 1
		for n := 7; n >= 0; n-- {
			v := int(c>>n) & 1
			e.bit(&t[symbol], v)
			symbol = symbol<<1 | v
		}
		previous = c
	}
	for range 5 {
		e.shift()
	}
	head := append([]byte{0x5d, 0, 0, 0x80, 0}, binary.LittleEndian.AppendUint64(nil, uint64(len(b)))...)
	return append(head, e.out...)
}

const (
	driversGUID    = "\xc9\xbd\xb8\x7c\xeb\xf8\x34\x4f\xaa\xea\x3e\xe4\xaf\x65\x16\xa1"
	setupGUID      = "\x21\xaa\x2c\x46\x14\x76\x03\x45\x83\x6e\x8a\xb6\xf4\x66\x23\x31"
	bootMenuGUID   = "\xdc\x5b\xc2\xee\xf2\x67\x95\x4d\xb1\xd5\xf8\x1b\x20\x39\xd1\x1d"
	secureBootGUID = "\x4f\xa4\xe6\xf0\x95\x71\xc3\x41\xac\x64\x54\xf2\x02\xcd\x0a\x21"
	lzmaGUID       = "\x98\x58\x4e\xee\x14\x39\x59\x42\x9d\x6e\xdc\x7b\xd7\x94\x03\xcf"
)

func size24(n int) []byte { return []byte{byte(n), byte(n >> 8), byte(n >> 16)} }

func section(typ byte, content []byte) []byte {
	b := append(append(size24(len(content)+4), typ), content...)
	return append(b, make([]byte, -len(b)&3)...)
}

func file(name string, typ byte, content []byte) []byte {
	b := append([]byte(name), 0, 0, typ, 0)
	b = append(append(append(b, size24(len(content)+24)...), 0xf8), content...)
	return append(b, bytes.Repeat([]byte{0xff}, -len(b)&7)...)
}

// volume makes a firmware volume with a name and files in it.
func volume(name string, files ...[]byte) []byte {
	b := make([]byte, 72)
	copy(b[40:], "_FVH")
	b[48], b[52] = 72, 72
	b = append(append(b, name...), 20, 0, 0, 0)
	b = append(b, make([]byte, -len(b)&7)...)
	for _, f := range files {
		b = append(b, f...)
	}
	b = append(b, bytes.Repeat([]byte{0xff}, 64)...)
	binary.LittleEndian.PutUint64(b[32:], uint64(len(b)))
	return b
}

// withDrivers makes a firmware whose code begins as OVMF's: a volume with a compressed
// section, in which are two volumes. The names are of the files in the second.
func withDrivers(drivers ...string) *firmware {
	var files [][]byte
	for _, d := range drivers {
		files = append(files, file(d, 9, []byte("code")))
	}
	inner := append(section(0x17, volume("another volume..", file(setupGUID, 9, nil))), section(0x17, volume(driversGUID, files...))...)
	compressed := section(0x02, append([]byte(lzmaGUID+"\x18\x00\x01\x00"), compress(inner)...))
	f := newFirmware()
	f.code = volume("the outer volume", file("a raw file......", 1, []byte{1}), file("the volumes.....", 0x0b, compressed))
	return f
}

func TestContents(t *testing.T) {
	for _, v := range []struct {
		name    string
		drivers []string
		want    image.Contents
		profile image.FirmwareProfile
	}{
		{"dstack", []string{setupGUID}, image.Contents{SetupApp: true}, image.Pre202505},
		{"Secure Boot", []string{secureBootGUID, setupGUID}, image.Contents{SecureBoot: true, SetupApp: true}, image.Pre202505},
		{"202505", []string{setupGUID, bootMenuGUID}, image.Contents{SetupApp: true, BootMenu: true}, image.Stable202505},
		{"neither", []string{bootMenuGUID[:15] + "x"}, image.Contents{}, image.Pre202505},
	} {
		fw, err := image.ParseTDVF(withDrivers(v.drivers...).bytes())
		if err != nil {
			t.Fatal(err)
		}
		c, err := fw.Inspect()
		if err != nil {
			t.Errorf("%s: %v", v.name, err)
			continue
		}
		if *c != v.want || c.Profile() != v.profile {
			t.Errorf("%s: got %+v, %s; want %+v, %s", v.name, *c, c.Profile(), v.want, v.profile)
		}
	}
	fw, err := image.ParseTDVF(newFirmware().bytes())
	if err != nil {
		t.Fatal(err)
	}
	if c, err := fw.Inspect(); err == nil {
		t.Errorf("code without a volume has %+v", c)
	}
}

// TestContentsMeasured has the events of what the firmware holds.
func TestContentsMeasured(t *testing.T) {
	machine := image.Machine{VCPUs: 1, MemoryBytes: 4 << 30, NICs: 1, QEMU: "8.2.2"}
	var metadata map[string]any
	measured := func(f *firmware) (*image.Measurement, []image.Event, error) {
		path := imageOf(t, newKernel(), metadata)
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), "ovmf.fd"), f.bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := static(t, path)
		if err != nil {
			t.Fatal(err)
		}
		events, err := m.RTMR0(machine)
		return m, events, err
	}
	// As logged by a guest on hardware whose firmware is built with Secure Boot.
	off := digest(t, "cfa4e2c606f572627bf06d5669cc2ab1128358d27b45bc63ee9ea56ec109cfafb7194006f847a6a74b5eaed6b73332ec")
	var not *image.UnmodelledError
	for _, metadata = range []map[string]any{nil, {"ovmf_variant": "pre202505"}} {
		_, events, err := measured(withDrivers(secureBootGUID, setupGUID))
		if err != nil || events[2].Name != "SecureBoot" || events[2].Digest != off {
			t.Errorf("Secure Boot is built in: got %+v (%v), want %v", events[2], err, off)
		}
		if _, _, err := measured(withDrivers()); !errors.As(err, &not) {
			t.Errorf("without UiApp: got %v, want an UnmodelledError", err)
		}
	}
	metadata = nil
	m, _, err := measured(newFirmware())
	if err != nil {
		t.Fatal(err)
	}
	r, err := m.Measure(machine)
	if err != nil || len(r.Assumed) != 1 || !strings.Contains(r.Assumed[0], "without Secure Boot") {
		t.Errorf("firmware that is not looked into: assumed %q (%v)", r.Assumed, err)
	}
	if m, _, err = measured(withDrivers(setupGUID)); err != nil {
		t.Fatal(err)
	}
	if r, err = m.Measure(machine); err != nil || len(r.Assumed) != 0 {
		t.Errorf("firmware that was looked into: assumed %q (%v)", r.Assumed, err)
	}
	if m, _, err := measured(withDrivers(setupGUID, bootMenuGUID)); m.Firmware != image.Stable202505 || err == nil {
		t.Errorf("202505: profile %s (%v)", m.Firmware, err)
	}
}

func TestDebianContents(t *testing.T) {
	for name, want := range map[string]image.Contents{bookwormOVMF: {SecureBoot: true, SetupApp: true}, trixieOVMF: {SetupApp: true}} {
		fw, err := image.ParseTDVF(debianFile(t, name))
		if err != nil {
			t.Fatal(err)
		}
		if c, err := fw.Inspect(); err != nil || *c != want {
			t.Errorf("%s: got %+v, want %+v (%v)", name, c, want, err)
		}
	}
}

// FuzzContents spoils volumes and their compressed form.
func FuzzContents(f *testing.F) {
	content := withDrivers(secureBootGUID, setupGUID, bootMenuGUID).bytes()
	f.Add([]byte{})
	f.Add([]byte{0, 60, 3, 1, 9, 200})
	f.Fuzz(func(t *testing.T, changes []byte) {
		fw, err := image.ParseTDVF(patched(content, []int{testStore, testStore + 0x100, testStore + 0x200}, changes))
		if err != nil {
			t.Fatal(err)
		}
		fw.Inspect()
	})
}
