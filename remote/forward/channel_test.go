package forward_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
	"tdx-agent/remote/forward"
)

// machine is a simulated TD with a measured agent key, of the application whose compose
// hash is that of its name.
type machine struct {
	name   string
	td     *tdxsim.TD
	key    *ecdsa.PrivateKey
	pin    [32]byte // of its root
	bundle []byte
	events []measure.Event
	mu     sync.Mutex // one quote at a time
}

func newMachine(t *testing.T, name string, isReady bool) *machine {
	t.Helper()
	m := &machine{name: name}
	var err error
	if m.td, err = tdxsim.New(t.TempDir(), tdxsim.Config{Seed: []byte(name)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.td.Close() })
	roots, err := dcap.NewRoots(m.td.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	m.pin = roots.Pins()[0]
	m.bundle, err = m.td.Collateral()
	if err == nil {
		m.events, err = measure.ParseCCEL(m.td.CCEL())
	}
	if err == nil {
		m.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&m.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	hash, key := sha256.Sum256([]byte(name)), sha256.Sum256(der)
	m.extend(t, measure.EventAppID, hash[:20])
	m.extend(t, measure.EventComposeHash, hash[:])
	m.extend(t, measure.EventInstanceID, hash[12:])
	m.extend(t, measure.EventAgentKey, key[:])
	if isReady {
		m.extend(t, measure.EventSystemReady, nil)
	}
	return m
}

func (m *machine) extend(t *testing.T, name string, payload []byte) {
	t.Helper()
	e, err := measure.NewRuntimeEvent(name, payload, measure.EventV1)
	if err == nil {
		err = m.td.Extend(measure.RTMR3, e.Digest)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.events = append(m.events, e)
}

func (m *machine) quote(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.td.Client()
	dir, err := c.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		return nil, err
	}
	err = c.WriteFile(dir+"/inblob", rd[:])
	q, readErr := c.ReadFile(dir + "/outblob")
	return &measure.Evidence{Quote: q, Events: m.events, VMConfig: "{}"}, errors.Join(err, readErr, c.RemoveAll(dir))
}

// config accepts peer by an entry of the name and with these terms, and speaks for m.
func (m *machine) config(t *testing.T, peer *machine, entry, terms string) atls.Config {
	t.Helper()
	p, err := remote.ParsePolicy("policy.toml", fmt.Appendf(nil, "version = 1\n[defaults]\nmax_collateral_age = \"48h\"\n[[peer]]\nname = %q\nroot = \"sha256:%x\"\nallow_simulated = true\nallow_any_image = true\n%s\n", entry, peer.pin, terms))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "collateral.json")
	if err := os.WriteFile(file, peer.bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	roots, err := p.Roots()
	if err != nil {
		t.Fatal(err)
	}
	store, err := collateral.New(collateral.Config{Roots: roots, Files: []string{file}})
	if err != nil {
		t.Fatal(err)
	}
	v, err := remote.NewVerifier(remote.Config{Policy: p, Collateral: store})
	if err != nil {
		t.Fatal(err)
	}
	key, err := atls.NewKey(m.key, m.quote, func(context.Context) (measure.Digest, error) {
		regs, err := m.td.Registers()
		return regs.RTMR[measure.RTMR3], err
	})
	if err != nil {
		t.Fatal(err)
	}
	return atls.Config{Verifier: v, Attester: key}
}

// pair is a server that forwards to services, and a client that it accepts.
type pair struct {
	client *machine
	dialer *atls.Dialer
	bare   *atls.Dialer // proves nothing
	addr   string

	listener *atls.Listener
	verifier *remote.Verifier   // the server's
	stop     context.CancelFunc // of Inbound
}

const terms = "compose_hash = [\"%x\"]\nservice = [\"web\", \"raw\", \"open\"]\nallow_unattested_clients = true\n"

// newPair starts a server; the client is accepted by an entry of this name and terms, ""
// for its compose hash.
func newPair(t *testing.T, services map[string]forward.Service, client *machine, entry, clientTerms string) *pair {
	t.Helper()
	nothingStays(t)
	server := newMachine(t, "server", true)
	if clientTerms == "" {
		clientTerms = fmt.Sprintf(terms, sha256.Sum256([]byte(client.name)))
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lc := atls.ListenerConfig{Config: server.config(t, client, entry, clientTerms), Unattested: []string{"open"}, PerSecond: 1000, Burst: 1000}
	for name := range services {
		lc.Services = append(lc.Services, name)
	}
	l, err := atls.NewListener(inner, lc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- forward.Inbound(ctx, l, slog.New(slog.DiscardHandler), services) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	p := &pair{client: client, addr: inner.Addr().String(), listener: l, verifier: lc.Verifier, stop: cancel}
	cfg := client.config(t, server, "server", fmt.Sprintf(terms, sha256.Sum256([]byte("server"))))
	p.dialer, err = atls.NewDialer(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Attester = nil
	if p.bare, err = atls.NewDialer(cfg, nil); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pair) dial(t *testing.T, d *atls.Dialer, service string) *atls.Conn {
	t.Helper()
	c, err := d.DialContext(t.Context(), "tcp", p.addr, service, []string{"server"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*atls.Conn)
}

func to(address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}
}
