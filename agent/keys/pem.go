package keys

import (
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/binary"
	"slices"
)

// appendPEM writes a PEM block (RFC 7468) into memory of the right size at once, so
// that no part of a key is left where a buffer grew.
func appendPEM(label string, der []byte) []byte {
	b := make([]byte, 0, pemSize(label, der))
	b = append(append(append(b, "-----BEGIN "...), label...), "-----\n"...)
	for len(der) > pemLine {
		b = append(base64.StdEncoding.AppendEncode(b, der[:pemLine]), '\n')
		der = der[pemLine:]
	}
	b = append(base64.StdEncoding.AppendEncode(b, der), '\n')
	return append(append(append(b, "-----END "...), label...), "-----\n"...)
}

const (
	pemColumn = 64
	pemLine   = pemColumn / 4 * 3 // bytes
)

func pemSize(label string, der []byte) int {
	size := base64.StdEncoding.EncodedLen(len(der))
	return size + size/pemColumn + 1 + 2*len(label) + len("-----BEGIN -----\n-----END -----\n")
}

// Certificate is an X.509 certificate that was issued.
type Certificate struct {
	der  []byte
	json string // what AppendJSON appends, where it is known
}

// PEM returns the certificate's PEM text, which ends in a newline.
func (c *Certificate) PEM() string { return string(appendPEM(certificateLabel, c.der)) }

const certificateLabel = "CERTIFICATE"

// SizeJSON bounds what AppendJSON appends.
func (c *Certificate) SizeJSON() int {
	size := pemSize(certificateLabel, c.der)
	return size + size/pemColumn + 4 // an end of line has two bytes
}

// AppendJSON appends the PEM text as the inside of a JSON string. A certificate with
// evidence has more than 20 KiB, and this is most of the time that an answer takes beside
// its signature: so it is written where the answer is, and 12 bits are looked up at a
// time, which takes half as long as encoding/base64 does. The lookups depend on the data:
// not for keys.
func (c *Certificate) AppendJSON(b []byte) []byte {
	if c.json != "" {
		return append(b, c.json...)
	}
	b = append(b, "-----BEGIN "+certificateLabel+`-----\n`...)
	der := c.der
	const column = pemColumn + 2
	for b = slices.Grow(b, c.SizeJSON()); len(der) >= pemLine+2; der = der[pemLine:] { // two more are read
		n := len(b)
		b = b[:n+column]
		line := (*[column]byte)(b[n:])
		for i := range pemLine / 6 {
			v := binary.BigEndian.Uint64(der[6*i:])
			binary.LittleEndian.PutUint64(line[8*i:], uint64(base64Pairs[v>>52])|uint64(base64Pairs[v>>40&4095])<<16|uint64(base64Pairs[v>>28&4095])<<32|uint64(base64Pairs[v>>16&4095])<<48)
		}
		line[pemColumn], line[pemColumn+1] = '\\', 'n'
	}
	if len(der) > pemLine {
		b = append(base64.StdEncoding.AppendEncode(b, der[:pemLine]), `\n`...)
		der = der[pemLine:]
	}
	b = append(base64.StdEncoding.AppendEncode(b, der), `\n`...)
	return append(b, "-----END "+certificateLabel+`-----\n`...)
}

// base64Pairs holds the two digits of 12 bits, the first in the low byte.
var base64Pairs = func() (pairs [1 << 12]uint16) {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	for i := range pairs {
		pairs[i] = uint16(digits[i>>6]) | uint16(digits[i&63])<<8
	}
	return pairs
}()

// spkiHead is what comes before the point in the DER SubjectPublicKeyInfo of a P-256 key
// (RFC 5480).
const spkiHead = "\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00"

// p256SPKI returns a P-256 key's DER SubjectPublicKeyInfo.
func p256SPKI(key *ecdsa.PublicKey) ([]byte, error) {
	point, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	return append([]byte(spkiHead), point...), nil
}

// The PKCS #8 form (RFC 5958, RFC 5915) of a P-256 key with its public half, around
// the scalar and the point. This is the form that dstack hashes for a DH secret.
const (
	pkcs8Head   = "\x30\x81\x87\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04\x6d\x30\x6b\x02\x01\x01\x04\x20"
	pkcs8Middle = "\xa1\x44\x03\x42\x00"
	pointSize   = 65 // uncompressed, SEC 1
)

// pkcs8 returns the 138 bytes of the key whose scalar s is. They are the caller's to
// clear.
func (s *Secret) pkcs8(public *ecdsa.PublicKey) ([]byte, error) {
	point, err := public.Bytes()
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(pkcs8Head)+len(s.bytes())+len(pkcs8Middle)+pointSize)
	b = append(append(append(b, pkcs8Head...), s.bytes()...), pkcs8Middle...)
	return append(b, point...), nil
}
