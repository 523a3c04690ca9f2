package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
	"tdx-agent/remote/cache"
)

// calculation is what an image's files say, from which its Reference Values are
// calculated for the machine that evidence claims to be.
type calculation struct {
	static  *image.Measurement
	version string
	// results by vm_config. Only what could be calculated is kept.
	results *cache.Cache[string, *image.Result]
}

// maxCalculated bounds the vm_configs, of a few hundred bytes mostly, whose results are
// kept for each image.
const maxCalculated = 64

// LoadImages reads the files that entries of the policy name ([Image].Metadata), as
// long as that takes: a second for each image, about. A Verifier takes no policy whose
// images are not loaded.
func (p *Policy) LoadImages(ctx context.Context) error {
	loaded := map[string]*calculation{}
	for i := range p.Entries {
		for k := range p.Entries[i].images {
			m := &p.Entries[i].images[k]
			if m.Metadata == "" {
				continue
			}
			c, ok := loaded[m.Metadata]
			if !ok {
				var err error
				if c, err = loadImage(ctx, m.Metadata); err != nil {
					return fmt.Errorf("image %q: %w", m.Name, err)
				}
				loaded[m.Metadata] = c
			}
			m.calculated = c
		}
	}
	return nil
}

// loadImage reads an image's metadata.json with what it names, or a
// measurement.tdx.cbor.
func loadImage(ctx context.Context, path string) (*calculation, error) {
	c := &calculation{results: cache.New[string, *image.Result](maxCalculated)}
	if strings.HasSuffix(path, ".cbor") {
		m, err := image.ReadMaterial(path)
		c.static = m
		return c, err
	}
	img, err := image.OpenImage(path)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	c.version = img.Metadata.Version
	c.static, err = img.Static(ctx)
	return c, err
}

// RequireImage makes every entry of the policy demand the image whose metadata.json, or
// measurement.tdx.cbor, is at path. An entry that demands one already is an error.
func (p *Policy) RequireImage(ctx context.Context, path string) error {
	c, err := loadImage(ctx, path)
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	for i := range p.Entries {
		e := &p.Entries[i]
		if len(e.images) > 0 {
			return fmt.Errorf("image: policy entry %q names an image already", e.Name)
		}
		e.images, e.AllowAnyImage = []Image{{Name: path, Metadata: path, calculated: c}}, false
	}
	return nil
}

// unloaded names an image that LoadImages has not read.
func (p *Policy) unloaded() string {
	for i := range p.Entries {
		for k := range p.Entries[i].images {
			if m := &p.Entries[i].images[k]; m.Metadata != "" && m.calculated == nil {
				return m.Name
			}
		}
	}
	return ""
}

// Calculated reports whether the registers, and with RTMR0 the ACPI tables, follow from
// an image and the vm_config of the evidence, instead of standing in the policy.
func (m *Image) Calculated() bool { return m.Metadata != "" || m.Carried }

// registers returns the values that MRTD and RTMR0 to RTMR2 may have: those of the
// policy, or those of this image on the machine that the evidence claims to be. A
// claim that is wrong gives another RTMR0 than the quote's, so that equality proves it.
// Nothing is taken from the event log.
func (m *Image) registers(c *Claims) (values [4][]measure.Digest, err error) {
	if !m.Calculated() {
		return [4][]measure.Digest{m.MRTD, m.RTMR0, m.RTMR1, m.RTMR2}, nil
	}
	r, err := m.calculate(c)
	if err != nil {
		return values, err
	}
	values = [4][]measure.Digest{{r.MRTD}, {r.RTMR[0]}, {r.RTMR[1]}, {r.RTMR[2]}}
	if m.AllowAnyPageOrder {
		values[0] = append(values[0], r.OtherMRTD)
	}
	return values, nil
}

func (m *Image) calculate(c *Claims) (*image.Result, error) {
	switch {
	case c.SignatureErr != nil: // worth no calculation
		return nil, errors.New("the quote is not genuine")
	case c.VMConfig == "":
		return nil, errors.New("there is no vm_config, which says how many processors and how much memory")
	}
	known := m.calculated
	if known != nil {
		if r, ok := known.results.Get(c.VMConfig); ok {
			return r, nil
		}
	}
	config, err := image.ParseVMConfig([]byte(c.VMConfig))
	if err != nil {
		return nil, err
	}
	static, err := m.staticOf(config)
	if err != nil {
		return nil, err
	}
	if len(config.OSImageHash) > 0 && len(static.OSImageHash) > 0 && !bytes.Equal(config.OSImageHash, static.OSImageHash) {
		return nil, fmt.Errorf("the vm_config is about the image %x, not %x", config.OSImageHash, static.OSImageHash)
	}
	machine, err := config.Machine()
	if err != nil {
		return nil, err
	}
	r, err := static.Measure(machine)
	if err == nil && known != nil && len(c.VMConfig) <= 16<<10 {
		known.results.Add(strings.Clone(c.VMConfig), r)
	}
	return r, err
}

// staticOf is the image's part: of the files of the policy, or of the measurement
// document that the evidence carries, if that is bound to the policy's os_image_hash.
func (m *Image) staticOf(config *image.VMConfig) (*image.Measurement, error) {
	switch {
	case m.calculated != nil:
		return m.calculated.static, nil
	case !m.Carried:
		return nil, fmt.Errorf("image %q was not loaded", m.Name)
	case config.Material == nil || config.ChecksumFile == nil:
		return nil, errors.New("the vm_config carries no measurement document (tdx_measurement)")
	}
	if err := image.VerifyMaterial([32]byte(m.OSImageHash), config.ChecksumFile, config.Material); err != nil {
		return nil, err
	}
	static, err := image.ParseMaterial(config.Material)
	if err == nil {
		static.OSImageHash = slices.Clone(m.OSImageHash)
	}
	return static, err
}

// Version is the image's own word on its version, "" if it is not known.
func (m *Image) Version() string {
	if m.calculated == nil {
		return ""
	}
	return m.calculated.version
}

// hash is the os_image_hash of the policy, or that of the image's files, or nil.
func (m *Image) hash() Hex {
	if len(m.OSImageHash) == 0 && m.calculated != nil {
		return m.calculated.static.OSImageHash
	}
	return m.OSImageHash
}
