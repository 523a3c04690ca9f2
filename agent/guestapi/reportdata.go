package guestapi

import (
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"hash"
	"strings"

	xsha3 "golang.org/x/crypto/sha3"

	"tdx-agent/measure"
)

const (
	hashDefault = "sha512"
	hashRaw     = "raw" // the report data as it is
	tagDefault  = "app-data"
)

// reservedTags are the report data domains in which a quote stands for something
// other than an application's word: an RA-TLS certificate, the root of a KMS, an
// end of an attested channel. An application that could ask for them could pose as
// the agent.
var reservedTags = []string{"ratls-cert", "kms-root-ca", "tdx-atls-v1"}

// boundData is report data as Tappd makes it, with what it says it has done.
type boundData struct {
	data      measure.ReportData
	algorithm string // the effective hash
	tag       string // the effective prefix, "" for raw
}

// bindReportData makes the report data of Tappd's TdxQuote: the hash of prefix, a
// colon and data, with zeros to the right; or, for raw, data itself.
func bindReportData(data []byte, algorithm, prefix string) (boundData, error) {
	b := boundData{algorithm: algorithm, tag: prefix}
	if err := checkTag(prefix); err != nil {
		return b, err
	}
	if algorithm == hashRaw {
		b.tag = ""
		if len(data) != len(b.data) {
			return b, badRequest("invalid content length: raw report data has %d bytes, want exactly %d", len(data), len(b.data))
		}
		copy(b.data[:], data)
		return b, nil
	}
	if algorithm == "" {
		b.algorithm = hashDefault
	}
	if prefix == "" {
		b.tag = tagDefault
	}
	h := newHash(b.algorithm)
	if h == nil {
		return b, badRequest("invalid hash algorithm: %q, want sha256, sha384, sha512, sha3-256, sha3-384, sha3-512, keccak256, keccak384, keccak512 or raw", clip(algorithm))
	}
	h.Write([]byte(b.tag + ":"))
	h.Write(data)
	copy(b.data[:], h.Sum(nil))
	return b, nil
}

// checkTag refuses the reserved tags. "ratls-cert:x" counts as one: the colon that
// follows the prefix need not be the one that ends the tag.
func checkTag(prefix string) error {
	tag, _, _ := strings.Cut(prefix, ":")
	for _, reserved := range reservedTags {
		if tag == reserved {
			return denied("prefix %q is reserved: quotes with it stand for the agent itself; choose another", clip(prefix))
		}
	}
	return nil
}

// newHash returns nil for a name that is not known.
func newHash(name string) hash.Hash {
	switch name {
	case "sha256":
		return sha256.New()
	case "sha384":
		return sha512.New384()
	case "sha512":
		return sha512.New()
	case "sha3-256":
		return sha3.New256()
	case "sha3-384":
		return sha3.New384()
	case "sha3-512":
		return sha3.New512()
	case "keccak256":
		return xsha3.NewLegacyKeccak256()
	case "keccak384":
		return newKeccak(48)
	case "keccak512":
		return xsha3.NewLegacyKeccak512()
	}
	return nil
}
