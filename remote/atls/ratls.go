package atls

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"time"

	"tdx-agent/remote"
)

// RATLS makes an end speak dstack's RA-TLS in place of tdx-atls/1, for peers that know
// nothing else: evidence inside TLS certificates.
//
// It is the weaker way, and says so as assurance "certificate", which a policy entry
// must ask for (require = "certificate", require_measured_agent_key = false). Evidence
// is bound to a key that was in the TD once, and not to the connection: whoever has got
// hold of the key, or may ask the peer's TD for raw quotes, can show it from anywhere
// and for as long as he likes. No service is named: a [Listener] has one. A dialler does
// not learn that the server refuses it before it reads.
type RATLS struct {
	// Certificate returns this TD's certificate, as ratls.Renewer's does. Nil, which a
	// Listener cannot have: this end shows none.
	Certificate func(context.Context) (*tls.Certificate, error)
}

func (c *Config) checkRATLS() error {
	switch {
	case c.RATLS == nil:
		return nil
	case c.Attester != nil:
		return errors.New("atls: RA-TLS has no use for an Attester: evidence is in the certificate")
	case c.KeyTTL > 0:
		return errors.New("atls: RA-TLS has no key mode")
	}
	return nil
}

// checkOneService is for a listener's part of RA-TLS.
func (c *ListenerConfig) checkOneService() error {
	switch {
	case c.RATLS == nil:
		return nil
	case c.RATLS.Certificate == nil:
		return errors.New("atls: an RA-TLS listener needs a certificate")
	case len(c.Services) != 1:
		return errors.New("atls: RA-TLS clients name no service: want exactly one")
	}
	return nil
}

// serveRATLS is the server's side.
func (e *end) serveRATLS(ctx context.Context, raw net.Conn, l *ListenerConfig) (h *handshake, ttl time.Duration, err error) {
	h = e.newHandshake(ctx, raw, Server)
	h.peer.Service = l.Services[0]
	cfg, err := h.ratlsConfig(ctx)
	if err != nil {
		return h, 0, err
	}
	cfg.ClientAuth = tls.RequireAnyClientCert
	mayBeNobody := e.takesUnattested(l, h.peer.Service)
	if mayBeNobody {
		cfg.ClientAuth = tls.RequestClientCert
	}
	ttl, err = h.handshakeRATLS(ctx, raw, cfg, l.Entries[h.peer.Service], mayBeNobody)
	if err == nil && !h.reserve(l.MaxConnections) {
		err = &busyError{time.Second}
	}
	return h, ttl, err
}

// dialRATLS is the client's side.
func (e *end) dialRATLS(ctx context.Context, raw net.Conn, address, service string, entries []string) (h *handshake, ttl time.Duration, err error) {
	h = e.newHandshake(ctx, raw, Client)
	h.peer.Service = service
	cfg, err := h.ratlsConfig(ctx)
	if err != nil {
		return h, 0, err
	}
	if host, _, err := net.SplitHostPort(address); err == nil {
		cfg.ServerName = host // for those who route by it; it proves nothing
	}
	ttl, err = h.handshakeRATLS(ctx, raw, cfg, entries, false)
	return h, ttl, err
}

func (h *handshake) ratlsConfig(ctx context.Context) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // who the peer is follows from its evidence alone
		SessionTicketsDisabled: true, ClientSessionCache: nil}
	if h.cfg.RATLS.Certificate == nil {
		return cfg, nil
	}
	h.step = StepSendEvidence
	err := within(ctx, limitAttest, func(ctx context.Context) (err error) {
		if h.leaf, err = h.cfg.RATLS.Certificate(ctx); err != nil {
			return &ownError{err}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	cfg.Certificates = []tls.Certificate{*h.leaf}
	return cfg, nil
}

// handshakeRATLS makes the TLS connection. The peer's certificate is appraised in
// VerifyConnection, which runs for every handshake, and counts once TLS has shown that
// the peer holds its key. The session ends with the certificate at the latest.
func (h *handshake) handshakeRATLS(ctx context.Context, raw net.Conn, cfg *tls.Config, entries []string, mayBeNobody bool) (ttl time.Duration, err error) {
	var proven Peer
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 && mayBeNobody {
			return nil
		}
		h.step = StepVerify
		err := within(ctx, limitVerify, func(ctx context.Context) error { return h.appraiseChain(ctx, &proven, state.PeerCertificates, entries) })
		if err == nil {
			h.step = StepTLS
		}
		return err
	}
	if h.conn = tls.Client(wire{raw}, cfg); h.role == Server {
		h.conn = tls.Server(wire{raw}, cfg)
	}
	h.enter(StepTLS, limitTLS+limitVerify)
	if err := h.conn.HandshakeContext(ctx); err != nil {
		return 0, err
	}
	state := h.conn.ConnectionState()
	if state.DidResume {
		return 0, &unsupportedError{"not a new TLS 1.3 session"}
	}
	if len(state.PeerCertificates) == 0 {
		return 0, nil
	}
	h.step = StepVerify
	h.peer.Result, h.peer.Certificate, h.peer.VerifiedAt = proven.Result, true, proven.Result.At
	h.peer.evidence, h.peer.reportData, h.peer.life = proven.evidence, proven.reportData, proven.life
	h.peer.notAfter = state.PeerCertificates[0].NotAfter
	return max(h.peer.notAfter.Sub(h.cfg.Now()), time.Second), nil
}

// appraiseChain judges what the peer shows. p gets what it proves.
func (h *handshake) appraiseChain(ctx context.Context, p *Peer, chain []*x509.Certificate, entries []string) error {
	if len(chain) == 0 {
		return &unsupportedError{"the peer shows no certificate"}
	}
	if h.leaf != nil && subtle.ConstantTimeCompare(chain[0].RawSubjectPublicKeyInfo, h.leaf.Leaf.RawSubjectPublicKeyInfo) == 1 {
		return &bindingError{"the peer's TLS key is our own"}
	}
	channel := &remote.Channel{Certificate: true}
	if h.role == Server {
		channel.Service = h.peer.Service
	}
	r, a, err := h.cfg.Verifier.AppraiseCertificate(ctx, chain, remote.Expect{Entries: entries, Channel: channel})
	if errors.As(err, new(*remote.CertificateError)) {
		return &evidenceError{err}
	}
	if err != nil {
		return err
	}
	p.Result, p.evidence, p.reportData, p.life = r, a.Evidence, a.ReportData, chain[0].NotAfter.Sub(chain[0].NotBefore)
	return nil
}
