package guestapi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
)

// statusError is an error that chooses its exit status, as the agent's do.
type statusError struct{ exit int }

func (e *statusError) Error() string { return "log and register differ" }
func (e *statusError) ExitCode() int { return e.exit }

// busyError is what a full quote queue returns.
type busyError struct{ statusError }

func (e *busyError) RetryAfter() time.Duration { return 1500 * time.Millisecond }

func TestGuestErrors(t *testing.T) {
	for _, c := range []struct {
		err          error
		status, exit int
		retry, words string
	}{
		{fmt.Errorf("quote: %w", &busyError{statusError{9}}), 429, 9, "2", "quote: log"},
		{fmt.Errorf("quote: %w", &statusError{7}), 400, 7, "", "quote: log and register differ"},
		{&measure.UnsupportedError{What: "quote", Needs: "a TD"}, 400, 3, "", "cannot quote here"},
		{fmt.Errorf("quote: %w", context.DeadlineExceeded), 400, 10, "", "no answer in time: quote"},
		{errors.New("fl\u00fcchtig \"x\"\n"), 400, 1, "", "fl\u00fcchtig \"x\"\n"},
		{errors.New(""), 400, 1, "", "says nothing more"},
	} {
		g := newTestGuest()
		g.before = func(context.Context) error { return c.err }
		path := serve(t, config(guestapi.Dstack, g))
		for _, request := range []string{postJSON("/GetQuote", "{}"), get("/Attest"), postJSON("/EmitEvent", `{"event":"a"}`)} {
			r := exchange(t, path, request)
			wantError(t, r, c.status, c.exit, c.words)
			if r.header.Get("Retry-After") != c.retry {
				t.Errorf("Retry-After is %q, want %q", r.header.Get("Retry-After"), c.retry)
			}
		}
		r := exchange(t, path, post("/GetQuote", "", ""))
		if r.status != c.status || !strings.Contains(protoFields(t, r.body)[1], c.words) {
			t.Errorf("protobuf: %q", r.raw)
		}
	}
}

func TestPanicIsOneRequestsError(t *testing.T) {
	g := newTestGuest()
	g.before = func(context.Context) error { panic("boom") }
	path := serve(t, config(guestapi.Dstack, g))
	wantError(t, exchange(t, path, get("/GetQuote")), 500, 1, "internal error")
	r := exchange(t, path, post("/GetQuote", "", ""))
	if r.status != 500 || !strings.Contains(protoFields(t, r.body)[1], "internal error") {
		t.Errorf("protobuf: %q", r.raw)
	}
	wantOK(t, exchange(t, path, get("/Version")), versionBody)
}

func TestCallerIsTheConnectingProcess(t *testing.T) {
	g := newTestGuest()
	path := serve(t, config(guestapi.Dstack, g))
	decodeQuote(t, exchange(t, path, get("/GetQuote")))
	want := guestapi.Caller{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Known: true}
	got := g.lastCaller()
	want.CgroupID, want.Cgroup, want.Container = got.CgroupID, got.Cgroup, got.Container // the next test's
	if got != want {
		t.Errorf("caller is %+v, want %+v", got, want)
	}
}

func TestCallerIsUnknownOverTCP(t *testing.T) {
	g := newTestGuest()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skip("no loopback: ", err)
	}
	s := guestapi.NewServer(config(guestapi.Dstack, g))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	ask := func(address string) reply {
		t.Helper()
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, get("/GetQuote"))
		raw, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		return parse(t, string(raw))
	}
	if r := ask(ln.Addr().String()); r.status != 200 {
		t.Errorf("%.80q", r.raw)
	}
	if g.lastCaller().Known {
		t.Errorf("caller is %+v, want unknown", g.lastCaller())
	}
	// Unknown is nobody's number, and not root's either.
	cfg := config(guestapi.Dstack, g)
	cfg.OnlyUIDs = []uint32{0}
	if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	only := guestapi.NewServer(cfg)
	go only.Serve(ln)
	defer only.Shutdown(t.Context())
	wantError(t, ask(ln.Addr().String()), 400, 8, "this socket is for other users than yours (unknown)")
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestKeepAlive(t *testing.T) {
	path := serve(t, config(guestapi.Dstack, newTestGuest()))
	conn := dial(t, path)
	r := bufio.NewReader(conn)
	for range 3 {
		// As the JavaScript SDK writes it: no Connection header.
		io.WriteString(conn, "POST /Version HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
		if status, body := readOne(t, r); status != 200 || body != versionBody {
			t.Fatalf("%d %s", status, body)
		}
	}
}

func TestHalfClosedConnectionIsAnswered(t *testing.T) {
	g := newTestGuest()
	halfClosed := make(chan struct{})
	g.before = func(ctx context.Context) error {
		<-halfClosed
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond): // longer than the check for a hangup takes
			return nil
		}
	}
	conn := dial(t, serve(t, config(guestapi.Dstack, g)))
	io.WriteString(conn, postJSON("/GetQuote", "{}"))
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	close(halfClosed)
	raw, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	decodeQuote(t, parse(t, string(raw)))
}

func TestHangupEndsTheCall(t *testing.T) {
	g := newTestGuest()
	started, ended := make(chan struct{}), make(chan error, 1)
	g.before = func(ctx context.Context) error {
		close(started)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}
	cfg := config(guestapi.Dstack, g)
	cfg.CallTimeout = 20 * time.Second
	conn := dial(t, serve(t, cfg))
	io.WriteString(conn, postJSON("/GetQuote", "{}"))
	<-started
	conn.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the call ended with %v, want %v", err, context.Canceled)
		}
	case <-time.After(5 * time.Second):
		t.Error("the call goes on although the caller is gone")
	}
}

func TestSlowQuoteOutlivesTheReadTimeout(t *testing.T) {
	g := newTestGuest()
	cfg := config(guestapi.Dstack, g)
	cfg.ReadTimeout = 100 * time.Millisecond
	g.before = func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * cfg.ReadTimeout):
			return nil
		}
	}
	path := serve(t, cfg)
	decodeQuote(t, exchange(t, path, postJSON("/GetQuote", "{}")))
	decodeQuote(t, exchange(t, path, get("/GetQuote")))
}

func TestCallTimeout(t *testing.T) {
	g := newTestGuest()
	g.before = func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("quote: %w", ctx.Err()) }
	cfg := config(guestapi.Dstack, g)
	cfg.CallTimeout = 50 * time.Millisecond
	wantError(t, exchange(t, serve(t, cfg), get("/GetQuote")), 400, 10, "no answer in time")
}

func TestSlowClients(t *testing.T) {
	cfg := config(guestapi.Dstack, newTestGuest())
	cfg.ReadTimeout, cfg.IdleTimeout = 200*time.Millisecond, 200*time.Millisecond
	path := serve(t, cfg)

	t.Run("body", func(t *testing.T) {
		conn := dial(t, path)
		io.WriteString(conn, "POST /GetQuote HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{\"rep")
		raw, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		wantError(t, parse(t, string(raw)), 400, 10, "did not arrive within 200ms: got 5 bytes of 20")
	})
	for name, begin := range map[string]string{"headers": "POST /GetQuote HTTP/1.1\r\nHos", "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, path)
			io.WriteString(conn, begin)
			if raw, err := io.ReadAll(conn); err != nil || strings.Contains(string(raw), " 200 ") {
				t.Errorf("%v: %q, want the connection closed", err, raw)
			}
		})
	}
	t.Run("idle", func(t *testing.T) {
		conn := dial(t, path)
		io.WriteString(conn, "GET /Version HTTP/1.1\r\nHost: x\r\n\r\n")
		r := bufio.NewReader(conn)
		readOne(t, r)
		if rest, err := io.ReadAll(r); err != nil || len(rest) != 0 {
			t.Errorf("%v: %q, want the connection closed", err, rest)
		}
	})
}

func TestConnectionCaps(t *testing.T) {
	for name, limit := range map[string]func(*guestapi.Config){
		"total":                      func(c *guestapi.Config) { c.MaxConns = 2 },
		"per user":                   func(c *guestapi.Config) { c.MaxConnsPerUID = 2 },
		"per user and control group": func(c *guestapi.Config) { c.MaxConnsPerCaller = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(guestapi.Dstack, newTestGuest())
			limit(&cfg)
			path := serve(t, cfg)
			const keep = "GET /Version HTTP/1.1\r\nHost: x\r\n\r\n"
			first, second := dial(t, path), dial(t, path)
			for _, conn := range []net.Conn{first, second} {
				io.WriteString(conn, keep)
				readOne(t, bufio.NewReader(conn))
			}
			raw, err := io.ReadAll(dial(t, path))
			if err != nil {
				t.Fatal(err)
			}
			r := parse(t, string(raw))
			wantError(t, r, 429, 9, "too many open connections")
			if r.header.Get("Retry-After") != "1" {
				t.Errorf("Retry-After is %q", r.header.Get("Retry-After"))
			}
			io.WriteString(second, get("/Version"))
			if _, err := io.Copy(io.Discard, second); err != nil {
				t.Fatal(err)
			}
			awaitSlot(t, path)
		})
	}
}

// TestTurnedAwayClientSeesWhy: a client that is still sending its request must not end
// with a broken pipe. However many are turned away at once, all are.
func TestTurnedAwayClientSeesWhy(t *testing.T) {
	cfg := config(guestapi.Dstack, newTestGuest())
	cfg.MaxConns = 1
	path := serve(t, cfg)
	held := dial(t, path)
	io.WriteString(held, "GET /Version HTTP/1.1\r\nHost: x\r\n\r\n")
	readOne(t, bufio.NewReader(held))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	for _, size := range []int{0, 100, 60 << 10} {
		for range 20 {
			resp, err := client.Post("http://localhost/GetQuote", "application/json", strings.NewReader(strings.Repeat(" ", size)))
			if err != nil {
				t.Fatalf("a request of %d bytes: %v", size, err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get(guestapi.ExitHeader) != "9" {
				t.Errorf("a request of %d bytes: %s", size, resp.Status)
			}
		}
	}
	var silent []net.Conn
	for range 100 {
		silent = append(silent, dial(t, path))
	}
	for _, conn := range silent {
		if raw, err := io.ReadAll(conn); err != nil || parse(t, string(raw)).status != 429 {
			t.Errorf("one of a hundred: %v %.80q", err, raw)
		}
	}
}

// busyConn is a connection of a busy machine: what has a deadline of a moment is late.
type busyConn struct{ *net.UnixConn }

func (c busyConn) SetWriteDeadline(at time.Time) error {
	err := c.UnixConn.SetWriteDeadline(at)
	time.Sleep(5 * time.Millisecond)
	return err
}

type busyListener struct{ net.Listener }

func (l busyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return busyConn{c.(*net.UnixConn)}, nil
}

// TestTurnedAwayByBusyMachine: the answer goes out however late the server gets to it.
func TestTurnedAwayByBusyMachine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	inner, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l := guestapi.LimitListener(busyListener{inner}, 1, 1)
	defer l.Close()
	held := dial(t, path)
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	go l.Accept()
	refused := dial(t, path)
	io.WriteString(refused, get("/Version"))
	if raw, err := io.ReadAll(refused); err != nil || parse(t, string(raw)).status != 429 {
		t.Errorf("got %v, %q", err, raw)
	}
	held.Close()
}

// awaitSlot connects until it is served: the server frees a slot some time after
// the client has seen the end of its connection.
func awaitSlot(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		conn := dial(t, path)
		io.WriteString(conn, get("/Version"))
		if raw, err := io.ReadAll(conn); err == nil && strings.Contains(string(raw), " 200 ") {
			return
		}
	}
	t.Error("a closed connection does not free its slot")
}

func TestConcurrentCallers(t *testing.T) {
	g := newTestGuest()
	path := serve(t, config(guestapi.Dstack, g))
	before := len(g.eventNames())
	var wg sync.WaitGroup
	const callers, rounds = 8, 10
	for caller := range callers {
		wg.Go(func() {
			for round := range rounds {
				name := fmt.Sprintf("caller-%d-%d", caller, round)
				wantOK(t, exchange(t, path, postJSON("/EmitEvent", `{"event":"`+name+`","payload":""}`)), "null")
				for _, target := range []string{"/Info", "/Version"} {
					if r := exchange(t, path, get(target)); r.status != 200 || !json.Valid([]byte(r.body)) {
						t.Errorf("%s: %s", target, r.body)
					}
				}
				// answers are written into buffers that others have used
				data := fmt.Sprintf("ca%02x%04x", caller, round)
				r := exchange(t, path, get("/GetQuote?report_data="+data))
				if want := data + strings.Repeat("0", 120); !strings.Contains(r.body, `"report_data":"`+want+`"`) || strings.Count(r.body, want) != 2 || !json.Valid([]byte(r.body)) {
					t.Errorf("the answer to report data %s is %.200s", data, r.body)
				}
			}
		})
	}
	wg.Wait()
	if got := len(g.eventNames()) - before; got != callers*rounds {
		t.Errorf("%d events, want %d", got, callers*rounds)
	}
}

func TestShutdownWaitsForAnswers(t *testing.T) {
	g := newTestGuest()
	started, proceed := make(chan struct{}), make(chan struct{})
	g.before = func(context.Context) error { close(started); <-proceed; return nil }
	path := t.TempDir() + "/s.sock"
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := guestapi.NewServer(config(guestapi.Dstack, g))
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	conn := dial(t, path)
	io.WriteString(conn, get("/GetQuote"))
	<-started
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(t.Context()) }()
	if err := <-served; err != nil { // Shutdown has begun
		t.Errorf("Serve: %v", err)
	}
	close(proceed)
	raw, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	decodeQuote(t, parse(t, string(raw)))
	if err := <-down; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}
