// Package kmstest is a key management service that speaks dstack's protocol, for tests:
// real TLS, a certificate with the evidence of a (simulated) TD, keys only for guests
// whose evidence its own Verifier accepts. The program does not import it.
package kmstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	secpecdsa "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"golang.org/x/crypto/sha3"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/ratls"
)

// Config makes a Server, and says in what it differs from a good one.
type Config struct {
	Host   string // in its certificate
	Guests *remote.Verifier
	Attest func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) // the KMS's own
	Now    func() time.Time

	// What follows breaks it. Nil changes nothing.

	EditCertificate func(*x509.Certificate)                   // before it is signed
	AttestKey       *ecdsa.PublicKey                          // evidence of this key in place of its own
	Signer          *ecdsa.PrivateKey                         // signs the certificate in the root's place
	Answer          func(method string, answer []byte) []byte // what is sent instead
	Delay           func(r *http.Request)                     // before an answer
	Key             *ecdsa.PrivateKey                         // served with, in place of the certificate's own
	Clients         *x509.CertPool                            // who signs its clients' certificates, in place of the temporary authority
}

// Server is a KMS.
type Server struct {
	cfg      Config
	root     *authority
	temp     *authority
	k256     *secp256k1.PrivateKey
	tls      tls.Certificate
	http     http.Server
	mu       sync.Mutex // guards what follows
	requests []string   // the methods called
}

// authority is a key with its certificate.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func (a *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

func (a *authority) keyPEM() (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), err
}

var firstDay = time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC)

// newAuthority signs itself, or has the parent sign.
func newAuthority(name string, key *ecdsa.PrivateKey, pathLength int, parent *authority, now time.Time, extensions ...pkix.Extension) (*authority, error) {
	template := &x509.Certificate{Subject: pkix.Name{Organization: []string{"Dstack"}, CommonName: name}, NotBefore: firstDay, NotAfter: now.Add(3650 * 24 * time.Hour), SerialNumber: big.NewInt(now.UnixNano()),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true, MaxPathLen: pathLength, MaxPathLenZero: pathLength == 0, ExtraExtensions: extensions}
	signer, signerKey := template, key
	if parent != nil {
		signer, signerKey = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, &key.PublicKey, signerKey)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{key, cert}, err
}

// New makes a KMS with fresh keys.
func New(ctx context.Context, cfg Config) (*Server, error) {
	s := &Server{cfg: cfg}
	for _, a := range []struct {
		into *(*authority)
		name string
	}{{&s.root, "Dstack KMS CA"}, {&s.temp, "Dstack Client Temp CA"}} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if *a.into, err = newAuthority(a.name, key, 1, nil, cfg.Now()); err != nil {
			return nil, err
		}
	}
	var err error
	if s.k256, err = secp256k1.GeneratePrivateKey(); err != nil {
		return nil, err
	}
	if err := s.certify(ctx); err != nil {
		return nil, err
	}
	clients := x509.NewCertPool()
	clients.AddCert(s.temp.cert)
	if cfg.Clients != nil {
		clients = cfg.Clients
	}
	s.http = http.Server{Handler: http.HandlerFunc(s.handle), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{s.tls}, ClientCAs: clients, ClientAuth: tls.VerifyClientCertIfGiven, Time: cfg.Now}}
	return s, nil
}

// certify makes the server's own certificate.
func (s *Server) certify(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	attestKey := &key.PublicKey
	if s.cfg.AttestKey != nil {
		attestKey = s.cfg.AttestKey
	}
	spki, err := x509.MarshalPKIXPublicKey(attestKey)
	if err != nil {
		return err
	}
	ev, err := s.cfg.Attest(ctx, ratls.ReportData(spki))
	if err != nil {
		return err
	}
	extensions, err := ratls.Extensions(ev, spki)
	if err != nil {
		return err
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: s.cfg.Host}, NotBefore: firstDay, NotAfter: s.cfg.Now().Add(3650 * 24 * time.Hour), SerialNumber: big.NewInt(7),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: append(extensions, ratls.UsageExtension(ratls.UsageKMS))}
	if ip := net.ParseIP(s.cfg.Host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{s.cfg.Host}
	}
	if s.cfg.EditCertificate != nil {
		s.cfg.EditCertificate(template)
	}
	parent, signer := s.root.cert, s.root.key
	if s.cfg.Signer != nil {
		parent, signer = &x509.Certificate{Subject: s.root.cert.Subject}, s.cfg.Signer
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	s.tls = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	if s.cfg.Key != nil {
		s.tls.PrivateKey = s.cfg.Key
	}
	return err
}

// Serve answers on l until Close.
func (s *Server) Serve(l net.Listener) error { return s.http.ServeTLS(l, "", "") }

// Close ends Serve and all connections.
func (s *Server) Close() error { return s.http.Close() }

// Root returns the id of this key provider: its root key, DER.
func (s *Server) Root() []byte { return s.root.cert.RawSubjectPublicKeyInfo }

// RootCertificate returns the root's certificate.
func (s *Server) RootCertificate() *x509.Certificate { return s.root.cert }

// PublicKey returns the secp256k1 root key, which signs the keys of applications: 33 bytes.
func (s *Server) PublicKey() []byte { return s.k256.PubKey().SerializeCompressed() }

// Requests returns the methods that were called so far.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.requests...)
}

// AppKey returns the secp256k1 key of an application, 32 bytes, and the root's signature
// of its public half.
func (s *Server) AppKey(appID []byte) (key, signature []byte, err error) {
	key, err = hkdf.Key(sha256.New, s.k256.Serialize(), []byte("RATLS"), string(appID)+"app-key", 32)
	if err != nil {
		return nil, nil, err
	}
	h := sha3.NewLegacyKeccak256()
	h.Write([]byte("dstack-kms-issued:"))
	h.Write(appID)
	h.Write(secp256k1.PrivKeyFromBytes(key).PubKey().SerializeCompressed())
	compact := secpecdsa.SignCompact(s.k256, h.Sum(nil), true)
	return key, append(compact[1:], compact[0]-31), nil
}

// derive returns the P-256 key that the root key gives for a context.
func (s *Server) derive(context string) (*ecdsa.PrivateKey, error) {
	scalar, err := s.root.key.Bytes()
	if err != nil {
		return nil, err
	}
	b, err := hkdf.Key(sha256.New, scalar, []byte("RATLS"), context, 32)
	if err != nil {
		return nil, err
	}
	return ecdsa.ParseRawPrivateKey(elliptic.P256(), b)
}

// dhSecret is the hash of the derived key's PKCS #8 form.
func (s *Server) dhSecret(context string) (string, error) {
	key, err := s.derive(context)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// guest judges evidence for a key.
func (s *Server) guest(ctx context.Context, ev *measure.Evidence, rd measure.ReportData) (*measure.Identity, error) {
	r, err := s.cfg.Guests.Appraise(ctx, ev, remote.Expect{ReportData: rd})
	if err != nil {
		return nil, fmt.Errorf("app not allowed: %w", err)
	}
	return &r.Claims.Identity, nil
}
