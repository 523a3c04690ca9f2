package keys

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	nacl "golang.org/x/crypto/nacl/box"

	"tdx-agent/measure"
	"tdx-agent/remote/dcap"
)

// LocalConfig says how to ask dstack's local key provider, and when to believe it. All but
// Timeout and Now are required.
type LocalConfig struct {
	// Measured returns what this boot has measured, or why nothing may be asked for yet.
	// The provider is the enclave whose MRENCLAVE is the id in its key-provider event.
	Measured func(ctx context.Context) (*measure.Identity, error)
	// Dial connects to the host API, and Path is below which path it is, such as "/api".
	Dial func(ctx context.Context) (net.Conn, error)
	Path string
	// Attest makes the evidence that the provider judges us by: only the quote is sent.
	Attest Attest
	// Verifier verifies the quote of the provider, by what Collateral returns.
	Verifier   *dcap.Verifier
	Collateral func(ctx context.Context) (*dcap.Collateral, error)
	// TCBStatus are the statuses of the provider's platform that are accepted.
	TCBStatus []dcap.Status
	// Timeout bounds the exchange; default 60 s.
	Timeout time.Duration
	Now     func() time.Time // nil: time.Now
}

// Local is dstack's local key provider: an SGX enclave on the host that gives each
// application a seed, through the host API. It implements [Provider].
//
// The host carries the messages and is not believed: our key for this one exchange is in
// our quote, so that only we can open the answer; the hash of the answer is in the
// enclave's quote, so that only the enclave can have made it. How the enclave makes the
// seed, and that it judges our quote, follows from its MRENCLAVE and from nothing else.
type Local struct{ cfg LocalConfig }

// NewLocal checks cfg and connects to nobody.
func NewLocal(cfg LocalConfig) (*Local, error) {
	if cfg.Measured == nil || cfg.Dial == nil || cfg.Attest == nil || cfg.Verifier == nil || cfg.Collateral == nil || len(cfg.TCBStatus) == 0 {
		return nil, errors.New("local key provider: Measured, Dial, Attest, Verifier, Collateral and TCBStatus are required")
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 60 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Local{cfg}, nil
}

// The reasons of a [LocalError].
const (
	LocalUnreachable = "unreachable" // no connection, no answer in time, or a broken one
	LocalDenied      = "denied"      // the host API has refused us
	LocalAnswer      = "answer"      // its answer is not one
	LocalQuote       = "quote"       // the provider's quote is not genuine
	LocalEnclave     = "enclave"     // it is of another enclave than the measured one, or of one in debug mode
	LocalTCB         = "tcb"         // its platform's TCB status is not accepted
	LocalBinding     = "binding"     // it vouches for another answer
)

// LocalError says why the local key provider gave no keys.
type LocalError struct {
	Reason string // LocalUnreachable and so on
	Err    error
}

func (e *LocalError) Error() string {
	return fmt.Sprintf("local key provider: %s: %v", e.Reason, e.Err)
}

// Unwrap returns Err.
func (e *LocalError) Unwrap() error { return e.Err }

// ExitCode is the program's exit status for this error.
func (e *LocalError) ExitCode() int {
	switch e.Reason {
	case LocalUnreachable:
		return 10
	case LocalDenied:
		return 8
	case LocalAnswer:
		return 1
	case LocalQuote:
		return 6
	}
	return 5
}

func localFault(reason, format string, a ...any) error {
	return &LocalError{Reason: reason, Err: fmt.Errorf(format, a...)}
}

// App implements [Provider].
func (l *Local) App(ctx context.Context) (*App, error) {
	id, err := l.cfg.Measured(ctx)
	if err != nil {
		return nil, err
	}
	provider, err := measure.ParseKeyProvider([]byte(id.KeyProvider))
	if err == nil && (provider.Kind != measure.KeyProviderLocal || len(provider.ID) != 32) {
		err = fmt.Errorf("this boot has measured key provider %s, want a local one with an MRENCLAVE of 32 bytes", id.KeyProvider)
	}
	if err != nil {
		return nil, fmt.Errorf("local key provider: %w", err)
	}
	public, private, err := nacl.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	defer clear(private[:])
	var rd measure.ReportData
	copy(rd[:], public[:])
	ev, err := l.cfg.Attest(ctx, rd)
	if err != nil {
		return nil, fmt.Errorf("local key provider: evidence for it: %w", err)
	}
	sealed, quote, err := l.sealingKey(ctx, ev.Quote)
	if err != nil {
		return nil, err
	}
	if err := l.appraise(ctx, quote, sealed, provider.ID); err != nil {
		return nil, err
	}
	seed, ok := nacl.OpenAnonymous(nil, sealed, public, private)
	defer clear(seed)
	if !ok || len(seed) != 32 {
		return nil, localFault(LocalAnswer, "encrypted_key does not hold 32 bytes for our key")
	}
	return appOfSeed(seed, provider)
}

// sealingKey makes the exchange: a seed in a sealed box (libsodium's), and the quote that
// vouches for it.
func (l *Local) sealingKey(ctx context.Context, ours []byte) (sealed, quote []byte, err error) {
	body, err := json.Marshal(map[string]string{"quote": hex.EncodeToString(ours)})
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	status, answer, err := l.exchange(ctx, body)
	switch {
	case errors.As(err, &tooLargeError{}):
		return nil, nil, localFault(LocalAnswer, "%w", err)
	case err != nil && ctx.Err() != nil:
		return nil, nil, localFault(LocalUnreachable, "no answer within %s: %w", l.cfg.Timeout, ctx.Err())
	case err != nil:
		return nil, nil, localFault(LocalUnreachable, "%w", err)
	case status != http.StatusOK:
		return nil, nil, localFault(LocalDenied, "status %d: %s", status, errorText(answer))
	}
	doc, err := measure.ParseJSONObject(answer)
	if err != nil {
		return nil, nil, localFault(LocalAnswer, "%w", err)
	}
	if sealed, err = secretHex(doc, "encrypted_key", maxSealedSeed); err != nil {
		return nil, nil, localFault(LocalAnswer, "%w", err)
	}
	if quote, err = secretHex(doc, "provider_quote", maxProviderQuote); err != nil {
		return nil, nil, localFault(LocalAnswer, "%w", err)
	}
	return sealed, quote, nil
}

// The bounds of the answer's members, in bytes.
const (
	maxSealedSeed    = 32 + nacl.AnonymousOverhead
	maxProviderQuote = 16 << 10
)

func (l *Local) exchange(ctx context.Context, body []byte) (int, []byte, error) {
	conn, err := l.cfg.Dial(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	return post(conn, "http://localhost"+l.cfg.Path+"/GetSealingKey?json", body)
}

// appraise decides whether the sealed seed is the measured enclave's.
func (l *Local) appraise(ctx context.Context, quote, sealed, enclave []byte) error {
	c, err := l.cfg.Collateral(ctx)
	if err != nil {
		return fmt.Errorf("local key provider: collateral: %w", err)
	}
	r, err := l.cfg.Verifier.VerifyEnclave(quote, c, l.cfg.Now())
	if err != nil {
		return localFault(LocalQuote, "%w", err)
	}
	switch hash := sha256.Sum256(sealed); {
	case !bytes.Equal(r.MREnclave[:], enclave):
		return localFault(LocalEnclave, "its MRENCLAVE is %x, but this boot has measured %x", r.MREnclave, enclave)
	case r.Debug:
		return localFault(LocalEnclave, "it is in debug mode, in which the host can read it")
	case !slices.Contains(l.cfg.TCBStatus, r.Merged.Status):
		return localFault(LocalTCB, "the TCB status of its platform is %s (%v), want one of %v", r.Merged.Status, r.Merged.Advisories, l.cfg.TCBStatus)
	case subtle.ConstantTimeCompare(hash[:], r.ReportData[:32]) != 1:
		return localFault(LocalBinding, "its quote is not for the key that came with it")
	}
	return nil
}
