package image_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

// debianFiles are the files of Debian packages that the expected values belong to, with
// their SHA-256. None is kept here.
var debianFiles = map[string]string{
	bookwormOVMF: "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773",
	trixieOVMF:   "14954040cc754ade0c625ac3470ea46d4c14318b5b1396de4ef77090203d76db",
	debianKernel: "3d616aa853fe11b1c0ea99a1cdb4fb6ddc9010ba7c4562de700ad94264989654",
}

const (
	bookwormOVMF = "bookworm/usr/share/ovmf/OVMF.fd"
	trixieOVMF   = "trixie/usr/share/ovmf/OVMF.fd"
	debianKernel = "bookworm/boot/vmlinuz-6.1.0-50-cloud-amd64"
)

// debianFile returns a file's content, or skips the test where there is none.
func debianFile(t testing.TB, name string) []byte {
	t.Helper()
	dir := os.Getenv("TDX_AGENT_DEBIAN")
	if dir == "" {
		t.Skip("no Debian firmware and kernel: set TDX_AGENT_DEBIAN to the folder that packaging/testbed/firmware.sh makes")
	}
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Skipf("no Debian firmware and kernel: %v", err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != debianFiles[name] {
		t.Skipf("%s is of another version of its package: SHA-256 %s", name, got)
	}
	return b
}

func digest(t testing.TB, s string) (d measure.Digest) {
	t.Helper()
	if err := d.UnmarshalText([]byte(s)); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDebianMRTD compares MRTD in both orders with values of two other programs: Google's
// for single-pass, kvinwang/dstack-mr for two-pass.
func TestDebianMRTD(t *testing.T) {
	for _, v := range []struct{ file, cfv, two, single string }{
		{bookwormOVMF, "f87302177b059d54a2cf0c5f13340dbabf5c9dd60dc3f996c68b776fbe4de959769443a3d8ef6538b97d7e151c8298e8",
			"acccbcc870a381adab0d3919d90a7f268ac3b0364771f202ed4bb4e892d045b33db3b32e6924cba830a724eed443f7e1",
			"4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057fb887fed0744d5631a212967fb231c47"},
		{trixieOVMF, "344bc51c980ba621aaa00da3ed7436f7d6e549197dfe699515dfa2c6583d95e6412af21c097d473155875ffd561d6790",
			"456f07902150d008bb913c3e1e84e9297f735a6c83cd2a957a1f0a8bbedb06df188e3837ae48d32c73d473d097dc0db2",
			"bdc6fb145880f06f30c8b346b8dce2a99d9351b56892df22f80fcf6574caa9f9c31df8e8576d53b4d0cd1c3f28910e11"},
	} {
		fw, err := image.ParseTDVF(debianFile(t, v.file))
		if err != nil {
			t.Fatal(err)
		}
		for order, want := range map[image.PageOrder]string{image.TwoPass: v.two, image.SinglePass: v.single} {
			if got, err := fw.MRTD(order); err != nil || got != digest(t, want) {
				t.Errorf("%s, %v: got %v, want %s (%v)", v.file, order, got, want, err)
			}
		}
		if got := fw.CFV(); got != digest(t, v.cfv) {
			t.Errorf("%s: CFV is %v, want %s", v.file, got, v.cfv)
		}
	}
}

// debianImage lays out an image of trixie's firmware, bookworm's kernel and an initrd of
// so many bytes of the letter A. A variant says in the metadata what the drivers would.
func debianImage(t testing.TB, initrd int, variant string) string {
	t.Helper()
	dir := t.TempDir()
	for name, from := range map[string]string{"ovmf.fd": trixieOVMF, "bzImage": debianKernel} {
		if err := os.WriteFile(filepath.Join(dir, name), debianFile(t, from), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "initrd"), bytes.Repeat([]byte("A"), initrd), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]string{"bios": "ovmf.fd", "kernel": "bzImage", "initrd": "initrd", "cmdline": "console=ttyS0", "ovmf_variant": variant})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "metadata.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDebianImage compares whole images with kvinwang/dstack-mr and an independent
// implementation. RTMR0 of the first row is also that of a real guest.
func TestDebianImage(t *testing.T) {
	const r1Low, r1High = "17a737503d5ba0c620fbc4d8e8e28a8e23551a2f2e31dff48cc64f40e2bcc39d1f9fa541f411a02cbcbe398c794d9b72",
		"633ea744f0fa7492e7480e4403f28d5091a57da60a10f1c0b44f783e1ee6a883a385d491c2857ac7e295b63bbe713963"
	img, err := image.OpenImage(debianImage(t, 5<<20, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	m, err := img.Static(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct {
		cpus   int
		gib    uint64
		r0, r1 string
	}{
		{1, 1, "274c2344116db7c663470693b5ba62b8621eac28cb41d2f816ddf188f9f423f900a1c44d32386fd3c993dc814e62af9d", r1Low},
		{2, 2, "0bb3d6375f94482cdd24b767e4a0d720348527c4f2ab433d77f842b9394fa1638bb6df83fb0a1301f29c71bf60da48bb", r1High},
		{4, 4, "22736a688f6f2a21329df9e4d0b2ca3a50fddc74e086996493cfedcd3b71cb539ba70fee90d95a70511dc830db837281", r1High},
	} {
		r, err := m.Measure(image.Machine{VCPUs: v.cpus, MemoryBytes: v.gib << 30, QEMU: "8.2.2", NICs: 1})
		if err != nil {
			t.Fatal(err)
		}
		want := [3]measure.Digest{digest(t, v.r0), digest(t, v.r1), digest(t, "c82f286e9fb7af6c816c69c5b2961684d7416ec1adf1ad588404e6118a47f7e23c842598f0fe9216441da9cd946f1a65")}
		if r.MRTD != digest(t, "456f07902150d008bb913c3e1e84e9297f735a6c83cd2a957a1f0a8bbedb06df188e3837ae48d32c73d473d097dc0db2") {
			t.Errorf("MRTD is %v", r.MRTD)
		}
		if got := fmt.Sprintf("%x", r.MRImage()); v.gib == 4 && got != "4a169944954f82168adc470aba2d2b42c4ff373b0d7766faee7987854e01c06d" {
			t.Errorf("mr_image is %s", got)
		}
		if r.RTMR != want {
			t.Errorf("%d vCPU, %d GiB: got %v, want %v", v.cpus, v.gib, r.RTMR, want)
		}
	}
}
