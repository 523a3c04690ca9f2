package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
)

// EgressError is an [Egress]'s refusal of a destination.
type EgressError struct {
	Status      int // of HTTP: 403 is a destination that is not allowed
	Destination string
	Reason      string
}

func (e *EgressError) Error() string {
	if e.Status == http.StatusForbidden {
		return fmt.Sprintf("egress: %s; destinations are listed in agent.toml ([egress] allow)", e.Reason)
	}
	return fmt.Sprintf("egress: no way to %s: %s", e.Destination, e.Reason)
}

// Timeout reports that the destination did not answer in time.
func (e *EgressError) Timeout() bool { return e.Status == http.StatusGatewayTimeout }

// Through returns a dial function, as [net.Dialer.DialContext] is one, that connects to TCP
// addresses by way of the [Egress] at a Unix socket. Names are looked up there. Its error
// for what the Egress refuses is an [EgressError]. Where a destination resets a
// connection, what comes through the socket is its end: what must be whole says so itself,
// as TLS does. It is the same the other way.
func Through(socket string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if !strings.HasPrefix(network, "tcp") {
			return nil, fmt.Errorf("egress: network is %q, want tcp", network)
		}
		if _, err := ParseDestination(address); err != nil {
			return nil, fmt.Errorf("egress: %w", err)
		}
		// The Egress is a little less patient, and says why.
		ctx, cancel := context.WithTimeout(ctx, connectTimeout+requestTimeout)
		defer cancel()
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("no egress answers at %s; start tdx-agent egress: %w", socket, err)
		}
		if err != nil {
			return nil, fmt.Errorf("egress: %w", err)
		}
		stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
		err = requestConnect(c, address)
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}
}

// requestConnect asks for address on c, and leaves c after the answer's header.
func requestConnect(c net.Conn, address string) error {
	_, failed := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", address, address) // an early refusal can be read all the same
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(byteByByte{c}, 4<<10)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return fmt.Errorf("egress: %s: %w", address, errors.Join(failed, err))
	}
	if resp.StatusCode == http.StatusOK {
		return nil // the destination's bytes follow
	}
	reason, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	return &EgressError{Status: resp.StatusCode, Destination: address, Reason: strings.TrimSpace(string(reason))}
}

// byteByByte reads no byte more than is asked for first, so that a buffer above it holds
// none of what comes after a header.
type byteByByte struct{ io.Reader }

func (r byteByByte) Read(b []byte) (int, error) { return r.Reader.Read(b[:min(len(b), 1)]) }
