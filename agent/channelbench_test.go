package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// benchVerifier accepts the application of an agent in key mode.
func benchVerifier(b *testing.B, d *daemon) *remote.Verifier {
	b.Helper()
	check(b, d.backend.publishSimulated(d.dir))
	root, err := os.ReadFile(d.dir.simulatedRoot())
	check(b, err)
	roots, err := dcap.NewRoots(root)
	check(b, err)
	s, err := d.ledger.Snapshot(b.Context())
	check(b, err)
	id, err := measure.IdentityOf(s.Events())
	check(b, err)
	p, err := remote.ParsePolicy("policy.toml", []byte("version = 1\n[defaults]\nmax_collateral_age = \"48h\"\n"+
		"[[peer]]\nname = \"peer\"\nroot = \"sha256:"+hexOf(roots.Pins()[0])+"\"\nallow_simulated = true\nallow_any_image = true\nrequire = \"key\"\nservice = [\"echo\"]\ncompose_hash = [\""+hexOf([32]byte(id.ComposeHash))+"\"]\n"))
	check(b, err)
	pins, err := p.Roots()
	check(b, err)
	store, err := collateral.New(collateral.Config{Roots: pins, Files: []string{filepath.Clean(d.dir.simulatedCollateral())}})
	check(b, err)
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: store})
	check(b, err)
	return v
}

func processTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	check(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchConnections opens b.N connections and reports the processor time of both ends.
func benchConnections(b *testing.B, dial func() (net.Conn, error)) {
	once := func() {
		c, err := dial()
		check(b, err)
		_, err = c.Write([]byte{1})
		check(b, err)
		_, err = io.ReadFull(c, make([]byte, 1))
		check(b, err)
		c.Close()
	}
	once()
	start := processTime(b)
	for b.Loop() {
		once()
	}
	b.ReportMetric(float64((processTime(b)-start).Nanoseconds())/1e3/float64(b.N), "cpu-µs/op")
}

func serveEcho(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.Close()
		}()
	}
}

// BenchmarkConnectSplit reconnects in key mode with the agent key in the process that
// has the channel, and with it behind channel.sock at both ends, as endpoint and
// connect have it. Its floor is mutual TLS 1.3 with keys of the same kind.
func BenchmarkConnectSplit(b *testing.B) {
	b.Run("plain-mtls", func(b *testing.B) {
		cfg := benchTLS(b)
		l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
		check(b, err)
		defer l.Close()
		go serveEcho(l)
		benchConnections(b, func() (net.Conn, error) { return tls.Dial("tcp", l.Addr().String(), cfg) })
	})
	server, client := benchDaemon(b), benchDaemon(b)
	for _, name := range []string{"key", "key-split"} {
		attester := func(d *daemon) atls.Attester {
			if name == "key" {
				return d.channel
			}
			a, err := newChannelAttester(b.Context(), d.dir)
			check(b, err)
			return a
		}
		b.Run(name, func(b *testing.B) {
			inner, err := net.Listen("tcp", "127.0.0.1:0")
			check(b, err)
			l, err := atls.NewListener(inner, atls.ListenerConfig{Services: []string{"echo"}, PerSecond: 1e6, Burst: 1e6,
				Config: atls.Config{Verifier: benchVerifier(b, client), Attester: attester(server), KeyTTL: time.Hour}})
			check(b, err)
			defer l.Close()
			go serveEcho(l)
			d, err := atls.NewDialer(atls.Config{Verifier: benchVerifier(b, server), Attester: attester(client), KeyTTL: time.Hour}, nil)
			check(b, err)
			benchConnections(b, func() (net.Conn, error) {
				return d.DialContext(context.Background(), "tcp", inner.Addr().String(), "echo", []string{"peer"})
			})
		})
	}
}

func benchTLS(b *testing.B) *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(b, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(b, err)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert,
		MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, CurvePreferences: []tls.CurveID{tls.SecP256r1MLKEM768}} // as channels have it
}
