package keys_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

const vmConfig = `{"os_image_hash":"` + "abababababababababababababababababababababababababababababababab" + `"}`

// attest returns an Attest whose quotes have the layout of one and no signature, and
// how often it was asked.
func attest(t testing.TB) (keys.Attest, *atomic.Int32) {
	t.Helper()
	var events []measure.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{{"app-id", bytes.Repeat([]byte{7}, 20)}, {"compose-hash", bytes.Repeat([]byte{8}, 32)}, {"key-provider", []byte(`{"name":"none","id":""}`)}, {"system-ready", nil}} {
		event, err := measure.NewRuntimeEvent(e.name, e.payload, measure.EventV1)
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, event)
	}
	rtmr, err := measure.Replay(events)
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	return func(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		asked.Add(1)
		q := make([]byte, 1000)
		binary.LittleEndian.PutUint16(q[0:], 4)
		binary.LittleEndian.PutUint16(q[2:], 2)
		binary.LittleEndian.PutUint32(q[4:], 0x81)
		copy(q[376+48*3:], rtmr[3][:])
		copy(q[568:], rd[:])
		binary.LittleEndian.PutUint32(q[632:], uint32(len(q)-636))
		return &measure.Evidence{Quote: q, Events: events, VMConfig: vmConfig}, nil
	}, &asked
}

// certificates parses a chain and the key, which must be the leaf's.
func certificates(t testing.TB, k *keys.TLSKey) []*x509.Certificate {
	t.Helper()
	pair, err := tls.X509KeyPair([]byte(strings.Join(k.ChainPEM(), "\n")), k.KeyPEM())
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(k.KeyPEM())
	if block.Type != "PRIVATE KEY" || len(rest) > 0 {
		t.Errorf("key is a %s block with %d bytes after it", block.Type, len(rest))
	}
	if der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey); err != nil || !bytes.Equal(der, block.Bytes) {
		t.Errorf("key is %x, crypto/x509 writes %x (%v)", block.Bytes, der, err)
	}
	for i, text := range k.ChainPEM() {
		if want := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[i]})); text != want {
			t.Errorf("certificate %d is written\n%s\nencoding/pem writes\n%s", i, text, want)
		}
	}
	if want := string(pem.EncodeToMemory(block)); string(k.KeyPEM()) != want {
		t.Error("the key's PEM is not what encoding/pem writes")
	}
	var chain []*x509.Certificate
	for _, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	return chain
}

// TestCertificatePEM has encoding/pem write the same, for every length of the last line.
func TestCertificatePEM(t *testing.T) {
	der := make([]byte, 400)
	rand.Read(der)
	for n := range der[1:] {
		c, want := keys.CertificateOf(der[:n+1]), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der[:n+1]}))
		if got := c.PEM(); got != want {
			t.Fatalf("%d bytes:\n%s\nwant\n%s", n+1, got, want)
		}
		if got := string(c.AppendJSON([]byte("["))); got != "["+strings.ReplaceAll(want, "\n", `\n`) || len(got)-1 > c.SizeJSON() {
			t.Fatalf("%d bytes, for JSON, bounded by %d:\n%s\nwant\n%s", n+1, c.SizeJSON(), got, want)
		}
	}
}

func seconds(n uint64) *uint64 { return &n }

func TestCertificate(t *testing.T) {
	app := vectorApp(t)
	evidence, asked := attest(t)
	now := time.Date(2030, 2, 3, 4, 5, 6, 0, time.UTC)
	k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Now: now, Subject: "Zählwerk", AltNames: []string{"a.example", "*.b.example", "10.0.0.1", "::1"}, Server: true}, evidence)
	if err != nil {
		t.Fatal(err)
	}
	chain := certificates(t, k)
	leaf := chain[0]
	if len(chain) != 2 || leaf.Subject.String() != "CN=Zählwerk" || strings.Join(leaf.DNSNames, " ") != "a.example *.b.example" ||
		len(leaf.IPAddresses) != 2 || !leaf.IPAddresses[0].Equal(net.IPv4(10, 0, 0, 1)) || !leaf.IPAddresses[1].Equal(net.IPv6loopback) {
		t.Errorf("%d certificates; leaf %s, %v, %v", len(chain), leaf.Subject, leaf.DNSNames, leaf.IPAddresses)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 1 || leaf.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth || leaf.IsCA {
		t.Errorf("usages %v, %v, authority %v", leaf.KeyUsage, leaf.ExtKeyUsage, leaf.IsCA)
	}
	if !leaf.NotBefore.Equal(time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC)) || !leaf.NotAfter.Equal(time.Date(2040, 2, 1, 4, 5, 6, 0, time.UTC)) {
		t.Errorf("from %v to %v", leaf.NotBefore, leaf.NotAfter)
	}
	claims, err := ratls.ParseIssuerClaims(leaf)
	if err != nil || claims.Usage != "app:custom" || claims.AppID != nil || claims.AppInfo != nil {
		t.Errorf("claims %+v (%v)", claims, err)
	}
	if _, err := ratls.Parse(leaf); !errors.Is(err, ratls.ErrNoAttestation) || asked.Load() != 0 {
		t.Errorf("%d quotes were made, the leaf's attestation: %v", asked.Load(), err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(chain[1])
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "x.b.example", CurrentTime: now}); err != nil {
		t.Error(err)
	}
	again, err := app.IssueRandom(t.Context(), keys.CertificateRequest{}, evidence)
	if err != nil || bytes.Equal(again.KeyPEM(), k.KeyPEM()) {
		t.Errorf("two random keys are the same (%v)", err)
	}
	if second := certificates(t, again)[0]; len(second.ExtKeyUsage) != 0 || second.Subject.String() != "" {
		t.Errorf("usages %v, subject %s", second.ExtKeyUsage, second.Subject)
	}
}

func TestCertificateWithEvidence(t *testing.T) {
	app := vectorApp(t)
	evidence, asked := attest(t)
	k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{Subject: "s", Client: true, Server: true, RATLS: true, AppInfo: true,
		NotBefore: seconds(1000), NotAfter: seconds(4000000000)}, evidence)
	if err != nil {
		t.Fatal(err)
	}
	leaf := certificates(t, k)[0]
	if leaf.NotBefore.Unix() != 1000 || leaf.NotAfter.Unix() != 4000000000 || len(leaf.ExtKeyUsage) != 2 || asked.Load() != 1 {
		t.Errorf("from %v to %v, usages %v, %d quotes", leaf.NotBefore, leaf.NotAfter, leaf.ExtKeyUsage, asked.Load())
	}
	a, err := ratls.Parse(leaf)
	if err != nil || a.Evidence.VMConfig != vmConfig || len(a.Evidence.Events) != 4 {
		t.Fatalf("%v %+v", err, a)
	}
	for _, id := range []string{"1.3.6.1.4.1.62397.1.1", "1.3.6.1.4.1.62397.1.2", "1.3.6.1.4.1.62397.1.4", "1.3.6.1.4.1.62397.1.8", "1.3.6.1.4.1.62397.1.9"} {
		n := 0
		for _, e := range leaf.Extensions {
			if e.Id.String() == id && !e.Critical {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d extensions %s", n, id)
		}
	}
	claims, err := ratls.ParseIssuerClaims(leaf)
	if err != nil || claims.AppID != nil || !bytes.Equal(claims.AppInfo.AppID, bytes.Repeat([]byte{7}, 20)) ||
		hex.EncodeToString(claims.AppInfo.OSImageHash) != strings.Repeat("ab", 32) || string(claims.AppInfo.KeyProviderInfo) != `{"name":"none","id":""}` {
		t.Errorf("%v %+v", err, claims)
	}
}

// TestDerivedCertificate holds the key of a path to the key derivation.
func TestDerivedCertificate(t *testing.T) {
	app := vectorApp(t)
	evidence, _ := attest(t)
	first, err := app.IssueDerived(t.Context(), "vms", keys.CertificateRequest{}, evidence)
	if err != nil {
		t.Fatal(err)
	}
	second, err := app.IssueDerived(t.Context(), "vms", keys.CertificateRequest{Subject: "other"}, evidence)
	if err != nil || !bytes.Equal(first.KeyPEM(), second.KeyPEM()) {
		t.Errorf("the key of a path differs from call to call (%v)", err)
	}
	block, _ := pem.Decode(first.KeyPEM())
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	// The same 32 bytes as in TestGetKeyVectors, as a P-256 scalar.
	if raw, err := key.(*ecdsa.PrivateKey).Bytes(); err != nil || hex.EncodeToString(raw) != "9db79b3fefe69f2a7b7efbc908c854bf845a629023361f2c9cb3db09fb99010f" {
		t.Errorf("scalar is %x (%v)", raw, err)
	}
	if third, err := app.IssueDerived(t.Context(), "vm", keys.CertificateRequest{}, evidence); err != nil || bytes.Equal(first.KeyPEM(), third.KeyPEM()) {
		t.Errorf("two paths have one key (%v)", err)
	}
	first.Zero()
	if bytes.Contains(first.KeyPEM(), []byte("PRIVATE")) {
		t.Error("Zero leaves the key")
	}
}

func TestCertificateRefusals(t *testing.T) {
	app := vectorApp(t)
	evidence, asked := attest(t)
	for name, c := range map[string]struct {
		r     keys.CertificateRequest
		words string
	}{
		"dates":              {keys.CertificateRequest{NotBefore: seconds(5), NotAfter: seconds(5)}, "not_before must be earlier than not_after"},
		"dates swapped":      {keys.CertificateRequest{NotBefore: seconds(6), NotAfter: seconds(5)}, "not_before must be earlier than not_after"},
		"end before default": {keys.CertificateRequest{NotAfter: seconds(5)}, "not_before must be earlier than not_after"},
		"far future":         {keys.CertificateRequest{NotAfter: seconds(253402300800)}, "before the year 10000"},
		"largest number":     {keys.CertificateRequest{NotBefore: seconds(1<<64 - 1)}, "before the year 10000"},
		"subject long":       {keys.CertificateRequest{Subject: strings.Repeat("s", 257)}, "at most 256 bytes"},
		"subject no text":    {keys.CertificateRequest{Subject: "\xff"}, "UTF-8"},
		"many names":         {keys.CertificateRequest{AltNames: make([]string, 129)}, "129 names"},
		"empty name":         {keys.CertificateRequest{AltNames: []string{""}}, "0 bytes"},
		"long name":          {keys.CertificateRequest{AltNames: []string{strings.Repeat("n", 254)}}, "254 bytes"},
		"international":      {keys.CertificateRequest{AltNames: []string{"zähl.example"}}, "xn--"},
		"control":            {keys.CertificateRequest{AltNames: []string{"a\x00b"}}, "want ASCII"},
	} {
		for _, issue := range []func() (*keys.TLSKey, error){
			func() (*keys.TLSKey, error) { return app.IssueRandom(t.Context(), c.r, evidence) },
			func() (*keys.TLSKey, error) { return app.IssueDerived(t.Context(), "p", c.r, evidence) },
		} {
			if _, err := issue(); err == nil || !strings.Contains(err.Error(), c.words) || !errors.As(err, new(*keys.RequestError)) {
				t.Errorf("%s: error is %v, want it to say %q", name, err, c.words)
			}
		}
	}
	if asked.Load() != 0 {
		t.Errorf("%d quotes were made for requests that are refused", asked.Load())
	}
	failing := func(context.Context, measure.ReportData) (*measure.Evidence, error) {
		return nil, errors.New("host is silent")
	}
	if _, err := app.IssueRandom(t.Context(), keys.CertificateRequest{RATLS: true}, failing); err == nil || err.Error() != "host is silent" {
		t.Errorf("error is %v", err)
	}
	swapped := func(ctx context.Context, _ measure.ReportData) (*measure.Evidence, error) {
		return evidence(ctx, measure.ReportData{1})
	}
	if _, err := app.IssueRandom(t.Context(), keys.CertificateRequest{RATLS: true}, swapped); err == nil || !strings.Contains(err.Error(), "not of this key") {
		t.Errorf("error is %v", err)
	}
}

func TestEphemeral(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seed")
	app, err := keys.Ephemeral{Path: path}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if p := app.Provider(); string(p.Payload()) != `{"name":"none","id":""}` {
		t.Errorf("provider is %s", p.Payload())
	}
	again, err := keys.Ephemeral{Path: path}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a, _ := app.PublicKey()
	b, _ := again.PublicKey()
	if !bytes.Equal(a, b) {
		t.Error("a restart changes the keys")
	}
	other, err := keys.Ephemeral{Path: path + "2"}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if b, _ = other.PublicKey(); bytes.Equal(a, b) {
		t.Error("two seeds give the same keys")
	}

	failing := func(context.Context, measure.ReportData) (*measure.Evidence, error) {
		return nil, errors.New("host is silent")
	}
	if _, err := app.IssueRandom(t.Context(), keys.CertificateRequest{}, failing); err == nil || !strings.Contains(err.Error(), "authority: host is silent") {
		t.Errorf("error is %v", err)
	}
	evidence, asked := attest(t)
	var chains [2][]*x509.Certificate
	for i := range chains {
		k, err := app.IssueRandom(t.Context(), keys.CertificateRequest{}, evidence)
		if err != nil {
			t.Fatal(err)
		}
		chains[i] = certificates(t, k)
	}
	ca := chains[0][1]
	if asked.Load() != 1 || !ca.Equal(chains[1][1]) {
		t.Errorf("%d quotes for one authority", asked.Load())
	}
	if ca.Subject.String() != "CN=App Root Cert" || !ca.IsCA || ca.MaxPathLen != 1 || ca.CheckSignatureFrom(ca) != nil {
		t.Errorf("authority %s, %v, path length %d", ca.Subject, ca.IsCA, ca.MaxPathLen)
	}
	if _, err := ratls.Parse(ca); err != nil {
		t.Error(err)
	}
	// After a restart the new leaf still chains to the old certificate of the authority.
	k, err := again.IssueRandom(t.Context(), keys.CertificateRequest{}, evidence)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := certificates(t, k)[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
}

func TestAuthorityWaitsNoLongerThanItsCaller(t *testing.T) {
	app, err := keys.Ephemeral{Path: filepath.Join(t.TempDir(), "seed")}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	started, proceed := make(chan struct{}), make(chan struct{})
	slow := func(context.Context, measure.ReportData) (*measure.Evidence, error) {
		close(started)
		<-proceed
		return nil, errors.New("too late")
	}
	done := make(chan error, 1)
	go func() {
		_, err := app.IssueRandom(t.Context(), keys.CertificateRequest{}, slow)
		done <- err
	}()
	<-started
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := app.IssueRandom(ctx, keys.CertificateRequest{}, slow); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	close(proceed)
	if err := <-done; err == nil {
		t.Error("a certificate without evidence")
	}
}
