package image_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tdx-agent/measure/image"
)

// carried returns the measurement document of a real guest.
func carried(t testing.TB, file string) *image.VMConfig {
	t.Helper()
	c, err := image.ParseVMConfig([]byte(realGuest(t, file).vmConfig))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestCarriedMaterial binds a real document to its os_image_hash and compares its values
// with the guest's log and quote.
func TestCarriedMaterial(t *testing.T) {
	const file = "attestations/dk-lite-getquote.json"
	g, c := realGuest(t, file), carried(t, file)
	if err := image.VerifyMaterial([32]byte(c.OSImageHash), c.ChecksumFile, c.Material); err != nil {
		t.Error(err)
	}
	m, err := image.ParseMaterial(c.Material)
	if err != nil {
		t.Fatal(err)
	}
	if m.MRTDTwoPass != g.quote.MRTD {
		t.Errorf("MRTD is %v, want that of the quote, %v", m.MRTDTwoPass, g.quote.MRTD)
	}
	if again, err := m.Material(); err != nil || !bytes.Equal(again, c.Material) {
		t.Errorf("written again it is\n%x, want\n%x (%v)", again, c.Material, err)
	}
	if got := hex.EncodeToString(m.Layout.Witness()); got != "80100904000609020b021010" {
		t.Errorf("TD HOB witness is %s", got)
	}
	var not *image.UnmodelledError
	if _, err := m.KernelDigest(image.KernelPatched, 1<<30); !errors.As(err, &not) {
		t.Errorf("kernel of a guest with 1 GiB: got %v, want an UnmodelledError", err)
	}
	if _, err := m.KernelDigest(image.KernelRaw, 4<<30); !errors.As(err, &not) {
		t.Errorf("raw kernel: got %v, want an UnmodelledError", err)
	}
}

// TestCarriedMaterial2 reads the version before, which has no number.
func TestCarriedMaterial2(t *testing.T) {
	const file = "attestations/dk-measurement-getquote.json"
	g, c := realGuest(t, file), carried(t, file)
	m, err := image.ParseMaterial(c.Material)
	if err != nil {
		t.Fatal(err)
	}
	if m.MRTDTwoPass != g.quote.MRTD {
		t.Errorf("MRTD is %v, want that of the quote, %v", m.MRTDTwoPass, g.quote.MRTD)
	}
}

func TestVerifyMaterialRefused(t *testing.T) {
	c := carried(t, "attestations/dk-lite-getquote.json")
	sum := func(b []byte) [32]byte { return image.OSImageHash(b) }
	other := []byte(strings.Repeat("0", 64) + "  " + image.MaterialFile + "\n")
	for _, v := range []struct {
		name          string
		hash          [32]byte
		sums, content []byte
		want          string
	}{
		{"hash", [32]byte{}, c.ChecksumFile, c.Material, "but os_image_hash is"},
		{"document", sum(c.ChecksumFile), c.ChecksumFile, append(bytes.Clone(c.Material), 0), "but the checksum file says"},
		{"other document", sum(other), other, c.Material, "but the checksum file says"},
		{"twice", sum(append(other, c.ChecksumFile...)), append(other, c.ChecksumFile...), c.Material, "is there twice"},
		{"not listed", sum([]byte(strings.Repeat("0", 64) + "  x\n")), []byte(strings.Repeat("0", 64) + "  x\n"), c.Material, "does not list"},
		{"empty", sum(nil), nil, c.Material, "line 1"},
		{"short hash", sum([]byte("00  x\n")), []byte("00  x\n"), c.Material, "line 1"},
		{"one space", sum([]byte(strings.Repeat("0", 64) + " x\n")), []byte(strings.Repeat("0", 64) + " x\n"), c.Material, "line 1"},
		{"large", sum(make([]byte, 1<<17)), make([]byte, 1<<17), c.Material, "want at most"},
	} {
		if err := image.VerifyMaterial(v.hash, v.sums, v.content); err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
}

// document encodes the material of the test image.
func document(t testing.TB) []byte {
	t.Helper()
	d48 := "5830" + strings.Repeat("ab", 48)
	text := func(s string) string { return hex.EncodeToString(append([]byte{0x60 + byte(len(s))}, s...)) }
	b, err := hex.DecodeString("a3" + text("version") + "03" + text("image") + "a3" + text("cmdline_sha384") + d48 + text("kernel_authenticode") + d48 + text("initrd_sha384") + d48 +
		text("tdvf") + "a3" + text("ovmf") + text("pre202505") + text("mrtd") + "a2" + text("single_pass") + d48 + text("two_pass") + d48 + text("td_hob") + "4c80100904000609020b021010")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMaterialRefused(t *testing.T) {
	if m, err := image.ParseMaterial(document(t)); err != nil {
		t.Fatal(err)
	} else if again, err := m.Material(); err != nil || !bytes.Equal(again, document(t)) {
		t.Errorf("written again it is %x (%v)", again, err)
	}
	replace := func(old, with string) []byte {
		o, err1 := hex.DecodeString(old)
		w, err2 := hex.DecodeString(with)
		b := bytes.Replace(document(t), o, w, 1)
		if err1 != nil || err2 != nil || bytes.Equal(b, document(t)) {
			t.Fatalf("%s is not in the document", old)
		}
		return b
	}
	const version = "6776657273696f6e"
	for _, v := range []struct {
		name string
		doc  []byte
		want string
	}{
		{"empty", nil, "EOF"},
		{"cut", document(t)[:200], "EOF"},
		{"longer", append(document(t), 0), "extraneous"},
		{"array", []byte{0x80}, "array"},
		{"later version", replace(version+"03", version+"04"), "version 4"},
		{"version 0", replace(version+"03", version+"00"), "version 0"},
		{"long number", replace(version+"03", version+"1803"), "encoding"},
		{"other member", replace(version, "6776657273696f6f"), "unknown field"},
		{"case", replace(version, "6756657273696f6e"), "unknown field"},
		{"member twice", replace("a3"+version+"03", "a4"+version+"03"+version+"03"), "duplicate"},
		{"indefinite length", append(replace("a3"+version, "bf"+version), 0xff), "indefinite"},
		{"tag", replace(version+"03", version+"c003"), "tag"},
		{"short digest", replace("5830abab", "582fab"), "has 47 bytes"},
		{"profile", replace("70726532", "70726533"), "ovmf"},
		{"witness", replace("4c80100904", "4c80100a04"), "witness"},
		{"deep", bytes.Repeat([]byte{0x81}, 4000), "nested"},
		{"large", make([]byte, 5000), "want at most"},
	} {
		if _, err := image.ParseMaterial(v.doc); err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
	m, err := static(t, imageOf(t, newKernel(), nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Material(); err == nil || !strings.Contains(err.Error(), "variable store") {
		t.Errorf("a variable store that the document cannot express: got %v", err)
	}
}

// TestReadMaterial must neither wait for a pipe's writer nor read without end.
func TestReadMaterial(t *testing.T) {
	dir := t.TempDir()
	pipe, large := filepath.Join(dir, "pipe.cbor"), filepath.Join(dir, "large.cbor")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(large, make([]byte, 4097), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{pipe: "want a regular file", "/dev/zero": "want a regular file", large: "want at most 4096"} {
		if _, err := image.ReadMaterial(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

func FuzzMaterial(f *testing.F) {
	f.Add(document(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := image.ParseMaterial(b)
		if err != nil {
			return
		}
		again, err := m.Material()
		if err != nil || !bytes.Equal(again, b) && bytes.Contains(b, []byte("version")) {
			t.Errorf("%x is written as %x (%v)", b, again, err)
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(strings.Repeat("0", 64) + "  ovmf.fd\n" + strings.Repeat("1", 64) + " *bzImage\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		files, err := image.ParseManifest(b)
		if err == nil && len(files) != strings.Count(strings.TrimSuffix(string(b), "\n"), "\n")+1 {
			t.Errorf("%q lists %d files", b, len(files))
		}
	})
}
