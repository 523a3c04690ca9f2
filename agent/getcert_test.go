package main

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/agent/keys"
)

// TestGetCertOfApplications judges servers with the certificates that dstack's
// applications have: issued by the application's authority, with and without evidence,
// with and without the authority, and with somebody else's evidence.
func TestGetCertOfApplications(t *testing.T) {
	c, _ := bootTest(t)
	rootFile := filepath.Join(filepath.Dir(c.bundle), filepath.Base(runtimeDir("").simulatedRoot()))
	app, err := keys.Ephemeral{Path: filepath.Join(t.TempDir(), "seed")}.App(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	issue := func(r keys.CertificateRequest) tls.Certificate {
		r.Server = true
		k, err := app.IssueRandom(t.Context(), r, c.quote)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := tls.X509KeyPair([]byte(strings.Join(k.ChainPEM(), "\n")), k.KeyPEM())
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	whole, bare := issue(keys.CertificateRequest{RATLS: true, AppInfo: true}), issue(keys.CertificateRequest{AppInfo: true})
	alone := whole
	alone.Certificate = whole.Certificate[:1]
	crossed := issue(keys.CertificateRequest{RATLS: true})
	crossed.Certificate = whole.Certificate // and not its key
	for name, tc := range map[string]struct {
		cert  tls.Certificate
		exit  int
		words string
	}{
		"issued":                   {whole, 0, "verdict: VALID"},
		"claims without evidence":  {bare, exitEvidence, "carries no dstack attestation"},
		"issuer not shown":         {alone, exitEvidence, "its issuer is not shown"},
		"another's, without a key": {crossed, exitFailure, "invalid signature"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{tc.cert}, ClientAuth: tls.RequireAnyClientCert})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go handshakeAll(l)
			var out, log bytes.Buffer
			exit := run(t.Context(), []string{"get-cert", "--root", rootFile, "--collateral", c.bundle, l.Addr().String()}, &out, &log)
			if exit != tc.exit || !strings.Contains(log.String(), tc.words) {
				t.Errorf("exit status %d, want %d and %q:\n%s", exit, tc.exit, tc.words, log.String())
			}
			block, _ := pem.Decode(out.Bytes())
			if (block != nil) != (exit == 0) || block != nil && !bytes.Equal(block.Bytes, tc.cert.Certificate[0]) {
				t.Errorf("printed %.100q", out.String())
			}
		})
	}
}

func handshakeAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			c.(*tls.Conn).Handshake()
			c.Close()
		}()
	}
}
