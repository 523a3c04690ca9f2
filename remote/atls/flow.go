package atls

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// serve is the server's side, once TLS stands.
func (h *handshake) serve(ctx context.Context, l *ListenerConfig, slots chan struct{}) (ttl time.Duration, err error) {
	h.enter(StepHello, limitHello)
	var hello helloClient
	frameC, err := h.read(frameHelloClient, maxHello, &hello)
	if err != nil {
		return 0, err
	}
	if err := hello.check(); err != nil {
		return 0, err
	}
	h.peer.Service = hello.Service
	if !slices.Contains(l.Services, hello.Service) {
		return 0, &unsupportedError{fmt.Sprintf("service %.64q is not here", hello.Service)}
	}
	mode := h.wants(hello.AgentKey, hello.Modes)
	switch {
	case !slices.Contains(hello.Attest, attestSelf) && h.takesUnattested(l, hello.Service):
		mode = modeNone
	case !slices.Contains(hello.Attest, attestSelf) || !slices.Contains(hello.Modes, mode):
		return 0, &unsupportedError{"the client does not attest, and the service takes no unattested clients"}
	}
	frameS, err := h.write(frameHelloServer, &helloServer{Version: 1, Nonce: nonce(), ClientEvidence: mode, Format: formatDstack, Order: orderClientFirst,
		Service: hello.Service, MaxEvidence: defaultMaxEvidence, AgentKey: h.agentKey()}, maxHello)
	if err != nil {
		return 0, err
	}
	if err := h.bind(frameC, frameS); err != nil {
		return 0, err
	}
	h.progress(greeted)
	own := modeQuote
	if mode != modeNone {
		own, err = h.appraiseClient(ctx, mode, &hello, l.Entries[hello.Service])
	} else if slices.Contains(hello.Attest, attestPeer) && !h.unproven.Allow() {
		err = &busyError{time.Second}
	}
	if err != nil {
		return 0, err
	}
	h.progress(appraised)
	if !h.reserve(l.MaxConnections) {
		return 0, &busyError{time.Second}
	}
	if err := h.answer(ctx, own, &hello, slots); err != nil {
		return 0, err
	}
	return h.waitResult()
}

// appraiseClient reads and judges the client's evidence, and returns the mode that the
// client asks of us.
func (h *handshake) appraiseClient(ctx context.Context, mode string, hello *helloClient, entries []string) (own string, err error) {
	h.enter(StepWaitEvidence, limitWaitEvidence)
	st, own, err := h.readStatement(mode)
	if err != nil {
		return "", err
	}
	if own != modeQuote && own != modeKey {
		return "", &formError{fmt.Sprintf("server_evidence is %.20q, want quote or key", own)}
	}
	h.enter(StepVerify, limitVerify)
	err = within(ctx, limitVerify, func(ctx context.Context) error {
		return h.verify(ctx, h.peer, h.of(Client), st, hello.AgentKey, hello.Service, entries)
	})
	return own, err
}

// answer sends our evidence, if the client wants any, and that it is accepted.
func (h *handshake) answer(ctx context.Context, own string, hello *helloClient, slots chan struct{}) error {
	h.enter(StepSendEvidence, limitAttest)
	var frames []byte
	if slices.Contains(hello.Attest, attestPeer) {
		select {
		case slots <- struct{}{}:
		default:
			return &busyError{time.Second}
		}
		evidence, err := h.attest(ctx, own, "", hello.MaxEvidence)
		<-slots // before the peer reads: it has all its time for that
		if err != nil {
			return err
		}
		frames = evidence
	}
	result, err := encodeFrame(frameResult, &resultFrame{OK: true, Code: CodeOK, Ref: h.ref, TTLSeconds: int(h.cfg.MaxSession / time.Second)}, maxResult)
	if err != nil {
		return err
	}
	_, err = h.conn.Write(append(frames, result...))
	return err
}

// waitResult wants the peer's RESULT ok, and returns how long it wants the session to
// last.
func (h *handshake) waitResult() (ttl time.Duration, err error) {
	h.enter(StepWaitResult, limitWaitResult)
	var r resultFrame
	if _, err := h.read(frameResult, maxResult, &r); err != nil {
		return 0, err
	}
	if r.Code != CodeOK || r.Ref != h.ref {
		return 0, &formError{fmt.Sprintf("result %.20q for %.20q, want ok for %s", r.Code, r.Ref, h.ref)}
	}
	return time.Duration(min(max(r.TTLSeconds, 0), 1<<20)) * time.Second, nil
}

// dial is the client's side, once TLS stands.
func (h *handshake) dial(ctx context.Context, service string, entries []string) (ttl time.Duration, err error) {
	h.enter(StepHello, limitHello)
	hello := helloClient{Version: 1, Nonce: nonce(), Attest: []string{attestPeer}, Modes: []string{modeQuote}, Formats: []string{formatDstack},
		Service: service, MaxEvidence: defaultMaxEvidence, AgentKey: h.agentKey()}
	if h.cfg.Attester != nil {
		hello.Attest, hello.Modes = []string{attestSelf, attestPeer}, []string{modeQuote, modeKey}
	}
	frameC, err := h.write(frameHelloClient, &hello, maxHello)
	if err != nil {
		return 0, err
	}
	var answer helloServer
	frameS, err := h.read(frameHelloServer, maxHello, &answer)
	if err != nil {
		return 0, err
	}
	if err := answer.check(&hello); err != nil {
		return 0, err
	}
	if err := h.bind(frameC, frameS); err != nil {
		return 0, err
	}
	peerMode, err := h.sendEvidence(ctx, &answer)
	if err != nil {
		return 0, err
	}
	return h.appraiseServer(ctx, peerMode, &answer, entries)
}

// sendEvidence sends what the server wants, and returns the mode that we ask of it.
func (h *handshake) sendEvidence(ctx context.Context, answer *helloServer) (peerMode string, err error) {
	if answer.ClientEvidence == modeNone {
		return modeQuote, nil
	}
	if h.cfg.Attester == nil {
		return "", &unsupportedError{"the server wants evidence, and we have no TEE"}
	}
	peerMode = h.wants(answer.AgentKey, []string{modeQuote, modeKey})
	h.enter(StepSendEvidence, limitAttest)
	frame, err := h.attest(ctx, answer.ClientEvidence, peerMode, answer.MaxEvidence)
	if err != nil {
		return "", err
	}
	_, err = h.conn.Write(frame)
	return peerMode, err
}

// appraiseServer judges the server's evidence; then the channel is open for us.
func (h *handshake) appraiseServer(ctx context.Context, mode string, answer *helloServer, entries []string) (ttl time.Duration, err error) {
	h.enter(StepWaitEvidence, limitVerify+limitAttest)
	st, _, err := h.readStatement(mode)
	if err != nil {
		return 0, err
	}
	if ttl, err = h.waitResult(); err != nil {
		return 0, err
	}
	h.enter(StepVerify, limitVerify)
	if err := within(ctx, limitVerify, func(ctx context.Context) error {
		return h.verify(ctx, h.peer, h.of(Server), st, answer.AgentKey, "", entries)
	}); err != nil {
		return 0, err
	}
	_, err = h.write(frameResult, &resultFrame{OK: true, Code: CodeOK, Ref: h.ref, TTLSeconds: int(h.cfg.MaxSession / time.Second)}, maxResult)
	return ttl, err
}
