package measure

import (
	"encoding/binary"
	"fmt"
)

// Sizes of a TDX quote (Intel TDX DCAP Quoting Library API, quote format 4 and 5).
const (
	maxQuoteSize    = 128 << 10 // what Linux's TDX guest driver takes
	quoteHeaderSize = 48
	teeTypeTDX      = 0x81
	bodySizeTD10    = 584
	bodySizeTD15    = 648
)

// Types of the TD report body in a quote.
const (
	BodyTD10 = 2
	BodyTD15 = 3
)

// Quote is a parsed TDX quote. Nothing in it is trusted: no signature was checked.
type Quote struct {
	Version            uint16 // 4 or 5
	AttestationKeyType uint16 // 2 is ECDSA P-256
	TEEType            uint32 // always 0x81
	Reserved           [4]byte
	QEVendorID         [16]byte
	UserData           [20]byte
	BodyType           uint16 // BodyTD10 or BodyTD15; version 4 has only the first
	Body               TDBody

	Signed        []byte // what the quote's signature covers: header, descriptor and body
	SignatureData []byte // signature, attestation key and certification data, unparsed
	Trailing      []byte // what follows; the kernel pads, and no signature covers it
}

// TDBody is the TD report body of a quote.
type TDBody struct {
	TEETCBSVN      [16]byte
	MRSEAM         Digest
	MRSignerSEAM   Digest
	SEAMAttributes [8]byte
	TDAttributes   [8]byte // bit 0 of byte 0 is DEBUG
	XFAM           [8]byte
	Registers
	ReportData  ReportData
	TEETCBSVN2  [16]byte // BodyTD15 only, else zero
	MRServiceTD Digest   // BodyTD15 only, else zero
}

// Debug reports whether the TD runs in debug mode, in which the host can read it.
func (b *TDBody) Debug() bool { return b.TDAttributes[0]&1 != 0 }

// QuoteParseError says why bytes are not a TDX quote.
type QuoteParseError struct {
	Field     string
	Got, Want string
}

func (e *QuoteParseError) Error() string {
	return fmt.Sprintf("not a TDX quote: %s is %s, want %s", e.Field, e.Got, e.Want)
}

func quoteError(field string, got any, want string) error {
	return &QuoteParseError{Field: field, Got: fmt.Sprint(got), Want: want}
}

// ParseQuote parses a version 4 or version 5 TDX quote of at most 128 KiB. It checks
// the form only, never a signature. The slices of the result are parts of b. The
// error is a [*QuoteParseError].
func ParseQuote(b []byte) (*Quote, error) {
	if len(b) > maxQuoteSize {
		return nil, quoteError("length", len(b), fmt.Sprintf("at most %d bytes", maxQuoteSize))
	}
	if len(b) < quoteHeaderSize {
		return nil, quoteError("length", len(b), fmt.Sprintf("at least %d bytes of header", quoteHeaderSize))
	}
	q := &Quote{
		Version:            binary.LittleEndian.Uint16(b),
		AttestationKeyType: binary.LittleEndian.Uint16(b[2:]),
		TEEType:            binary.LittleEndian.Uint32(b[4:]),
		Reserved:           [4]byte(b[8:]),
		QEVendorID:         [16]byte(b[12:]),
		UserData:           [20]byte(b[28:]),
	}
	if q.TEEType != teeTypeTDX {
		return nil, quoteError("TEE type", fmt.Sprintf("%#x", q.TEEType), "0x81 (TDX)")
	}
	start, size, err := q.body(b)
	if err != nil {
		return nil, err
	}
	end := start + size // at most 702
	if len(b) < end+4 {
		return nil, quoteError("length", len(b), fmt.Sprintf("at least %d bytes for this header and body", end+4))
	}
	q.Body = parseTDBody(b[start:end])
	signature := uint64(binary.LittleEndian.Uint32(b[end:]))
	if rest := uint64(len(b) - end - 4); signature == 0 || signature > rest {
		return nil, quoteError("signed data size", signature, fmt.Sprintf("1 to %d, the bytes that are left", rest))
	}
	tail := end + 4 + int(signature)
	q.Signed, q.SignatureData, q.Trailing = b[:end:end], b[end+4:tail:tail], b[tail:]
	return q, nil
}

// body finds the TD report body and sets its type.
func (q *Quote) body(b []byte) (start, size int, err error) {
	switch q.Version {
	case 4:
		q.BodyType = BodyTD10
		return quoteHeaderSize, bodySizeTD10, nil
	case 5:
	default:
		return 0, 0, quoteError("version", q.Version, "4 or 5")
	}
	if len(b) < quoteHeaderSize+6 {
		return 0, 0, quoteError("length", len(b), "room for the body descriptor")
	}
	q.BodyType = binary.LittleEndian.Uint16(b[quoteHeaderSize:])
	switch q.BodyType {
	case BodyTD10:
		size = bodySizeTD10
	case BodyTD15:
		size = bodySizeTD15
	default:
		return 0, 0, quoteError("body type", q.BodyType, "2 (TD 1.0) or 3 (TD 1.5)")
	}
	if got := binary.LittleEndian.Uint32(b[quoteHeaderSize+2:]); got != uint32(size) {
		return 0, 0, quoteError("body size", got, fmt.Sprintf("%d for body type %d", size, q.BodyType))
	}
	return quoteHeaderSize + 6, size, nil
}

// parseTDBody takes 584 or 648 bytes.
func parseTDBody(b []byte) TDBody {
	t := TDBody{
		TEETCBSVN:      [16]byte(b),
		MRSEAM:         Digest(b[16:]),
		MRSignerSEAM:   Digest(b[64:]),
		SEAMAttributes: [8]byte(b[112:]),
		TDAttributes:   [8]byte(b[120:]),
		XFAM:           [8]byte(b[128:]),
		Registers: Registers{MRTD: Digest(b[136:]), MRConfigID: Digest(b[184:]), MROwner: Digest(b[232:]),
			MROwnerConfig: Digest(b[280:])},
		ReportData: ReportData(b[520:]),
	}
	for i := range t.RTMR {
		t.RTMR[i] = Digest(b[328+48*i:])
	}
	if len(b) >= bodySizeTD15 {
		t.TEETCBSVN2, t.MRServiceTD = [16]byte(b[584:]), Digest(b[600:])
	}
	return t
}
