package collateral

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"time"

	"tdx-agent/remote/dcap"
)

// Update channels. Early has a TCB recovery's TCB info as soon as it is out, standard
// when platforms had time to follow.
const (
	channelStandard = "standard"
	channelEarly    = "early"
)

func isChannel(c string) bool { return c == channelStandard || c == channelEarly }

func isCA(ca string) bool { return ca == dcap.CAPlatform || ca == dcap.CAProcessor }

// Config says where a [Store] gets collateral from. Files come first, then the cache
// in Dir, then PCCS in their order, then Intel's PCS. Nothing is fetched from a source
// that is not named here.
type Config struct {
	// Roots are what collateral must end in. Required.
	Roots *dcap.Roots
	// Enclaves says that the collateral is for quotes of SGX enclaves, which have TCB info
	// and a quoting enclave of their own ([dcap.ParseEnclaveCollateral]). What Dir then
	// keeps is in the folder sgx in it.
	Enclaves bool
	// Files are bundle files (the JSON of [dcap.Bundle]) and folders with files
	// *.json: at most 256, of 5 MiB each and 64 MiB together.
	Files []string
	// PCCS are base URLs, https or http, without user, query or fragment. Collateral
	// is signed: what http gives away is which platforms are asked about.
	PCCS []string
	// IntelPCS asks Intel's PCS last.
	IntelPCS bool
	// Dir is the state folder, made if it is missing, with the cached bundles and
	// the rollback floor. More than one process may use it. Empty: memory alone, so
	// that a restart forgets the floor.
	Dir string
	// UpdateChannel is "standard" (also if empty) or "early". Each has its own floor.
	UpdateChannel string
	// AllowRollback takes collateral that is behind the floor, which stays where it
	// is. It gives an attacker back every TCB and every PCK certificate that was
	// revoked in the last 30 days.
	AllowRollback bool
	// StaleGrace must be that of the [dcap.Config], which judges, see
	// [Store.StaleGrace]: for so long a set is handed out after its end if there is no newer one. Zero: not at all. At
	// most [dcap.MaxStaleGrace].
	StaleGrace time.Duration

	// TLSRoots are what PCCS certificates must end in. Nil: the system's.
	TLSRoots *x509.CertPool
	// Dial connects to a source. Nil: TCP, or the proxy that the environment names.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Limits are the defaults if they are zero.
	Limits Limits

	Now    func() time.Time                                 // nil: time.Now
	Jitter func(most time.Duration) time.Duration           // from 0 to most. Nil: random
	Wait   func(ctx context.Context, d time.Duration) error // until d passed or ctx ended. Nil: a timer
	Logger *slog.Logger                                     // nil: none
}

// Limits bound what a [Store] spends. A zero field has the default.
type Limits struct {
	Connect   time.Duration // for TCP, and for TLS. Default: 5 s
	Source    time.Duration // for all answers of one source. Default: 15 s
	Refused   time.Duration // how long a failed fetch is not tried again. Default: 60 s
	PerMinute int           // how often any source is asked for a set. Default: 30, at once or in a minute
	Sets      int           // fetched sets, in memory and in Dir. Default: 64
}

// complete fills in the defaults of cfg and checks it.
func (cfg *Config) complete() *Error {
	defaults(&cfg.UpdateChannel, channelStandard)
	defaults(&cfg.Limits.Connect, 5*time.Second)
	defaults(&cfg.Limits.Source, 15*time.Second)
	defaults(&cfg.Limits.Refused, time.Minute)
	defaults(&cfg.Limits.PerMinute, 30)
	defaults(&cfg.Limits.Sets, 64)
	defaults(&cfg.Logger, slog.New(slog.DiscardHandler))
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Jitter == nil {
		cfg.Jitter = func(most time.Duration) time.Duration { return rand.N(most + 1) }
	}
	if cfg.Wait == nil {
		cfg.Wait = wait
	}
	l := &cfg.Limits
	switch {
	case cfg.Roots == nil || cfg.Roots.Name() == "none":
		return &Error{Code: "config", Got: "no roots", Hint: "give dcap.IntelRoots or dcap.NewRoots"}
	case !isChannel(cfg.UpdateChannel):
		return &Error{Code: "config", Got: fmt.Sprintf("update channel %q", cfg.UpdateChannel), Want: `"standard" or "early"`}
	case cfg.StaleGrace < 0 || cfg.StaleGrace > dcap.MaxStaleGrace:
		return &Error{Code: "config", Got: fmt.Sprint("stale grace of ", cfg.StaleGrace), Want: fmt.Sprint("0 to ", dcap.MaxStaleGrace)}
	case min(l.Connect, l.Source, l.Refused) < 0 || min(l.PerMinute, l.Sets) < 0:
		return &Error{Code: "config", Got: "a limit below 0", Want: "0 for the default, or more"}
	}
	return nil
}

// parse checks a bundle.
func (cfg *Config) parse(bundle []byte) (*dcap.Collateral, error) {
	if cfg.Enclaves {
		return dcap.ParseEnclaveCollateral(bundle, cfg.Roots)
	}
	return dcap.ParseCollateral(bundle, cfg.Roots)
}

func defaults[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
