package ratls

import (
	"crypto/sha512"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"

	"tdx-agent/measure"
)

// The extensions. All are non-critical, and the value of each is a DER OCTET STRING
// around the content, inside the OCTET STRING that X.509 itself puts there.
var (
	OIDQuote       = oid(1) // the raw quote
	OIDEventLog    = oid(2) // the event log, JSON, or ELGZv1 and gzip
	OIDAppID       = oid(3) // issuer's claim: application id, 20 bytes
	OIDUsage       = oid(4) // issuer's claim: what the certificate is for, UTF-8
	OIDAttestation = oid(8) // versioned attestation, stripped
	OIDAppInfo     = oid(9) // issuer's claim: [AppInfo], MessagePack
)

func oid(last int) asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, last}
}

// The usages that dstack's issuers write.
const (
	UsageApp   = "app:custom" // an application's certificate
	UsageAppCA = "app:ca"     // the authority of one application
	UsageKMS   = "kms:rpc"    // the key management service itself
)

// The bounds of what a certificate carries.
const (
	maxAttestation = 256 << 10 // bytes; also of a quote and of a plain log
	maxUnpackedLog = 16 << 10  // bytes of a log that came compressed
	maxReadable    = 60 << 10  // bytes of all extensions: rustls and mbed TLS take no handshake message above 64 KiB
	maxEvents      = 512       // of RTMR3, and again as many of the boot
	maxUsage       = 64        // bytes
	maxAppInfo     = 4096      // bytes
	appIDSize      = 20
)

// ReportData is the report data that binds a quote to a key: SHA-512 of
// "ratls-cert:" and the key's DER SubjectPublicKeyInfo.
func ReportData(spki []byte) measure.ReportData {
	h := sha512.New()
	h.Write([]byte("ratls-cert:"))
	h.Write(spki)
	return measure.ReportData(h.Sum(nil))
}

// checkCount holds a log to the bounds of an agent's own: what a boot measures does not
// take from what runs after it.
func checkCount(events []measure.Event) error {
	var runtime int
	for i := range events {
		if events[i].IMR == measure.RTMR3 {
			runtime++
		}
	}
	if boot := len(events) - runtime; max(runtime, boot) > maxEvents {
		return fmt.Errorf("the log has %d events of RTMR3 and %d of the boot, want at most %d of each", runtime, boot, maxEvents)
	}
	return nil
}

// UsageExtension returns the extension that says what a certificate is for.
func UsageExtension(usage string) pkix.Extension { return wrap(OIDUsage, []byte(usage)) }

func wrap(id asn1.ObjectIdentifier, content []byte) pkix.Extension {
	head := octetString(len(content))
	return pkix.Extension{Id: id, Value: append(append(make([]byte, 0, len(head)+len(content)), head...), content...)}
}

// wrapOwn is wrap for content that nobody else has: it is moved, where there is room, and
// not copied.
func wrapOwn(id asn1.ObjectIdentifier, content []byte) pkix.Extension {
	return pkix.Extension{Id: id, Value: slices.Insert(content, 0, octetString(len(content))...)}
}

// octetString returns what DER writes before a string of n bytes. That is within the caps
// of this package, and so below 2^24.
func octetString(n int) []byte {
	switch {
	case n < 0x80:
		return []byte{asn1.TagOctetString, byte(n)}
	case n < 1<<8:
		return []byte{asn1.TagOctetString, 0x81, byte(n)}
	case n < 1<<16:
		return []byte{asn1.TagOctetString, 0x82, byte(n >> 8), byte(n)}
	}
	return []byte{asn1.TagOctetString, 0x83, byte(n >> 16), byte(n >> 8), byte(n)}
}

// content returns what the extension id holds, at most limit bytes, and whether
// there is one. A second extension of that id is refused: which of the two a reader
// takes should not matter.
func content(extensions []pkix.Extension, id asn1.ObjectIdentifier, limit int) (b []byte, found bool, err error) {
	for _, e := range extensions {
		if !e.Id.Equal(id) {
			continue
		}
		if found {
			return nil, false, fmt.Errorf("extension %v is there twice", id)
		}
		found = true
		if len(e.Value) > limit+5 {
			return nil, false, fmt.Errorf("extension %v has %d bytes, want at most %d", id, len(e.Value), limit+5)
		}
		rest, err := asn1.Unmarshal(e.Value, &b)
		if err != nil {
			return nil, false, fmt.Errorf("extension %v is not a DER OCTET STRING: %v", id, err)
		}
		if len(rest) > 0 {
			return nil, false, fmt.Errorf("extension %v: %d bytes follow the OCTET STRING", id, len(rest))
		}
	}
	return b, found, nil
}
