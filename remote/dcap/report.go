package dcap

import (
	"slices"
	"time"

	"tdx-agent/measure"
)

// Report is what is known of a genuine quote.
type Report struct {
	// Quote is the quote, now genuine but for Trailing. Its slices are parts of the
	// bytes that were verified: do not change them.
	Quote         *measure.Quote
	QuoteSHA256   [32]byte // without trailing bytes. No replay key: see the package
	TrailingBytes int      // behind the quote, which no signature covers

	PCK  PCK
	QE   QEReport
	Root [32]byte // SHA-256 of the root certificate that the PCK chain ends in

	// The TCB levels of platform, TDX module and quoting enclave, and the merged
	// one: status by Intel's convergence, the earliest date, every advisory once.
	Platform, Module, QEStatus, Merged TCB
	// NewestTCBDate is the tcbDate of the newest level of what is out of date, the
	// earliest where that is more than one of platform, module and quoting enclave:
	// since then something newer could have been there. If nothing is out of date it
	// is that of the platform.
	NewestTCBDate time.Time
	ShortSVNs     []ShortSVN // what is below the newest levels

	EvaluationTCB, EvaluationQE     int // tcbEvaluationDataNumber
	CollateralFrom, CollateralUntil time.Time
	CollateralIssued                time.Time // of the oldest of TCB info, QE identity and PCK CRL
	CollateralSHA256                [32]byte  // of the bundle
	// StaleSince is when the collateral ended, if it was used beyond that within
	// Config.StaleGrace. Else zero.
	StaleSince time.Time

	// SecondOpinion is "agrees", or "not consulted: " and why.
	SecondOpinion string

	verified *verified
}

func newReport(q *verified, c *Collateral, v *verdict, stale time.Time, opinion string) *Report {
	return &Report{
		Quote: q.quote, QuoteSHA256: q.sha256, TrailingBytes: len(q.quote.Trailing), verified: q,
		PCK: *q.chain.pck, QE: *q.qe, Root: q.chain.pin,
		Platform: v.platform.clone(), Module: v.module.clone(), QEStatus: v.qe.clone(), Merged: v.merged.clone(),
		NewestTCBDate: v.newest, ShortSVNs: slices.Clone(v.short),
		EvaluationTCB: c.tcb.evaluation, EvaluationQE: c.qe.evaluation,
		CollateralFrom: c.from, CollateralUntil: c.until, CollateralIssued: c.oldest(), CollateralSHA256: c.sha256, StaleSince: stale,
		SecondOpinion: opinion,
	}
}

// clone keeps the caller's hands off what is cached.
func (t *TCB) clone() TCB {
	return TCB{Status: t.Status, Date: t.Date, Advisories: slices.Clone(t.Advisories)}
}

// PlatformAndModule merges platform and TDX module, without the quoting enclave: what
// dcap-qvl calls the status of the platform.
func (r *Report) PlatformAndModule() TCB {
	return merge(converge(r.Platform.Status, r.Module.Status), &r.Platform, &r.Module)
}
