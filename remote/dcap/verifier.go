package dcap

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"hash/maphash"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/cache"
)

// MaxStaleGrace bounds Config.StaleGrace.
const MaxStaleGrace = 72 * time.Hour

// Config says how a [Verifier] verifies.
type Config struct {
	// Roots are what chains must end in. Nil refuses every quote.
	Roots *Roots
	// SecondOpinion also asks go-tdx-guest about the signatures, once per PCK
	// certificate. Both must accept.
	SecondOpinion bool
	// StaleGrace is how long TCB info, QE identity and CRLs may be used after they
	// ended, at most MaxStaleGrace. Certificates get no grace. The Report says so.
	StaleGrace time.Duration
	// Entries of the caches of platforms and of attestation keys. Zero: 1024.
	Platforms, AttestationKeys int
}

// Verifier verifies quotes. It remembers what does not depend on time: PCK chains
// and QE reports whose signatures hold, and TCB verdicts by collateral. Whether a
// certificate is in its time of validity or revoked is looked at on every call. The
// caches are bounded, and only what was verified gets in. For many goroutines.
type Verifier struct {
	cfg  Config
	seed maphash.Seed

	keys          *cache.Cache[uint64, *attestation]        // by the hash of their bytes, which are compared
	texts         *cache.Cache[uint64, *chainText]          // by the hash of their bytes, which are compared
	chains        *cache.Cache[[32]byte, *pckChain]         // by the hash of their DER
	intermediates *cache.Cache[[32]byte, *x509.Certificate] // by the hash of their DER
	verdicts      *cache.Cache[verdictKey, *verdict]
	opinions      *cache.Cache[[32]byte, string] // by the hash of the PCK certificate
}

// attestation is an attestation key that a QE report signed by a PCK vouches for.
type attestation struct {
	bytes string // everything behind a quote's signature
	chain *pckChain
	key   *ecdsa.PublicKey
	qe    *QEReport
}

// verdictKey is everything that a verdict depends on.
type verdictKey struct {
	collateral, leaf [32]byte
	bodyType         uint16
	svn, svn2        [16]byte
	seamSigner       measure.Digest
	seamAttributes   [8]byte
	qe               QEReport
}

// NewVerifier returns a verifier with empty caches.
func NewVerifier(cfg Config) *Verifier {
	size := func(n int) int {
		if n <= 0 {
			n = 1024
		}
		return max(n/2, 1)
	}
	cfg.StaleGrace = min(max(cfg.StaleGrace, 0), MaxStaleGrace)
	platforms, keys := size(cfg.Platforms), size(cfg.AttestationKeys)
	return &Verifier{
		cfg: cfg, seed: maphash.MakeSeed(),
		keys:          cache.New[uint64, *attestation](keys),
		texts:         cache.New[uint64, *chainText](platforms),
		chains:        cache.New[[32]byte, *pckChain](platforms),
		intermediates: cache.New[[32]byte, *x509.Certificate](8),
		verdicts:      cache.New[verdictKey, *verdict](keys),
		opinions:      cache.New[[32]byte, string](platforms),
	}
}

// CacheCounts says how well v remembers attestation keys with their PCK chains, and TCB
// verdicts.
func (v *Verifier) CacheCounts() (keys, verdicts cache.Counts) {
	return v.keys.Counts(), v.verdicts.Counts()
}

// Platform checks the PCK chain of a quote up to a pinned root, but not when it is
// valid nor whether it is revoked, and says which collateral its platform needs. The
// quote itself is not yet trusted. The error is an [*Error].
func (v *Verifier) Platform(quote []byte) (fmspc [6]byte, ca string, err error) {
	_, d, fault := v.parse(quote)
	if fault != nil {
		return fmspc, "", fault
	}
	if known := v.known(d); known != nil {
		return known.chain.pck.FMSPC, known.chain.pck.CA, nil
	}
	chain, fault := v.chain(d.chain, nil)
	if fault != nil {
		return fmspc, "", fault
	}
	return chain.pck.FMSPC, chain.pck.CA, nil
}

// Signatures is Platform, and checks every signature of the quote too: it tells
// whether a quote is worth a fetch of collateral. The error is an [*Error].
func (v *Verifier) Signatures(quote []byte) (fmspc [6]byte, ca string, err error) {
	q, d, fault := v.parse(quote)
	if fault != nil {
		return fmspc, "", fault
	}
	a, fault := v.attest(q, d, nil)
	if fault != nil {
		return fmspc, "", fault
	}
	return a.chain.pck.FMSPC, a.chain.pck.CA, nil
}

// Verify judges a quote by this collateral at this time. A nil error says that the
// quote is genuine; its statuses are in the Report and are not judged here. The error
// is an [*Error], the Report then nil.
func (v *Verifier) Verify(ctx context.Context, quote []byte, c *Collateral, at time.Time) (*Report, error) {
	if err := checkSetup(c, ofTD, at); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, &Error{Code: "canceled", Stage: stageSetup, Err: ctx.Err()}
	}
	r, err := v.verify(ctx, quote, c, at)
	if err != nil {
		return nil, err // not returned as it is: a nil *Error is no nil error
	}
	return r, nil
}

// checkSetup demands a time, and collateral of this technology: the SGX side of a platform
// says nothing of its TDX side.
func checkSetup(c *Collateral, of technology, at time.Time) *Error {
	switch {
	case c == nil || c.tcb == nil:
		return &Error{Code: "no_collateral", Stage: stageSetup, Hint: "fetch collateral for the platform first"}
	case c.of.id != of.id:
		return &Error{Code: "collateral_technology", Stage: stageSetup, Got: "collateral for " + c.of.id + " quotes", Want: "for " + of.id + " quotes"}
	case at.IsZero():
		return &Error{Code: "no_time", Stage: stageSetup, Hint: "give the time at which the quote is judged"}
	}
	return nil
}

func (v *Verifier) verify(ctx context.Context, quote []byte, c *Collateral, at time.Time) (*Report, *Error) {
	q, d, err := v.parse(quote)
	if err != nil {
		return nil, err
	}
	a, err := v.attest(q, d, c)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(quote[:len(quote)-len(q.Trailing)])
	return v.report(ctx, &verified{v, quote, q, a, sum}, c, at)
}

// verified is a quote whose every signature holds, which is so for ever.
type verified struct {
	by    *Verifier
	bytes []byte
	quote *measure.Quote
	*attestation
	sha256 [32]byte
}

// report judges what time and collateral decide.
func (v *Verifier) report(ctx context.Context, q *verified, c *Collateral, at time.Time) (*Report, *Error) {
	stale, err := v.applicable(q.chain, c, at)
	if err != nil {
		return nil, err
	}
	verdict, err := v.judge(q.quote, q.attestation, c)
	if err != nil {
		return nil, err
	}
	opinion, err := v.opinion(ctx, q.bytes[:len(q.bytes)-len(q.quote.Trailing)], q.chain, at)
	if err != nil {
		return nil, err
	}
	return newReport(q, c, verdict, stale, opinion), nil
}

// Signed is a quote whose every signature a [Verifier] has checked, up to a pinned root.
// Nothing is known of its TCB, nor whether a certificate was revoked.
type Signed struct{ verified *verified }

// Signed is the quote that r is about.
func (r *Report) Signed() *Signed { return &Signed{r.verified} }

// IsOf reports whether s is these bytes.
func (s *Signed) IsOf(quote []byte) bool { return bytes.Equal(s.verified.bytes, quote) }

// Platform says which collateral the quote's platform needs.
func (s *Signed) Platform() (fmspc [6]byte, ca string) {
	return s.verified.chain.pck.FMSPC, s.verified.chain.pck.CA
}

// CheckSignatures checks every signature of a quote. The error is an [*Error].
func (v *Verifier) CheckSignatures(quote []byte) (*Signed, error) {
	q, d, err := v.parse(quote)
	if err != nil {
		return nil, err
	}
	a, err := v.attest(q, d, nil)
	if err != nil {
		return nil, err
	}
	return &Signed{&verified{v, quote, q, a, sha256.Sum256(quote[:len(quote)-len(q.Trailing)])}}, nil
}

// VerifySigned is Verify of a quote whose signatures this Verifier has checked: they are
// not checked once more. The caller has not changed its bytes.
func (v *Verifier) VerifySigned(ctx context.Context, s *Signed, c *Collateral, at time.Time) (*Report, error) {
	if s.verified.by != v || c == nil || c.tcb == nil || at.IsZero() || ctx.Err() != nil {
		return v.Verify(ctx, s.verified.bytes, c, at)
	}
	r, err := v.report(ctx, s.verified, c, at)
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (v *Verifier) parse(quote []byte) (*measure.Quote, *signatureData, *Error) {
	if v == nil || v.cfg.Roots == nil || len(v.cfg.Roots.pins) == 0 {
		return nil, nil, &Error{Code: "no_roots", Stage: stageSetup, Hint: "give Config.Roots"}
	}
	return parseQuote(quote)
}

// known returns what is known of these signature data, but for the quote's own
// signature. Bytes that are equal have the same key, bound by the same QE report.
func (v *Verifier) known(d *signatureData) *attestation {
	a, ok := v.keys.Get(maphash.Bytes(v.seed, d.certified))
	if !ok || a.bytes != string(d.certified) {
		return nil
	}
	return a
}

// attest checks the signatures of a quote from its PCK chain down. c may be nil.
func (v *Verifier) attest(q *measure.Quote, d *signatureData, c *Collateral) (*attestation, *Error) {
	a, isNew := v.known(d), false
	if a == nil {
		chain, err := v.chain(d.chain, c)
		if err != nil {
			return nil, err
		}
		key, qe, err := d.certify(chain.key)
		if err != nil {
			return nil, err
		}
		a, isNew = &attestation{chain: chain, key: key, qe: qe}, true
	}
	if !verifyRaw(a.key, q.Signed, d.signature) {
		return nil, &Error{Code: "quote_signature", Stage: stageQuote, Hint: "the quote was changed after it was signed"}
	}
	if isNew {
		a.bytes = string(d.certified) // of its own: the quote is the caller's
		v.keys.Add(maphash.Bytes(v.seed, d.certified), a)
		at := len(d.certified) - len(d.chain) // the chain is what ends it
		v.texts.Add(maphash.Bytes(v.seed, d.chain), &chainText{a.bytes[at:], a.chain})
	}
	return a, nil
}

func (v *Verifier) judge(q *measure.Quote, a *attestation, c *Collateral) (*verdict, *Error) {
	b := &q.Body
	key := verdictKey{
		collateral: c.sha256, leaf: a.chain.pck.SHA256, bodyType: q.BodyType, svn: b.TEETCBSVN, svn2: b.TEETCBSVN2,
		seamSigner: b.MRSignerSEAM, seamAttributes: b.SEAMAttributes, qe: *a.qe,
	}
	if known, ok := v.verdicts.Get(key); ok {
		return known, nil
	}
	verdict, err := c.judge(a.chain.pck, b, q.BodyType, a.qe)
	if err != nil {
		return nil, err
	}
	v.verdicts.Add(key, verdict)
	return verdict, nil
}
