package guestapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The bounds of a request body, the usual one and that of methods which take data to
// sign; dstack takes 10 MiB.
const (
	maxBody      = 64 << 10
	maxLargeBody = 1 << 20
	// maxDrained is how much of a body that is too large is read all the same: many
	// clients look for an answer only when they have sent everything.
	maxDrained = 10 << 20
)

const (
	mediaJSON     = "application/json"
	mediaProtobuf = "application/octet-stream"
)

// response is a whole answer: nothing is written before all of it is known.
type response struct {
	status int
	media  string
	body   []byte
	exit   int    // 0: no header
	retry  string // seconds, or ""
	allow  string
	text   string  // of an error, for the log
	secret bool    // the body holds key material
	buffer *[]byte // what body was written into, of bodies; nil: of none
}

// bodies are buffers for answers, cleared after those with key material. An answer is
// tens of kilobytes, so that making each anew is most of the work of the garbage
// collector.
var bodies = sync.Pool{New: func() any { return new([]byte) }}

// maxKeptBody bounds the buffers that are kept.
const maxKeptBody = 128 << 10

func (r *response) write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", r.media)
	h.Set("Content-Length", strconv.Itoa(len(r.body)))
	if r.exit != 0 {
		h.Set(ExitHeader, strconv.Itoa(r.exit))
	}
	if r.retry != "" {
		h.Set("Retry-After", r.retry)
	}
	if r.allow != "" {
		h.Set("Allow", r.allow)
	}
	w.WriteHeader(r.status)
	w.Write(r.body) // an error here is the client's
	if r.secret {
		clear(r.body)
	}
	if r.buffer != nil && cap(r.body) <= maxKeptBody {
		*r.buffer = r.body[:0]
		bodies.Put(r.buffer)
	}
}

// handle answers one request of either surface.
func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	peer, _ := r.Context().Value(peerKey{}).(*peerConn)
	if peer == nil {
		peer = &peerConn{}
	}
	name, ok := s.route(r.URL)
	c := call{method: name, arguments: arguments{encoding: encodingOf(r)}, caller: peer.caller}
	var answer response
	refused := s.pace(r.Context())
	if refused == nil {
		refused = s.limit(&c, s.methods[name].class)
	}
	switch {
	case refused != nil:
		o := outcomeOf(refused)
		answer = s.record(&c, o.answer(c.arguments.encoding), time.Since(start))
	case !ok:
		answer = s.notFound()
	case r.Method != http.MethodGet && r.Method != http.MethodPost:
		o := outcome{status: http.StatusMethodNotAllowed, exit: exitUsage, text: "want GET or POST"}
		answer = s.record(&c, o.answer(encodingJSON), time.Since(start))
		answer.allow = "GET, POST"
	default:
		answer = s.call(w, r, &c, peer)
		answer = s.record(&c, answer, time.Since(start))
	}
	if s.cfg.Surface == Worker {
		w.Header().Set("X-App-Version", "v"+s.cfg.Version+" ("+s.cfg.Revision+")")
	}
	answer.write(w)
	s.observe(name, answer.status, refused != nil)
	level := levelOf(answer.status)
	if !s.cfg.Logger.Enabled(r.Context(), level) {
		return
	}
	s.cfg.Logger.LogAttrs(r.Context(), level, "call",
		slog.String("service", s.cfg.Surface.String()), slog.String("method", clip(name)),
		slog.Int("status", answer.status), slog.Duration("took", time.Since(start)),
		slog.String("caller", peer.caller.String()), slog.String("error", answer.text))
}

func (s *Server) observe(name string, status int, isThrottled bool) {
	if s.cfg.Observe == nil {
		return
	}
	if _, known := s.methods[name]; !known {
		name = ""
	}
	s.cfg.Observe(name, status, isThrottled)
}

func levelOf(status int) slog.Level {
	switch {
	case status >= 500:
		return slog.LevelError
	case status >= 400:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

// route returns the method that a path names. ok is false when the path does not
// have the shape of the surface's only route; whether there is such a method is
// another question.
func (s *Server) route(u *url.URL) (name string, ok bool) {
	path := u.EscapedPath()
	switch s.cfg.Surface {
	case Dstack:
		name, ok = strings.CutPrefix(path, "/")
	case Tappd, Worker:
		name, ok = strings.CutPrefix(path, "/prpc/")
	}
	if !ok || name == "" || strings.Contains(name, "/") {
		return "", false
	}
	name, err := url.PathUnescape(name)
	if err != nil {
		return "", false
	}
	if s.cfg.Surface != Dstack {
		for service := s.cfg.Surface.String() + "."; strings.HasPrefix(name, service); {
			name = strings.TrimPrefix(name, service)
		}
	}
	return name, true
}

func (s *Server) notFound() response {
	form := "/<Method>, as in /GetQuote"
	switch s.cfg.Surface {
	case Tappd:
		form = "/prpc/<Method>, as in /prpc/TdxQuote"
	case Worker:
		form = "/prpc/<Method>, as in /prpc/Info"
	}
	o := outcome{status: http.StatusNotFound, exit: exitUsage, text: "no such path: want " + form}
	return o.answer(encodingJSON)
}

// call runs a method and encodes what it answers. A panic in it is this request's
// error and nobody else's.
func (s *Server) call(w http.ResponseWriter, r *http.Request, c *call, peer *peerConn) (answer response) {
	enc := c.arguments.encoding
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Logger.Error("panic in a method", "method", c.method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			o := outcome{status: http.StatusInternalServerError, exit: exitFailure, text: "internal error: see the agent's log"}
			answer = o.answer(enc)
		}
	}()
	reply, err := s.run(w, r, c, peer)
	if err != nil {
		o := outcomeOf(err)
		if enc == encodingProtobuf && c.arguments.looksLikeJSON() {
			enc = encodingJSON // whoever wrote it can read it
		}
		return o.answer(enc)
	}
	answer = response{status: http.StatusOK, secret: s.methods[c.method].secret}
	answer.buffer = bodies.Get().(*[]byte)
	b := *answer.buffer
	if enc == encodingProtobuf {
		answer.media, answer.body = mediaProtobuf, reply.appendProto(b)
	} else {
		answer.media, answer.body = mediaJSON, reply.appendJSON(b)
	}
	if answer.secret {
		reply.clear()
	}
	return answer
}

func (s *Server) run(w http.ResponseWriter, r *http.Request, c *call, peer *peerConn) (message, error) {
	m, ok := s.methods[c.method]
	if err := s.admits(c); err != nil {
		return nil, err
	}
	limit := maxBody
	if m.large && s.cfg.Grants.Sign {
		limit = maxLargeBody
	}
	payload, err := s.payload(w, r, limit)
	if err != nil {
		return nil, err
	}
	c.arguments.payload = payload
	if !ok {
		return nil, badRequest("Service not found: %s", clip(c.method))
	}
	// The deadline for reading was meant for the body. Left in place it would end
	// the request's context in the middle of a slow quote.
	if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("connection: %w", err)
	}
	ctx, cancel := s.callContext(r, peer)
	defer cancel()
	return m.run(s, ctx, c)
}

// callContext bounds the Guest's work for r: it ends after CallTimeout and when the
// peer is gone, but not when the peer has only finished sending.
func (s *Server) callContext(r *http.Request, peer *peerConn) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), s.cfg.CallTimeout)
	stop := context.AfterFunc(r.Context(), func() {
		awaitHangup(ctx, peer.Conn)
		cancel()
	})
	return ctx, func() {
		stop()
		cancel()
	}
}

// payload returns the encoded arguments: the query of a GET, the body of a POST, of
// at most limit bytes.
func (s *Server) payload(w http.ResponseWriter, r *http.Request, limit int) ([]byte, error) {
	if r.Method == http.MethodGet {
		return []byte(r.URL.RawQuery), nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, int64(limit)))
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		return body, nil
	case errors.As(err, &tooLarge):
		if r.ContentLength <= maxDrained {
			io.CopyN(io.Discard, r.Body, maxDrained) // until the request's deadline
		}
		return nil, badRequest("failed to read data: payload too large, want at most %d bytes", limit)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &requestError{
			text: fmt.Sprintf("the request body did not arrive within %v: got %d bytes of %s", s.cfg.ReadTimeout, len(body), announced(r)),
			exit: exitTimeout,
		}
	}
	return nil, badRequest("the request body broke off after %d bytes of %s: %v", len(body), announced(r), err)
}

// announced is the length that a request says its body has.
func announced(r *http.Request) string {
	if r.ContentLength < 0 {
		return "an unknown number"
	}
	return strconv.FormatInt(r.ContentLength, 10)
}
