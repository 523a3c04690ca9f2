package atls_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"tdx-agent/remote/atls"
)

// selfMade is a TLS certificate as anybody can make one.
func selfMade(t testing.TB) tls.Certificate { return selfMadeOf(t, elliptic.P256()) }

func selfMadeOf(t testing.TB, curve elliptic.Curve) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func tlsOf(t testing.TB) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{selfMade(t)}, InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{atls.ALPN}, MinVersion: tls.VersionTLS13,
		CurvePreferences: atls.KeyExchanges}
}

// TestKeyExchange has a client with Go's own choices end up with one that outlives
// quantum computers, and one that knows of none get in all the same.
func TestKeyExchange(t *testing.T) {
	p := newPair(t, "")
	for _, c := range []struct {
		offers []tls.CurveID
		want   tls.CurveID
	}{{nil, tls.SecP256r1MLKEM768}, {[]tls.CurveID{tls.X25519}, tls.X25519}} {
		cfg := tlsOf(t)
		cfg.CurvePreferences = c.offers
		conn := p.stranger(t, cfg)
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		if got := conn.ConnectionState().CurveID; got != c.want {
			t.Errorf("offered %v: got %v, want %v", c.offers, got, c.want)
		}
	}
}

// stranger is a TLS connection to the server without the protocol above it.
func (p *pair) stranger(t testing.TB, cfg *tls.Config) *tls.Conn {
	t.Helper()
	raw, err := p.connect(context.Background(), "tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(raw, cfg)
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	t.Cleanup(func() { raw.Close() })
	return c
}

// takeFrame reads a frame with its header.
func takeFrame(r io.Reader) ([]byte, error) {
	header := make([]byte, 4)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	body := make([]byte, int(header[1])<<16|int(header[2])<<8|int(header[3]))
	_, err := io.ReadFull(r, body)
	return append(header, body...), err
}

func makeFrame(kind byte, body string) []byte {
	return append([]byte{kind, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// wantResult wants a refusal of this code, and the end of the connection.
func wantResult(t testing.TB, c net.Conn, code string) {
	t.Helper()
	frame, err := takeFrame(c)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	var r struct {
		OK   bool
		Code string
	}
	if err := json.Unmarshal(frame[4:], &r); err != nil || frame[0] != 4 || r.OK || r.Code != code {
		t.Errorf("got %d %s, want the refusal %s", frame[0], frame[4:], code)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on after a refusal")
	}
}

var zeros32 = strings.Repeat("A", 43) + "="

func hello(edit ...string) string {
	return strings.NewReplacer(edit...).Replace(`{"v":1,"nonce":"` + zeros32 + `","attest":["self","peer"],"modes":["quote","key"],"formats":["dstack-tdx/1"],"service":"echo","max_evidence":100000,"agent_key":"` + zeros32 + `"}`)
}

// TestRelay puts somebody with keys of his own between two honest ends, who passes
// every frame on. Each end binds its evidence to its own channel, so it does not fit.
func TestRelay(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	relay, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	outer, inner := tlsOf(t), tlsOf(t)
	go func() {
		raw, err := relay.Accept()
		if err != nil {
			return
		}
		client := tls.Server(raw, outer)
		toServer, err := net.Dial("tcp", p.address)
		if err != nil {
			return
		}
		server := tls.Client(toServer, inner)
		go func() { io.Copy(server, client); server.Close() }()
		io.Copy(client, server)
		client.Close()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err = p.dialer.DialContext(ctx, "tcp", relay.Addr().String(), "echo", []string{"server"})
	wantCode(t, err, atls.CodeBindingMismatch, true)
	if n := p.server.quoted(); n != 0 {
		t.Errorf("the server made %d quotes for a relay", n)
	}
}

// TestReflection sends the client's own evidence back to it: its role does not fit.
func TestReflection(t *testing.T) {
	p := newPair(t, "")
	mirror, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mirror.Close()
	cfg := tlsOf(t)
	go func() {
		raw, err := mirror.Accept()
		if err != nil {
			return
		}
		defer raw.Close()
		c := tls.Server(raw, cfg)
		c.SetDeadline(time.Now().Add(30 * time.Second))
		var hello struct {
			Key string `json:"agent_key"`
		}
		frame, err := takeFrame(c)
		if err != nil || json.Unmarshal(frame[4:], &hello) != nil {
			return
		}
		answer := makeFrame(2, `{"v":1,"nonce":"`+zeros32+`","client_evidence":"quote","format":"dstack-tdx/1","order":"client-first","service":"echo","max_evidence":200000,"agent_key":"`+hello.Key+`"}`)
		c.Write(answer)
		th := atls.Transcript(frame, answer)
		evidence, err := takeFrame(c)
		if err != nil {
			return
		}
		c.Write(evidence)
		c.Write(makeFrame(4, `{"ok":true,"code":"ok","ref":"`+hex.EncodeToString(th[:8])+`","ttl_s":1}`))
		io.Copy(io.Discard, c)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err = p.dialer.DialContext(ctx, "tcp", mirror.Addr().String(), "echo", []string{"server"})
	wantCode(t, err, atls.CodeBindingMismatch, false)
}

// TestStrangersTLS has TLS connections that are not what the protocol wants.
func TestStrangersTLS(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	for name, edit := range map[string]func(*tls.Config){
		"TLS 1.2":        func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"no ALPN":        func(c *tls.Config) { c.NextProtos = nil },
		"another ALPN":   func(c *tls.Config) { c.NextProtos = []string{"h2"} },
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := tlsOf(t)
			edit(cfg)
			c := p.stranger(t, cfg)
			c.Write(makeFrame(1, hello()))
			if frame, err := takeFrame(c); err == nil {
				t.Errorf("the server answers with %s", frame)
			}
		})
	}
	if n := p.server.quoted(); n != 0 {
		t.Errorf("%d quotes for strangers", n)
	}
}

// TestNoResumption offers the server a session ticket store, which stays empty.
func TestNoResumption(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	cfg := tlsOf(t)
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	for range 2 {
		c := p.stranger(t, cfg)
		c.Write(makeFrame(1, hello()))
		if frame, err := takeFrame(c); err != nil || frame[0] != 2 {
			t.Fatalf("got %s, %v", frame, err)
		}
		if c.ConnectionState().DidResume {
			t.Error("the session was resumed")
		}
		c.Close()
	}
}

// TestBadHello has one vector for each thing that a hello can get wrong.
func TestBadHello(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	for _, tc := range []struct{ name, body, code string }{
		{"version", hello(`"v":1`, `"v":2`), "unsupported"},
		{"short nonce", hello(`"nonce":"AA`, `"nonce":"`), "bad_frame"},
		{"no nonce", hello(`"nonce":"`+zeros32+`",`, ""), "bad_frame"},
		{"service unknown", hello(`"echo"`, `"nothing"`), "unsupported"},
		{"no service", hello(`"echo"`, `""`), "bad_frame"},
		{"long service", hello(`"echo"`, `"`+strings.Repeat("e", 65)+`"`), "bad_frame"},
		{"no format in common", hello(`dstack-tdx/1`, `cmw+json`), "unsupported"},
		{"no evidence offered", hello(`["self","peer"]`, `["peer"]`), "unsupported"},
		{"no quote offered", hello(`["quote","key"]`, `["key"]`), "unsupported"},
		{"nothing may be sent", hello(`100000`, `0`), "bad_frame"},
		{"member twice", hello(`{"v":1`, `{"v":1,"v":1`), "bad_frame"},
		{"member twice, in another case", hello(`{"v":1`, `{"v":1,"V":1`), "bad_frame"},
		{"member twice, with a long s", hello(`"service":"echo"`, `"service":"echo","ſervice":"echo"`), "bad_frame"},
		{"no object", `[]`, "bad_frame"},
		{"no JSON", `{`, "bad_frame"},
		{"two objects", hello() + "{}", "bad_frame"},
		{"long list", hello(`["quote","key"]`, `["`+strings.Repeat(`quote","`, 20)+`quote"]`), "bad_frame"},
		{"as long as can be", hello(`"v":1`, `"v":1`+strings.Repeat(" ", 4096-len(hello()))), ""},
		{"a byte too long", hello(`"v":1`, `"v":1`+strings.Repeat(" ", 4097-len(hello()))), "bad_frame"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := p.stranger(t, tlsOf(t))
			c.Write(makeFrame(1, tc.body))
			if tc.code != "" {
				wantResult(t, c, tc.code)
			} else if frame, err := takeFrame(c); err != nil || frame[0] != 2 {
				t.Errorf("got %s, %v, want HELLO_S", frame, err)
			}
		})
	}
	for _, kind := range []byte{0, 2, 3, 5, 255} {
		c := p.stranger(t, tlsOf(t))
		c.Write(makeFrame(kind, hello()))
		wantResult(t, c, "bad_frame")
	}
	if n := p.server.quoted(); n != 0 {
		t.Errorf("%d quotes for strangers", n)
	}
}

// TestBadEvidence has one vector for each thing that an EVIDENCE frame can get wrong.
func TestBadEvidence(t *testing.T) {
	p := newPair(t, "")
	p.echo(t)
	good := map[string]any{"format": "dstack-tdx/1", "quote": []byte("x"), "event_log": []any{}, "agent_spki": []byte("x"), "rtmr3": strings.Repeat("00", 48), "sig": []byte("x"), "server_evidence": "quote"}
	for _, tc := range []struct {
		name, code string
		edit       func(map[string]any)
	}{
		{"format", "unsupported", func(m map[string]any) { m["format"] = "other" }},
		{"agent key", "binding_mismatch", func(map[string]any) {}},
		{"long agent key", "bad_frame", func(m map[string]any) { m["agent_spki"] = make([]byte, 257) }},
		{"long signature", "bad_frame", func(m map[string]any) { m["sig"] = make([]byte, 257) }},
		{"RTMR3", "bad_frame", func(m map[string]any) { m["rtmr3"] = "00" }},
		{"mode of our evidence", "bad_frame", func(m map[string]any) { m["server_evidence"] = "none" }},
		{"too large", "bad_frame", func(m map[string]any) { m["vm_config"] = strings.Repeat("x", 257<<10) }},
		{"application bytes instead", "bad_frame", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := p.stranger(t, tlsOf(t))
			c.Write(makeFrame(1, hello()))
			if frame, err := takeFrame(c); err != nil || frame[0] != 2 {
				t.Fatalf("got %s, %v", frame, err)
			}
			if tc.edit == nil {
				fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
			} else {
				m := map[string]any{}
				for k, v := range good {
					m[k] = v
				}
				tc.edit(m)
				body, err := json.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				c.Write(makeFrame(3, string(body)))
			}
			wantResult(t, c, tc.code)
		})
	}
	if n := p.server.quoted(); n != 0 {
		t.Errorf("%d quotes for strangers", n)
	}
}

// TestSlowClients holds up nobody: connections that say nothing do not keep another
// from its channel.
func TestSlowClients(t *testing.T) {
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.MaxPerAddress = 200 })
	p.echo(t)
	for range 50 {
		raw, err := net.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
	}
	half := p.stranger(t, tlsOf(t))
	half.Write([]byte{1, 0})
	roundTrip(t, p.mustDial(t), "x")
}

// TestPerAddress closes what is more than an address may have under way.
func TestPerAddress(t *testing.T) {
	p := newPair(t, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.MaxPerAddress = 2 })
	p.echo(t)
	var held []net.Conn
	for range 2 {
		c := p.stranger(t, tlsOf(t))
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	c := p.stranger(t, tlsOf(t))
	if err := c.Handshake(); err == nil {
		if _, err := takeFrame(c); err == nil {
			t.Error("a third handshake of one address goes on")
		}
	}
	for _, c := range held {
		c.Close()
	}
}

// TestClose ends handshakes under way.
func TestClose(t *testing.T) {
	p := newPair(t, "")
	c := p.stranger(t, tlsOf(t))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := p.listener.Close(); err != nil {
		t.Error(err)
	}
	if _, err := p.listener.Accept(); err != net.ErrClosed {
		t.Errorf("Accept after Close: %v", err)
	}
}

// FuzzServer sends a server whatever comes, after an honest TLS handshake and hello.
func FuzzServer(f *testing.F) {
	p := newPair(f, "", func(_, _ *atls.Config, l *atls.ListenerConfig) { l.MaxPerAddress = 200 })
	p.echo(f)
	f.Add([]byte(hello()), []byte("{}"))
	f.Add([]byte("{}"), []byte(`{"format":"dstack-tdx/1"}`))
	cfg := tlsOf(f)
	f.Fuzz(func(t *testing.T, first, second []byte) {
		if len(first) > 5000 || len(second) > 5000 {
			return
		}
		c := p.stranger(t, cfg)
		defer c.Close()
		c.Write(bytes.Join([][]byte{makeFrame(1, string(first)), makeFrame(3, string(second))}, nil))
		for {
			frame, err := takeFrame(c)
			if err != nil {
				return
			}
			if frame[0] == 3 || frame[0] == 4 && strings.Contains(string(frame), `"ok":true`) {
				t.Fatalf("the server accepts: %s", frame)
			}
		}
	})
}
