package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"tdx-agent/remote/forward"
)

// The bounds of what agent.toml may declare.
const (
	maxServices = 64
	maxConnects = 64
)

// EndpointConfig is what endpoint and connect share: who peers are, by which collateral,
// and how much they may cost.
type EndpointConfig struct {
	Listen     string        `toml:"listen"` // HOST:PORT or unix:PATH
	Policy     string        `toml:"policy"`
	Collateral []string      `toml:"collateral"`
	PCCS       []string      `toml:"pccs"`
	KeyTTL     time.Duration `toml:"key_ttl"`

	MaxConnections int `toml:"max_connections"`
	MaxHandshakes  int `toml:"max_handshakes"`
	MaxPerAddress  int `toml:"max_per_address"`
	PerSecond      int `toml:"per_second"`
	Burst          int `toml:"burst"`
}

func newEndpointConfig() EndpointConfig {
	return EndpointConfig{Listen: "127.0.0.1:8443", Collateral: []string{}, PCCS: []string{},
		MaxConnections: 4096, MaxHandshakes: 256, MaxPerAddress: 16, PerSecond: 5, Burst: 20}
}

// ServiceConfig declares a local service that peers may reach over attested channels.
type ServiceConfig struct {
	Name    string `toml:"name"`
	Backend string `toml:"backend"` // unix:PATH, or a loopback HOST:PORT
	Mode    string `toml:"mode"`    // "tcp" or "http"
	// Peers narrows down which entries of the policy may reach the service. None: all
	// that list it.
	Peers            []string `toml:"peers"`
	AllowUnattested  bool     `toml:"allow_unattested"`
	ProxyProtocol    bool     `toml:"proxy_protocol"`
	FlashbotsHeaders bool     `toml:"flashbots_headers"`
}

// ConnectConfig declares a local socket that leads to a service of a peer.
type ConnectConfig struct {
	Name       string   `toml:"name"`
	Listen     string   `toml:"listen"`      // unix:PATH, or a loopback HOST:PORT
	SocketMode string   `toml:"socket_mode"` // of a Unix socket
	Address    string   `toml:"address"`
	Service    string   `toml:"service"`
	Expect     []string `toml:"expect"`
}

// Modes of a service.
const (
	modeTCP  = "tcp"
	modeHTTP = "http"
)

// socketModesAllowed are what socket_mode may be.
var socketModesAllowed = map[string]fs.FileMode{"": 0o600, "0600": 0o600, "0660": 0o660, "0666": 0o666}

var declaredName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// checkChannels checks everything that is about attested channels.
func (c *Config) checkChannels() error {
	if err := c.Endpoint.check(); err != nil {
		return fmt.Errorf("endpoint.%w", err)
	}
	if len(c.Services) > maxServices || len(c.Connects) > maxConnects {
		return fmt.Errorf("there are %d [[service]] and %d [[connect]], want at most %d and %d", len(c.Services), len(c.Connects), maxServices, maxConnects)
	}
	seen := map[string]bool{}
	for i := range c.Services {
		s := &c.Services[i]
		if err := s.check(); err != nil {
			return fmt.Errorf("service %.64q: %w", s.Name, err)
		}
		if seen[s.Name] {
			return fmt.Errorf("service %q is declared twice", s.Name)
		}
		seen[s.Name] = true
	}
	clear(seen)
	for i := range c.Connects {
		s := &c.Connects[i]
		if err := s.check(); err != nil {
			return fmt.Errorf("connect %.64q: %w", s.Name, err)
		}
		if seen[s.Name] {
			return fmt.Errorf("connect %q is declared twice", s.Name)
		}
		seen[s.Name] = true
		if k := slices.IndexFunc(c.Connects[:i], func(other ConnectConfig) bool { return other.Listen == s.Listen }); k >= 0 {
			return fmt.Errorf("connect %q: listen: %q is that of %q already", s.Name, s.Listen, c.Connects[k].Name)
		}
	}
	if c.Endpoint.Policy == "" && len(c.Services)+len(c.Connects) > 0 {
		return errors.New("endpoint.policy is empty, want the file that says who the peers of [[service]] and [[connect]] are")
	}
	return nil
}

func (c *EndpointConfig) check() error {
	if err := checkListen(c.Listen, false); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	for _, path := range append([]string{c.Policy}, c.Collateral...) {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("policy and collateral: %q, want an absolute path", path)
		}
	}
	if c.KeyTTL < 0 || c.KeyTTL > time.Hour {
		return fmt.Errorf("key_ttl is %s, want 0s to 1h", c.KeyTTL)
	}
	for name, n := range map[string]int{"max_connections": c.MaxConnections, "max_handshakes": c.MaxHandshakes, "max_per_address": c.MaxPerAddress, "per_second": c.PerSecond, "burst": c.Burst} {
		if n < 1 || n > 1<<16 {
			return fmt.Errorf("%s is %d, want 1 to %d", name, n, 1<<16)
		}
	}
	return nil
}

func (s *ServiceConfig) check() error {
	if !declaredName.MatchString(s.Name) {
		return errors.New("name: want 1 to 64 letters, digits, dots, hyphens and underscores")
	}
	if err := checkListen(s.Backend, true); err != nil {
		return fmt.Errorf("backend: %w: what comes over a channel goes no further than this machine", err)
	}
	if s.Mode != "" && s.Mode != modeTCP && s.Mode != modeHTTP {
		return fmt.Errorf(`mode is %q, want "tcp" or "http"`, s.Mode)
	}
	if s.ProxyProtocol && s.Mode == modeHTTP {
		return errors.New(`proxy_protocol: not with mode = "http", whose connections many peers share; the headers say who asks`)
	}
	if s.FlashbotsHeaders && s.Mode != modeHTTP {
		return errors.New(`flashbots_headers: only with mode = "http"`)
	}
	return nil
}

func (s *ConnectConfig) check() error {
	if !declaredName.MatchString(s.Name) {
		return errors.New("name: want 1 to 64 letters, digits, dots, hyphens and underscores")
	}
	if err := checkListen(s.Listen, true); err != nil {
		return fmt.Errorf("listen: %w: whoever reaches it uses this TD's evidence", err)
	}
	if _, ok := socketModesAllowed[s.SocketMode]; !ok {
		return fmt.Errorf(`socket_mode is %q, want "0600", "0660" or "0666"`, s.SocketMode)
	}
	if _, err := forward.ParseDestination(s.Address); err != nil {
		return fmt.Errorf("address: %w", err)
	}
	if s.Service == "" || len(s.Service) > 64 {
		return fmt.Errorf("service is %.64q, want the name of a service at the peer", s.Service)
	}
	if len(s.Expect) == 0 || slices.Contains(s.Expect, "") {
		return errors.New("expect: want the policy entries that may accept the peer: addresses prove nothing")
	}
	return nil
}

// checkListen checks an address that is unix:PATH or HOST:PORT.
func checkListen(address string, mustBeLocal bool) error {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		if !filepath.IsAbs(path) || len(path) > 107 {
			return fmt.Errorf("%.120q, want an absolute path of at most 107 bytes", address)
		}
		return nil
	}
	if !mustBeLocal {
		if strings.Count(address, ":") == 0 {
			return fmt.Errorf("%.120q, want HOST:PORT or unix:PATH", address)
		}
		return nil
	}
	d, err := forward.ParseDestination(address)
	if err != nil || !d.IsLocal() {
		return fmt.Errorf("%.120q, want unix:PATH or a loopback address as 127.0.0.1:8080", address)
	}
	return nil
}

// forwarded is the service as package forward takes it.
func (s *ServiceConfig) forwarded(dial dialFunc) forward.Service {
	return forward.Service{Dial: dialer(dial, s.Backend), ProxyProtocol: s.ProxyProtocol, HTTP: s.Mode == modeHTTP, FlashbotsHeaders: s.FlashbotsHeaders}
}

// loosenedServices adds what is loosened of services to m.
func (c *Config) loosenedServices(m map[string]any) {
	for i := range c.Services {
		if c.Services[i].AllowUnattested {
			m[c.Services[i].loosenedKey()] = true
		}
	}
}

func (s *ServiceConfig) loosenedKey() string { return "service." + s.Name + ".allow_unattested" }

// tightServices is the same services without what loosens.
func tightServices(all []ServiceConfig) []ServiceConfig {
	all = slices.Clone(all)
	for i := range all {
		all[i].AllowUnattested = false
	}
	return all
}
