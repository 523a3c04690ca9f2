package dcap

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
)

const (
	maxChainText = 8 << 10 // of a certificate chain as PEM
	maxChain     = 3       // certificates
	pemBegin     = "-----BEGIN CERTIFICATE-----"
	pemEnd       = "-----END CERTIFICATE-----"
	pemColumns   = 64
)

// canonical refuses base64 whose unused last bits are not zero. With that, no bit of
// a chain can change without changing a certificate or being refused.
var canonical = base64.StdEncoding.Strict()

// decodePEM decodes a certificate chain in the strict form of RFC 7468: nothing but
// certificates, lines of 64 columns ended by LF or CRLF. One NUL may follow, which
// Intel's quote library writes.
func decodePEM(text []byte) (chain [][]byte, err error) {
	if len(text) > maxChainText {
		return nil, fmt.Errorf("chain of %d bytes, want at most %d", len(text), maxChainText)
	}
	rest := bytes.TrimSuffix(text, []byte{0})
	buf := make([]byte, 0, len(rest)/4*3)
	for len(rest) > 0 {
		if len(chain) == maxChain {
			return nil, fmt.Errorf("more than %d certificates", maxChain)
		}
		start := len(buf)
		if buf, rest, err = decodeCertificate(buf, rest); err != nil {
			return nil, fmt.Errorf("certificate %d: %v", len(chain)+1, err)
		}
		chain = append(chain, buf[start:len(buf):len(buf)])
	}
	return chain, nil
}

// decodeCertificate appends the DER of the first certificate in text to buf.
func decodeCertificate(buf, text []byte) (der, rest []byte, err error) {
	line, rest, err := cutLine(text)
	if err != nil {
		return nil, nil, err
	}
	if string(line) != pemBegin {
		return nil, nil, fmt.Errorf("got %.40q, want %s", line, pemBegin)
	}
	for last := false; ; {
		if line, rest, err = cutLine(rest); err != nil {
			return nil, nil, err
		}
		if string(line) == pemEnd {
			return buf, rest, nil
		}
		if last || len(line) == 0 || len(line) > pemColumns {
			return nil, nil, fmt.Errorf("a line is not %d columns of base64", pemColumns)
		}
		last = len(line) < pemColumns || line[len(line)-1] == '='
		if buf, err = canonical.AppendDecode(buf, line); err != nil {
			return nil, nil, err
		}
	}
}

// cutLine takes a line. The base64 decoder skips CR, so no CR may be inside.
func cutLine(text []byte) (line, rest []byte, err error) {
	if len(text) == 0 {
		return nil, nil, errors.New("the text ends before " + pemEnd)
	}
	line, rest, found := bytes.Cut(text, []byte{'\n'})
	if found {
		line = bytes.TrimSuffix(line, []byte{'\r'})
	}
	if bytes.IndexByte(line, '\r') >= 0 {
		return nil, nil, errors.New("a line has a CR inside")
	}
	return line, rest, nil
}
