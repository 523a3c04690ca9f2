package atls_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	"tdx-agent/remote"
)

// BenchmarkRATLS opens a connection, sends a byte and reads it back: plain mutual TLS
// 1.3, and RA-TLS with certificates that both ends know. Client and server are one
// process.
func BenchmarkRATLS(b *testing.B) {
	b.Run("plain-mtls", func(b *testing.B) {
		cfg := &tls.Config{Certificates: []tls.Certificate{*leafOf(b, nil, time.Hour)}, ClientAuth: tls.RequireAnyClientCert, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
		l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		go echoAll(l)
		for b.Loop() {
			c, err := tls.Dial("tcp", l.Addr().String(), cfg)
			if err != nil {
				b.Fatal(err)
			}
			oneByte(b, c)
		}
	})
	b.Run("ratls", func(b *testing.B) {
		p := newRATLSPair(b, weak)
		go echoAll(p.listener)
		for b.Loop() {
			c, err := p.dial()
			if err != nil {
				b.Fatal(err)
			}
			oneByte(b, c)
		}
	})
}

func oneByte(b *testing.B, c net.Conn) {
	if _, err := c.Write([]byte{1}); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		b.Fatal(err)
	}
	c.Close()
}

// BenchmarkAppraiseCertificate judges a certificate that is known, and one that is not,
// beside what no verifier can do without: reading the certificate and checking its
// signature.
func BenchmarkAppraiseCertificate(b *testing.B) {
	m := newMachine(b, "server", false)
	chain := []*x509.Certificate{m.attestedLeaf(b, time.Hour).Leaf}
	v := verifier(b, m.entry("server", "echo", weak), m)
	x := remote.Expect{Channel: &remote.Channel{Certificate: true, Service: "echo"}}
	judge := func(b *testing.B) {
		if _, _, err := v.AppraiseCertificate(context.Background(), chain, x); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("floor-x509", func(b *testing.B) {
		for b.Loop() {
			c, err := x509.ParseCertificate(chain[0].Raw)
			if err != nil {
				b.Fatal(err)
			}
			if err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("known", func(b *testing.B) {
		for b.Loop() {
			judge(b)
		}
	})
	b.Run("new", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			x.Entries = []string{"server", strconv.Itoa(i)} // another list is another question
			judge(b)
		}
	})
}
