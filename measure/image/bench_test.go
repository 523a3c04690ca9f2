package image_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"tdx-agent/measure/image"
)

// The sizes of dstack's files: firmware of 4 MiB, kernel, initrd.
const (
	benchStore  = 0x84000
	benchCode   = 0x37c000
	benchKernel = 12 << 20
	benchInitrd = 16 << 20

	// Bytes that must be hashed: per page added 128, per 256 bytes measured 384, for both
	// orders of MRTD; then CFV, kernel and initrd.
	benchAdded = (benchStore + benchCode + 0x1a000) / 4096
	benchBytes = 2*(128*benchAdded+384*(benchCode/256)) + benchStore + benchKernel + benchInitrd
)

func benchImage(b *testing.B) string {
	f := newFirmware()
	f.size = benchStore + benchCode
	f.store = blankStore(benchStore)
	code, store := &f.sections[0], &f.sections[1]
	code.DataOffset, code.RawDataSize, code.Address, code.MemorySize = benchStore, benchCode, 0xffc84000, benchCode
	store.RawDataSize, store.Address, store.MemorySize = benchStore, 0xffc00000, benchStore
	kernel := append(newKernel(), bytes.Repeat([]byte{1, 2, 3, 4}, benchKernel/4)...)[:benchKernel]
	binary.LittleEndian.PutUint32(kernel[peSections+16:], benchKernel-0x1e00)
	path := imageOf(b, kernel, nil)
	for name, content := range map[string][]byte{"ovmf.fd": f.bytes(), "initrd": make([]byte, benchInitrd)} {
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), content, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	return path
}

// BenchmarkImage compares measuring an image's files for a machine with hashing as many
// bytes, and with measuring for one more machine.
func BenchmarkImage(b *testing.B) {
	path := benchImage(b)
	machine := image.Machine{VCPUs: 4, MemoryBytes: 4 << 30, QEMU: "8.2.2", NICs: 1}
	b.Run("floor-sha384", func(b *testing.B) {
		buf := make([]byte, 1<<20)
		b.SetBytes(benchBytes)
		for b.Loop() {
			h := sha512.New384()
			for n := benchBytes; n > 0; n -= len(buf) {
				h.Write(buf[:min(n, len(buf))])
			}
			h.Sum(nil)
		}
	})
	b.Run("measure", func(b *testing.B) {
		b.SetBytes(benchBytes)
		b.ReportAllocs()
		for b.Loop() {
			m, err := static(b, path)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := m.Measure(machine); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("cached", func(b *testing.B) {
		m, err := static(b, path)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := m.Measure(machine); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkDebianImage measures an image of real files: its firmware's drivers are
// decompressed as well.
func BenchmarkDebianImage(b *testing.B) {
	path := debianImage(b)
	for b.Loop() {
		if _, err := static(b, path); err != nil {
			b.Fatal(err)
		}
	}
}
