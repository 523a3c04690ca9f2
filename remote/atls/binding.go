package atls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"

	"tdx-agent/measure"
)

// ALPN is the protocol's name in the TLS handshake.
const ALPN = "tdx-atls/1"

const (
	exporterLabel   = "EXPORTER-tdx-atls-v1"
	transcriptLabel = "tdx-atls/1 hello\x00"
	reportDataTag   = "tdx-atls-v1:"
	signatureTag    = "tdx-atls-v1 sig\x00"
)

// Role is an end of a channel.
type Role byte

// The roles.
const (
	Client Role = 'C'
	Server Role = 'S'
)

// Session is what a channel binds, the same on both ends but for Role, which is that
// of the end whose evidence is meant. All of it comes from the own TLS connection,
// none from the peer's word.
type Session struct {
	Role       Role
	Exporter   [32]byte // ExportKeyingMaterial over Transcript
	Transcript [32]byte // hash of both hello frames
	ClientKey  [32]byte // SHA-256 of the SubjectPublicKeyInfo of the client's certificate
	ServerKey  [32]byte
}

// BodySize is the size of a [Session.Body].
const BodySize = 1 + 4*32 + 32 + 48

// Body is what report data and signature of one end cover: role, exporter, transcript,
// both certificates' keys, the agent key (SHA-256 of its SubjectPublicKeyInfo) and
// RTMR3 of that end.
func (s *Session) Body(agentKey [32]byte, rtmr3 measure.Digest) (b [BodySize]byte) {
	w := append(b[:0], byte(s.Role))
	for _, part := range [][]byte{s.Exporter[:], s.Transcript[:], s.ClientKey[:], s.ServerKey[:], agentKey[:], rtmr3[:]} {
		w = append(w, part...)
	}
	return b
}

// ReportData is the report data of a quote for this body.
func ReportData(body [BodySize]byte) measure.ReportData {
	return sha512.Sum512(append([]byte(reportDataTag), body[:]...))
}

// signedDigest is what the agent key signs for this body.
func signedDigest(body [BodySize]byte) [48]byte {
	return sha512.Sum384(append([]byte(signatureTag), body[:]...))
}

// transcript hashes both hello frames, with their headers.
func transcript(client, server []byte) [32]byte {
	h := sha256.New()
	h.Write([]byte(transcriptLabel))
	h.Write(client)
	h.Write(server)
	return [32]byte(h.Sum(nil))
}

// Statement is what one end says of itself on a channel. Nothing in it is trusted.
type Statement struct {
	Evidence  *measure.Evidence // nil in key mode
	AgentKey  []byte            // DER SubjectPublicKeyInfo, P-256
	RTMR3     measure.Digest
	Signature []byte // ECDSA with SHA-384, ASN.1, by AgentKey

	unread []byte // the event log of Evidence that was received, as JSON
}

// Attester makes this TD's statements. It builds what is signed itself: who can reach
// it cannot have other report data signed.
type Attester interface {
	// Attest makes a statement, with evidence unless keyMode is set. Of its errors the
	// peer is told internal, or busy where one has a method RetryAfter() time.Duration.
	Attest(ctx context.Context, s *Session, keyMode bool) (*Statement, error)
	// AgentKey is the SHA-256 of the agent key's SubjectPublicKeyInfo.
	AgentKey() [32]byte
}

// Key is a TD's agent key with what it needs to make statements. It implements
// [Attester] within the process that holds the key.
type Key struct {
	private *ecdsa.PrivateKey
	public  []byte
	hash    [32]byte
	quote   func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error)
	rtmr3   func(ctx context.Context) (measure.Digest, error)
}

// NewKey takes the agent key, a source of evidence and one of the live RTMR3. The
// latter must fail while log and register disagree.
func NewKey(private *ecdsa.PrivateKey, quote func(context.Context, measure.ReportData) (*measure.Evidence, error), rtmr3 func(context.Context) (measure.Digest, error)) (*Key, error) {
	if private == nil || private.Curve != elliptic.P256() {
		return nil, errors.New("atls: the agent key is no P-256 key")
	}
	der, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("atls: agent key: %v", err)
	}
	return &Key{private: private, public: der, hash: sha256.Sum256(der), quote: quote, rtmr3: rtmr3}, nil
}

// AgentKey implements [Attester].
func (k *Key) AgentKey() [32]byte { return k.hash }

// Attest implements [Attester]. If RTMR3 is extended while the quote is made, another
// one is made, three at most.
func (k *Key) Attest(ctx context.Context, s *Session, keyMode bool) (*Statement, error) {
	for range 3 {
		rtmr3, err := k.rtmr3(ctx)
		if err != nil {
			return nil, fmt.Errorf("atls: RTMR3: %w", err)
		}
		st := &Statement{AgentKey: k.public, RTMR3: rtmr3}
		body := s.Body(k.hash, rtmr3)
		if !keyMode {
			if st.Evidence, err = k.quote(ctx, ReportData(body)); err != nil {
				return nil, fmt.Errorf("atls: quote: %w", err)
			}
			q, err := measure.ParseQuote(st.Evidence.Quote)
			if err != nil {
				return nil, fmt.Errorf("atls: quote: %w", err)
			}
			if q.Body.RTMR[measure.RTMR3] != rtmr3 {
				continue
			}
		}
		digest := signedDigest(body)
		if st.Signature, err = ecdsa.SignASN1(rand.Reader, k.private, digest[:]); err != nil {
			return nil, fmt.Errorf("atls: sign: %w", err)
		}
		return st, nil
	}
	return nil, errors.New("atls: RTMR3 was extended during every quote")
}

// checkSignature checks that the statement's agent key signed this body.
func (st *Statement) checkSignature(body [BodySize]byte) error {
	parsed, err := x509.ParsePKIXPublicKey(st.AgentKey)
	if err != nil {
		return &bindingError{fmt.Sprintf("agent key: %v", err)}
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return &bindingError{"agent key is no P-256 key"}
	}
	digest := signedDigest(body)
	if !ecdsa.VerifyASN1(key, digest[:], st.Signature) {
		return &bindingError{"the agent key did not sign this channel"}
	}
	return nil
}

// checkQuote checks that the quote is about this body, whoever may have made it.
func (st *Statement) checkQuote(body [BodySize]byte) error {
	q, err := measure.ParseQuote(st.Evidence.Quote)
	if err != nil {
		return &evidenceError{err}
	}
	if q.Body.RTMR[measure.RTMR3] != st.RTMR3 {
		return &bindingError{"RTMR3 of the quote is not the one that was signed"}
	}
	want := ReportData(body)
	if subtle.ConstantTimeCompare(q.Body.ReportData[:], want[:]) != 1 {
		return &bindingError{"the quote is about another channel"}
	}
	return nil
}
