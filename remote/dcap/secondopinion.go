package dcap

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/google/go-tdx-guest/abi"
	"github.com/google/go-tdx-guest/verify"
)

// Second opinions.
const (
	opinionAgrees = "agrees"
	opinionNone   = "not consulted: "
)

// guestExtensions is how many extensions go-tdx-guest wants in a PCK certificate.
const guestExtensions = 6

// opinion asks go-tdx-guest about the signatures of a quote, once per PCK
// certificate. It sees a quote only after everything else here accepted it.
func (v *Verifier) opinion(ctx context.Context, quote []byte, chain *pckChain, at time.Time) (string, *Error) {
	if !v.cfg.SecondOpinion {
		return opinionNone + "switched off", nil
	}
	if known, ok := v.opinions.Get(chain.pck.SHA256); ok {
		return known, nil
	}
	if ctx.Err() != nil {
		return "", &Error{Code: "canceled", Stage: stageSecondOpinion, Err: ctx.Err()}
	}
	opinion, err := consult(quote, chain, at)
	if err != nil {
		return "", &Error{Code: "second_opinion", Stage: stageSecondOpinion, Err: err, Hint: "go-tdx-guest refuses what this engine accepts: report it"}
	}
	v.opinions.Add(chain.pck.SHA256, opinion)
	return opinion, nil
}

// consult runs go-tdx-guest without collateral: it decides on signatures, never on
// the TCB, and fetches nothing. The error says that it refuses the signatures; what
// it cannot read, or panics on, it has no opinion on.
func consult(quote []byte, chain *pckChain, at time.Time) (opinion string, err error) {
	defer func() {
		if p := recover(); p != nil {
			opinion, err = opinionNone+fmt.Sprintf("go-tdx-guest panicked: %v", p), nil
		}
	}()
	if chain.pck.CA != CAPlatform {
		return opinionNone + "go-tdx-guest knows the Platform CA only", nil
	}
	if n := len(chain.leaf.Extensions); n != guestExtensions {
		return opinionNone + fmt.Sprintf("go-tdx-guest reads PCK certificates of %d extensions, not %d", guestExtensions, n), nil
	}
	parsed, err := abi.QuoteToProto(quote)
	if err != nil {
		return opinionNone + fmt.Sprintf("go-tdx-guest cannot read the quote: %v", err), nil
	}
	// Without roots it would fall back to Intel's, and say so on standard output.
	roots := x509.NewCertPool()
	roots.AddCert(chain.root)
	// Options hold state of one verification: never share them.
	return opinionAgrees, verify.TdxQuote(parsed, &verify.Options{
		TrustedRoots: roots,
		Now:          &verify.TimeSet{PckCertChain: at, TcbInfo: at, QeIdentity: at, PckCrl: at, RootCaCrl: at},
	})
}
