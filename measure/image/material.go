package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"tdx-agent/measure"
)

// MaterialFile is the name of the measurement document in an image and its manifest.
const MaterialFile = "measurement.tdx.cbor"

const (
	maxMaterial = 4 << 10  // bytes; a real document has 384
	maxManifest = 64 << 10 // bytes of sha256sum.txt
)

// material is measurement.tdx.cbor. Encoding keeps the order of the fields. Version 2
// has no member version and is otherwise the same.
type material struct {
	Version uint64        `cbor:"version,omitempty"`
	Image   materialImage `cbor:"image"`
	TDVF    materialTDVF  `cbor:"tdvf"`
}

type materialImage struct {
	CommandLine []byte `cbor:"cmdline_sha384"`
	Kernel      []byte `cbor:"kernel_authenticode"`
	Initrd      []byte `cbor:"initrd_sha384"`
}

type materialTDVF struct {
	Profile string       `cbor:"ovmf"`
	MRTD    materialMRTD `cbor:"mrtd"`
	HOB     []byte       `cbor:"td_hob"`
}

type materialMRTD struct {
	SinglePass []byte `cbor:"single_pass"`
	TwoPass    []byte `cbor:"two_pass"`
}

// ParseMaterial parses a measurement.tdx.cbor of version 3, or 2, of at most 4 KiB. It
// must be exactly as dstack encodes it: definite lengths, shortest numbers, each member
// once and in order.
//
// The Measurement says what its author says. It is as trusted as the os_image_hash that
// [VerifyMaterial] binds it to, which must be on an allow-list. It has the CFV of
// OVMF's blank 4 MiB variable store, and only the kernel digest of guests with 2 GiB or
// at least 2816 MiB.
func ParseMaterial(b []byte) (*Measurement, error) {
	m, err := parseMaterial(b)
	if err != nil {
		return nil, fmt.Errorf("measurement document: %w", err)
	}
	return m, nil
}

// ReadMaterial is [ParseMaterial] of a regular file.
func ReadMaterial(path string) (*Measurement, error) {
	root, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	b, err := (&Image{root: root}).read(filepath.Base(path), maxMaterial)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	m, err := ParseMaterial(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

func parseMaterial(b []byte) (*Measurement, error) {
	if len(b) > maxMaterial {
		return nil, fmt.Errorf("%d bytes, want at most %d", len(b), maxMaterial)
	}
	if err := materialVersion(b); err != nil {
		return nil, err
	}
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 16,
	}.DecMode()
	if err != nil {
		return nil, err
	}
	var doc material
	if err := dec.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	if again, err := cbor.Marshal(doc); err != nil || !bytes.Equal(again, b) {
		return nil, errors.New("is not in the one encoding it has: members out of order, or numbers not in their shortest form")
	}
	return doc.measurement()
}

// materialVersion looks at the version alone, so that a later document is refused as
// that and not for its members.
func materialVersion(b []byte) error {
	var doc struct {
		Version *uint64 `cbor:"version"`
	}
	if err := cbor.Unmarshal(b, &doc); err != nil {
		return err
	}
	if doc.Version != nil && *doc.Version != 3 {
		return unmodelled(MaterialFile, "version %d, want 3", *doc.Version)
	}
	return nil
}

func (doc *material) measurement() (*Measurement, error) {
	m := &Measurement{CFV: blankStoreDigest(), cfvAt: MemoryRange{0xffc00000, 0x84000}}
	for _, f := range []struct {
		name string
		dst  *measure.Digest
		src  []byte
	}{{"cmdline_sha384", &m.CommandLine, doc.Image.CommandLine}, {"kernel_authenticode", &m.Kernel, doc.Image.Kernel},
		{"initrd_sha384", &m.Initrd, doc.Image.Initrd}, {"single_pass", &m.MRTDSinglePass, doc.TDVF.MRTD.SinglePass}, {"two_pass", &m.MRTDTwoPass, doc.TDVF.MRTD.TwoPass}} {
		if len(f.src) != len(f.dst) {
			return nil, fmt.Errorf("%s has %d bytes, want %d", f.name, len(f.src), len(f.dst))
		}
		*f.dst = measure.Digest(f.src)
	}
	var err error
	if m.Firmware, err = ParseFirmwareProfile(doc.TDVF.Profile); err != nil || doc.TDVF.Profile == "" {
		return nil, unmodelled(MaterialFile, "ovmf %.40q", doc.TDVF.Profile)
	}
	m.Layout, err = ParseWitness(doc.TDVF.HOB)
	return m, err
}

// Material encodes the measurement as measurement.tdx.cbor, version 3. It is an error
// if it has no patched kernel digest, or a CFV that the document cannot express.
func (m *Measurement) Material() ([]byte, error) {
	if m.kernelErr != nil {
		return nil, m.kernelErr
	}
	if m.CFV != blankStoreDigest() || m.variables[0] != nil {
		return nil, unmodelled(MaterialFile, "it cannot express a firmware with Secure Boot, or a variable store other than OVMF's blank one of the 4 MiB build")
	}
	if m.normalized {
		return nil, unmodelled(MaterialFile, "version 3 cannot express a normalized kernel header")
	}
	profile := m.Firmware
	if profile == "" {
		profile = Pre202505
	}
	return cbor.Marshal(material{
		Version: 3,
		Image:   materialImage{m.CommandLine[:], m.Kernel[:], m.Initrd[:]},
		TDVF:    materialTDVF{string(profile), materialMRTD{m.MRTDSinglePass[:], m.MRTDTwoPass[:]}, m.Layout.Witness()},
	})
}

// OSImageHash returns dstack's os_image_hash: SHA-256 of the image's sha256sum.txt.
func OSImageHash(checksumFile []byte) [32]byte { return sha256.Sum256(checksumFile) }

// ParseManifest parses a sha256sum.txt of at most 64 KiB: a line "HASH  NAME" for each
// file. A name that is there twice is an error.
func ParseManifest(b []byte) (map[string][32]byte, error) {
	if len(b) > maxManifest {
		return nil, fmt.Errorf("checksum file has %d bytes, want at most %d", len(b), maxManifest)
	}
	files := map[string][32]byte{}
	for i, line := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
		digits, name, ok := strings.Cut(line, " ")
		sum, err := hex.DecodeString(digits)
		if !ok || err != nil || len(sum) != 32 || len(name) < 2 || name[0] != ' ' && name[0] != '*' {
			return nil, fmt.Errorf("checksum file: line %d is %.100q, want 64 hexadecimal digits, two spaces and a name", i+1, line)
		}
		name = name[1:]
		if _, twice := files[name]; twice {
			return nil, fmt.Errorf("checksum file: %q is there twice", name)
		}
		files[name] = [32]byte(sum)
	}
	return files, nil
}

// VerifyMaterial checks that a carried measurement document belongs to an
// os_image_hash: the checksum file hashes to it and lists the document. This is
// consistency within what one party sent. It says nothing of the image until the
// os_image_hash is compared with a list of those that are accepted.
func VerifyMaterial(osImageHash [32]byte, checksumFile, document []byte) error {
	if got := OSImageHash(checksumFile); got != osImageHash {
		return fmt.Errorf("checksum file hashes to %x, but os_image_hash is %x", got, osImageHash)
	}
	files, err := ParseManifest(checksumFile)
	if err != nil {
		return err
	}
	want, ok := files[MaterialFile]
	if !ok {
		return fmt.Errorf("checksum file does not list %s", MaterialFile)
	}
	if got := sha256.Sum256(document); got != want {
		return fmt.Errorf("%s hashes to %x, but the checksum file says %x", MaterialFile, got, want)
	}
	return nil
}
