package forward_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tdx-agent/remote/atls"
	"tdx-agent/remote/forward"
)

// recorder is an HTTP back end that keeps the bytes of each request.
func recorder(t *testing.T) (address string, requests chan string) {
	requests = make(chan string, 8)
	return backEnd(t, func(c net.Conn) {
		var raw bytes.Buffer
		r := bufio.NewReader(io.TeeReader(c, &raw))
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.Copy(io.Discard, req.Body)
			requests <- raw.String()
			raw.Reset()
			if req.Header.Get("Upgrade") != "" {
				io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+req.Header.Get("Upgrade")+"\r\n\r\n")
				io.Copy(c, r)
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	}), requests
}

var separators = regexp.MustCompile(`[^a-z0-9]`)

// identityIn lists the header lines, and trailer lines, that a back end could take for
// ours, however it folds names.
func identityIn(request string) map[string][]string {
	found := map[string][]string{}
	for line := range strings.Lines(request) {
		name, value, _ := strings.Cut(strings.TrimRight(line, "\r\n"), ":")
		folded := separators.ReplaceAllString(strings.ToLower(name), "-")
		if strings.HasPrefix(folded, "x-attested") || strings.HasPrefix(folded, "x-flashbots-measurement") || strings.HasPrefix(folded, "x-flashbots-attestation") {
			found[name] = append(found[name], strings.TrimSpace(value))
		}
	}
	return found
}

// identityOf is what a back end is told of a machine.
func identityOf(m *machine, entry string, c *atls.Conn) map[string][]string {
	hash := sha256.Sum256([]byte(m.name))
	return map[string][]string{
		"X-Attested-App-Id": {fmt.Sprintf("%x", hash[:20])}, "X-Attested-Compose-Hash": {fmt.Sprintf("%x", hash)}, "X-Attested-Instance-Id": {fmt.Sprintf("%x", hash[12:])},
		"X-Attested-Policy-Entry": {entry}, "X-Attested-Assurance": {"simulated-quote"}, "X-Attested-Ref": {c.Peer().Ref},
	}
}

func TestIdentityHeaders(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, "worker", "")
	c := p.dial(t, p.dialer, "web")
	want := identityOf(client, "worker", c)
	r := bufio.NewReader(c)
	for _, tc := range []struct{ name, lines, body string }{
		{name: "nothing"},
		{name: "the names themselves", lines: "X-Attested-App-Id: evil\r\nX-Attested-Assurance: quote\r\nX-Attested-Image: evil\r\n"},
		{name: "another letter case", lines: "x-attested-app-id: evil\r\nX-ATTESTED-REF: evil\r\nx-aTTested-Image: evil\r\n"},
		{name: "underscores", lines: "X_Attested_App_Id: evil\r\nx-attested_image: evil\r\nX_ATTESTED-IMAGE: evil\r\n"},
		{name: "other separators", lines: "X.Attested.App.Id: evil\r\nX~Attested!Image: evil\r\nX'Attested|Image: evil\r\n"},
		{name: "twice", lines: "X-Attested-App-Id: evil\r\nX-Attested-App-Id: evil2\r\n"},
		{name: "names that are not ours yet", lines: "X-Attested-Future: evil\r\nX-Attested: evil\r\n"},
		{name: "Connection names ours", lines: "Connection: keep-alive, X-Attested-App-Id, X-Attested-Ref\r\nConnection: x-attested-compose-hash\r\n"},
		{name: "other hop-by-hop headers", lines: "Keep-Alive: X-Attested-App-Id\r\nProxy-Connection: X-Attested-App-Id\r\nTE: trailers, X-Attested-App-Id\r\n"},
		{name: "a trailer", lines: "Transfer-Encoding: chunked\r\nTrailer: X-Attested-App-Id\r\n", body: "1\r\nx\r\n0\r\nX-Attested-App-Id: evil\r\n\r\n"},
		{name: "a trailer that nobody announced", lines: "Transfer-Encoding: chunked\r\n", body: "1\r\nx\r\n0\r\nX-Attested-App-Id: evil\r\n\r\n"},
		{name: "a continued line", lines: "X-Foo: a\r\n X-Attested-App-Id: evil\r\n"},
		{name: "another protocol, without its sight", lines: "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"},
		{name: "one of two protocols", lines: "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n"},
		{name: "two protocols", lines: "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n"},
		{name: "flashbots", lines: "X-Flashbots-Measurement: evil\r\nx_flashbots_attestation_type: evil\r\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fmt.Fprintf(c, "POST /x HTTP/1.1\r\nHost: peer.example\r\n%s\r\n%s", tc.lines, tc.body)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "ok" {
				t.Fatalf("got %s, %q, %v", resp.Status, b, err)
			}
			request := <-requests
			if diff := cmp.Diff(want, identityIn(request)); diff != "" {
				t.Errorf("the back end sees others than what is proven:\n%s\nin\n%s", diff, request)
			}
			if strings.Contains(request, "\r\nTrailer:") {
				t.Errorf("the back end is told of trailers:\n%s", request)
			}
			if strings.Contains(request, "Upgrade") || strings.Contains(request, "h2c") {
				t.Errorf("the back end may switch protocols:\n%s", request)
			}
			if !strings.Contains(request, "\r\nHost: peer.example\r\n") {
				t.Errorf("the host is not the peer's:\n%s", request)
			}
		})
	}
}

// TestHTTPRefuses closes what is no request for the back end, which sees nothing of it.
func TestHTTPRefuses(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, "worker", "")
	for _, tc := range []struct {
		name, request string
		status        int
	}{
		{"space before the colon", "GET / HTTP/1.1\r\nHost: x\r\nX-Attested-App-Id : evil\r\n\r\n", 400},
		{"a bare carriage return", "GET / HTTP/1.1\r\nHost: x\r\nX-Foo: a\rX-Attested-App-Id: evil\r\n\r\n", 400},
		{"a null byte", "GET / HTTP/1.1\r\nHost: x\r\nX-Attested\x00-App-Id: evil\r\n\r\n", 400},
		{"two lengths", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400},
		{"CONNECT", "CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: x\r\n\r\n", 405},
		{"long header", "GET / HTTP/1.1\r\nHost: x\r\nX-Foo: " + strings.Repeat("a", 80<<10) + "\r\n\r\n", 431},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := p.dial(t, p.dialer, "web")
			go io.WriteString(c, tc.request)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || resp.StatusCode != tc.status {
				t.Errorf("got %v, %v, want status %d", resp, err, tc.status)
			}
			select {
			case r := <-requests:
				t.Errorf("the back end sees %q", r)
			default:
			}
		})
	}
}

// TestHTTPAbsoluteForm reaches the service's back end, whatever the target names.
func TestHTTPAbsoluteForm(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, "worker", "")
	c := p.dial(t, p.dialer, "web")
	io.WriteString(c, "GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\nForwarded: for=10.0.0.1\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	if r := <-requests; !strings.HasPrefix(r, "GET /latest HTTP/1.1\r\n") || strings.Contains(r, "10.0.0.1") {
		t.Errorf("the back end sees %q", r)
	}
}

// TestHTTPQuery passes a query on as it is, whatever it means to the back end.
func TestHTTPQuery(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, "worker", "")
	c := p.dial(t, p.dialer, "web")
	io.WriteString(c, "GET //a/%2fb?x=1;y=2&%zz HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	if r := <-requests; !strings.HasPrefix(r, "GET //a/%2fb?x=1;y=2&%zz HTTP/1.1\r\n") {
		t.Errorf("the back end sees %q", r)
	}
}

// TestHTTPDenied begins nothing for a peer that a new policy denies.
func TestHTTPDenied(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, "worker", "")
	c := p.dial(t, p.dialer, "web")
	r := bufio.NewReader(c)
	for _, want := range []int{200, 403} {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != want {
			t.Fatalf("got %v, %v, want %d", resp, err, want)
		}
		io.Copy(io.Discard, resp.Body)
		other := client.config(t, newMachine(t, "another", true), "worker", fmt.Sprintf(terms, sha256.Sum256([]byte("another")))).Verifier
		if err := p.verifier.SetPolicy(other.Policy(), other.Collateral()); err != nil {
			t.Fatal(err)
		}
		p.listener.Reappraise(t.Context())
	}
	if len(requests) != 1 {
		t.Errorf("the back end has seen %d requests, want 1", len(requests))
	}
}

// TestHTTPUpgrade passes a protocol switch on, with who the peer is.
func TestHTTPUpgrade(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, "worker", "")
	c := p.dial(t, p.dialer, "web")
	io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, X-Attested-App-Id\r\nUpgrade: websocket\r\nX_Attested_App_Id: evil\r\n\r\n")
	r := bufio.NewReader(c)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 101 {
		t.Fatalf("got %v, %v", resp, err)
	}
	io.WriteString(c, "ping")
	got := make([]byte, 4)
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "ping" {
		t.Errorf("got %q, %v", got, err)
	}
	if diff := cmp.Diff(identityOf(client, "worker", c), identityIn(<-requests)); diff != "" {
		t.Error(diff)
	}
}

// TestHTTPPeersShareNoIdentity lets two channels use one kept connection to the back end.
func TestHTTPPeersShareNoIdentity(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}, "open": {Dial: to(address), HTTP: true, FlashbotsHeaders: true}}, client, "a b,\u00e9", "")
	c := p.dial(t, p.dialer, "web")
	bare := p.dial(t, p.bare, "open")
	body := client.td
	regs, err := body.Registers()
	if err != nil {
		t.Fatal(err)
	}
	attested := p.dial(t, p.dialer, "open")
	attestedWant := identityOf(client, "a%20b%2C%C3%A9", attested)
	attestedWant["X-Flashbots-Attestation-Type"] = []string{"dcap-tdx"}
	attestedWant["X-Flashbots-Measurement"] = []string{fmt.Sprintf(`{"0":"%s","1":"%s","2":"%s","3":"%s","4":"%s"}`, regs.MRTD, regs.RTMR[0], regs.RTMR[1], regs.RTMR[2], regs.RTMR[3])}
	for _, tc := range []struct {
		name string
		c    *atls.Conn
		want map[string][]string
	}{
		{"attested", c, identityOf(client, "a%20b%2C%C3%A9", c)},
		{"unattested", bare, map[string][]string{"X-Attested-Assurance": {"none"}, "X-Attested-Ref": {bare.Peer().Ref}, "X-Flashbots-Attestation-Type": {"none"}}},
		{"attested, with the headers of flashbots", attested, attestedWant},
	} {
		io.WriteString(tc.c, "GET / HTTP/1.1\r\nHost: x\r\nX-Attested-App-Id: evil\r\nX-Flashbots-Measurement: evil\r\n\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(tc.c), nil); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s: got %v, %v", tc.name, resp, err)
		}
		if diff := cmp.Diff(tc.want, identityIn(<-requests)); diff != "" {
			t.Errorf("%s: %s", tc.name, diff)
		}
	}
}

// TestUnprovenIdentity tells a back end nothing of an application that could have made up
// its events: the entry accepts any, and nothing ends the boot's.
func TestUnprovenIdentity(t *testing.T) {
	address, requests := recorder(t)
	client := newMachine(t, "client", false)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(address), HTTP: true}}, client, strings.Repeat("x", 300),
		"allow_any_app = true\nrequire_events = []\nrequire_measured_agent_key = false\nservice = [\"web\"]")
	c := p.dial(t, p.dialer, "web")
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	want := map[string][]string{"X-Attested-Assurance": {"simulated-quote"}, "X-Attested-Ref": {c.Peer().Ref}} // nor a name that is too long
	if diff := cmp.Diff(want, identityIn(<-requests)); diff != "" {
		t.Error(diff)
	}
}
