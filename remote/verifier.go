package remote

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/cache"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// Config says how a [Verifier] appraises.
type Config struct {
	// Policy says who is accepted. Nil is an error.
	Policy *Policy
	// Collateral is where collateral comes from. Its roots must be those of the
	// policy, see [Policy.Roots]. Nil is an error. With a StaleGrace it hands out
	// collateral after its end, which a policy refuses unless it says
	// allow_stale_collateral.
	Collateral *collateral.Store
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
	// RealHardware refuses policies that accept simulated evidence: set it where our
	// own TD is real.
	RealHardware bool
	// NoSecondOpinion spares asking go-tdx-guest about every new platform.
	NoSecondOpinion bool
}

// Verifier appraises Evidence (RFC 9334): signatures, TCB, what booted, which
// application, and whether it is fresh, under a policy that can be replaced while it
// works. For many goroutines.
type Verifier struct {
	cfg    Config
	logs   *logs
	leaves *cache.Cache[leafKey, *leafVerdict]
	active atomic.Pointer[active]
	set    sync.Mutex // held by SetPolicy
}

// active is a policy with the engine that trusts its roots.
type active struct {
	policy     *Policy
	dcap       *dcap.Verifier
	store      *collateral.Store
	generation uint64
}

// NewVerifier returns a Verifier.
func NewVerifier(cfg Config) (*Verifier, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	v := &Verifier{cfg: cfg, logs: newLogs(), leaves: cache.New[leafKey, *leafVerdict](maxLeaves)}
	return v, v.SetPolicy(cfg.Policy, cfg.Collateral)
}

// SetPolicy replaces policy and collateral. Appraisals under way end under the old
// ones. After an error the old ones stay in force.
func (v *Verifier) SetPolicy(p *Policy, store *collateral.Store) error {
	if p == nil || len(p.Entries) == 0 {
		return errors.New("remote: no policy, which would accept nobody: give one, or BuiltinPolicy")
	}
	if store == nil {
		return errors.New("remote: no source of collateral: give a collateral.Store")
	}
	if name := p.unloaded(); name != "" {
		return fmt.Errorf("remote: policy %s: image %q was not loaded: call Policy.LoadImages first", p.ID, name)
	}
	if names := p.Simulated(); v.cfg.RealHardware && len(names) > 0 {
		return fmt.Errorf("remote: policy %s accepts simulated evidence (%q), which is refused where this TD is real", p.ID, names)
	}
	roots, err := p.Roots()
	if err != nil {
		return fmt.Errorf("remote: policy %s: %w", p.ID, err)
	}
	v.set.Lock()
	defer v.set.Unlock()
	generation := uint64(1)
	if old := v.active.Load(); old != nil {
		generation = old.generation + 1
	}
	v.active.Store(&active{policy: p, store: store, generation: generation,
		dcap: dcap.NewVerifier(dcap.Config{Roots: roots, SecondOpinion: !v.cfg.NoSecondOpinion, StaleGrace: store.StaleGrace()})})
	return nil
}

// Collateral returns the store in use.
func (v *Verifier) Collateral() *collateral.Store { return v.active.Load().store }

// Policy returns the policy in force.
func (v *Verifier) Policy() *Policy { return v.active.Load().policy }

// CacheCounts says how well a [Verifier] remembers, by what it remembers. What belongs to
// a policy is counted from that one's beginning.
func (v *Verifier) CacheCounts() map[string]cache.Counts {
	a := v.active.Load()
	keys, verdicts := a.dcap.CacheCounts()
	return map[string]cache.Counts{"attestation_keys": keys, "tcb_verdicts": verdicts, "collateral": a.store.Counts(),
		"event_logs": v.logs.known.Counts(), "certificates": v.leaves.Counts()}
}

// Generation counts the policies that have been in force, from 1: what was concluded
// under another one may no longer hold.
func (v *Verifier) Generation() uint64 { return v.active.Load().generation }

// Expect is what evidence must fit besides the policy. The zero value expects report
// data of zeros.
type Expect struct {
	// ReportData is what the quote was asked to bind: a nonce, the hash of a channel.
	ReportData measure.ReportData
	// AnyReportData accepts evidence that was made for somebody else or long ago. The
	// Result then says that freshness was not checked.
	AnyReportData bool
	// Compose is an app-compose.json that must be the measured one. Nil: none given.
	Compose []byte
	// MRConfig is the document that MRCONFIGID must be the version 3 hash of, unless the
	// policy pins mr_config_id. "": none given.
	MRConfig string
	// Entries names the policy entries that may accept the evidence. Nil: every one.
	Entries []string
	// Channel is the attested channel that the evidence came over. Nil: none.
	Channel *Channel
	// Signed is the quote of the evidence, whose signatures were checked before. Nil: they
	// were not. They are not checked once more if that was under this policy.
	Signed *Signed
	// CertificateLife is how long the certificate is valid that the evidence came in.
	// Zero: it came in none.
	CertificateLife time.Duration
	// Offered is collateral that the peer sent along, a bundle as dcap.Bundle has it.
	// It is used for this appraisal alone, if no configured source has any.
	Offered []byte
}

// Appraise judges evidence. A nil error says that an entry of the policy accepts it;
// a [*Rejection] lists what failed; any other error says that nothing was judged.
//
// Collateral is only fetched for a quote whose every signature holds.
func (v *Verifier) Appraise(ctx context.Context, ev *measure.Evidence, x Expect) (*Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("remote: appraise: %w", err)
	}
	if ev == nil {
		return nil, errors.New("remote: appraise: no evidence")
	}
	a, at := v.active.Load(), v.cfg.Now()
	c := &Claims{VMConfig: ev.VMConfig}
	known, key := v.claimLog(c, ev.Events)
	if err := a.claimQuote(ctx, c, ev.Quote, &x, at); err != nil {
		return nil, fmt.Errorf("remote: appraise: %w", err)
	}
	r, err := a.result(c, &x, at)
	if err != nil {
		return nil, err
	}
	if !r.Accepted {
		return nil, &Rejection{r}
	}
	if known != nil {
		v.logs.remember(known, key, ev.Events)
	}
	return r, nil
}

// result judges claims by every entry and keeps the one that accepts them or comes
// closest.
func (a *active) result(c *Claims, x *Expect, at time.Time) (*Result, error) {
	r := &Result{At: at, Policy: a.policy.ID, Claims: c, policy: a.policy, expect: x}
	fewest := -1
	for i := range a.policy.Entries {
		e := &a.policy.Entries[i]
		if x.Entries != nil && !slices.Contains(x.Entries, e.Name) {
			continue
		}
		s := sheet{checks: make([]Check, 0, 48)}
		e.judge(&s, c, x, at)
		if fewest < 0 || s.failed < fewest {
			fewest, r.Entry, r.Checks, r.Image = s.failed, e.Name, s.checks, s.image
		}
		if s.failed == 0 {
			r.Accepted = true
			break
		}
	}
	if fewest < 0 {
		return nil, fmt.Errorf("remote: policy %s has none of the entries %q that are expected", a.policy.ID, x.Entries)
	}
	return r, nil
}

// claimLog takes what the event log says.
func (v *Verifier) claimLog(c *Claims, events []measure.Event) (known *logClaims, key uint64) {
	if len(events) == 0 {
		return nil, 0
	}
	known, key = v.logs.claims(events)
	c.HasLog, c.Replayed, c.Covered, c.LogErr = true, known.replayed, known.covered, known.logErr
	c.Identity, c.IdentityErr = known.identity, known.identityErr
	return known, key
}

// claimQuote verifies the quote by the collateral that there is, or fetches some. The
// error is that of ctx.
func (a *active) claimQuote(ctx context.Context, c *Claims, quote []byte, x *Expect, at time.Time) error {
	if a.claimSigned(ctx, c, quote, x.Signed, at) {
		return nil
	}
	fmspc, ca, err := a.dcap.Platform(quote)
	if err != nil {
		return c.refuse(quote, err)
	}
	set := a.store.Known(fmspc, ca)
	if set != nil {
		if err := a.verify(ctx, c, quote, set, at); err != nil || c.CollateralErr == nil {
			return err
		}
	}
	// No collateral yet, or it has ended. Only a genuine quote is worth a fetch.
	if _, _, err := a.dcap.Signatures(quote); err != nil {
		return c.refuse(quote, err)
	}
	fetched, err := a.store.Fetch(ctx, fmspc, ca)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		return a.verify(ctx, c, quote, fetched, at)
	}
	if x.Offered != nil {
		if own, offeredErr := a.store.Offered(x.Offered); offeredErr == nil {
			return a.verify(ctx, c, quote, own, at)
		} else {
			err = errors.Join(err, offeredErr)
		}
	}
	if set == nil {
		c.CollateralErr = err
	}
	return c.parse(quote)
}

// Signed is a quote whose every signature was checked, up to a root of the policy: it is
// worth more work. Nothing is judged yet.
type Signed struct{ quote *dcap.Signed }

// CheckSignatures checks the signatures of a quote, which is little work beside an
// appraisal.
func (v *Verifier) CheckSignatures(quote []byte) (*Signed, error) {
	s, err := v.active.Load().dcap.CheckSignatures(quote)
	if err != nil {
		return nil, err
	}
	return &Signed{s}, nil
}

// claimSigned claims a quote whose signatures were checked before. If that is not so, or
// it is not good, it is for claimQuote to say why.
func (a *active) claimSigned(ctx context.Context, c *Claims, quote []byte, s *Signed, at time.Time) bool {
	if s == nil || !s.quote.IsOf(quote) {
		return false
	}
	set := a.store.Known(s.quote.Platform())
	if set == nil {
		return false
	}
	r, err := a.dcap.VerifySigned(ctx, s.quote, set.Collateral, at)
	if err != nil {
		return false
	}
	c.Quote, c.Report, c.Source = r.Quote, r, set.Source
	return true
}

// verify sorts the engine's answer into the claims.
func (a *active) verify(ctx context.Context, c *Claims, quote []byte, set *collateral.Set, at time.Time) error {
	r, err := a.dcap.Verify(ctx, quote, set.Collateral, at)
	if err == nil {
		c.Quote, c.Report, c.Source, c.CollateralErr = r.Quote, r, set.Source, nil
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err() // an appraisal that was broken off says nothing of the quote
	}
	d, ok := asDCAP(err)
	if !ok {
		return err
	}
	if d.Stage == "collateral" || d.Code == "tdx_module_mismatch" {
		c.CollateralErr, c.Source = err, set.Source
		return c.parse(quote)
	}
	return c.refuse(quote, err)
}

// refuse says that the quote is not genuine.
func (c *Claims) refuse(quote []byte, err error) error {
	d, ok := asDCAP(err)
	if !ok || d.Stage == "setup" {
		return err
	}
	c.SignatureErr = d
	return c.parse(quote)
}

// parse shows what a quote says that was not verified to its end.
func (c *Claims) parse(quote []byte) error {
	if q, err := measure.ParseQuote(quote); err == nil {
		c.Quote = q
	}
	return nil
}

func asDCAP(err error) (*dcap.Error, bool) {
	return errors.AsType[*dcap.Error](err)
}

// Platform checks every signature of a quote and says which platform it is of: whose
// collateral to fetch. The error is a [*dcap.Error].
func (v *Verifier) Platform(quote []byte) (fmspc [6]byte, ca string, err error) {
	return v.active.Load().dcap.Signatures(quote)
}
