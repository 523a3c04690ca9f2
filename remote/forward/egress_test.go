package forward_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"tdx-agent/remote/forward"
)

// startEgress serves an Egress with cfg at the socket it returns, until the test's end.
func startEgress(t *testing.T, cfg forward.EgressConfig) (e *forward.Egress, socket string) {
	t.Helper()
	nothingStays(t)
	dir, err := os.MkdirTemp("", "egress") // a test's own folder has too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	e = forward.NewEgress(cfg)
	go func() { done <- e.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return e, socket
}

// backEnd runs serve for each connection, until the test's end.
func backEnd(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); serve(c) }()
		}
	}()
	return l.Addr().String()
}

func echo(c net.Conn) { io.Copy(c, c) }

func destinations(t *testing.T, list ...string) (all []forward.Destination) {
	t.Helper()
	for _, s := range list {
		d, err := forward.ParseDestination(s)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

func TestThroughEgress(t *testing.T) {
	address := backEnd(t, func(c net.Conn) { // speaks first, then answers what it has all of
		io.WriteString(c, "hello\n")
		b, _ := io.ReadAll(c)
		fmt.Fprintf(c, "%d bytes", len(b))
	})
	e, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, address)})
	c, err := forward.Through(socket)(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	sent := bytes.Repeat([]byte("x"), 3<<20)
	go func() { c.Write(sent); c.(interface{ CloseWrite() error }).CloseWrite() }()
	if b, err := io.ReadAll(c); err != nil || string(b) != fmt.Sprintf("hello\n%d bytes", len(sent)) {
		t.Errorf("got %q, %v", b, err)
	}
	if _, relayed, refused := e.Counts(); relayed != 1 || refused != 0 {
		t.Errorf("%d relayed, %d refused", relayed, refused)
	}
}

// TestEgressEarlyBytes loses nothing of an asker that does not wait for the answer.
func TestEgressEarlyBytes(t *testing.T) {
	address := backEnd(t, echo)
	_, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, address)})
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\nearly", address, address)
	c.(*net.UnixConn).CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "HTTP/1.1 200 OK\r\n\r\nearly" {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestEgressHTTPS is what a collateral fetch does.
func TestEgressHTTPS(t *testing.T) {
	srv, client := tlsServer(t)
	_, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, srv.Listener.Addr().String())})
	client.Transport.(*http.Transport).DialContext = forward.Through(socket)
	resp, err := client.Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); string(b) != "collateral" {
		t.Errorf("got %q", b)
	}
}

func TestEgressRefuses(t *testing.T) {
	address := backEnd(t, echo)
	_, port, _ := net.SplitHostPort(address)
	var log bytes.Buffer
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := silent.Addr().String()
	silent.Close()
	e, socket := startEgress(t, forward.EgressConfig{
		Allow:    destinations(t, address, closed, "rebound.example:"+port, "linked.example:80"),
		Resolver: resolver(t, map[string]string{"rebound.example.": "127.0.0.1", "linked.example.": "169.254.169.254"}),
		Logger:   slog.New(slog.NewTextHandler(&log, nil)),
	})
	for _, tc := range []struct {
		name, request string
		status        int
		want          string
	}{
		{"other host", "CONNECT 127.0.0.2:" + port + " HTTP/1.1", 403, "127.0.0.2:" + port + " is not a destination"},
		{"other port", "CONNECT 127.0.0.1:1 HTTP/1.1", 403, "not a destination"},
		{"another spelling of a port", "CONNECT 127.0.0.1:0" + port + " HTTP/1.1", 400, "want a port"},
		{"another spelling of an address", "CONNECT 127.1:" + port + " HTTP/1.1", 400, "want a host's name"},
		{"an IPv4 address as IPv6", "CONNECT [::ffff:127.0.0.1]:" + port + " HTTP/1.1", 400, "the address of one host"},
		{"host header that differs", "CONNECT 127.0.0.2:" + port + " HTTP/1.1\r\nHost: " + address, 403, "127.0.0.2"},
		{"wildcard", "CONNECT *:" + port + " HTTP/1.1", 400, "no wildcards"},
		{"user in the target", "CONNECT u@" + address + " HTTP/1.1", 400, "want a host's name"},
		{"name that resolves to this machine", "CONNECT rebound.example:" + port + " HTTP/1.1", 403, "resolves to 127.0.0.1"},
		{"name that resolves to the link", "CONNECT linked.example:80 HTTP/1.1", 403, "resolves to 169.254.169.254"},
		{"GET", "GET http://" + address + "/ HTTP/1.1\r\nHost: " + address, 405, "want CONNECT"},
		{"content", "CONNECT " + address + " HTTP/1.1\r\nContent-Length: 1", 400, "no content"},
		{"chunks", "CONNECT " + address + " HTTP/1.1\r\nTransfer-Encoding: chunked", 400, "no content"},
		{"not HTTP", "\x16\x03\x01", 400, "not an HTTP request"},
		{"long header", "CONNECT " + address + " HTTP/1.1\r\nX: " + strings.Repeat("x", 8<<10), 431, "8192 bytes"},
		{"nobody there", "CONNECT " + closed + " HTTP/1.1", 502, "connection refused"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log.Reset()
			_, _, before := e.Counts()
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			io.WriteString(c, tc.request+"\r\n\r\n")
			answer, _ := io.ReadAll(c)
			if !bytes.HasPrefix(answer, fmt.Appendf(nil, "HTTP/1.1 %d ", tc.status)) || !bytes.Contains(answer, []byte(tc.want)) {
				t.Errorf("got %q, want status %d and %q", answer, tc.status, tc.want)
			}
			if _, _, after := e.Counts(); after != before+1 {
				t.Errorf("%d refused, want one", after-before)
			}
			if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "no relay") {
				t.Errorf("log is %q, want one line", log.String())
			}
		})
	}
}

func TestThroughEgressErrors(t *testing.T) {
	address := backEnd(t, echo)
	_, socket := startEgress(t, forward.EgressConfig{})
	_, err := forward.Through(socket)(t.Context(), "tcp", address)
	if e, ok := errors.AsType[*forward.EgressError](err); !ok || e.Status != http.StatusForbidden || !strings.Contains(err.Error(), "[egress] allow") {
		t.Errorf("an Egress that allows nothing: %v", err)
	}
	if _, err = forward.Through(socket)(t.Context(), "unix", address); err == nil || !strings.Contains(err.Error(), "want tcp") {
		t.Errorf("another network: %v", err)
	}
	if _, err = forward.Through(socket)(t.Context(), "tcp", "a b:1"); err == nil || !strings.Contains(err.Error(), "destination is") {
		t.Errorf("a name that would end the request: %v", err)
	}
	if _, err = forward.Through(socket+"x")(t.Context(), "tcp", address); err == nil || !strings.Contains(err.Error(), "start tdx-agent egress") {
		t.Errorf("no Egress: %v", err)
	}
	mute, err := net.Listen("unix", socket+"m")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err = forward.Through(socket+"m")(ctx, "tcp", address); err == nil {
		t.Error("an Egress that says nothing: no error")
	}
}

// TestEgressFull answers, and does not leave waiting, whoever is one too many.
func TestEgressFull(t *testing.T) {
	address := backEnd(t, echo)
	_, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, address), MaxConnections: 1})
	dial := forward.Through(socket)
	first, err := dial(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_, err = dial(t.Context(), "tcp", address)
	if e, ok := errors.AsType[*forward.EgressError](err); !ok || e.Status != http.StatusServiceUnavailable {
		t.Errorf("a second relay of one: %v", err)
	}
	first.Close()
	for deadline := time.Now().Add(20 * time.Second); ; {
		c, err := dial(t.Context(), "tcp", address)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after the first has ended: %v", err)
		}
	}
}

// TestEgressIdle ends a relay that carries nothing, and no other: not one that carries
// bytes one way only.
func TestEgressIdle(t *testing.T) {
	const idle = time.Second // a busy machine may be late by much of it
	started := make(chan struct{})
	address := backEnd(t, func(c net.Conn) {
		tick := time.NewTicker(idle / 6)
		defer tick.Stop()
		<-started
		for range 12 { // twice as long as idle
			<-tick.C
			io.WriteString(c, ".")
		}
		io.Copy(io.Discard, c)
	})
	_, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, address), Idle: idle})
	c, err := forward.Through(socket)(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	close(started)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if b, err := io.ReadAll(c); err != nil || len(b) != 12 {
		t.Errorf("got %d bytes and %v, want 12 and the end", len(b), err)
	}
}

// TestEgressIdlePipes holds no pipe, by which the kernel copies, for relays that are
// silent: the descriptors would be three times as many.
func TestEgressIdlePipes(t *testing.T) {
	const relays = 20
	address := backEnd(t, func(c net.Conn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) }) // without a pipe
	_, socket := startEgress(t, forward.EgressConfig{Allow: destinations(t, address)})
	message := bytes.Repeat([]byte("x"), 1<<20)
	before := pipes(t)
	for range relays {
		c, err := forward.Through(socket)(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		go c.Write(message)
		answer := make([]byte, len(message))
		if _, err := io.ReadFull(c, answer); err != nil || !bytes.Equal(answer, message) {
			t.Fatalf("what comes back is not what was sent: %v", err)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); pipes(t) > before+2; {
		if time.Now().After(deadline) {
			t.Fatalf("%d silent relays hold %d descriptors of pipes", relays, pipes(t)-before)
		}
		runtime.GC() // what is kept for the next that copies goes with it
		time.Sleep(10 * time.Millisecond)
	}
}

// pipes counts this process's descriptors of pipes.
func pipes(t *testing.T) (n int) {
	t.Helper()
	all, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range all {
		if to, _ := os.Readlink(fd); strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

func TestParseDestination(t *testing.T) {
	for in, want := range map[string]string{
		"PCCS.Example.org:8081": "pccs.example.org:8081", "127.0.0.1:80": "127.0.0.1:80", "[::1]:80": "[::1]:80",
		"[2001:DB8:0::1]:443": "[2001:db8::1]:443", "localhost:1": "localhost:1", "my_host:65535": "my_host:65535", "xn--bcher-kva.example:1": "xn--bcher-kva.example:1",
	} {
		if d, err := forward.ParseDestination(in); err != nil || d.String() != want {
			t.Errorf("%q: got %v, %v, want %s", in, d, err, want)
		}
	}
	for _, in := range []string{"", "host", "host:", ":80", "host:0", "host:080", "host:65536", "host:-1", "host:http", "host:+80", "a..b:1", "host.:1", ".host:1", "-a:1", "a-:1", "*.example.org:1", "*:1",
		"1.2.3:80", "0x7f000001.1:80", "127.0.0.1.:80", "[fe80::1%eth0]:80", "0.0.0.0:80", "[::]:80", "224.0.0.1:80", "[::ffff:1.2.3.4]:80", "h\u00f6st:1", "a b:1", "a\r\nb:1", "\u212aelvin:1", strings.Repeat("a", 64) + ":1", strings.Repeat("a.", 127) + "a:1"} {
		if d, err := forward.ParseDestination(in); err == nil {
			t.Errorf("%q is taken as %s", in, d)
		}
	}
}

func FuzzParseDestination(f *testing.F) {
	f.Add("[2001:DB8::1]:443")
	f.Add("Host.example:80")
	f.Fuzz(func(t *testing.T, s string) {
		d, err := forward.ParseDestination(s)
		if err != nil {
			return
		}
		if again, err := forward.ParseDestination(d.String()); err != nil || again != d {
			t.Errorf("%q is %s, which is %s, %v", s, d, again, err)
		}
		if strings.ContainsAny(d.String(), " \r\n\t/@*%") {
			t.Errorf("%q is taken as %q", s, d)
		}
	})
}
