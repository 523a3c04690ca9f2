package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// TestBusyOverSocket carries the time to try again from the quote queue, over channel.sock,
// to the process with the channel, which tells its peer.
func TestBusyOverSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "tdx")
	check(t, err)
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "channel.sock")
	l, err := net.Listen("unix", socket)
	check(t, err)
	server := newHTTPServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		replyError(w, fmt.Errorf("atls: quote: %w", &measure.BusyError{Queued: 32, Wait: 1500 * time.Millisecond}))
	}))
	go server.Serve(l)
	defer server.Close()
	a := &channelAttester{socket: socket, client: &http.Client{Transport: &http.Transport{DialContext: dialUnix(socket)}}}
	_, err = a.Attest(context.Background(), &atls.Session{Role: atls.Server}, false)
	var busy interface{ RetryAfter() time.Duration }
	if !errors.As(err, &busy) || busy.RetryAfter() != 1500*time.Millisecond || exitCode(err) != exitThrottled {
		t.Errorf("got %v with exit status %d, want busy for 1.5s and 9", err, exitCode(err))
	}
}
