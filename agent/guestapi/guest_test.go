package guestapi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
)

// testGuest is a Guest whose quotes have the layout of a version 4 quote, with
// registers that its event log explains, and no signature.
type testGuest struct {
	name string // of the application
	gpu  string
	// before, if set, runs before Evidence and Emit do their work.
	before func(ctx context.Context) error

	mu     sync.Mutex // guards what follows
	events []measure.Event
	caller guestapi.Caller // of the last quote or event
}

func newTestGuest() *testGuest {
	boot := []byte("boot event data")
	g := &testGuest{name: "demo"}
	for imr := range 3 {
		g.events = append(g.events, measure.Event{
			IMR: imr, Type: 0x80000001, Digest: measure.Digest{byte(imr + 1)}, Payload: boot,
		})
	}
	for _, name := range []string{"system-preparing", "system-ready"} {
		e, err := measure.NewRuntimeEvent(name, nil, measure.EventV1)
		if err != nil {
			panic(err)
		}
		g.events = append(g.events, e)
	}
	return g
}

func (g *testGuest) Evidence(ctx context.Context, rd measure.ReportData, caller guestapi.Caller) (*measure.Evidence, error) {
	if g.before != nil {
		if err := g.before(ctx); err != nil {
			return nil, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.caller = caller
	quote, err := quoteShaped(g.events, rd)
	if err != nil {
		return nil, err
	}
	return &measure.Evidence{Quote: quote, Events: slices.Clone(g.events), VMConfig: `{"cpu_count":2}`}, nil
}

// quoteShaped returns a quote of the usual length: header, TD report body with the
// replayed registers and the report data, an empty signature section.
func quoteShaped(events []measure.Event, rd measure.ReportData) ([]byte, error) {
	rtmr, err := measure.Replay(events)
	if err != nil {
		return nil, err
	}
	q := make([]byte, 5006)
	binary.LittleEndian.PutUint16(q[0:], 4)    // version
	binary.LittleEndian.PutUint16(q[2:], 2)    // ECDSA P-256
	binary.LittleEndian.PutUint32(q[4:], 0x81) // TDX
	for i := range rtmr {
		copy(q[376+48*i:], rtmr[i][:])
	}
	copy(q[568:], rd[:])
	binary.LittleEndian.PutUint32(q[632:], uint32(len(q)-636))
	return q, nil
}

func (g *testGuest) Info(context.Context) (guestapi.Info, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	rtmr, err := measure.Replay(g.events)
	if err != nil {
		return guestapi.Info{}, err
	}
	hash := bytes.Repeat([]byte{0xab}, 32)
	tcb := guestapi.TCBInfo{
		RTMR: rtmr, MRAggregated: hash, OSImageHash: hash, ComposeHash: hash, DeviceID: hash,
		Events: g.events, AppCompose: `{"name":"` + g.name + `"}`,
	}
	text, err := tcb.Format()
	return guestapi.Info{
		AppID: hash[:20], InstanceID: hash[:20], TCBInfo: text, AppName: g.name, DeviceID: hash,
		MRAggregated: hash, OSImageHash: hash, KeyProviderInfo: `{"name":"none","id":""}`,
		ComposeHash: hash, VMConfig: `{"cpu_count":2}`, CloudVendor: "QEMU", CloudProduct: "Q35",
	}, err
}

func (g *testGuest) Emit(ctx context.Context, name string, payload []byte, caller guestapi.Caller) error {
	if g.before != nil {
		if err := g.before(ctx); err != nil {
			return err
		}
	}
	e, err := measure.NewRuntimeEvent(name, payload, measure.EventV1)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.caller = caller
	g.events = append(g.events, e)
	return nil
}

func (g *testGuest) GPU() string { return g.gpu }

func (g *testGuest) lastCaller() guestapi.Caller {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.caller
}

func (g *testGuest) eventNames() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var names []string
	for _, e := range g.events {
		names = append(names, e.Name)
	}
	return names
}

var everything = guestapi.Grants{Read: true, Quote: true, RawReportData: true, Cert: true, Sign: true, Keys: guestapi.AllNames, ReservedKeys: true, Measure: guestapi.AllNames}

// config serves everything, with waits that are short enough for a test.
func config(surface guestapi.Surface, g guestapi.Guest) guestapi.Config {
	return guestapi.Config{
		Surface: surface, Grants: everything, Guest: g, Version: "0.5.11", Revision: "git:0123456789abcdef0123",
		ReadTimeout: 5 * time.Second, IdleTimeout: 5 * time.Second, CallTimeout: 5 * time.Second,
	}
}

// serve starts a server and returns the path of its socket.
func serve(t testing.TB, cfg guestapi.Config) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := guestapi.NewServer(cfg)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return path
}

func dial(t testing.TB, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// reply is an answer as it came over the wire.
type reply struct {
	status int
	header http.Header
	body   string
	raw    string
}

// exchange sends the bytes of a request, which must ask for the connection to be
// closed, and reads to the end of the stream.
func exchange(t testing.TB, path, request string) reply {
	t.Helper()
	conn := dial(t, path)
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("reading the answer: %v (got %q)", err, raw)
	}
	return parse(t, string(raw))
}

// parse takes an answer apart by hand and checks what must hold for every one:
// Content-Length that counts the body exactly, no chunks, ASCII if it is JSON.
func parse(t testing.TB, raw string) reply {
	t.Helper()
	head, body, ok := strings.Cut(raw, "\r\n\r\n")
	if !ok {
		t.Fatalf("no end of headers in %q", raw)
	}
	r := reply{body: body, raw: raw, header: http.Header{}}
	lines := strings.Split(head, "\r\n")
	var minor int
	if _, err := fmt.Sscanf(lines[0], "HTTP/1.%d %d", &minor, &r.status); err != nil {
		t.Fatalf("status line %q: %v", lines[0], err)
	}
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, ": ")
		r.header.Add(name, value)
	}
	if got := r.header.Get("Content-Length"); got != strconv.Itoa(len(body)) {
		t.Errorf("Content-Length is %q, the body has %d bytes", got, len(body))
	}
	if r.header.Get("Transfer-Encoding") != "" {
		t.Error("the answer is chunked")
	}
	if r.header.Get("Content-Type") == "application/json" {
		for i := range len(body) {
			if body[i] >= 0x80 {
				t.Errorf("byte %d of the JSON body is %#x, want ASCII", i, body[i])
				break
			}
		}
	}
	return r
}

func post(path, contentType, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s",
		path, contentType, len(body), body)
}

func postJSON(path, body string) string { return post(path, "application/json", body) }

func get(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: dstack\r\nConnection: close\r\n\r\n"
}

// wantError checks the shape and status of a JSON error, the exit status, and that
// the text has the words in it.
func wantError(t testing.TB, r reply, status, exit int, words string) {
	t.Helper()
	var e map[string]string
	if err := json.Unmarshal([]byte(r.body), &e); err != nil || len(e) != 1 || !strings.HasPrefix(r.body, "{\n  \"error\": \"") || !strings.HasSuffix(r.body, "\"\n}") {
		t.Errorf("body is %q, want {\"error\": ...} with an indent of two", r.body)
	}
	if r.status != status || r.header.Get(guestapi.ExitHeader) != strconv.Itoa(exit) {
		t.Errorf("status %d, exit %q, want %d and %d (%s)", r.status, r.header.Get(guestapi.ExitHeader), status, exit, r.body)
	}
	if !strings.Contains(e["error"], words) {
		t.Errorf("error is %q, want it to say %q", e["error"], words)
	}
}

func wantOK(t testing.TB, r reply, body string) {
	t.Helper()
	if r.status != 200 || r.body != body {
		t.Errorf("status %d, body %s, want 200 and %s", r.status, r.body, body)
	}
	if r.header.Get(guestapi.ExitHeader) != "" {
		t.Errorf("a success has the header %s", guestapi.ExitHeader)
	}
}

// quoteReply is the JSON answer to GetQuote and TdxQuote.
type quoteReply struct {
	Quote         string  `json:"quote"`
	EventLog      string  `json:"event_log"`
	ReportData    string  `json:"report_data"`
	VMConfig      string  `json:"vm_config"`
	HashAlgorithm string  `json:"hash_algorithm"`
	Prefix        *string `json:"prefix"`
}

func decodeQuote(t testing.TB, r reply) (quoteReply, []byte) {
	t.Helper()
	var q quoteReply
	if r.status != 200 {
		t.Fatalf("status %d: %s", r.status, r.body)
	}
	if err := json.Unmarshal([]byte(r.body), &q); err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(q.Quote)
	if err != nil {
		t.Fatal(err)
	}
	return q, b
}

// readOne reads one answer from a connection that stays open.
func readOne(t testing.TB, r *bufio.Reader) (int, string) {
	t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}
