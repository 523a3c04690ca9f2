package image_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"tdx-agent/measure/image"
)

// The sizes of dstack's files: firmware of 4 MiB, kernel, initrd.
const (
	benchStore  = 0x84000
	benchCode   = 0x37c000
	benchKernel = 12 << 20
	benchInitrd = 16 << 20
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

// mustHash is how many bytes of the image have to be hashed: for MRTD in both orders 128
// for every page added and 384 for every 256 bytes measured; then CFV, kernel and initrd.
func mustHash(b *testing.B, path string) (n int64) {
	for _, name := range []string{"ovmf.fd", "bzImage", "initrd"} {
		content, err := os.ReadFile(filepath.Join(filepath.Dir(path), name))
		if err != nil {
			b.Fatal(err)
		}
		if name != "ovmf.fd" {
			n += int64(len(content))
			continue
		}
		fw, err := image.ParseTDVF(content)
		if err != nil {
			b.Fatal(err)
		}
		for _, s := range fw.Sections {
			if s.Attributes&image.AttributeAug == 0 {
				n += 2 * 128 * int64(s.MemorySize/4096)
			}
			if s.Attributes&image.AttributeExtend != 0 {
				n += 2 * 384 * int64(s.MemorySize/256)
			}
			if s.Type == image.SectionCFV {
				n += int64(s.RawDataSize)
			}
		}
	}
	return n
}

// floor hashes n bytes that are in the processor's cache, on one core.
func floor(n int64) {
	buf := make([]byte, 64<<10)
	h := sha512.New384()
	for ; n > 0; n -= int64(len(buf)) {
		h.Write(buf[:min(n, int64(len(buf)))])
	}
	h.Sum(nil)
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

// processorTime is what the process has used so far.
func processorTime(b *testing.B) time.Duration {
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

// BenchmarkImage compares measuring an image's files for a machine with hashing as many
// bytes, and with measuring for one more machine. The firmware has no drivers that could
// be looked at.
func BenchmarkImage(b *testing.B) { benchmarkImage(b, benchImage(b)) }

// BenchmarkDebianImage does so with real files: the firmware's drivers are decompressed
// as well, further where the metadata does not name the firmware's profile.
func BenchmarkDebianImage(b *testing.B) {
	for _, mib := range []int{16, 32, 64} {
		for _, variant := range []string{"", "pre202505"} {
			b.Run(fmt.Sprintf("initrd=%dMiB/variant=%s", mib, variant), func(b *testing.B) {
				benchmarkImage(b, debianImage(b, mib<<20, variant))
			})
		}
	}
}

func benchmarkImage(b *testing.B, path string) {
	machine := image.Machine{VCPUs: 4, MemoryBytes: 4 << 30, QEMU: "8.2.2", NICs: 1}
	n := mustHash(b, path)
	measured := func() *image.Measurement {
		m, err := static(b, path)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := m.Measure(machine); err != nil {
			b.Fatal(err)
		}
		return m
	}
	b.Run("floor-sha384", func(b *testing.B) {
		b.SetBytes(n)
		for b.Loop() {
			floor(n)
		}
	})
	b.Run("measure", func(b *testing.B) {
		b.SetBytes(n)
		b.ReportAllocs()
		for b.Loop() {
			measured()
		}
	})
	// The two in turns, as neighbours on the machine slow them down in turns too. By the
	// clock several cores help; by processor time it is what one core needs.
	b.Run("floors", func(b *testing.B) {
		var clock, processor []float64
		for b.Loop() {
			start, used := time.Now(), processorTime(b)
			floor(n)
			floored, usedByFloor := time.Since(start), processorTime(b)-used
			start, used = time.Now(), processorTime(b)
			measured()
			clock = append(clock, float64(time.Since(start))/float64(floored))
			processor = append(processor, float64(processorTime(b)-used)/float64(usedByFloor))
		}
		b.ReportMetric(median(clock), "floors")
		b.ReportMetric(median(processor), "cpu-floors")
	})
	b.Run("cached", func(b *testing.B) {
		m := measured()
		b.ReportAllocs()
		for b.Loop() {
			if _, err := m.Measure(machine); err != nil {
				b.Fatal(err)
			}
		}
	})
}
