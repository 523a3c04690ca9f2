package collateral_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

func notFound(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }

func reply(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) }
}

func redirect(to string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) }
}

// stall answers nothing until the client goes.
func stall(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// drip sends a byte at a time until the client goes.
func drip(w http.ResponseWriter, r *http.Request) {
	for r.Context().Err() == nil {
		_, _ = w.Write([]byte(" "))
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
		case <-time.After(time.Millisecond):
		}
	}
}

// flood sends this many bytes and says so before, or not.
func flood(size int, announce bool) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if announce {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		chunk := bytes.Repeat([]byte(" "), 64<<10)
		for left := size; left > 0; left -= len(chunk) {
			if _, err := w.Write(chunk[:min(left, len(chunk))]); err != nil {
				return
			}
		}
	}
}

// TestForms fetches over every form that servers have.
func TestForms(t *testing.T) {
	bundle := dated(t, 20, 5, 0)
	for name, change := range map[string]func(*pccs){
		"plain":              func(*pccs) {},
		"CRLs in hex":        func(p *pccs) { p.hexCRLs = true },
		"SGX header":         func(p *pccs) { p.tcbChain = "SGX-TCB-Info-Issuer-Chain" },
		"lower-case header":  func(p *pccs) { p.tcbChain = "tcb-info-issuer-chain" },
		"upper-case header":  func(p *pccs) { p.tcbChain = "SGX-TCB-INFO-ISSUER-CHAIN" },
		"plus for space":     func(p *pccs) { p.escape = url.QueryEscape },
		"plus as it is":      func(p *pccs) { p.escape = escapeFew },
		"redirect to itself": func(p *pccs) { p.instead["rootcacrl"] = once(redirect("/x/rootcacrl"), p, "rootcacrl") },
		"500 once":           func(p *pccs) { p.instead["pckcrl"] = once(status(500), p, "pckcrl") },
		"429 once":           func(p *pccs) { p.instead["tcb"] = once(status(429), p, "tcb") },
		"hang up once":       func(p *pccs) { p.instead["identity"] = once(hangUp, p, "identity") },
	} {
		for scheme, start := range map[string]func(http.Handler) *httptest.Server{"http": httptest.NewServer, "https": httptest.NewTLSServer} {
			t.Run(name+"/"+scheme, func(t *testing.T) {
				cfg, _ := config(t)
				p := startPCCS(t, bundle, start)
				p.set(change)
				cfg.PCCS, cfg.TLSRoots = []string{p.URL + "/"}, certificatesOf(p)
				set := mustFetch(t, open(t, cfg))
				if set.Source != "pccs "+p.URL || evaluation(set) != 20 {
					t.Errorf("source %q, evaluation number %d", set.Source, evaluation(set))
				}
				if _, err := dcap.ParseCollateral(set.Bundle, cfg.Roots); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func certificatesOf(p *pccs) *x509.CertPool {
	pool := x509.NewCertPool()
	if c := p.Certificate(); c != nil {
		pool.AddCert(c)
	}
	return pool
}

// escapeFew leaves plus signs as they are.
func escapeFew(s string) string { return strings.ReplaceAll(url.PathEscape(s), "%2B", "+") }

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func hangUp(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// once is a handler that takes itself out of p.
func once(h http.HandlerFunc, p *pccs, name string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p.set(func(p *pccs) { delete(p.instead, name) })
		h(w, r)
	}
}

// TestLies has one vector for each way in which a source fails. requests is how often
// the source was asked for anything.
func TestLies(t *testing.T) {
	other := newPCCS(t, dated(t, 20, 5, 0))
	foreign, _ := simulate(t, tdxsim.Config{Seed: []byte("foreign")})
	otherFMSPC, _ := simulate(t, tdxsim.Config{FMSPC: [6]byte{1}})
	all := func(h http.HandlerFunc) func(testing.TB, *pccs) {
		return func(_ testing.TB, p *pccs) { p.set(func(p *pccs) { p.instead[""] = h }) }
	}
	one := func(name string, h http.HandlerFunc) func(testing.TB, *pccs) {
		return func(_ testing.TB, p *pccs) { p.set(func(p *pccs) { p.instead[name] = h }) }
	}
	serve := func(bundle []byte) func(testing.TB, *pccs) {
		return func(t testing.TB, p *pccs) { p.serve(t, bundle) }
	}
	edit := func(change func(*pccs)) func(testing.TB, *pccs) {
		return func(_ testing.TB, p *pccs) { p.set(change) }
	}
	for _, c := range []struct {
		name, code string
		requests   int
		change     func(testing.TB, *pccs)
	}{
		{"not found", "not_found", 1, all(notFound)},
		{"CRL not found", "not_found", 3, one("pckcrl", notFound)},
		{"500", "status", 2, all(status(500))},
		{"403", "status", 1, all(status(403))},
		{"204", "status", 1, all(status(204))},
		{"stall", "timeout", 1, all(stall)},
		{"drip", "timeout", 1, all(drip)},
		{"hang up", "transport", 2, all(hangUp)},
		{"big TCB info", "body_size", 1, one("tcb", flood(256<<10+1, true))},
		{"flood for TCB info", "body_size", 1, one("tcb", flood(8<<20, false))},
		{"flood for QE identity", "body_size", 2, one("identity", flood(8<<20, false))},
		{"flood for PCK CRL", "body_size", 3, one("pckcrl", flood(8<<20, false))},
		{"big root CRL", "body_size", 4, one("rootcacrl", flood(3<<20, true))},
		{"flood of headers", "transport", 2, all(func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) })},
		{"redirect to another host", "redirect", 1, all(redirect(other.URL + "/sgx/certification/v4/rootcacrl"))},
		{"redirect to a scheme", "redirect", 1, all(redirect("file:///etc/passwd"))},
		{"redirect in circles", "redirect", 4, all(redirect("/tdx/certification/v4/tcb"))},
		{"no header", "header", 1, edit(func(p *pccs) { p.tcbChain = "X" })},
		{"header not URL-encoded", "header", 1, edit(func(p *pccs) { p.escape = func(string) string { return "%zz" } })},
		{"header not PEM", "not_genuine", 4, edit(func(p *pccs) { p.escape = func(string) string { return "hello" } })},
		{"not JSON", "response", 1, one("tcb", reply("<html>"))},
		{"not the document", "response", 2, one("identity", reply(`{"tcbInfo":{},"signature":""}`))},
		{"no CRL", "response", 3, one("pckcrl", reply("hello"))},
		{"no bytes", "response", 4, one("rootcacrl", reply(""))},
		{"other platform", "wrong_platform", 4, serve(otherFMSPC)},
		{"other root", "not_genuine", 4, serve(foreign)},
		{"flipped signature", "not_genuine", 4, edit(func(p *pccs) { p.bundle.TCBInfoSignature = strings.Repeat("1", 128) })},
		{"flipped text", "not_genuine", 4, edit(func(p *pccs) { p.bundle.QEIdentity = strings.Replace(p.bundle.QEIdentity, "UpToDate", "UpToDatf", 1) })},
		{"expired", "expired", 4, serve(dated(t, 20, 5, -31*day))},
		{"not yet valid", "not_yet_valid", 4, serve(dated(t, 20, 5, day))},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, _ := config(t)
			p := newPCCS(t, dated(t, 20, 5, 0))
			c.change(t, p)
			cfg.PCCS, cfg.Dir = []string{p.URL}, t.TempDir()
			if c.code == "timeout" {
				cfg.Limits.Source = 50 * time.Millisecond
			}
			s := open(t, cfg)
			_, err := fetch(s)
			if e := wantCode(t, err, c.code); e != nil && e.Source != "pccs "+p.URL {
				t.Errorf("source %q", e.Source)
			}
			if n := len(p.taken()); n != c.requests {
				t.Errorf("%d requests, want %d", n, c.requests)
			}
			if r := other.taken(); len(r) != 0 {
				t.Errorf("asked another host for %q", r)
			}
			if s.Known(fmspc, dcap.CAPlatform) != nil || len(cached(t, cfg.Dir)) != 0 {
				t.Error("the set is kept")
			}
			cfg.PCCS = []string{p.URL, other.URL}
			if set := mustFetch(t, open(t, cfg)); set.Source != "pccs "+other.URL {
				t.Errorf("from %s", set.Source)
			}
			other.taken()
		})
	}
}

// TestWrongCA asks for a CA of which the server has no CRL.
func TestWrongCA(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	cfg.PCCS = []string{p.URL}
	_, err := open(t, cfg).Fetch(context.Background(), fmspc, dcap.CAProcessor)
	wantCode(t, err, "wrong_platform")
	if r := p.taken(); len(r) < 3 || r[2] != "/sgx/certification/v4/pckcrl?ca=processor&encoding=der" {
		t.Errorf("asked for %q", r)
	}
}

// TestUnreachable has what fails before there is an answer, and how errors of several
// sources read.
func TestUnreachable(t *testing.T) {
	cfg, _ := config(t)
	gone := newPCCS(t, dated(t, 20, 5, 0))
	gone.Close()
	untrusted := startPCCS(t, dated(t, 20, 5, 0), httptest.NewTLSServer)
	cfg.TLSRoots = x509.NewCertPool()
	for _, address := range []string{gone.URL, untrusted.URL} {
		cfg.PCCS = []string{address}
		_, err := fetch(open(t, cfg))
		wantCode(t, err, "transport")
	}
	cfg.PCCS = []string{gone.URL, untrusted.URL}
	_, err := fetch(open(t, cfg))
	if e := wantCode(t, err, "transport"); e != nil && (!strings.Contains(e.Error(), gone.URL) || !strings.Contains(e.Error(), untrusted.URL)) {
		t.Errorf("%v does not name both sources", e)
	}
	if _, ok := errors.AsType[*url.Error](err); !ok {
		t.Errorf("%v does not have its cause", err)
	}

	cfg.Limits.Connect = 10 * time.Millisecond
	cfg.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	_, err = fetch(open(t, cfg))
	wantCode(t, err, "timeout")
}

// TestDowngrade redirects from https to http on the same host.
func TestDowngrade(t *testing.T) {
	cfg, _ := config(t)
	p := startPCCS(t, dated(t, 20, 5, 0), httptest.NewTLSServer)
	p.set(func(p *pccs) { p.instead[""] = redirect(strings.Replace(p.URL, "https:", "http:", 1) + "/rootcacrl") })
	cfg.PCCS, cfg.TLSRoots = []string{p.URL}, certificatesOf(p)
	_, err := fetch(open(t, cfg))
	wantCode(t, err, "redirect")
}

// TestEndpoints shows what is asked of a PCCS and of Intel, and that Intel's two hosts
// are constants.
func TestEndpoints(t *testing.T) {
	documents := func(fmspc, only, further, rootCRL string) []string {
		return []string{"/tdx/certification/v4/tcb?fmspc=" + fmspc + further, "/tdx/certification/v4/qe/identity" + only,
			"/sgx/certification/v4/pckcrl?ca=platform&encoding=der", rootCRL}
	}
	for _, c := range []struct {
		name, channel string
		intel         bool
		want          []string
	}{
		{"pccs", "standard", false, documents("50806f000000", "", "", "/sgx/certification/v4/rootcacrl")},
		{"pccs early", "early", false, documents("50806f000000", "?update=early", "&update=early", "/sgx/certification/v4/rootcacrl")},
		{"intel", "", true, documents("50806f000000", "", "", "/IntelSGXRootCA.der")},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, _ := config(t)
			certificate, pool := selfSigned(t, "api.trustedservices.intel.com", "certificates.trustedservices.intel.com", "pccs.invalid")
			p := startPCCS(t, dated(t, 20, 5, 0), func(h http.Handler) *httptest.Server {
				s := httptest.NewUnstartedServer(h)
				s.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
				s.StartTLS()
				return s
			})
			var mu sync.Mutex
			var dialled []string
			cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				mu.Lock()
				dialled = append(dialled, address)
				mu.Unlock()
				return new(net.Dialer).DialContext(ctx, network, p.Listener.Addr().String())
			}
			cfg.TLSRoots, cfg.UpdateChannel, cfg.IntelPCS = pool, c.channel, c.intel
			source, hosts := "intel pcs", []string{"api.trustedservices.intel.com:443", "certificates.trustedservices.intel.com:443"}
			if !c.intel {
				cfg.PCCS = []string{"https://pccs.invalid:8081/sgx/certification/v4/"}
				source, hosts = "pccs https://pccs.invalid:8081", []string{"pccs.invalid:8081"}
			}
			if set := mustFetch(t, open(t, cfg)); set.Source != source {
				t.Errorf("source %q", set.Source)
			}
			if got := p.taken(); !slices.Equal(got, c.want) {
				t.Errorf("asked for %q, want %q", got, c.want)
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(slices.Compact(dialled), hosts) {
				t.Errorf("dialled %q, want %q", dialled, hosts)
			}
		})
	}
}

func selfSigned(t testing.TB, names ...string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotBefore: time.Now().Add(-day), NotAfter: time.Now().Add(day), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
}

// TestRealTimers runs the defaults of Config.Wait, Jitter and Limits once.
func TestRealTimers(t *testing.T) {
	cfg, _ := config(t)
	p := newPCCS(t, dated(t, 20, 5, 0))
	p.set(func(p *pccs) { p.instead["tcb"] = once(status(503), p, "tcb") })
	cfg.PCCS, cfg.Wait = []string{p.URL}, nil
	cfg.Jitter = func(most time.Duration) time.Duration { return min(most, time.Millisecond) }
	mustFetch(t, open(t, cfg))
	p.set(func(p *pccs) { p.instead["tcb"] = status(503) })
	cfg.Jitter, cfg.Limits.Source = func(time.Duration) time.Duration { return time.Hour }, 20*time.Millisecond
	_, err := fetch(open(t, cfg))
	wantCode(t, err, "status")
	cfg.Jitter, cfg.Limits = nil, collateral.Limits{}
	_, err = fetch(open(t, cfg))
	wantCode(t, err, "status")
}
