package remote

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"tdx-agent/remote/ratls"
)

// CertificateError says that a certificate is not to be appraised: it carries no
// evidence, or evidence for another key, or is not of this time.
type CertificateError struct{ Err error }

func (e *CertificateError) Error() string { return e.Err.Error() }

// Unwrap returns the cause, such as [ratls.ErrNoAttestation].
func (e *CertificateError) Unwrap() error { return e.Err }

// AppraiseCertificate judges the evidence in the first of the certificates that a TLS
// peer shows (dstack RA-TLS): it must be bound to that certificate's key. The caller
// must know that the peer holds the key, as TLS shows, and may call this before it
// knows. What issuers say of the holder is no evidence and is not read.
//
// x is as for [Verifier.Appraise], but for ReportData, which follows from the key, and
// CertificateLife.
//
// Accepted certificates of at most 64 KiB are remembered for five minutes, under the
// policy that accepts them. The errors are those of Appraise and a [*CertificateError].
func (v *Verifier) AppraiseCertificate(ctx context.Context, chain []*x509.Certificate, x Expect) (*Result, *ratls.Attested, error) {
	at := v.cfg.Now()
	if len(chain) == 0 {
		return nil, nil, &CertificateError{errors.New("remote: the peer shows no certificate")}
	}
	generation := v.Generation()
	key := newLeafKey(chain[0], generation, &x)
	isKept := x.Compose == nil && x.MRConfig == "" && x.Offered == nil && len(chain[0].Raw) <= maxLeaf // all else is in the key
	if known, ok := v.leaves.Get(key); ok && isKept && at.Sub(known.at).Abs() < maxLeafAge && !at.After(chain[0].NotAfter) && !at.Before(chain[0].NotBefore) {
		return known.result, known.attested, nil
	}
	if err := ratls.CheckLeaf(chain, at); err != nil {
		return nil, nil, &CertificateError{err}
	}
	a, err := ratls.Parse(chain[0])
	if err != nil {
		return nil, nil, &CertificateError{err}
	}
	x.ReportData, x.CertificateLife = a.ReportData, chain[0].NotAfter.Sub(chain[0].NotBefore)
	r, err := v.Appraise(ctx, a.Evidence, x)
	if err != nil {
		return nil, a, err
	}
	if isKept && v.Generation() == generation {
		v.leaves.Add(key, &leafVerdict{result: r, attested: a, at: at})
	}
	return r, a, nil
}

// Bounds of what is remembered of certificates.
const (
	maxLeaves  = 128      // a generation of the cache
	maxLeaf    = 64 << 10 // bytes
	maxLeafAge = 5 * time.Minute
)

// leafKey is a certificate and what it was accepted for.
type leafKey struct {
	sum        [32]byte // SHA-256 of the certificate's DER and the policy's generation
	hasChannel bool
	channel    Channel
	expect     string // the rest of Expect
}

func newLeafKey(leaf *x509.Certificate, generation uint64, x *Expect) (k leafKey) {
	h := sha256.New()
	h.Write(leaf.Raw)
	h.Write(binary.BigEndian.AppendUint64(nil, generation))
	h.Sum(k.sum[:0])
	if x.Channel != nil {
		k.channel, k.hasChannel = *x.Channel, true
	}
	k.expect = fmt.Sprintf("%t %t %q", x.AnyReportData, x.Entries == nil, x.Entries)
	return k
}

// leafVerdict is a certificate that was accepted.
type leafVerdict struct {
	result   *Result
	attested *ratls.Attested
	at       time.Time
}
