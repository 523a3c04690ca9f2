package collateral

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

const (
	maxDocumentBody = 256 << 10   // TCB info, QE identity
	maxCRLBody      = 2<<20 + 2   // 1 MiB of DER, or its hexadecimal digits and a line end
	maxHeader       = 64 << 10    // two chains in one answer are about 10 KiB
	maxRedirects    = 3           // on the same host
	retryWithin     = time.Second // the jitter before the second try
)

// newClient returns a client that obeys limits, verifies servers by tlsRoots (nil:
// the system's) and connects with dial (nil: TCP, through the environment's proxy).
func newClient(limits Limits, tlsRoots *x509.CertPool, dial func(ctx context.Context, network, address string) (net.Conn, error)) *http.Client {
	var proxy func(*http.Request) (*url.URL, error)
	if dial == nil {
		proxy = http.ProxyFromEnvironment
		dial = new(net.Dialer).DialContext
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy: proxy,
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, limits.Connect)
				defer cancel()
				return dial(ctx, network, address)
			},
			TLSHandshakeTimeout:    limits.Connect,
			TLSClientConfig:        &tls.Config{RootCAs: tlsRoots, MinVersion: tls.VersionTLS12}, // 1.2: what many a PCCS has
			MaxResponseHeaderBytes: maxHeader,
			MaxIdleConns:           4,
			MaxIdleConnsPerHost:    1,
			MaxConnsPerHost:        4,
			IdleConnTimeout:        10 * time.Second,
			DisableCompression:     true, // so that a cap on bytes is one on bytes received
			ForceAttemptHTTP2:      true,
		},
		CheckRedirect: checkRedirect,
	}
}

// checkRedirect lets a server send a client to another path of its own, not elsewhere:
// a source is what was configured. From https to http would be in the clear.
func checkRedirect(next *http.Request, via []*http.Request) error {
	first := via[0].URL
	if next.URL.Host != first.Host || first.Scheme == "https" && next.URL.Scheme != "https" || len(via) > maxRedirects {
		return &Error{Code: "redirect", Got: fmt.Sprintf("redirect %d to %s://%s", len(via), next.URL.Scheme, next.URL.Host),
			Want: fmt.Sprintf("at most %d, on %s://%s", maxRedirects, first.Scheme, first.Host), Hint: "configure the host that has the collateral"}
	}
	return nil
}

// answer is what a source sent. Nothing in it is trusted.
type answer struct {
	header http.Header
	body   []byte
}

// request asks for address, and once more if it is the server or the way to it that
// failed. The answer is of at most limit bytes. ctx limits the time.
func (s *Store) request(ctx context.Context, address string, limit int64) (*answer, *Error) {
	a, err, again := s.try(ctx, address, limit)
	if err == nil || !again || s.cfg.Wait(ctx, s.cfg.Jitter(retryWithin)) != nil {
		return a, err
	}
	a, err, _ = s.try(ctx, address, limit)
	return a, err
}

func (s *Store) try(ctx context.Context, address string, limit int64) (_ *answer, _ *Error, again bool) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, &Error{Code: "config", Err: err}, false
	}
	resp, err := s.client.Do(req)
	if err != nil {
		e := transportError(ctx, err)
		return nil, e, e.Code == "transport"
	}
	defer resp.Body.Close()
	if e := checkStatus(resp); e != nil {
		return nil, e, resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		e := transportError(ctx, err)
		return nil, e, e.Code == "transport"
	}
	if int64(len(body)) > limit {
		return nil, &Error{Code: "body_size", Got: fmt.Sprintf("more bytes for %s", req.URL.Path), Want: fmt.Sprintf("at most %d", limit), Hint: "do not trust this source"}, false
	}
	return &answer{resp.Header, body}, nil, false
}

func checkStatus(resp *http.Response) *Error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	e := &Error{Code: "status", Got: fmt.Sprintf("HTTP status %d for %s", resp.StatusCode, resp.Request.URL.Path), Want: "200"}
	if resp.StatusCode == http.StatusNotFound {
		e.Code, e.Hint = "not_found", "the source does not know this platform, or is no PCCS: check its URL"
	}
	return e
}

// transportError tells why there is no answer.
func transportError(ctx context.Context, err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e // of checkRedirect
	}
	var timeout net.Error
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return &Error{Code: "canceled", Err: err}
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return &Error{Code: "timeout", Err: err, Hint: "check that the source can be reached"}
	}
	return &Error{Code: "transport", Err: err, Hint: "check that the source can be reached"}
}
