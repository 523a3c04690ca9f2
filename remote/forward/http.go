package forward

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"tdx-agent/remote/atls"
)

// Limits of HTTP mode, beside those of a channel's session.
const (
	httpHeaderTimeout = 10 * time.Second
	httpIdle          = 2 * time.Minute
	maxHTTPHeader     = 64 << 10
	maxIdleBackEnd    = 16 // connections kept for a service
)

// httpServer passes the requests that come over channels on to one service's back end,
// with headers that say who the peer is.
type httpServer struct {
	server  http.Server
	backEnd *http.Transport
}

// newHTTPServer serves until ctx ends.
func newHTTPServer(ctx context.Context, s *Service, log *slog.Logger) *httpServer {
	h := &httpServer{backEnd: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			return s.Dial(ctx)
		},
		DisableCompression: true, MaxIdleConns: maxIdleBackEnd, MaxIdleConnsPerHost: maxIdleBackEnd, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: maxHTTPHeader,
	}}
	proxy := &httputil.ReverseProxy{
		Transport: h.backEnd, FlushInterval: -1, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		// The headers that Connection names are gone by then, so that they cannot take
		// ours with them.
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "backend" // one pool; Host stays the peer's
			r.Out.URL.RawQuery = r.In.URL.RawQuery               // also what net/url cannot read: nothing here goes by it
			r.Out.Trailer = nil                                  // could repeat a header after its check
			id := IdentityOf(mustPeer(r.In))
			setIdentity(r.Out.Header, &id, s.FlashbotsHeaders)
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() == nil {
				p := mustPeer(r)
				log.Warn("the local service does not answer", "service", p.Service, "ref", p.Ref, "error", err)
			}
			w.WriteHeader(http.StatusBadGateway)
		},
	}
	h.server = http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c := r.Context().Value(channelKey{}).(*atls.Conn)
			switch {
			case c.IsDenied(): // by a policy that is in force since; what was begun before may end
				w.Header().Set("Connection", "close")
				http.Error(w, "the policy denies this peer now", http.StatusForbidden)
				return
			case r.ProtoMajor != 1: // the server hands HTTP/2's preface over as a request
				http.Error(w, "want HTTP/1.1", http.StatusHTTPVersionNotSupported)
				return
			case r.Method == http.MethodConnect:
				http.Error(w, "no CONNECT here", http.StatusMethodNotAllowed)
				return
			}
			select {
			case <-c.Draining(): // the peer should open another channel
				w.Header().Set("Connection", "close")
			default:
			}
			onlyWebSocket(r.Header)
			defer func() {
				if broken := recover(); broken != nil { // http.ErrAbortHandler: the back end broke off
					c.Cut() // to HTTP/1.0 the end of the channel is that of the answer
					panic(broken)
				}
			}()
			proxy.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: httpHeaderTimeout, IdleTimeout: httpIdle, MaxHeaderBytes: maxHTTPHeader,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, channelKey{}, c.(*watchedConn).Conn)
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return h
}

// onlyWebSocket ignores a wish for any other protocol, as RFC 9110 7.8 lets a server: over
// HTTP/2 in clear text ("h2c") requests would come to the back end that nobody has looked at.
func onlyWebSocket(h http.Header) {
	if up := h["Upgrade"]; len(up) != 1 || !strings.EqualFold(up[0], "websocket") {
		h.Del("Upgrade")
		h.Del("HTTP2-Settings")
	}
}

type channelKey struct{}

// mustPeer says who sent a request.
func mustPeer(r *http.Request) *atls.Peer { return r.Context().Value(channelKey{}).(*atls.Conn).Peer() }

// serve answers the requests of one channel until it is closed or ctx ends.
func (h *httpServer) serve(ctx context.Context, c *atls.Conn) {
	// An answer may not be whole yet.
	defer context.AfterFunc(ctx, c.Cut)()
	h.server.Serve(&oneConn{conn: &watchedConn{Conn: c, closed: make(chan struct{})}}) // its error is the channel's end, or ours
}

// watchedConn tells when it is closed.
type watchedConn struct {
	*atls.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *watchedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.closed) })
	return err
}

// oneConn is a listener that accepts one connection, and ends when that does.
type oneConn struct {
	conn     *watchedConn
	accepted bool // Accept's alone
}

func (l *oneConn) Accept() (net.Conn, error) {
	if l.accepted {
		<-l.conn.closed
		return nil, io.EOF
	}
	l.accepted = true
	return l.conn, nil
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// close ends what is idle.
func (h *httpServer) close() {
	h.server.Close()
	h.backEnd.CloseIdleConnections()
}
