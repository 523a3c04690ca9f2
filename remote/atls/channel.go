package atls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/cache"
)

// Defaults of a [Config].
const (
	DefaultMaxSession  = time.Hour
	DefaultDrain       = 10 * time.Minute
	DefaultDeniedDrain = 10 * time.Second
)

// Config is one end's part in channels.
type Config struct {
	// Verifier appraises peers. Required.
	Verifier *remote.Verifier
	// Attester speaks for this TD. Nil: this end has no TEE, and reaches only services
	// that take unattested clients.
	Attester Attester
	// RATLS speaks dstack's RA-TLS instead, which is weaker. Attester must be nil then.
	RATLS *RATLS
	// KeyTTL is how long a peer that was appraised may use key mode, where the policy
	// lets it (require = "key"). Zero: not at all.
	KeyTTL time.Duration
	// MaxSession ends a connection, after Drain more to finish in. Zero: the defaults.
	MaxSession, Drain time.Duration
	// DeniedDrain is what a peer has to finish in that a new policy denies: an answer
	// that is being written need not break off, and no policy waits for a peer to end by
	// itself. Zero: the default.
	DeniedDrain time.Duration
	// AllowSelf accepts a peer with our own agent key.
	AllowSelf bool
	// Observe is told of every handshake, from its goroutine. May be nil.
	Observe func(Handshake)
	Now     func() time.Time // nil: time.Now
}

// end is a Config at work, shared by all channels of a Listener or a Dialer.
type end struct {
	cfg  Config
	kept *cache.Cache[[32]byte, *kept] // by agent key
	// logs are those of accepted evidence by agent key: a peer's log is most of its
	// evidence, and seldom another than the last time.
	logs *cache.Cache[[32]byte, *knownLog]
	// reasons bounds the forged quotes that are looked into further, for an operator to
	// read why: an event log is more work than a signature.
	reasons *rate.Limiter
	// unproven bounds our quotes for clients that prove nothing: their number is nobody's
	// to bound, and peers share what the host can make.
	unproven *rate.Limiter
	counted  counters

	mu      sync.Mutex // guards what follows
	leaf    *tls.Certificate
	tls     *tls.Config // with leaf
	renewAt time.Time
	open    map[*Conn]struct{}
	// reserved channels are not open yet: their handshakes end.
	reserved int
}

// kept is accepted evidence, for key mode.
type kept struct {
	evidence   *measure.Evidence
	reportData measure.ReportData
	signed     *remote.Signed
	rtmr3      measure.Digest
	verifiedAt time.Time
}

func newEnd(cfg Config) (*end, error) {
	if cfg.Verifier == nil {
		return nil, errors.New("atls: no Verifier, so that nobody could be accepted")
	}
	if err := cfg.checkRATLS(); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.MaxSession <= 0 {
		cfg.MaxSession = DefaultMaxSession
	}
	if cfg.Drain <= 0 {
		cfg.Drain = DefaultDrain
	}
	if cfg.DeniedDrain <= 0 {
		cfg.DeniedDrain = DefaultDeniedDrain
	}
	if cfg.Observe == nil {
		cfg.Observe = func(Handshake) {}
	}
	return &end{cfg: cfg, kept: cache.New[[32]byte, *kept](512), logs: cache.New[[32]byte, *knownLog](64), reasons: rate.NewLimiter(2, 16), unproven: rate.NewLimiter(1, 8), open: map[*Conn]struct{}{}}, nil
}

// leafLife is how long a TLS key is used for new connections.
const leafLife = 24 * time.Hour

// certificate returns the current TLS certificate, which is a key and no claim at all,
// and the configuration with it.
func (e *end) certificate() (*tls.Certificate, *tls.Config, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if e.leaf == nil || !now.Before(e.renewAt) {
		leaf, err := newLeaf(now)
		if err != nil {
			return nil, nil, err
		}
		e.leaf, e.tls, e.renewAt = leaf, tlsConfig(leaf), now.Add(leafLife)
	}
	return e.leaf, e.tls, nil
}

func newLeaf(now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "tdx-atls"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(2 * leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// keyExchanges is what crypto/tls does less work for than for its own first choice, with
// the same ML-KEM-768 against whoever keeps what he records: a key of P-256 is made in a
// third of the time that one of X25519 takes. The latter is for peers without ML-KEM.
var keyExchanges = []tls.CurveID{tls.SecP256r1MLKEM768, tls.CurveP256, tls.X25519}

// tlsConfig never resumes: a resumed session would have been appraised another time.
func tlsConfig(leaf *tls.Certificate) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*leaf}, NextProtos: []string{ALPN},
		ClientAuth: tls.RequireAnyClientCert, InsecureSkipVerify: true, // who the peer is follows from its evidence alone
		SessionTicketsDisabled: true, ClientSessionCache: nil, CurvePreferences: keyExchanges}
}

// newSession takes a session from our own side of the connection, after its
// handshake: earlier the exporter has no value, or another.
func newSession(conn *tls.Conn, role Role, leaf *tls.Certificate, helloClient, helloServer []byte) (*Session, error) {
	state := conn.ConnectionState()
	s := &Session{Transcript: transcript(helloClient, helloServer)}
	ekm, err := state.ExportKeyingMaterial(exporterLabel, s.Transcript[:], 32)
	if err != nil {
		return nil, fmt.Errorf("exporter: %w", err)
	}
	s.Exporter = [32]byte(ekm)
	s.ClientKey, s.ServerKey = sha256.Sum256(leaf.Leaf.RawSubjectPublicKeyInfo), sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo)
	if role == Server {
		s.ClientKey, s.ServerKey = s.ServerKey, s.ClientKey
	}
	return s, nil
}

// checkTLS says why a TLS connection is not what the protocol wants.
func checkTLS(state *tls.ConnectionState, leaf *tls.Certificate) error {
	switch {
	case state.Version != tls.VersionTLS13 || state.DidResume:
		return &unsupportedError{"not a new TLS 1.3 session"}
	case state.NegotiatedProtocol != ALPN:
		return &unsupportedError{fmt.Sprintf("protocol %q, want %s", state.NegotiatedProtocol, ALPN)}
	case len(state.PeerCertificates) == 0:
		return &unsupportedError{"the peer shows no certificate"}
	}
	key, ok := state.PeerCertificates[0].PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return &unsupportedError{"the peer's certificate has no P-256 key"}
	}
	if subtle.ConstantTimeCompare(state.PeerCertificates[0].RawSubjectPublicKeyInfo, leaf.Leaf.RawSubjectPublicKeyInfo) == 1 {
		return &bindingError{"the peer's TLS key is our own"}
	}
	return nil
}

// Peer is who is at the other end, and how we know.
type Peer struct {
	Address string
	Role    Role // the peer's
	Service string
	Ref     string         // the same on both ends
	Result  *remote.Result // nil: the peer proved nothing
	KeyMode bool
	// Certificate says that the evidence was in the peer's certificate, see [RATLS].
	Certificate bool
	AgentKey    [32]byte  // SHA-256 of the SubjectPublicKeyInfo
	VerifiedAt  time.Time // when its quote was accepted; zero: never
	Opened      time.Time // when the handshake ended
	Expires     time.Time

	evidence   *measure.Evidence
	reportData measure.ReportData
	life       time.Duration // of the certificate, if there was one
	notAfter   time.Time     // the same
}

// Assurance is "quote", "key" or "certificate", by how the peer attested, or "none".
func (p *Peer) Assurance() string {
	switch {
	case !p.Attested():
		return modeNone
	case p.Certificate:
		return "certificate" // of RA-TLS
	case p.KeyMode:
		return modeKey
	}
	return modeQuote
}

// CertificateEnd is when the certificate ends that the evidence was in; zero: there was
// none.
func (p *Peer) CertificateEnd() time.Time { return p.notAfter }

// Evidence is what the peer showed, nil if it proved nothing.
func (p *Peer) Evidence() *measure.Evidence { return p.evidence }

// Attested reports whether the peer was appraised and accepted.
func (p *Peer) Attested() bool { return p.Result != nil && p.Result.Accepted }

// Entry is the policy entry that accepts the peer, "" for one that proved nothing.
func (p *Peer) Entry() string {
	if p.Result == nil {
		return ""
	}
	return p.Result.Entry
}

// verify appraises a peer's statement about this session, what is cheap to check first.
// p gets what it proves.
func (e *end) verify(ctx context.Context, p *Peer, s *Session, st *Statement, announced []byte, service string, entries []string) error {
	hash := sha256.Sum256(st.AgentKey)
	body := s.Body(hash, st.RTMR3)
	if subtle.ConstantTimeCompare(hash[:], announced) != 1 {
		return &bindingError{"the agent key is not the one of the hello"}
	}
	if e.cfg.Attester != nil && !e.cfg.AllowSelf {
		if own := e.cfg.Attester.AgentKey(); subtle.ConstantTimeCompare(own[:], hash[:]) == 1 {
			return &bindingError{"the peer's agent key is our own"}
		}
	}
	channel := &remote.Channel{AgentKey: hash, Service: service, KeyMode: st.Evidence == nil}
	if !channel.KeyMode {
		if err := st.checkQuote(body); err != nil {
			return err
		}
	}
	if err := st.checkSignature(body); err != nil {
		return err
	}
	p.AgentKey = hash
	if channel.KeyMode {
		return e.verifyKept(ctx, p, st, channel, entries)
	}
	signed, err := e.cfg.Verifier.CheckSignatures(st.Evidence.Quote)
	if err != nil && !e.reasons.Allow() {
		return &evidenceError{err} // whoever wants to keep us busy gets no more than that
	}
	known, _ := e.logs.Get(hash)
	log, err := st.readLog(known)
	if err != nil {
		return err
	}
	p.evidence, p.reportData = st.Evidence, ReportData(body)
	if p.Result, err = e.cfg.Verifier.Appraise(ctx, p.evidence, remote.Expect{ReportData: p.reportData, Entries: entries, Channel: channel, Signed: signed}); err != nil {
		return err
	}
	p.VerifiedAt = e.cfg.Now()
	e.logs.Add(hash, log)
	if id, err := p.Result.Identity(); e.cfg.KeyTTL > 0 && err == nil && subtle.ConstantTimeCompare(id.AgentKey, hash[:]) == 1 { // key mode is for measured keys
		e.kept.Add(hash, &kept{evidence: p.evidence, reportData: p.reportData, signed: signed, rtmr3: st.RTMR3, verifiedAt: p.VerifiedAt})
	}
	return nil
}

// verifyKept appraises the evidence that a peer has shown before, by everything that
// holds now.
func (e *end) verifyKept(ctx context.Context, p *Peer, st *Statement, channel *remote.Channel, entries []string) (err error) {
	defer func() {
		if errors.As(err, new(*reattestError)) {
			e.kept.Add(channel.AgentKey, nil) // the key's holder has signed, so this is nobody else's doing
		}
	}()
	k, ok := e.usable(channel.AgentKey)
	if !ok {
		return &reattestError{"nothing is known of this agent key"}
	}
	if subtle.ConstantTimeCompare(k.rtmr3[:], st.RTMR3[:]) != 1 {
		return &reattestError{"RTMR3 was extended since"}
	}
	p.evidence, p.reportData, p.KeyMode, p.VerifiedAt = k.evidence, k.reportData, true, k.verifiedAt
	p.Result, err = e.cfg.Verifier.Appraise(ctx, k.evidence, remote.Expect{ReportData: k.reportData, Entries: entries, Channel: channel, Signed: k.signed})
	if rejection, ok := errors.AsType[*remote.Rejection](err); ok {
		return &reattestError{rejection.Error()}
	}
	return err
}

// usable returns what is kept of an agent key, if it is not too old.
func (e *end) usable(agentKey [32]byte) (*kept, bool) {
	k, ok := e.kept.Get(agentKey)
	if !ok || k == nil || e.cfg.KeyTTL <= 0 || e.cfg.Now().Sub(k.verifiedAt) > e.cfg.KeyTTL {
		return nil, false
	}
	return k, true
}

// wants says in which mode a peer of this agent key should attest.
func (e *end) wants(agentKey []byte, modes []string) string {
	if len(agentKey) == 32 && slices.Contains(modes, modeKey) && e.cfg.Verifier.Policy().AllowsKeys() {
		if _, ok := e.usable([32]byte(agentKey)); ok {
			e.counted.keyHits.Add(1)
			return modeKey
		}
		e.counted.keyMisses.Add(1)
	}
	return modeQuote
}
