package image_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

// newKernel makes a bzImage that is a PE file too: headers of 0x400 bytes, sections in
// another order than their data, 0x200 bytes behind them, and no certificates.
func newKernel() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0x3000)
	for i := range b {
		b[i] = byte(i * 7)
	}
	clear(b[:0x400])
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], peAt)
	copy(b[peAt:], "PE\x00\x00")
	le.PutUint16(b[peAt+6:], 3)     // sections
	le.PutUint16(b[peAt+20:], 0xa0) // size of the optional header
	le.PutUint16(b[peAt+24:], 0x20b)
	le.PutUint32(b[peAt+24+60:], 0x400) // headers
	le.PutUint32(b[peAt+24+64:], 0xdeadbeef)
	le.PutUint32(b[peAt+24+108:], 6) // directories
	for i, s := range [][2]uint32{{0x1000, 0x1e00}, {0, 0}, {0x1a00, 0x400}} {
		le.PutUint32(b[peSections+40*i+16:], s[0])
		le.PutUint32(b[peSections+40*i+20:], s[1])
	}
	b[0x1f1] = 1
	le.PutUint16(b[0x1fe:], 0xaa55)
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x20f)
	b[0x211] = 1
	le.PutUint32(b[0x22c:], 0x7fffffff)
	le.PutUint16(b[0x236:], 0x3f)
	return b
}

const (
	peAt       = 0x40
	peSections = peAt + 24 + 0xa0
	peChecksum = peAt + 24 + 64
	peSecurity = peAt + 24 + 112 + 32 // directory entry
)

// imageOf lays out an image, whose initrd has 5000 bytes.
func imageOf(t testing.TB, kernel []byte, metadata map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	doc := map[string]any{"bios": "ovmf.fd", "kernel": "bzImage", "initrd": "initrd", "cmdline": "console=ttyS0"}
	for k, v := range metadata {
		doc[k] = v
	}
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"ovmf.fd": newFirmware().bytes(), "bzImage": kernel, "initrd": make([]byte, 5000), "metadata.json": b} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "metadata.json")
}

func static(t testing.TB, metadata string) (*image.Measurement, error) {
	t.Helper()
	img, err := image.OpenImage(metadata)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	return img.Static(t.Context())
}

func kernelDigest(t *testing.T, kernel []byte, mode image.KernelMode, memory uint64) measure.Digest {
	t.Helper()
	m, err := static(t, imageOf(t, kernel, nil))
	if err != nil {
		t.Fatal(err)
	}
	d, err := m.KernelDigest(mode, memory)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestAuthenticode(t *testing.T) {
	k := newKernel()
	if got, want := kernelDigest(t, k, image.KernelRaw, 1<<30), sha512.Sum384(slices.Concat(k[:peChecksum], k[peChecksum+4:peSecurity], k[peSecurity+8:])); got != want {
		t.Errorf("without certificates: got %v, want %x", got, want)
	}
	binary.LittleEndian.PutUint32(k[peSecurity:], 0x2f00)
	binary.LittleEndian.PutUint32(k[peSecurity+4:], 0x100)
	if got, want := kernelDigest(t, k, image.KernelRaw, 1<<30), sha512.Sum384(slices.Concat(k[:peChecksum], k[peChecksum+4:peSecurity], k[peSecurity+8:0x2f00])); got != want {
		t.Errorf("with certificates: got %v, want %x", got, want)
	}
	binary.LittleEndian.PutUint32(k[peAt+24+108:], 4)
	if got, want := kernelDigest(t, k, image.KernelRaw, 1<<30), sha512.Sum384(slices.Concat(k[:peChecksum], k[peChecksum+4:])); got != want {
		t.Errorf("without a directory of certificates: got %v, want %x", got, want)
	}
	odd := append(newKernel(), 1, 2, 3)
	if got, want := kernelDigest(t, odd, image.KernelRaw, 1<<30), sha512.Sum384(slices.Concat(odd[:peChecksum], odd[peChecksum+4:peSecurity], odd[peSecurity+8:])); got != want {
		t.Errorf("of odd length: got %v, want %x, nothing padded", got, want)
	}
}

// TestSetupHeader compares the patched kernel with one patched by hand.
func TestSetupHeader(t *testing.T) {
	le := binary.LittleEndian
	for _, v := range []struct {
		name   string
		spoil  func([]byte)
		memory uint64
		at     uint32 // of the initrd
	}{
		{"1 GiB", func([]byte) {}, 1 << 30, 0x40000000 - 0x28000 - 0x2000},
		{"2 GiB", func([]byte) {}, 2 << 30, 0x80000000 - 0x28000 - 0x2000},
		{"2815 MiB", func([]byte) {}, 2815 << 20, 2815<<20 - 0x28000 - 0x2000},
		{"2816 MiB", func([]byte) {}, 2816 << 20, 0x80000000 - 0x28000 - 0x2000},
		{"4 GiB, below the kernel's limit", func(k []byte) { k[0x236] = 0x3d; le.PutUint32(k[0x22c:], 0x37ffffff) }, 4 << 30, 0x37ffe000},
		{"old protocol", func(k []byte) { le.PutUint16(k[0x206:], 0x203); le.PutUint32(k[0x22c:], 0x37ffffff) }, 4 << 30, 0x37ffe000},
	} {
		k := newKernel()
		v.spoil(k)
		got := kernelDigest(t, k, image.KernelPatched, v.memory)
		want := bytes.Clone(k)
		want[0x210], want[0x211] = 0xb0, 0x81
		le.PutUint16(want[0x224:], 0xfe00)
		le.PutUint32(want[0x228:], 0x20000)
		le.PutUint32(want[0x218:], v.at)
		le.PutUint32(want[0x21c:], 5000)
		if got != kernelDigest(t, want, image.KernelRaw, v.memory) {
			t.Errorf("%s: the patched kernel is not the one patched by hand", v.name)
		}
	}
}

// TestNormalizedKernel takes a kernel that carries the header already, and no other.
func TestNormalizedKernel(t *testing.T) {
	k := newKernel()
	m, err := static(t, imageOf(t, k, nil))
	if err != nil {
		t.Fatal(err)
	}
	if d, err := m.KernelDigest(image.KernelNormalized, 1<<30); err == nil {
		t.Errorf("a kernel that is not normalized has the digest %v", d)
	}
	k[0x210], k[0x211] = 0xb0, 0x81
	binary.LittleEndian.PutUint16(k[0x224:], 0xfe00)
	binary.LittleEndian.PutUint32(k[0x228:], 0x20000)
	binary.LittleEndian.PutUint32(k[0x218:], 0x7ffd6000)
	binary.LittleEndian.PutUint32(k[0x21c:], 5000)
	if m, err = static(t, imageOf(t, k, nil)); err != nil {
		t.Fatal(err)
	}
	low, err1 := m.KernelDigest(image.KernelNormalized, 1<<30)
	high, err2 := m.KernelDigest(image.KernelPatched, 4<<30)
	if err1 != nil || err2 != nil || low != high {
		t.Errorf("normalized at 1 GiB: %v, patched at 4 GiB: %v, want the same (%v, %v)", low, high, err1, err2)
	}
}

func TestKernelRefused(t *testing.T) {
	le := binary.LittleEndian
	for _, v := range []struct {
		name  string
		spoil func([]byte) []byte
		want  string
	}{
		{"short", func(k []byte) []byte { return k[:0x300] }, "want at least"},
		{"no boot flag", func(k []byte) []byte { k[0x1fe] = 0; return k }, "no setup header"},
		{"no magic", func(k []byte) []byte { k[0x202] = 0; return k }, "no setup header"},
		{"setup code", func(k []byte) []byte { k[0x1f1] = 200; return k }, "setup code"},
		{"initrd's limit", func(k []byte) []byte { le.PutUint16(k[0x236:], 0); le.PutUint32(k[0x22c:], 0); return k }, "does not fit below"},
		{"PE outside", func(k []byte) []byte { le.PutUint32(k[0x3c:], 0xffffffff); return k }, "outside the file"},
		{"PE signature", func(k []byte) []byte { k[peAt] = 'X'; return k }, "signature is"},
		{"PE magic", func(k []byte) []byte { k[peAt+24] = 0; return k }, "magic is"},
		{"PE headers short", func(k []byte) []byte { le.PutUint32(k[peAt+24+60:], 0x80); return k }, "SizeOfHeaders"},
		{"PE headers long", func(k []byte) []byte { le.PutUint32(k[peAt+24+60:], 0x7fffffff); return k }, "SizeOfHeaders"},
		{"section outside", func(k []byte) []byte { le.PutUint32(k[peSections+20:], 0xffffffff); return k }, "outside the file"},
		{"sections overlap", func(k []byte) []byte { le.PutUint32(k[peSections+40+16:], 0x1000); return k }, "but the file has"},
		{"section table outside", func(k []byte) []byte { le.PutUint16(k[peAt+6:], 0xffff); return k }, "outside the file"},
		{"certificates", func(k []byte) []byte { le.PutUint32(k[peSecurity+4:], 0x7fffffff); return k }, "but the file has"},
	} {
		_, err := static(t, imageOf(t, v.spoil(newKernel()), nil))
		if err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
	for name, spoil := range map[string]func([]byte){
		"protocol": func(k []byte) { le.PutUint16(k[0x206:], 0x202) },
		"zImage":   func(k []byte) { k[0x211] = 0 },
	} {
		k := newKernel()
		spoil(k)
		m, err := static(t, imageOf(t, k, nil))
		if err != nil {
			t.Fatal(err)
		}
		var not *image.UnmodelledError
		if _, err := m.KernelDigest(image.KernelPatched, 2<<30); !errors.As(err, &not) {
			t.Errorf("%s: patched: got %v, want an UnmodelledError", name, err)
		}
		if _, err := m.KernelDigest(image.KernelRaw, 2<<30); err != nil {
			t.Errorf("%s: raw: %v", name, err)
		}
	}
}

// FuzzKernel measures hostile kernels, in an image whose firmware is small.
func FuzzKernel(f *testing.F) {
	f.Add([]byte{}, uint16(0x3000))
	f.Add([]byte{1, 0xf1, 0, 2, 0x36, 0}, uint16(0x3000))
	path := imageOf(f, newKernel(), nil)
	f.Fuzz(func(t *testing.T, changes []byte, size uint16) {
		kernel := patched(newKernel(), []int{0, 0x100, 0x200}, changes)
		kernel = kernel[:min(int(size), len(kernel))]
		name := filepath.Join(filepath.Dir(path), fmt.Sprintf("kernel-%d", os.Getpid()))
		metadata := filepath.Join(filepath.Dir(path), fmt.Sprintf("metadata-%d.json", os.Getpid()))
		doc := fmt.Sprintf(`{"bios":"ovmf.fd","kernel":%q,"initrd":"initrd","cmdline":""}`, filepath.Base(name))
		if err := errors.Join(os.WriteFile(name, kernel, 0o600), os.WriteFile(metadata, []byte(doc), 0o600)); err != nil {
			t.Fatal(err)
		}
		m, err := static(t, metadata)
		if err != nil {
			return
		}
		for mode := image.KernelPatched; mode <= image.KernelNormalized; mode++ {
			for _, memory := range []uint64{1 << 20, 1 << 30, 4 << 30} {
				if d, err := m.KernelDigest(mode, memory); err == nil && d.IsZero() {
					t.Errorf("%v kernel for %d bytes has no digest and no error", mode, memory)
				}
			}
		}
	})
}

// TestKernelModesNamed has the same digests whether a mode was named to Static or not, and
// keeps what is wrong with the kernel for who asks.
func TestKernelModesNamed(t *testing.T) {
	for name, kernel := range map[string][]byte{"kernel": newKernel(), "zImage": append(newKernel()[:0x211], append([]byte{0}, newKernel()[0x212:]...)...)} {
		path := imageOf(t, kernel, nil)
		img, err := image.OpenImage(path)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		named, err := img.Static(t.Context(), image.KernelRaw)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := img.Static(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, mode := range []image.KernelMode{image.KernelPatched, image.KernelRaw} {
			a, errA := named.KernelDigest(mode, 4<<30)
			b, errB := plain.KernelDigest(mode, 4<<30)
			if a != b || (errA == nil) != (errB == nil) {
				t.Errorf("%s, %v: %v (%v), and without the mode %v (%v)", name, mode, a, errA, b, errB)
			}
		}
	}
}
