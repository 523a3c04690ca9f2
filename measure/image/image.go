package image

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"

	"tdx-agent/measure"
)

const maxMetadata = 64 << 10 // bytes of metadata.json

// Metadata is an image's metadata.json. The names are of files in its folder.
type Metadata struct {
	BIOS, Kernel, Initrd string
	CommandLine          string // without the initrd option that is added when it is measured
	RootFS               string
	Version              string
	OVMFVariant          string
	KernelNormalized     bool // kernel_header_normalized
}

// ParseMetadata parses a metadata.json of at most 64 KiB. Members that are not used here
// are ignored.
func ParseMetadata(b []byte) (*Metadata, error) {
	if len(b) > maxMetadata {
		return nil, fmt.Errorf("metadata has %d bytes, want at most %d", len(b), maxMetadata)
	}
	o, err := parseObject(b)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	var m Metadata
	if _, err := o.decode(map[string]any{"bios": &m.BIOS, "kernel": &m.Kernel, "initrd": &m.Initrd, "cmdline": &m.CommandLine, "rootfs": &m.RootFS,
		"version": &m.Version, "ovmf_variant": &m.OVMFVariant, "kernel_header_normalized": &m.KernelNormalized}); err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	for _, f := range []struct{ name, value string }{{"bios", m.BIOS}, {"kernel", m.Kernel}, {"initrd", m.Initrd}} {
		if !filepath.IsLocal(f.value) {
			return nil, fmt.Errorf("metadata: %s is %q, want the name of a file in the image's folder", f.name, f.value)
		}
	}
	if strings.ContainsRune(m.CommandLine, 0) {
		return nil, errors.New("metadata: cmdline has a NUL in it")
	}
	if strings.Contains(m.CommandLine, "vga=") {
		return nil, unmodelled("cmdline", "QEMU writes vga= into the kernel's header")
	}
	return &m, nil
}

// Root says how dstack attaches the image's root file system: an ISO image as a CD-ROM, a
// verity image as a disk. Where the name does not say, versions before 0.5 had the first.
// It is zero where the version does not say either.
func (m *Metadata) Root() RootDisk {
	switch filepath.Ext(m.RootFS) {
	case ".iso":
		return RootCDROM
	case ".verity":
		return RootVirtio
	}
	var major, minor int
	if _, err := fmt.Sscanf(strings.TrimPrefix(m.Version, "v"), "%d.%d", &major, &minor); err != nil {
		return 0
	}
	if major == 0 && minor < 5 {
		return RootCDROM
	}
	return RootVirtio
}

// Image is an OS image: the folder of its metadata.json. No file outside of it is
// opened. Close it after use.
type Image struct {
	Metadata Metadata
	root     *os.Root
}

// OpenImage opens the image whose metadata.json is at path.
func OpenImage(path string) (*Image, error) {
	root, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	img := &Image{root: root}
	b, err := img.read(filepath.Base(path), maxMetadata)
	if err == nil {
		var m *Metadata
		if m, err = ParseMetadata(b); err == nil {
			img.Metadata = *m
			return img, nil
		}
	}
	root.Close()
	return nil, fmt.Errorf("%s: %w", path, err)
}

// Close closes the folder.
func (img *Image) Close() error { return img.root.Close() }

// open opens a regular file of the folder. O_NONBLOCK keeps a FIFO from blocking it.
func (img *Image) open(name string, limit int64) (*os.File, int64, error) {
	f, err := img.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = fmt.Errorf("%s is a %v, want a regular file", name, st.Mode().Type())
	case st.Size() > limit:
		err = fmt.Errorf("%s has %d bytes, want at most %d", name, st.Size(), limit)
	default:
		return f, st.Size(), nil
	}
	f.Close()
	return nil, 0, err
}

func (img *Image) read(name string, limit int64) ([]byte, error) {
	f, size, err := img.open(name, limit)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, size)
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// stream hashes a file without holding it in memory, and returns its size in bytes.
func (img *Image) stream(ctx context.Context, name string, limit int64, h hash.Hash) (int64, error) {
	f, size, err := img.open(name, limit)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := io.CopyBuffer(h, &contextReader{ctx, io.LimitReader(f, size+1)}, make([]byte, 256<<10))
	if err == nil && n != size {
		err = fmt.Errorf("%s changed while it was read", name)
	}
	return n, err
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}

// Static measures the image's files: firmware, kernel, command line and initrd. The
// kernel stays in memory, at most 256 MiB; the initrd is streamed. Digests of the kernel
// that will be asked for ([Measurement.KernelDigest]) in other modes than KernelPatched are
// best named: they are then calculated along with the rest.
func (img *Image) Static(ctx context.Context, modes ...KernelMode) (*Measurement, error) {
	profile, err := ParseFirmwareProfile(img.Metadata.OVMFVariant)
	if err != nil {
		return nil, unmodelled("ovmf_variant", "%.40q", img.Metadata.OVMFVariant)
	}
	if img.Metadata.OVMFVariant == "" {
		profile = ""
	}
	m := &Measurement{Firmware: profile, Root: img.Metadata.Root(), normalized: img.Metadata.KernelNormalized, CommandLine: commandLineDigest(img.Metadata.CommandLine)}
	sums, err := img.read("sha256sum.txt", maxManifest)
	if err == nil {
		h := OSImageHash(sums)
		m.OSImageHash = h[:]
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return img.measureFirmware(m) })
	g.Go(func() error { return img.measureKernel(m, modes) })
	g.Go(func() error {
		h := sha512.New384()
		_, err := img.stream(ctx, img.Metadata.Initrd, MaxInitrd, h)
		m.Initrd = measure.Digest(h.Sum(nil))
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return m, nil
}

func (img *Image) measureFirmware(m *Measurement) error {
	b, err := img.read(img.Metadata.BIOS, MaxFirmware)
	if err != nil {
		return err
	}
	t, err := ParseTDVF(b)
	if err != nil {
		return fmt.Errorf("%s: %w", img.Metadata.BIOS, err)
	}
	return m.takeFirmware(t)
}

// takeFirmware looks into the firmware while it hashes it.
func (m *Measurement) takeFirmware(t *TDVF) error {
	cfv := t.section(SectionCFV)
	m.Layout, m.CFV, m.cfvAt = t.Layout(), t.CFV(), MemoryRange{cfv.Address, cfv.MemorySize}
	var g errgroup.Group
	g.Go(func() error { m.takeContents(t); return nil })
	g.Go(func() (err error) {
		if m.MRTDTwoPass, err = t.MRTD(TwoPass); err == nil {
			m.MRTDSinglePass, err = t.MRTD(SinglePass)
		}
		return err
	})
	return g.Wait()
}

// takeContents derives variables and profile. Where the contents are not readable they
// are taken to be those of dstack's OVMF: UiApp, and no Secure Boot.
func (m *Measurement) takeContents(t *TDVF) {
	behind := filesAfter
	if m.Firmware != "" {
		behind = 0 // they would tell the profile, which the image's metadata says
	}
	contents, err := t.inspect(behind)
	if err != nil {
		contents, m.assumed = nil, []string{fmt.Sprintf("the firmware's drivers are those of dstack's OVMF, with UiApp and without Secure Boot: they could not be looked at (%v)", err)}
	}
	m.variables, m.storeErr = t.measuredVariables(contents)
	if contents != nil && m.Firmware == "" {
		m.Firmware = contents.Profile()
	}
}

func (img *Image) measureKernel(m *Measurement, modes []KernelMode) error {
	f, size, err := img.open(img.Metadata.Initrd, MaxInitrd)
	if err != nil {
		return err
	}
	f.Close()
	b, err := img.read(img.Metadata.Kernel, MaxKernel)
	if err != nil {
		return err
	}
	k := &kernelFile{bytes: b, initrdSize: uint32(size)}
	m.served = &servedKernel{file: k, patched: map[uint64]measure.Digest{}}
	var other sync.WaitGroup
	if slices.Contains(modes, KernelRaw) || slices.Contains(modes, KernelNormalized) {
		other.Go(func() { m.served.rawDigest() }) // an error comes again when it is asked for
	}
	m.Kernel, m.kernelErr = k.patched(lowMemorySplit)
	other.Wait()
	var not *UnmodelledError
	if errors.As(m.kernelErr, &not) || m.kernelErr == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", img.Metadata.Kernel, m.kernelErr)
}

// Verify reads every file that the image's sha256sum.txt lists and reports those that
// are missing or differ. Without a sha256sum.txt it is an error.
func (img *Image) Verify(ctx context.Context) error {
	sums, err := img.read("sha256sum.txt", maxManifest)
	if err != nil {
		return err
	}
	files, err := ParseManifest(sums)
	if err != nil {
		return err
	}
	var problems []error
	for name, want := range files {
		h := sha256.New()
		if _, err := img.stream(ctx, name, MaxInitrd, h); err != nil {
			problems = append(problems, err)
		} else if got := [32]byte(h.Sum(nil)); got != want {
			problems = append(problems, fmt.Errorf("%s hashes to %x, but sha256sum.txt says %x", name, got, want))
		}
	}
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(problems...)
}
