package atls

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"tdx-agent/remote"
)

// AttestTimeout is how long a handshake waits for a statement of its own TD. A quote
// that comes later is of no use.
const AttestTimeout = 10 * time.Second

// Deadlines of the states of a handshake, and of all of it.
const (
	limitTLS          = 10 * time.Second
	limitHello        = 5 * time.Second
	limitWaitEvidence = 20 * time.Second // the peer makes its quote
	limitVerify       = 10 * time.Second // with collateral to fetch
	limitAttest       = AttestTimeout
	limitWaitResult   = 10 * time.Second
	limitTotal        = 45 * time.Second
)

// maxRetryAfter is the longest that an end tells the other to wait.
const maxRetryAfter = time.Minute

// handshake is one under way, in one goroutine. Its states follow each other in the
// order of the steps; whatever does not fit ends it.
type handshake struct {
	*end
	ctx     context.Context // its end is the handshake's
	role    Role
	conn    *tls.Conn
	leaf    *tls.Certificate
	start   time.Time
	step    Step
	session *Session
	ref     string
	peer    *Peer
	policy  *remote.Policy // of the start

	hasQuoted  bool           // our evidence is a quote
	isReserved bool           // there is a place for the channel; end.mu guards it
	progress   func(standing) // of a client, for a server
}

func (e *end) newHandshake(ctx context.Context, raw net.Conn, role Role) *handshake {
	return &handshake{end: e, ctx: ctx, role: role, start: time.Now(), step: StepTLS, peer: &Peer{Address: address(raw), Role: Client + Server - role}, policy: e.cfg.Verifier.Policy()}
}

// begin makes the TLS connection.
func (e *end) begin(ctx context.Context, raw net.Conn, role Role) (*handshake, error) {
	h := e.newHandshake(ctx, raw, role)
	leaf, cfg, err := e.certificate()
	if err != nil {
		return h, err
	}
	h.leaf = leaf
	if h.conn = tls.Client(wire{raw}, cfg); role == Server {
		h.conn = tls.Server(wire{raw}, cfg)
	}
	h.enter(StepTLS, limitTLS)
	if err := h.conn.HandshakeContext(ctx); err != nil {
		return h, err
	}
	state := h.conn.ConnectionState()
	return h, checkTLS(&state, leaf)
}

func address(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil {
		return a.String()
	}
	return ""
}

// enter starts a state with its deadline.
func (h *handshake) enter(step Step, limit time.Duration) {
	h.step = step
	deadline := time.Now().Add(limit)
	if last := h.start.Add(limitTotal); deadline.After(last) {
		deadline = last
	}
	h.conn.SetDeadline(deadline)
	if h.ctx.Err() != nil { // the deadline that its end has set is gone
		h.conn.SetDeadline(time.Unix(1, 0))
	}
}

// within runs f with the context of a state.
func within(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx)
}

func (h *handshake) agentKey() []byte {
	if h.cfg.Attester == nil {
		return make([]byte, 32)
	}
	key := h.cfg.Attester.AgentKey()
	return key[:]
}

func nonce() []byte {
	b := make([]byte, 32)
	rand.Read(b) // never fails
	return b
}

// bind fixes the session once both hellos are there.
func (h *handshake) bind(client, server []byte) (err error) {
	if h.session, err = newSession(h.conn, h.role, h.leaf, client, server); err != nil {
		return err
	}
	h.ref = ref(h.session.Transcript)
	h.peer.Ref = h.ref
	return nil
}

// of is the session as evidence of this role binds it.
func (h *handshake) of(role Role) *Session {
	s := *h.session
	s.Role = role
	return &s
}

// read reads a frame into message. A refusal of the peer is a remote *Error.
func (h *handshake) read(kind byte, limit int, message any) (frame []byte, err error) {
	if frame, err = h.receive(kind, limit); err != nil {
		return nil, err
	}
	return frame, decode(frame, message)
}

// receive reads a frame. A refusal of the peer is a remote *Error.
func (h *handshake) receive(kind byte, limit int) (frame []byte, err error) {
	if frame, err = readFrame(h.conn, kind, limit); err != nil {
		return nil, err
	}
	if frame[0] == frameResult {
		var r resultFrame
		if err := decode(frame, &r); err != nil {
			return nil, err
		}
		if !r.OK || kind != frameResult {
			code := knownCode(r.Code)
			if code == CodeReattest && h.hasQuoted {
				code = CodeBadFrame // it has the quote that it asks for, and gets no other
			}
			return nil, &Error{Step: h.step, Code: code, Remote: true, Ref: h.ref, RetryAfter: time.Duration(min(max(r.RetryAfter, 0), int(maxRetryAfter/time.Millisecond))) * time.Millisecond}
		}
	}
	return frame, nil
}

// knownCode keeps a peer from putting words into our logs.
func knownCode(c Code) Code {
	switch c {
	case CodeUnsupported, CodeBadFrame, CodeEvidenceInvalid, CodeBindingMismatch, CodeCollateralUnavailable, CodePolicyDenied, CodeReattest, CodeBusy, CodeTimeout, CodeInternal:
		return c
	}
	return CodeBadFrame
}

func (h *handshake) write(kind byte, message any, limit int) (frame []byte, err error) {
	if frame, err = encodeFrame(kind, message, limit); err != nil {
		return nil, err
	}
	_, err = h.conn.Write(frame)
	return frame, err
}

// attest makes our statement and returns its frame.
func (h *handshake) attest(ctx context.Context, mode, serverEvidence string, limit int) (frame []byte, err error) {
	err = within(ctx, limitAttest, func(ctx context.Context) error {
		h.hasQuoted = mode != modeKey
		st, err := h.cfg.Attester.Attest(ctx, h.of(h.role), mode == modeKey)
		if err != nil {
			return &ownError{err}
		}
		frame, err = encodeStatement(st, serverEvidence, limit)
		return err
	})
	return frame, err
}

// readStatement reads the peer's EVIDENCE.
func (h *handshake) readStatement(mode string) (st *Statement, serverEvidence string, err error) {
	frame, err := h.receive(frameEvidence, maxEvidence)
	if err != nil {
		return nil, "", err
	}
	e, err := decodeEvidence(frame)
	if err != nil {
		return nil, "", err
	}
	st, err = e.statement(mode == modeKey)
	return st, e.serverEvidence, err
}

// closest is the policy entry that accepts the peer or came closest.
func (h *handshake) closest(err error) string {
	if rejection, ok := errors.AsType[*remote.Rejection](err); ok {
		return rejection.Result.Entry
	}
	return h.peer.Entry()
}

// finish is told of every handshake's end. It answers the peer if that is due.
func (h *handshake) finish(err error) *Error {
	code := CodeOK
	if err != nil {
		if code = codeOf(err); code == CodeClosed {
			err = h.closed(err)
		}
	}
	failed, isOurs := errors.AsType[*Error](err)
	if !isOurs && err != nil {
		failed = &Error{Step: h.step, Code: code, Ref: h.ref, Err: err}
		var busy waiter
		if errors.As(err, &busy) {
			failed.RetryAfter = min(max(busy.RetryAfter(), 0), maxRetryAfter)
		}
		if h.conn != nil && h.step != StepTLS && h.cfg.RATLS == nil {
			h.refuse(failed)
		}
	}
	if failed != nil {
		code = failed.Code
	}
	step := h.step
	if err == nil {
		step = StepOpen
	}
	h.cfg.Observe(Handshake{Time: h.start, Duration: time.Since(h.start), Remote: h.peer.Address, Role: h.role, Service: h.peer.Service, Ref: h.ref,
		Step: step, Code: code, Entry: h.closest(err), Assurance: h.peer.Assurance(), Err: err})
	return failed
}

// refuse tells the peer the code, if it will hear it.
func (h *handshake) refuse(e *Error) {
	h.conn.SetWriteDeadline(time.Now().Add(time.Second))
	code := e.Code
	if code == CodeClosed { // half of it, if anybody reads this
		code = CodeBadFrame
	}
	h.write(frameResult, &resultFrame{Code: code, Ref: e.Ref, RetryAfter: int(e.RetryAfter / time.Millisecond)}, maxResult)
}
