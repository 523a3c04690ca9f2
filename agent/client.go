package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"tdx-agent/agent/guestapi"
)

// maxReply bounds what a command reads from the agent.
const maxReply = 16 << 20

// call asks the agent on one of its sockets. Its refusals come back with the exit
// status that the agent gave them.
func call(ctx context.Context, socket, method, path string, body []byte) ([]byte, error) {
	return callWith(ctx, &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dialUnix(socket)}}, socket, method, path, body)
}

// dialUnix connects to a socket, whatever address a URL names.
func dialUnix(socket string) dialFunc {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
}

// callWith is call with a client of one's own.
func callWith(ctx context.Context, client *http.Client, socket, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
		req.Header["Idempotency-Key"] = nil // is not sent: the client may try again where a kept connection has ended
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, unreachable(socket, err)
	}
	defer resp.Body.Close()
	b, err := readLimited(resp.Body, "the agent's answer", maxReply)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return b, nil
	}
	code, err := strconv.Atoi(resp.Header.Get(guestapi.ExitHeader))
	if err != nil || code <= 0 {
		code = exitFailure
	}
	var r refusalReply
	if json.Unmarshal(b, &r) != nil || r.Error == "" {
		r.Error = fmt.Sprintf("HTTP %d: %s", resp.StatusCode, bytes.TrimSpace(b[:min(len(b), 512)]))
	}
	if r.RetryAfter > 0 {
		return nil, withExit(code, &laterError{r.Error, time.Duration(r.RetryAfter) * time.Millisecond})
	}
	return nil, withExit(code, errors.New(r.Error))
}

// laterError is a refusal of an agent that is busy.
type laterError struct {
	text string
	wait time.Duration
}

func (e *laterError) Error() string             { return e.text }
func (e *laterError) RetryAfter() time.Duration { return e.wait }

func unreachable(socket string, err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return exitf(exitTimeout, "the agent at %s did not answer in time", socket)
	case errors.Is(err, os.ErrPermission):
		return exitf(exitDenied, "socket %s: permission denied; it is for root or members of its group", socket)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return exitf(exitUnreachable, "no agent answers at %s; start it with tdx-agent serve, or name its folder with --runtime-dir", socket)
	}
	return withExit(exitUnreachable, fmt.Errorf("agent at %s: %w", socket, err))
}

// callJSON decodes the answer.
func callJSON(ctx context.Context, socket, path string, v any) error {
	b, err := call(ctx, socket, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("the agent's answer: %w", err)
	}
	return nil
}
