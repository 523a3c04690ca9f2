package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/mdlayher/vsock"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
	"tdx-agent/measure"
	"tdx-agent/remote/dcap"
)

// LocalConfig says how to reach the host's API, and when to take the enclave behind it for
// the local key provider.
type LocalConfig struct {
	URL        string        `toml:"url"`
	Collateral string        `toml:"collateral"`
	TCBStatus  []string      `toml:"tcb_status"`
	Timeout    time.Duration `toml:"timeout"`
}

// acceptableTCB are the statuses that may be accepted of a provider's platform.
var acceptableTCB = []dcap.Status{dcap.UpToDate, dcap.SWHardeningNeeded, dcap.ConfigurationNeeded, dcap.ConfigurationAndSWHardeningNeeded}

func (c *LocalConfig) check() error {
	if c.URL == "" {
		if c.Collateral != "" {
			return fmt.Errorf("keys.local.collateral is given, but keys.local.url is empty")
		}
		return nil
	}
	if _, _, _, err := c.address(); err != nil {
		return err
	}
	if !filepath.IsAbs(c.Collateral) {
		return fmt.Errorf("keys.local.collateral is %q, want the absolute path of a bundle for SGX quotes: without one no key provider is accepted", c.Collateral)
	}
	for _, s := range c.TCBStatus {
		if !slices.Contains(acceptableTCB, dcap.Status(s)) {
			return fmt.Errorf("keys.local.tcb_status: %q, want one of %v", s, acceptableTCB)
		}
	}
	if len(c.TCBStatus) == 0 {
		return fmt.Errorf("keys.local.tcb_status is empty, so nothing could match")
	}
	return checkKeyTimeout("keys.local.timeout", c.Timeout)
}

func checkKeyTimeout(name string, d time.Duration) error {
	if d < time.Second || d > 10*time.Minute {
		return fmt.Errorf("%s is %s, want 1s to 10m", name, d)
	}
	return nil
}

// address takes the URL apart.
func (c *LocalConfig) address() (cid, port uint32, path string, err error) {
	fault := fmt.Errorf("keys.local.url is %q, want vsock://CID:PORT/PATH, as dstack's vsock://2:12000/api", c.URL)
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "vsock" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return 0, 0, "", fault
	}
	host, err := strconv.ParseUint(u.Hostname(), 10, 32)
	if err != nil {
		return 0, 0, "", fault
	}
	service, err := strconv.ParseUint(u.Port(), 10, 32)
	if err != nil {
		return 0, 0, "", fault
	}
	return uint32(host), uint32(service), u.EscapedPath(), nil
}

// newLocal makes the client of the local key provider that is configured; nil if none is.
// It connects to nobody yet.
func (d *daemon) newLocal() (*keys.Local, error) {
	c := &d.cfg.Keys.Local
	if c.URL == "" || d.files == nil {
		return nil, nil
	}
	cid, port, path, err := c.address()
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	roots := dcap.IntelRoots()
	var accepted []dcap.Status
	for _, s := range c.TCBStatus {
		accepted = append(accepted, dcap.Status(s))
	}
	local, err := keys.NewLocal(keys.LocalConfig{
		Measured: d.measuredIdentity, Path: path, Verifier: dcap.NewVerifier(dcap.Config{Roots: roots}), TCBStatus: accepted, Timeout: c.Timeout,
		Dial: func(ctx context.Context) (net.Conn, error) { return vsock.DialContext(ctx, cid, port, nil) },
		Attest: func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
			return d.Evidence(ctx, rd, guestapi.Caller{})
		},
		Collateral: func(context.Context) (*dcap.Collateral, error) { // anew each time: the operator replaces it
			b, err := readCapped(c.Collateral, 5<<20)
			if err != nil {
				return nil, fmt.Errorf("%w; tdx-agent collateral fetch --sgx makes this file", err)
			}
			return dcap.ParseEnclaveCollateral(b, roots)
		},
	})
	return local, withExit(exitConfig, err)
}
