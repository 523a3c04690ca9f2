package ratls_test

import (
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// newKey returns a key and its SubjectPublicKeyInfo.
func newKey(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, spki
}

// issue returns a self-signed certificate with these extensions.
func issue(t testing.TB, key *ecdsa.PrivateKey, extensions ...pkix.Extension) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), ExtraExtensions: extensions}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// evidence is a quote-shaped text with the registers that its log gives, and a boot
// log that has the three events of the ACPI tables in it.
func evidence(t testing.TB, rd measure.ReportData, version int) *measure.Evidence {
	t.Helper()
	events := []measure.Event{{IMR: 0, Type: 0x80000001, Digest: digest(0xd1), Payload: []byte("firmware")}}
	for i := range byte(3) {
		events = append(events, measure.Event{IMR: 0, Type: 10, Digest: digest(0xe0 + i), Payload: []byte("ACPI DATA")})
	}
	events = append(events, measure.Event{IMR: 2, Type: 13, Digest: digest(0xd3), Payload: []byte("kernel")})
	for name, payload := range map[string][]byte{"app-id": bytes.Repeat([]byte{7}, 20), "system-ready": nil} {
		e, err := measure.NewRuntimeEvent(name, payload, version)
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	slices.SortStableFunc(events, func(a, b measure.Event) int { return strings.Compare(a.Name, b.Name) })
	rtmr, err := measure.Replay(events)
	if err != nil {
		t.Fatal(err)
	}
	q := make([]byte, 1000)
	binary.LittleEndian.PutUint16(q[0:], 4)
	binary.LittleEndian.PutUint16(q[2:], 2)
	binary.LittleEndian.PutUint32(q[4:], 0x81)
	for i := range rtmr {
		copy(q[376+48*i:], rtmr[i][:])
	}
	copy(q[568:], rd[:])
	binary.LittleEndian.PutUint32(q[632:], uint32(len(q)-636))
	return &measure.Evidence{Quote: q, Events: events, VMConfig: `{"cpu_count":2}`}
}

func digest(c byte) measure.Digest { return measure.Digest(bytes.Repeat([]byte{c}, 48)) }

func extensions(t testing.TB, spki []byte, version int) []pkix.Extension {
	t.Helper()
	list, err := ratls.Extensions(evidence(t, ratls.ReportData(spki), version), spki)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func octets(content string) []byte {
	b, err := asn1.Marshal([]byte(content))
	if err != nil {
		panic(err)
	}
	return b
}

func ext(id asn1.ObjectIdentifier, content string) pkix.Extension {
	return pkix.Extension{Id: id, Value: octets(content)}
}

func ids(list []pkix.Extension) (names []string) {
	for _, e := range list {
		names = append(names, e.Id.String()[len("1.3.6.1.4.1.62397.1"):])
	}
	return names
}

func TestRoundTrip(t *testing.T) {
	key, spki := newKey(t)
	for version, want := range map[int]string{measure.EventV1: ".1 .2 .8", measure.EventV2: ".8"} {
		list := extensions(t, spki, version)
		if got := strings.Join(ids(list), " "); got != want {
			t.Errorf("events of version %d: extensions %s, want %s", version, got, want)
		}
		for _, e := range list {
			if e.Critical {
				t.Errorf("%v is critical", e.Id)
			}
		}
		a, err := ratls.Parse(issue(t, key, list...))
		if err != nil {
			t.Fatal(err)
		}
		if a.Legacy || !a.Stripped || a.ReportData != ratls.ReportData(spki) || a.Evidence.VMConfig != `{"cpu_count":2}` {
			t.Errorf("version %d: %+v", version, a)
		}
		sent := evidence(t, a.ReportData, version)
		for _, e := range sent.Events {
			// A reader would compute the digests of runtime events where they are blank.
			if inside := bytes.Contains(list[len(list)-1].Value, e.Digest[:]); inside != (e.IMR == 3 || e.MeasuresACPI()) {
				t.Errorf("version %d: the digest of %+v is in the attestation: %v", version, e, inside)
			}
		}
		var kept []measure.Event
		for _, e := range sent.Events {
			if e.IMR == 3 || e.MeasuresACPI() {
				kept = append(kept, e)
			}
		}
		if len(a.Evidence.Events) != 5 || !bytes.Equal(a.Evidence.Quote, sent.Quote) {
			t.Fatalf("version %d: %d events", version, len(a.Evidence.Events))
		}
		for i, e := range a.Evidence.Events {
			if e.Digest != kept[i].Digest || e.Digest.IsZero() || e.Name != kept[i].Name || !bytes.Equal(e.Payload, kept[i].Payload) {
				t.Errorf("version %d: event %d is %+v, want %+v", version, i, e, kept[i])
			}
		}
	}
}

// TestLegacyReader reads what a verifier of dstack 0.5.8 reads: whole log, no blank
// digest, boot payloads blank.
func TestLegacyReader(t *testing.T) {
	key, spki := newKey(t)
	list := extensions(t, spki, measure.EventV1)
	a, err := ratls.Parse(issue(t, key, list[:2]...))
	if err != nil {
		t.Fatal(err)
	}
	if !a.Legacy || a.Stripped || a.Evidence.VMConfig != "" {
		t.Errorf("%+v", a)
	}
	sent := evidence(t, a.ReportData, measure.EventV1)
	want, err := measure.Replay(sent.Events)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := measure.Replay(a.Evidence.Events); err != nil || got != want {
		t.Errorf("replayed %v (%v), want %v", got, err, want)
	}
	if bytes.Contains(list[1].Value, []byte(`"digest":""`)) || strings.Contains(string(list[1].Value), "6669726d77617265") {
		t.Errorf("log in .2: %s", list[1].Value)
	}
}

func pack(log string) string {
	var b bytes.Buffer
	b.WriteString("ELGZv1")
	z := gzip.NewWriter(&b)
	z.Write([]byte(log))
	z.Close()
	return b.String()
}

func TestPackedLog(t *testing.T) {
	key, spki := newKey(t)
	list := extensions(t, spki, measure.EventV1)
	var log []byte
	if _, err := asn1.Unmarshal(list[1].Value, &log); err != nil {
		t.Fatal(err)
	}
	a, err := ratls.Parse(issue(t, key, list[0], ext(ratls.OIDEventLog, pack(string(log)))))
	if err != nil || len(a.Evidence.Events) != 7 {
		t.Errorf("%v", err)
	}
}

func TestRefusals(t *testing.T) {
	key, spki := newKey(t)
	list := extensions(t, spki, measure.EventV1)
	_, otherSPKI := newKey(t)
	other := extensions(t, otherSPKI, measure.EventV1)
	quote, log, blob := list[0], list[1], list[2]
	bad := func(id asn1.ObjectIdentifier, value []byte) pkix.Extension {
		return pkix.Extension{Id: id, Value: value}
	}
	many := evidence(t, ratls.ReportData(spki), measure.EventV1)
	for range 513 {
		e, _ := measure.NewRuntimeEvent("x", nil, measure.EventV1)
		many.Events = append(many.Events, e)
	}
	manyBlob, err := measure.EncodeAttestation(many, ratls.ReportData(spki))
	if err != nil {
		t.Fatal(err)
	}
	manyLog, err := measure.FormatEventLog(many.Events, true)
	if err != nil {
		t.Fatal(err)
	}
	two := measure.NewAttestation(evidence(t, ratls.ReportData(spki), measure.EventV1), ratls.ReportData(spki))
	two.RuntimeEvents = two.RuntimeEvents[:1]
	shorter, _ := two.Marshal()
	two.RuntimeEvents = append(slices.Clone(two.RuntimeEvents), two.RuntimeEvents[0])
	different, _ := two.Marshal()
	two.Events, two.RuntimeEvents = two.Events[:len(two.Events)-1], []measure.Event{two.RuntimeEvents[0], many.Events[len(many.Events)-1]}
	longer, _ := two.Marshal()

	for name, c := range map[string]struct {
		list  []pkix.Extension
		words string
	}{
		"other key":                {other, "bound to another key"},
		"other key, legacy":        {other[:2], "bound to another key"},
		"other key, .8 alone":      {other[2:], "bound to another key"},
		".8 bad, .1 and .2 good":   {[]pkix.Extension{quote, log, other[2]}, "bound to another key"},
		"quote alone":              {[]pkix.Extension{quote}, "want both"},
		"log alone":                {[]pkix.Extension{log}, "want both"},
		"not an octet string":      {[]pkix.Extension{bad(ratls.OIDAttestation, []byte{5, 0})}, "not a DER OCTET STRING"},
		"raw":                      {[]pkix.Extension{bad(ratls.OIDAttestation, blob.Value[4:])}, "not a DER OCTET STRING"},
		"empty":                    {[]pkix.Extension{bad(ratls.OIDAttestation, nil)}, "not a DER OCTET STRING"},
		"bytes behind the string":  {[]pkix.Extension{bad(ratls.OIDAttestation, append(slices.Clone(blob.Value), 0))}, "1 bytes follow the OCTET STRING"},
		"long form of a length":    {[]pkix.Extension{bad(ratls.OIDAttestation, []byte{4, 0x81, 1, 0})}, "not a DER OCTET STRING"},
		"bytes behind the blob":    {[]pkix.Extension{ext(ratls.OIDAttestation, string(manyBlob)+"\x00")}, "bytes follow it"},
		"empty blob":               {[]pkix.Extension{ext(ratls.OIDAttestation, "")}, "attestation is empty"},
		"other version":            {[]pkix.Extension{ext(ratls.OIDAttestation, "\x01")}, "attestation starts with"},
		"other platform":           {[]pkix.Extension{ext(ratls.OIDAttestation, "\x00\x02")}, "platform \"nitro\""},
		"too many events":          {[]pkix.Extension{ext(ratls.OIDAttestation, string(manyBlob))}, "515 events of RTMR3 and 5 of the boot, want at most 512"},
		"too many events, legacy":  {[]pkix.Extension{quote, ext(ratls.OIDEventLog, string(manyLog))}, "515 events of RTMR3 and 5 of the boot, want at most 512"},
		"too large":                {[]pkix.Extension{ext(ratls.OIDAttestation, strings.Repeat("\x00", 256<<10+1))}, "want at most"},
		"too large, legacy quote":  {[]pkix.Extension{ext(ratls.OIDQuote, strings.Repeat("\x00", 256<<10+1)), log}, "want at most"},
		"too large, legacy log":    {[]pkix.Extension{quote, ext(ratls.OIDEventLog, strings.Repeat(" ", 256<<10+1))}, "want at most"},
		"runtime events shorter":   {[]pkix.Extension{ext(ratls.OIDAttestation, string(shorter))}, "differ at runtime event 1"},
		"runtime events different": {[]pkix.Extension{ext(ratls.OIDAttestation, string(different))}, "differ at runtime event 1"},
		"runtime events longer":    {[]pkix.Extension{ext(ratls.OIDAttestation, string(longer))}, "beside it there are 2"},
		"log is no JSON":           {[]pkix.Extension{quote, ext(ratls.OIDEventLog, "[")}, "event log"},
		"quote is none":            {[]pkix.Extension{ext(ratls.OIDQuote, "quote"), log}, "not a TDX quote"},
		"packed log is none":       {[]pkix.Extension{quote, ext(ratls.OIDEventLog, "ELGZv1nothing")}, "event log: "},
		"packed log cut":           {[]pkix.Extension{quote, ext(ratls.OIDEventLog, pack("[]")[:20])}, "event log: "},
		"packed log followed":      {[]pkix.Extension{quote, ext(ratls.OIDEventLog, pack("[]")+"x")}, "1 bytes follow the compressed data"},
		"packed twice":             {[]pkix.Extension{quote, ext(ratls.OIDEventLog, pack("[]")+pack("[]")[6:])}, "bytes follow the compressed data"},
		"packed log large":         {[]pkix.Extension{quote, ext(ratls.OIDEventLog, pack("["+strings.Repeat(" ", 16<<10)+"]"))}, "more than 16384 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			cert := issue(t, key, c.list...)
			if _, err := ratls.Parse(cert); err == nil || !strings.Contains(err.Error(), c.words) {
				t.Errorf("error is %v, want it to say %q", err, c.words)
			} else if errors.Is(err, ratls.ErrNoAttestation) {
				t.Error("bad is told as absent")
			}
		})
	}
}

// TestDuplicates hands the extensions over as they are: crypto/x509 parses no
// certificate that has one twice.
func TestDuplicates(t *testing.T) {
	key, spki := newKey(t)
	list := extensions(t, spki, measure.EventV1)
	for i := range list {
		cert := *issue(t, key, list...)
		cert.Extensions = append(slices.Clone(cert.Extensions), list[i])
		if i < 2 { // .1 and .2 are not read beside .8
			cert.Extensions = append(slices.Clone(list[:2]), list[i])
		}
		if _, err := ratls.Parse(&cert); err == nil || !strings.Contains(err.Error(), "is there twice") {
			t.Errorf("%v twice: %v", list[i].Id, err)
		}
	}
	cert := *issue(t, key)
	usage := ratls.UsageExtension(ratls.UsageKMS)
	cert.Extensions = []pkix.Extension{usage, usage}
	if _, err := ratls.ParseIssuerClaims(&cert); err == nil || !strings.Contains(err.Error(), "is there twice") {
		t.Errorf("usage twice: %v", err)
	}
}

func TestNoAttestation(t *testing.T) {
	key, _ := newKey(t)
	if _, err := ratls.Parse(issue(t, key, ratls.UsageExtension(ratls.UsageApp))); !errors.Is(err, ratls.ErrNoAttestation) {
		t.Errorf("error is %v", err)
	}
}

func TestExtensionsRefuse(t *testing.T) {
	_, spki := newKey(t)
	_, other := newKey(t)
	rd := ratls.ReportData(spki)
	for name, c := range map[string]struct {
		change func(*measure.Evidence)
		spki   []byte
		words  string
	}{
		"other key": {func(*measure.Evidence) {}, other, "the quote is not of this key"},
		"no quote":  {func(e *measure.Evidence) { e.Quote = nil }, spki, "not a TDX quote"},
		"events":    {func(e *measure.Evidence) { e.Events = make([]measure.Event, 513) }, spki, "513 of the boot"},
		"size":      {func(e *measure.Evidence) { e.VMConfig = strings.Repeat(" ", 256<<10) }, spki, "want at most 262144"},
		"config":    {func(e *measure.Evidence) { e.VMConfig = "\xff" }, spki, "UTF-8"},
	} {
		ev := evidence(t, rd, measure.EventV1)
		c.change(ev)
		if _, err := ratls.Extensions(ev, c.spki); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: error is %v, want it to say %q", name, err, c.words)
		}
	}
}
