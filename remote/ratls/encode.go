package ratls

import (
	"crypto/x509/pkix"
	"fmt"
	"slices"

	"tdx-agent/measure"
)

// Extensions returns the extensions that carry ev in the certificate of the key whose
// DER SubjectPublicKeyInfo is spki: the versioned attestation (.8) and, for verifiers
// that know nothing else, quote and event log (.1, .2). These know version 1 events
// only, so a log with a version 2 event travels in .8 alone; so does one that would
// make a certificate which rustls does not read (60 KiB).
//
// The attestation keeps of the boot log what dstack keeps, the three events that
// measure ACPI tables; the log in .2 is whole, with the payloads of boot events
// blank. Every digest is filled in both. It is an error if the quote's report data is
// not [ReportData] of spki, or if there are more than 512 events of RTMR3 or of
// the boot, or an extension has more than 256 KiB.
func Extensions(ev *measure.Evidence, spki []byte) ([]pkix.Extension, error) {
	return new(Encoder).Extensions(ev, spki)
}

// Encoder writes the evidence of one TD for one key after the other, whose event log is
// mostly the last one's. Its method may be called concurrently; the zero Encoder is one.
type Encoder struct {
	logs measure.LastLog[writtenLog]
}

// writtenLog is an event log as certificates carry it.
type writtenLog struct {
	legacy   pkix.Extension
	stripped []measure.Event
}

// Extensions is [Extensions]. The values are not to be changed.
func (c *Encoder) Extensions(ev *measure.Evidence, spki []byte) ([]pkix.Extension, error) {
	rd := ReportData(spki)
	quote, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		return nil, fmt.Errorf("RA-TLS: %w", err)
	}
	if quote.Body.ReportData != rd {
		return nil, fmt.Errorf("RA-TLS: the quote is not of this key: report data is %s, want %s", quote.Body.ReportData, rd)
	}
	if err := checkCount(ev.Events); err != nil {
		return nil, fmt.Errorf("RA-TLS: %w", err)
	}
	log, err := c.logs.Of(ev.Events, writeLog)
	if err != nil {
		return nil, fmt.Errorf("RA-TLS: %w", err)
	}
	attestation := measure.NewAttestation(&measure.Evidence{Quote: ev.Quote, Events: log.stripped, VMConfig: ev.VMConfig}, rd)
	blob, err := attestation.Marshal()
	if err != nil {
		return nil, fmt.Errorf("RA-TLS: %w", err)
	}
	extensions := make([]pkix.Extension, 0, 3)
	if attestation.Version == measure.AttestationV0 {
		extensions = append(extensions, wrap(OIDQuote, ev.Quote), log.legacy)
	}
	extensions = append(extensions, wrapOwn(OIDAttestation, blob))
	for _, e := range extensions {
		if len(e.Value) > maxAttestation {
			return nil, fmt.Errorf("RA-TLS: extension %v has %d bytes, want at most %d", e.Id, len(e.Value), maxAttestation)
		}
	}
	if size(extensions) > maxReadable {
		return WithoutLegacy(extensions), nil
	}
	return extensions, nil
}

func writeLog(events []measure.Event) (writtenLog, error) {
	text, err := measure.FormatEventLog(events, true)
	return writtenLog{wrapOwn(OIDEventLog, text), strip(events)}, err
}

// WithoutLegacy returns the extensions that are not there for verifiers before dstack
// 0.5.9: what a certificate carries where legacy_oids is off.
func WithoutLegacy(extensions []pkix.Extension) []pkix.Extension {
	return slices.DeleteFunc(slices.Clone(extensions), func(e pkix.Extension) bool { return e.Id.Equal(OIDQuote) || e.Id.Equal(OIDEventLog) })
}

func size(extensions []pkix.Extension) (n int) {
	for _, e := range extensions {
		n += len(e.Value)
	}
	return n
}

// strip returns the events that a certificate keeps.
func strip(events []measure.Event) []measure.Event {
	var kept []measure.Event
	for i := range events {
		if e := &events[i]; e.IMR == measure.RTMR3 || e.MeasuresACPI() {
			kept = append(kept, *e)
		}
	}
	return kept
}
