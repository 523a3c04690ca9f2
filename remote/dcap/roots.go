package dcap

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
)

// intelRoot is the SHA-256 of the DER of Intel's SGX Root CA certificate.
var intelRoot = [32]byte{
	0x44, 0xa0, 0x19, 0x6b, 0x2b, 0x99, 0xf8, 0x89, 0xb8, 0xe1, 0x49, 0xe9, 0x5b, 0x80, 0x7a, 0x35,
	0x0e, 0x74, 0x24, 0x96, 0x43, 0x99, 0xe8, 0x85, 0xa7, 0xcb, 0xb8, 0xcc, 0xfa, 0xb6, 0x74, 0xd3,
}

const intelRootName = "Intel SGX Root CA"

// maxRoots bounds an injected set.
const maxRoots = 8

// Roots are the root certificates that a chain may end in. Each is pinned whole, by
// the SHA-256 of its DER: chains carry the certificate itself. The zero value and nil
// trust nothing.
type Roots struct {
	pins [][32]byte
	name string
}

// IntelRoots trusts Intel's production SGX Root CA and nothing else.
func IntelRoots() *Roots {
	return &Roots{pins: [][32]byte{intelRoot}, name: intelRootName}
}

// IntelRoot returns the SHA-256 of the DER of Intel's production SGX Root CA.
func IntelRoot() [32]byte { return intelRoot }

// PinnedRoots trusts the root certificates whose DER has one of these SHA-256 values,
// at most 8 of them. Chains carry the certificates themselves.
func PinnedRoots(pins ...[32]byte) (*Roots, error) {
	if len(pins) == 0 || len(pins) > maxRoots {
		return nil, fmt.Errorf("dcap: roots: %d pins, want 1 to %d", len(pins), maxRoots)
	}
	r := &Roots{pins: slices.Clone(pins)}
	var names []string
	for _, pin := range pins {
		names = append(names, RootName(pin))
	}
	r.name = strings.Join(names, ", ")
	return r, nil
}

// Pins returns the SHA-256 of the DER of each root.
func (r *Roots) Pins() [][32]byte {
	if r == nil {
		return nil
	}
	return slices.Clone(r.pins)
}

// RootName says which root has this SHA-256, for people.
func RootName(pin [32]byte) string {
	if pin == intelRoot {
		return intelRootName
	}
	return "a root that is not Intel's, SHA-256 " + hex.EncodeToString(pin[:8])
}

// NewRoots trusts the 1 to 8 root certificates in these PEM bytes instead of Intel's:
// those of a simulated TD, for one. Whoever has a root's key can sign any quote.
func NewRoots(pemBytes []byte) (*Roots, error) {
	r := new(Roots)
	var names []string
	rest := pemBytes
	for len(bytes.TrimSpace(rest)) > 0 {
		block, after := pem.Decode(rest)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("dcap: roots: byte %d is not the start of a PEM certificate", len(pemBytes)-len(rest))
		}
		rest = after
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("dcap: roots: certificate %d: %v", len(r.pins)+1, err)
		}
		if !c.IsCA || !bytes.Equal(c.RawIssuer, c.RawSubject) {
			return nil, fmt.Errorf("dcap: roots: certificate %d, %q, is not a self-issued CA certificate", len(r.pins)+1, c.Subject.CommonName)
		}
		if len(r.pins) == maxRoots {
			return nil, fmt.Errorf("dcap: roots: more than %d certificates", maxRoots)
		}
		pin := sha256.Sum256(c.Raw)
		r.pins = append(r.pins, pin)
		names = append(names, rootName(c.Subject.CommonName, pin))
	}
	if len(r.pins) == 0 {
		return nil, fmt.Errorf("dcap: roots: no PEM certificate in %d bytes", len(pemBytes))
	}
	r.name = strings.Join(names, ", ")
	return r, nil
}

// rootName never gives Intel's name to another certificate.
func rootName(subject string, pin [32]byte) string {
	if pin == intelRoot {
		return intelRootName
	}
	return fmt.Sprintf("%q, not Intel's, SHA-256 %s", subject, hex.EncodeToString(pin[:8]))
}

// Name says which roots these are, for people.
func (r *Roots) Name() string {
	if r == nil || len(r.pins) == 0 {
		return "none"
	}
	return r.name
}

func (r *Roots) trust(pin [32]byte) bool {
	return r != nil && slices.Contains(r.pins, pin)
}
