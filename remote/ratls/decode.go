package ratls

import (
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"slices"

	"tdx-agent/measure"
)

// ErrNoAttestation says that a certificate carries no dstack attestation at all, as
// opposed to a bad one.
var ErrNoAttestation = errors.New("the certificate carries no dstack attestation (extension .8, or .1 and .2)")

// Attested is the attestation in a certificate. All of it is untrusted until the
// Evidence was appraised for ReportData.
type Attested struct {
	Evidence *measure.Evidence
	// ReportData is what the certificate's key demands of the quote; the quote has
	// it.
	ReportData measure.ReportData
	// Legacy says that it came from the extensions .1 and .2, which have no
	// VMConfig, and not from .8.
	Legacy bool
	// Stripped says that the boot log is not there, but for what measures the ACPI
	// tables: of the registers, only RTMR3 can be replayed.
	Stripped bool
}

// Parse returns the attestation in a certificate: from extension .8 if there is one,
// else from .1 and .2. It refuses a quote that is not bound to the certificate's key,
// more than 256 KiB, more than 512 events of RTMR3 or of the boot, a compressed log of more than 16 KiB, duplicate
// extensions and trailing bytes. Without any attestation the error is
// [ErrNoAttestation].
func Parse(cert *x509.Certificate) (*Attested, error) {
	a, err := parse(cert.Extensions)
	if err == nil {
		a.ReportData = ReportData(cert.RawSubjectPublicKeyInfo)
		err = a.bound()
	}
	if err != nil {
		return nil, fmt.Errorf("RA-TLS: %w", err)
	}
	return a, nil
}

func parse(extensions []pkix.Extension) (*Attested, error) {
	blob, found, err := content(extensions, OIDAttestation, maxAttestation)
	if err != nil {
		return nil, err
	}
	if found {
		return parseAttestation(blob)
	}
	quote, hasQuote, err := content(extensions, OIDQuote, maxAttestation)
	if err != nil {
		return nil, err
	}
	log, hasLog, err := content(extensions, OIDEventLog, maxAttestation)
	switch {
	case err != nil:
		return nil, err
	case !hasQuote && !hasLog:
		return nil, ErrNoAttestation
	case hasQuote != hasLog:
		return nil, fmt.Errorf("it has one of the extensions %v and %v, want both", OIDQuote, OIDEventLog)
	}
	return parseLegacy(quote, log)
}

func parseAttestation(blob []byte) (*Attested, error) {
	v, err := measure.ParseAttestation(blob)
	if err != nil {
		return nil, err
	}
	events, err := oneLog(v)
	if err != nil {
		return nil, err
	}
	if err := checkCount(events); err != nil {
		return nil, err
	}
	return &Attested{
		Evidence: &measure.Evidence{Quote: v.Quote, Events: events, VMConfig: v.VMConfig},
		Stripped: !slices.ContainsFunc(events, func(e measure.Event) bool { return e.IMR != measure.RTMR3 && !e.MeasuresACPI() }),
	}, nil
}

// oneLog returns the log of an attestation, in which the runtime events stand twice.
// They must be the same ones, so that it cannot matter which of the two is appraised.
func oneLog(v *measure.Attestation) ([]measure.Event, error) {
	boot, runtime := []measure.Event{}, v.RuntimeEvents
	i := 0
	for _, e := range v.Events {
		if e.IMR != measure.RTMR3 {
			boot = append(boot, e)
			continue
		}
		if i >= len(runtime) || e.Type != runtime[i].Type || e.Digest != runtime[i].Digest {
			return nil, fmt.Errorf("the attestation's event log and its runtime events differ at runtime event %d", i)
		}
		i++
	}
	if i > 0 && i < len(runtime) {
		return nil, fmt.Errorf("the attestation's event log has %d runtime events, beside it there are %d", i, len(runtime))
	}
	return append(boot, runtime...), nil
}

func parseLegacy(quote, log []byte) (*Attested, error) {
	log, err := unpack(log)
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	events, err := measure.ParseEventLog(log)
	if err != nil {
		return nil, err
	}
	if err := checkCount(events); err != nil {
		return nil, err
	}
	return &Attested{Evidence: &measure.Evidence{Quote: quote, Events: events}, Legacy: true}, nil
}

// packedMark is what a compressed event log begins with.
const packedMark = "ELGZv1"

// unpack returns the JSON of an event log.
func unpack(log []byte) ([]byte, error) {
	packed, ok := bytes.CutPrefix(log, []byte(packedMark))
	if !ok {
		return log, nil
	}
	src := bytes.NewReader(packed)
	z, err := gzip.NewReader(src)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	log, err = io.ReadAll(io.LimitReader(z, maxUnpackedLog+1))
	switch {
	case err != nil:
		return nil, err
	case len(log) > maxUnpackedLog:
		return nil, fmt.Errorf("has more than %d bytes when unpacked", maxUnpackedLog)
	case src.Len() > 0:
		return nil, fmt.Errorf("%d bytes follow the compressed data", src.Len())
	}
	return log, nil
}

// bound demands a quote that carries the report data of the certificate's key.
func (a *Attested) bound() error {
	quote, err := measure.ParseQuote(a.Evidence.Quote)
	if err != nil {
		return err
	}
	if quote.Body.ReportData != a.ReportData {
		return fmt.Errorf("the quote is bound to another key: report data is %s, the certificate's key gives %s", quote.Body.ReportData, a.ReportData)
	}
	return nil
}
