package guestapi

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
)

// maxHeader bounds the request line and headers; a GET carries its arguments there.
const maxHeader = 32 << 10

// writeGrace is how long an answer may take to be written.
const writeGrace = 10 * time.Second

// Config says what a Server serves and to whom. Surface and Guest are required, and
// without Grants every method is refused.
type Config struct {
	Surface Surface
	Grants  Grants // of every caller of this socket
	// OnlyUIDs, if not empty, are the users that have these Grants. Others, and callers
	// that the transport does not know, have none.
	OnlyUIDs []uint32
	Guest    Guest
	// Keys returns the application's keys; nil is an agent that has none. It is asked
	// for every method that needs them, and its error is the answer.
	Keys func(ctx context.Context) (*keys.App, error)

	// PublicTCBInfo lets the Worker's Info carry tcb_info and vm_config: the
	// application's public_tcbinfo. Other surfaces always do.
	PublicTCBInfo bool

	Version  string // answer to the method Version
	Revision string // of the source, such as "git:0123456789abcdef0123"; "" is sent as "unknown"

	Limits *Limiter // of every caller; nil: none
	// Pace is how fast calls are taken up, all callers together: those that come faster
	// wait, and so hold their connections, of which there are MaxConns. Unlike a refusal
	// that costs nothing. Nil: at once.
	Pace *rate.Limiter
	// Audit records a call before it is answered; nil: no record. A call that gives
	// something of a key is not answered unless its record could be written.
	Audit  func(Record) error
	Logger *slog.Logger // nil: no log
	// Observe is told of every call: one of the surface's methods, or "" for another
	// word, the HTTP status, and whether it was turned away for coming too often. Nil:
	// nobody is.
	Observe func(method string, status int, isThrottled bool)

	// ReadTimeout bounds the arrival of a request, headers and body; default 10 s.
	ReadTimeout time.Duration
	// IdleTimeout is how long a connection is kept between requests; default 10 s.
	IdleTimeout time.Duration
	// CallTimeout bounds what the Guest does for one request; default 35 s, as a
	// quote takes up to 31 s when the host is busy.
	CallTimeout time.Duration

	MaxConns          int // open connections; default 256
	MaxConnsPerUID    int // open connections of one user; default 192
	MaxConnsPerCaller int // open connections of one container, or of one user in one control group; default 64
}

func (c *Config) setDefaults() {
	orDuration := func(d *time.Duration, value time.Duration) {
		if *d <= 0 {
			*d = value
		}
	}
	orDuration(&c.ReadTimeout, 10*time.Second)
	orDuration(&c.IdleTimeout, 10*time.Second)
	orDuration(&c.CallTimeout, 35*time.Second)
	if c.MaxConns <= 0 {
		c.MaxConns = 256
	}
	if c.MaxConnsPerUID <= 0 {
		c.MaxConnsPerUID = 192
	}
	if c.MaxConnsPerCaller <= 0 {
		c.MaxConnsPerCaller = 64
	}
	if c.Revision == "" {
		c.Revision = "unknown"
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Server serves one surface to the callers of one socket, or of several that have
// the same grants.
type Server struct {
	cfg     Config
	methods map[string]method
	slots   *slots
	logs    measure.LastLog[logText]
	http    http.Server
}

// NewServer returns a Server that is ready to [Server.Serve].
func NewServer(cfg Config) *Server {
	cfg.setDefaults()
	s := &Server{cfg: cfg, methods: methodsOf(cfg.Surface), slots: newSlots(cfg.MaxConns, cfg.MaxConnsPerUID, cfg.MaxConnsPerCaller)}
	s.http = http.Server{
		Handler:           http.HandlerFunc(s.handle),
		ReadHeaderTimeout: cfg.ReadTimeout,
		ReadTimeout:       cfg.ReadTimeout,
		IdleTimeout:       cfg.IdleTimeout,
		// Counted from the end of the headers.
		WriteTimeout:   cfg.ReadTimeout + cfg.CallTimeout + writeGrace,
		MaxHeaderBytes: maxHeader,
		ConnContext:    ConnContext,
		ErrorLog:       slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
	}
	return s
}

// Serve answers the connections of ln until [Server.Shutdown], then returns nil. It
// closes ln.
func (s *Server) Serve(ln net.Listener) error {
	err := s.http.Serve(newPeerListener(ln, s.slots))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown stops accepting, waits for requests that are being answered, and closes
// the connections. When ctx ends first it cuts them off and returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		s.http.Close()
	}
	return err
}
