package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Limits of an Egress.
const (
	maxRequestHeader = 8 << 10
	requestTimeout   = 5 * time.Second  // to read a request, and to write an answer
	connectTimeout   = 10 * time.Second // with the look-up of the name
	egressIdle       = time.Hour        // as long as a session of tdx-atls/1 lasts
	maxRefusals      = 64               // under way beside the relays
)

// EgressConfig says where an [Egress] may connect to.
type EgressConfig struct {
	// Allow are the destinations. None: every request is refused.
	Allow []Destination
	// MaxConnections bounds the relays at once. Default: 4096.
	MaxConnections int
	// Idle ends a relay that carries nothing for so long. Default: 1 h.
	Idle time.Duration
	// Resolver looks names up. Nil: the system's.
	Resolver *net.Resolver
	Logger   *slog.Logger // nil: none
}

// Egress dials for processes that have no network of their own: it takes HTTP CONNECT
// requests (RFC 9110 9.3.6) and relays bytes to the destinations that it allows. It
// looks at no byte of these: TLS ends in the asker.
//
// A destination is allowed by its exact name and port. What a name resolves to is in the
// hand of whoever answers look-ups, so a name does not lead to this machine or its links:
// those are reached by "localhost" or an address in Allow, never by a look-up.
//
// An answer other than 200 has the reason in its body: 403 not allowed, 400 and 405 not a
// CONNECT request, 502 the destination does not answer, 503 too many relays, 504 too late.
type Egress struct {
	cfg     EgressConfig
	allow   map[Destination]bool
	open    atomic.Int64
	relayed atomic.Int64
	refused atomic.Int64
}

// NewEgress returns an Egress.
func NewEgress(cfg EgressConfig) *Egress {
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = 4096
	}
	if cfg.Idle <= 0 {
		cfg.Idle = egressIdle
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Egress{cfg: cfg, allow: map[Destination]bool{}}
	for _, d := range cfg.Allow {
		e.allow[d] = true
	}
	return e
}

// Counts says how many relays are open, how many there were, and how many requests were
// refused or failed.
func (e *Egress) Counts() (open, relayed, refused int64) {
	return e.open.Load(), e.relayed.Load(), e.refused.Load()
}

// Serve answers on l until ctx ends, and closes it.
func (e *Egress) Serve(ctx context.Context, l net.Listener) error {
	return each(ctx, l, e.cfg.MaxConnections+maxRefusals, e.cfg.Logger, func(c net.Conn) { e.serve(ctx, c) })
}

func (e *Egress) serve(ctx context.Context, c net.Conn) {
	defer context.AfterFunc(ctx, func() { c.Close() })() // while it says nothing yet
	c.SetDeadline(time.Now().Add(requestTimeout))
	to, early, err := readConnect(c)
	var up net.Conn
	if err == nil {
		if e.open.Add(1) > int64(e.cfg.MaxConnections) {
			err = refuse(http.StatusServiceUnavailable, "there are %d relays already", e.cfg.MaxConnections)
		} else {
			up, err = e.connect(ctx, to)
		}
		defer e.open.Add(-1)
	}
	c.SetDeadline(time.Now().Add(requestTimeout))
	if err != nil {
		e.refused.Add(1)
		e.cfg.Logger.Warn("no relay", "destination", to.name(), "error", err)
		writeRefusal(c, err)
		return
	}
	defer up.Close()
	up.SetWriteDeadline(time.Now().Add(requestTimeout))
	if _, err := up.Write(early); err != nil {
		return
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	e.relayed.Add(1)
	join(ctx, c, up, e.cfg.Idle)
}

// refusal is a request that is answered with a status other than 200.
type refusal struct {
	status int
	reason string
}

func (r *refusal) Error() string { return r.reason }

func refuse(status int, format string, a ...any) error {
	return &refusal{status, fmt.Sprintf(format, a...)}
}

// readConnect reads a request, and what the asker has sent after it already.
func readConnect(c net.Conn) (to Destination, early []byte, err error) {
	limited := &io.LimitedReader{R: c, N: maxRequestHeader}
	r := bufio.NewReader(limited)
	req, err := http.ReadRequest(r)
	switch {
	case err != nil && limited.N == 0:
		return to, nil, refuse(http.StatusRequestHeaderFieldsTooLarge, "the request has more than %d bytes, want CONNECT HOST:PORT", maxRequestHeader)
	case err != nil && errors.Is(err, os.ErrDeadlineExceeded):
		return to, nil, refuse(http.StatusRequestTimeout, "the request did not end within %s", requestTimeout)
	case err != nil:
		return to, nil, refuse(http.StatusBadRequest, "not an HTTP request: %v", err)
	case req.Method != http.MethodConnect:
		return to, nil, refuse(http.StatusMethodNotAllowed, "the request is %.20q, want CONNECT HOST:PORT", req.Method)
	case req.ContentLength > 0 || len(req.TransferEncoding) > 0:
		return to, nil, refuse(http.StatusBadRequest, "a CONNECT request has no content")
	}
	if to, err = ParseDestination(req.RequestURI); err != nil {
		return to, nil, refuse(http.StatusBadRequest, "%v", err)
	}
	early, _ = r.Peek(r.Buffered())
	return to, early, nil
}

// connect dials an allowed destination.
func (e *Egress) connect(ctx context.Context, to Destination) (net.Conn, error) {
	if !e.allow[to] {
		return nil, refuse(http.StatusForbidden, "%s is not a destination that this egress allows", to)
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	d := net.Dialer{Resolver: e.cfg.Resolver}
	address := to.String()
	_, err := netip.ParseAddr(to.host)
	isName := err != nil && to.host != localhost
	switch {
	case to.host == localhost:
		address = strings.Replace(address, localhost, "127.0.0.1", 1)
	case isName:
		d.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error { return checkResolved(to, address) }
	}
	up, err := d.DialContext(ctx, "tcp", address)
	if r, ok := errors.AsType[*refusal](err); ok {
		return nil, r
	}
	if err != nil && ctx.Err() != nil {
		return nil, refuse(http.StatusGatewayTimeout, "%s did not answer within %s", to, connectTimeout)
	}
	if err != nil {
		return nil, refuse(http.StatusBadGateway, "%s: %v", to, err)
	}
	if isName && addrOf(up.LocalAddr()) == addrOf(up.RemoteAddr()) {
		up.Close()
		return nil, refuse(http.StatusForbidden, "%s resolves to %s, an address of this machine; allow the address if that is meant", to, up.RemoteAddr())
	}
	return up, nil
}

// checkResolved refuses what a name must not resolve to.
func checkResolved(to Destination, address string) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := a.Addr().Unmap()
	if ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsMulticast() {
		return refuse(http.StatusForbidden, "%s resolves to %s, which a name may not lead to; allow the address if that is meant", to, ip)
	}
	return nil
}

func addrOf(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return tcp.AddrPort().Addr().Unmap()
}

// name is String, or nothing for no destination.
func (d Destination) name() string {
	if d == (Destination{}) {
		return ""
	}
	return d.String()
}

func writeRefusal(c net.Conn, err error) {
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		r = &refusal{http.StatusInternalServerError, err.Error()}
	}
	more := ""
	if r.status == http.StatusMethodNotAllowed {
		more = "Allow: CONNECT\r\n"
	}
	fmt.Fprintf(c, "HTTP/1.1 %d %s\r\n%sContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s\n",
		r.status, http.StatusText(r.status), more, len(r.reason)+1, r.reason)
}
