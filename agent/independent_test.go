package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/abi"
	pb "github.com/google/go-tdx-guest/proto/tdx"
	"github.com/google/go-tdx-guest/verify"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// What follows checks our certificates by the standard library and go-tdx-guest, with no
// decoder of ours, as a stranger to this project would who has read dstack's source.

// foreignEvent is an event of either list.
type foreignEvent struct {
	IMR     int    `json:"imr"`
	Type    uint32 `json:"event_type"`
	Digest  string `json:"digest"`
	Name    string `json:"event"`
	Payload string `json:"event_payload"`
}

// foreignReplay folds digests into registers, and computes those of RTMR3 anew.
func foreignReplay(events []foreignEvent) (rtmr [4][48]byte, err error) {
	for _, e := range events {
		digest, err := hex.DecodeString(e.Digest)
		if err != nil || len(digest) != 48 || e.IMR < 0 || e.IMR > 3 {
			return rtmr, fmt.Errorf("event %+v: want a digest of 48 bytes and a register", e)
		}
		if e.IMR == 3 {
			payload, err := hex.DecodeString(e.Payload)
			if err != nil {
				return rtmr, err
			}
			text := binary.LittleEndian.AppendUint32(nil, e.Type)
			text = append(append(append(append(text, ':'), e.Name...), ':'), payload...)
			if sum := sha512.Sum384(text); !bytes.Equal(sum[:], digest) {
				return rtmr, fmt.Errorf("event %+v: its digest should be %x", e, sum)
			}
		}
		rtmr[e.IMR] = sha512.Sum384(append(rtmr[e.IMR][:], digest...))
	}
	return rtmr, nil
}

// scale reads the little of Parity's SCALE that dstack's attestation needs.
type scale struct{ b []byte }

func (s *scale) take(n int) []byte {
	if n > len(s.b) {
		panic(fmt.Sprintf("%d bytes wanted, %d left", n, len(s.b)))
	}
	part := s.b[:n]
	s.b = s.b[n:]
	return part
}

func (s *scale) uint32() uint32 { return binary.LittleEndian.Uint32(s.take(4)) }

func (s *scale) compact() int {
	switch s.b[0] & 3 {
	case 0:
		return int(s.take(1)[0] >> 2)
	case 1:
		return int(binary.LittleEndian.Uint16(s.take(2)) >> 2)
	}
	return int(s.uint32() >> 2)
}

func (s *scale) bytes() []byte { return s.take(s.compact()) }

// foreignAttestation reads a V0 attestation, and fails if anything is left of it.
func foreignAttestation(b []byte) (quote []byte, events, runtime []foreignEvent, reportData, config []byte) {
	s := &scale{b}
	if head := s.take(2); head[0] != 0 || head[1] != 0 {
		panic(fmt.Sprintf("begins with %x, want V0 of TDX", head))
	}
	quote = s.bytes()
	for range s.compact() {
		e := foreignEvent{IMR: int(s.uint32()), Type: s.uint32()}
		e.Digest, e.Name, e.Payload = hex.EncodeToString(s.bytes()), string(s.bytes()), hex.EncodeToString(s.bytes())
		events = append(events, e)
	}
	for range s.compact() {
		runtime = append(runtime, foreignEvent{IMR: 3, Name: string(s.bytes()), Payload: hex.EncodeToString(s.bytes())})
	}
	reportData, config = s.take(64), s.bytes()
	if len(s.b) > 0 {
		panic(fmt.Sprintf("%d bytes left", len(s.b)))
	}
	return quote, events, runtime, reportData, config
}

// foreignCheck checks the evidence in a certificate: signed below root, bound to the
// certificate's key, explained by both logs.
func foreignCheck(cert *x509.Certificate, root *x509.Certificate) error {
	content := map[string][]byte{}
	for _, e := range cert.Extensions {
		name := e.Id.String()
		if !strings.HasPrefix(name, "1.3.6.1.4.1.62397.1.") {
			continue
		}
		var inner []byte
		if rest, err := asn1.Unmarshal(e.Value, &inner); err != nil || len(rest) > 0 || e.Critical || content[name] != nil {
			return fmt.Errorf("extension %s: %v, %d bytes left, critical %v", name, err, len(rest), e.Critical)
		}
		content[name] = inner
	}
	spki, err := x509.MarshalPKIXPublicKey(cert.PublicKey)
	if err != nil {
		return err
	}
	want := sha512.Sum512(append([]byte("ratls-cert:"), spki...))
	quote, events, runtime, reportData, _ := foreignAttestation(content["1.3.6.1.4.1.62397.1.8"])
	if !bytes.Equal(reportData, want[:]) || !bytes.Equal(quote, content["1.3.6.1.4.1.62397.1.1"]) {
		return fmt.Errorf("report data %x, want %x; both quotes are one: %v", reportData, want, bytes.Equal(quote, content["1.3.6.1.4.1.62397.1.1"]))
	}
	parsed, err := abi.QuoteToProto(quote)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	now := time.Now()
	if err := verify.TdxQuote(parsed, &verify.Options{TrustedRoots: roots, Now: &verify.TimeSet{PckCertChain: now, TcbInfo: now, QeIdentity: now, PckCrl: now, RootCaCrl: now}}); err != nil {
		return err
	}
	body := parsed.(*pb.QuoteV4).GetTdQuoteBody()
	if !bytes.Equal(body.GetReportData(), want[:]) {
		return fmt.Errorf("the quote has report data %x, want %x", body.GetReportData(), want)
	}
	var legacy []foreignEvent
	if err := json.Unmarshal(content["1.3.6.1.4.1.62397.1.2"], &legacy); err != nil {
		return err
	}
	whole, err := foreignReplay(legacy)
	if err != nil {
		return fmt.Errorf("extension .2: %w", err)
	}
	for i, r := range body.GetRtmrs() {
		if !bytes.Equal(r, whole[i][:]) {
			return fmt.Errorf("extension .2 replays RTMR%d to %x, the quote has %x", i, whole[i], r)
		}
	}
	stripped, err := foreignReplay(events)
	if err != nil {
		return fmt.Errorf("extension .8: %w", err)
	}
	if !bytes.Equal(body.GetRtmrs()[3], stripped[3][:]) {
		return fmt.Errorf("extension .8 replays RTMR3 to %x, the quote has %x", stripped[3], body.GetRtmrs()[3])
	}
	return sameRuntime(events, runtime)
}

// sameRuntime compares the list of runtime events with those among all events, and
// demands that what was kept of the boot are ACPI tables.
func sameRuntime(events, runtime []foreignEvent) error {
	for _, e := range events {
		if e.IMR != 3 {
			if e.IMR != 0 || e.Payload != hex.EncodeToString([]byte("ACPI DATA")) {
				return fmt.Errorf("kept of the boot: %+v", e)
			}
			continue
		}
		if len(runtime) == 0 || runtime[0].Name != e.Name || runtime[0].Payload != e.Payload {
			return fmt.Errorf("event %+v is not among the runtime events", e)
		}
		runtime = runtime[1:]
	}
	if len(runtime) > 0 {
		return fmt.Errorf("runtime events %+v are not among the events", runtime)
	}
	return nil
}

// demoAttester makes evidence for certificates of a demonstration's CVM.
type demoAttester struct{ *demoCVM }

func (a demoAttester) Evidence(ctx context.Context, spki []byte) (*measure.Evidence, error) {
	return a.quote(ctx, ratls.ReportData(spki))
}

func (demoAttester) Changed(ctx context.Context, _ *measure.Evidence) error {
	<-ctx.Done()
	return ctx.Err()
}

func bootTest(t *testing.T) (*demoCVM, *x509.Certificate) {
	t.Helper()
	dir := t.TempDir()
	c, err := bootDemo(t.Context(), dir, "cvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	b, err := os.ReadFile(runtimeDir(dir).simulatedRoot())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c, root
}

// ownCertificate is what endpoint --ratls shows.
func ownCertificate(t *testing.T, c *demoCVM) *tls.Certificate {
	t.Helper()
	r, err := ratls.NewRenewer(ratls.RenewerConfig{Attester: demoAttester{c}, Server: true, Client: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	defer func() { cancel(); <-done }()
	cert, err := r.Certificate(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestCertificatesIndependently checks what we issue: endpoint's certificates, those of
// GetTlsKey, and the authority's.
func TestCertificatesIndependently(t *testing.T) {
	c, root := bootTest(t)
	own := ownCertificate(t, c)
	app, err := keys.Ephemeral{Path: filepath.Join(t.TempDir(), "seed")}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Subject: "web", AltNames: []string{"web.example"}, Server: true, RATLS: true, AppInfo: true}, c.quote)
	if err != nil {
		t.Fatal(err)
	}
	list := map[string]*x509.Certificate{"own": own.Leaf}
	for i, name := range []string{"leaf", "authority"} {
		block, _ := pem.Decode([]byte(k.Chain[i].PEM()))
		if list[name], err = x509.ParseCertificate(block.Bytes); err != nil {
			t.Fatal(err)
		}
	}
	for name, cert := range list {
		if err := foreignCheck(cert, root); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// The check fails where it should.
		if err := foreignCheck(cert, cert); err == nil {
			t.Errorf("%s: its quote is taken to be signed below another root", name)
		}
		other := *cert
		other.PublicKey = &k.Chain // not a key
		if err := foreignCheck(&other, root); err == nil {
			t.Errorf("%s: without its key", name)
		}
		other.PublicKey = own.PrivateKey.(*ecdsa.PrivateKey).Public()
		if name != "own" {
			if err := foreignCheck(&other, root); err == nil || !strings.Contains(err.Error(), "report data") {
				t.Errorf("%s under another key: %v", name, err)
			}
		}
	}
	checkX509(t, own.Leaf, list["leaf"], list["authority"])
}

// checkX509 has crypto/x509 judge chains, as who knows nothing of evidence does.
func checkX509(t *testing.T, own, leaf, authority *x509.Certificate) {
	t.Helper()
	pool := func(list ...*x509.Certificate) *x509.CertPool {
		p := x509.NewCertPool()
		for _, c := range list {
			p.AddCert(c)
		}
		return p
	}
	server, client := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for name, c := range map[string]struct {
		cert *x509.Certificate
		opts x509.VerifyOptions
		ok   bool
	}{
		"own, pinned, as a server":         {own, x509.VerifyOptions{Roots: pool(own), KeyUsages: server}, true},
		"own, pinned, as a client":         {own, x509.VerifyOptions{Roots: pool(own), KeyUsages: client}, true},
		"own, pinned, ended":               {own, x509.VerifyOptions{Roots: pool(own), CurrentTime: own.NotAfter.Add(time.Second)}, false},
		"own, not pinned":                  {own, x509.VerifyOptions{Roots: pool(authority)}, false},
		"leaf below its authority":         {leaf, x509.VerifyOptions{Roots: pool(authority), DNSName: "web.example", KeyUsages: server}, true},
		"leaf, authority not trusted":      {leaf, x509.VerifyOptions{Roots: pool(own), Intermediates: pool(authority)}, false},
		"leaf of another name":             {leaf, x509.VerifyOptions{Roots: pool(authority), DNSName: "other.example"}, false},
		"leaf as a client":                 {leaf, x509.VerifyOptions{Roots: pool(authority), KeyUsages: client}, false},
		"own below the application's leaf": {own, x509.VerifyOptions{Roots: pool(leaf)}, false},
	} {
		if _, err := c.cert.Verify(c.opts); (err == nil) != c.ok {
			t.Errorf("%s: %v, want acceptance %v", name, err, c.ok)
		}
	}
	if err := leaf.CheckSignatureFrom(authority); err != nil {
		t.Error(err)
	}
	if own.IsCA || leaf.IsCA || !authority.IsCA {
		t.Errorf("authorities: own %v, leaf %v, authority %v", own.IsCA, leaf.IsCA, authority.IsCA)
	}
}
