package image_test

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

func TestImageRefused(t *testing.T) {
	for _, v := range []struct {
		name     string
		metadata map[string]any
		want     string
	}{
		{"path upwards", map[string]any{"kernel": "../bzImage"}, "in the image's folder"},
		{"absolute path", map[string]any{"initrd": "/etc/passwd"}, "in the image's folder"},
		{"no firmware", map[string]any{"bios": ""}, "in the image's folder"},
		{"type", map[string]any{"cmdline": 1}, "cmdline"},
		{"NUL", map[string]any{"cmdline": "a\x00b"}, "NUL"},
		{"video mode", map[string]any{"cmdline": "quiet vga=ask"}, "vga="},
		{"variant", map[string]any{"ovmf_variant": "other"}, "ovmf_variant"},
		{"absent", map[string]any{"initrd": "other"}, "other"},
		{"folder", map[string]any{"initrd": "."}, "want a regular file"},
	} {
		if _, err := static(t, imageOf(t, newKernel(), v.metadata)); err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
	for name, text := range map[string]string{"not JSON": "{", "array": "[]", "twice": `{"bios":"a","bios":"b"}`, "more": "{} {}", "UTF-8": "{\"\xff\":1}", "large": strings.Repeat(" ", 1<<17)} {
		if _, err := image.ParseMetadata([]byte(text)); err == nil {
			t.Errorf("%s: parsed", name)
		}
	}
}

// TestImageConfined does not follow a link out of the folder, and does not hang at a FIFO.
func TestImageConfined(t *testing.T) {
	path := imageOf(t, newKernel(), map[string]any{"initrd": "link"})
	outside := filepath.Join(t.TempDir(), "secret")
	if err := errors.Join(os.WriteFile(outside, []byte("secret"), 0o600), os.Symlink(outside, filepath.Join(filepath.Dir(path), "link"))); err != nil {
		t.Fatal(err)
	}
	if _, err := static(t, path); err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("link out of the folder: got %v", err)
	}
	path = imageOf(t, newKernel(), map[string]any{"initrd": "fifo"})
	if err := syscall.Mkfifo(filepath.Join(filepath.Dir(path), "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := static(t, path); err == nil || !strings.Contains(err.Error(), "want a regular file") {
		t.Errorf("FIFO: got %v", err)
	}
	path = imageOf(t, newKernel(), nil)
	if err := os.Truncate(filepath.Join(filepath.Dir(path), "initrd"), 1<<32); err != nil {
		t.Fatal(err)
	}
	if _, err := static(t, path); err == nil || !strings.Contains(err.Error(), "want at most") {
		t.Errorf("initrd of 4 GiB: got %v", err)
	}
}

func TestStaticStops(t *testing.T) {
	img, err := image.OpenImage(imageOf(t, newKernel(), nil))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := img.Static(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// TestVerify compares the files with the manifest, whose hash is os_image_hash.
func TestVerify(t *testing.T) {
	path := imageOf(t, newKernel(), nil)
	dir := filepath.Dir(path)
	img, err := image.OpenImage(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if err := img.Verify(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a manifest: got %v", err)
	}
	sums := fmt.Sprintf("%x  bzImage\n%x  initrd\n", sha256.Sum256(newKernel()), sha256.Sum256(make([]byte, 5000)))
	if err := os.WriteFile(filepath.Join(dir, "sha256sum.txt"), []byte(sums), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := img.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	m, err := img.Static(t.Context())
	if want := sha256.Sum256([]byte(sums)); err != nil || string(m.OSImageHash) != string(want[:]) {
		t.Errorf("os_image_hash is %x, want %x (%v)", m.OSImageHash, want, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "initrd"), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := img.Verify(t.Context()); err == nil || !strings.Contains(err.Error(), "initrd hashes to") {
		t.Errorf("other initrd: got %v", err)
	}
}

// TestRealCommandLine measures the command line of dstack's images of January 2025 with
// the root hash that a real guest of theirs has in its RTMR3.
func TestRealCommandLine(t *testing.T) {
	g := realGuest(t, "attestations/dx-report.json")
	for _, e := range g.events {
		if e.Name != measure.EventRootFSHash {
			continue
		}
		line := "console=ttyS0 init=/init panic=1 systemd.unified_cgroup_hierarchy=0 pnpacpi=off dstack.fde=1 dstack.rootfs_hash=" + hex.EncodeToString(e.Payload)
		m, err := static(t, imageOf(t, newKernel(), map[string]any{"cmdline": line}))
		if err != nil {
			t.Fatal(err)
		}
		if want := digest(t, "d54d67fde61596a4334222c69d76a20273500c9df4d791a554eac56f899de9c35c59107ded404b86e49c11ac84bd17a8"); m.CommandLine != want {
			t.Errorf("command line is measured as %v, want %v", m.CommandLine, want)
		}
		return
	}
	t.Error("the log has no root hash")
}

// TestCommandLineUTF16 writes what is not ASCII in UTF-16, pairs included.
func TestCommandLineUTF16(t *testing.T) {
	m, err := static(t, imageOf(t, newKernel(), map[string]any{"cmdline": "é\U0001f600"}))
	if err != nil {
		t.Fatal(err)
	}
	measured := []byte{0xe9, 0, 0x3d, 0xd8, 0x00, 0xde}
	for _, c := range []byte(" initrd=initrd\x00") {
		measured = append(measured, c, 0)
	}
	if want := measure.Digest(sha512.Sum384(measured)); m.CommandLine != want {
		t.Errorf("got %v, want %v", m.CommandLine, want)
	}
}

func FuzzMetadata(f *testing.F) {
	f.Add([]byte(`{"bios":"ovmf.fd","kernel":"bzImage","initrd":"initrd","cmdline":"quiet","rootfs":"rootfs.iso"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := image.ParseMetadata(b)
		if err == nil && !(filepath.IsLocal(m.BIOS) && filepath.IsLocal(m.Kernel) && filepath.IsLocal(m.Initrd)) {
			t.Errorf("%+v names a file outside its folder", m)
		}
	})
}

// TestRootDisk decides by file name, then version, then the firmware's layout.
func TestRootDisk(t *testing.T) {
	for _, v := range []struct {
		rootfs, version string
		want            image.RootDisk
	}{
		{"rootfs.iso", "0.5.0", image.RootCDROM}, {"rootfs.img.verity", "0.4.0", image.RootVirtio}, {"", "0.4.2", image.RootCDROM},
		{"", "v0.5.4", image.RootVirtio}, {"rootfs.cpio", "1.0.0", image.RootVirtio}, {"", "", 0}, {"", "dev", 0},
	} {
		m := image.Metadata{RootFS: v.rootfs, Version: v.version}
		if got := m.Root(); got != v.want {
			t.Errorf("%+v: got %v, want %v", m, got, v.want)
		}
	}
	for want, l := range map[image.RootDisk]image.Layout{image.RootCDROM: image.DstackLayout03(), image.RootVirtio: image.DstackLayout05()} {
		r, err := platform(t, l).Measure(image.Machine{VCPUs: 1, MemoryBytes: 2 << 30, NICs: 1, QEMU: "8.2.2"})
		if err != nil {
			t.Fatal(err)
		}
		if r.Root != want {
			t.Errorf("root disk is %v, want %v", r.Root, want)
		}
	}
}

// TestMeasurementShared measures for several machines at once, each with another address
// of the initrd.
func TestMeasurementShared(t *testing.T) {
	m, err := static(t, imageOf(t, newKernel(), nil))
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	results := make([][]measure.Digest, 4)
	for n := range results {
		group.Go(func() {
			for mib := uint64(512); mib < 612; mib++ {
				r, err := m.Measure(image.Machine{VCPUs: 1, MemoryBytes: mib << 20, NICs: 1, QEMU: "8.2.2"})
				if err != nil {
					t.Error(err)
					return
				}
				results[n] = append(results[n], r.RTMR[1])
			}
		})
	}
	group.Wait()
	for n := range results {
		if !slices.Equal(results[n], results[0]) || len(slices.Compact(slices.Clone(results[n]))) != 100 {
			t.Errorf("goroutine %d has other values, or the same for other sizes of memory", n)
		}
	}
}
