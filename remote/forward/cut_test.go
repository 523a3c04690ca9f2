package forward_test

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"tdx-agent/remote/forward"
)

// TestServiceBreaksOff lets a peer know that what it has read is not all.
func TestServiceBreaksOff(t *testing.T) {
	broken := backEnd(t, func(c net.Conn) {
		io.ReadFull(c, make([]byte, 3))
		io.WriteString(c, "half")
		io.ReadFull(c, make([]byte, 1)) // it has arrived
		c.(*net.TCPConn).SetLinger(0)
	})
	whole := backEnd(t, func(c net.Conn) { io.WriteString(c, "half") })
	p := newPair(t, map[string]forward.Service{
		"raw":  {Dial: to(broken)},
		"web":  {Dial: func(context.Context) (net.Conn, error) { return nil, errors.New("nobody there") }},
		"open": {Dial: to(whole)},
	}, newMachine(t, "client", true), "client", "")
	c := p.dial(t, p.dialer, "raw")
	io.WriteString(c, "ask")
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, ".")
	if _, err := c.Read(b); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a service that resets: %v", err)
	}
	if _, err := p.dial(t, p.dialer, "web").Read(b); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("no service: %v", err)
	}
	if b, err := io.ReadAll(p.dial(t, p.dialer, "open")); err != nil || string(b) != "half" {
		t.Errorf("a service that ends: %q, %v", b, err)
	}
}

// TestNoChannelIsNoAnswer does not look like an answer of no bytes.
func TestNoChannelIsNoAnswer(t *testing.T) {
	there := make(chan struct{})
	c := local(t, func(context.Context) (net.Conn, error) { <-there; return nil, errors.New("no channel") })
	close(there)
	if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read %v, want a reset", err)
	}
}

// TestHTTPBreaksOff has a back end break off an answer whose length nothing says.
func TestHTTPBreaksOff(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(srv.Close)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(srv.Listener.Addr().String()), HTTP: true}}, newMachine(t, "client", true), "client", "")
	c := p.dial(t, p.dialer, "web")
	io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	if b, err := io.ReadAll(c); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestHTTPStops in the middle of an answer whose length nothing says.
func TestHTTPStops(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(srv.Close)
	p := newPair(t, map[string]forward.Service{"web": {Dial: to(srv.Listener.Addr().String()), HTTP: true}}, newMachine(t, "client", true), "client", "")
	c := p.dial(t, p.dialer, "web")
	io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	p.stop()
	if b, err := io.ReadAll(c); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %q, %v", b, err)
	}
}
