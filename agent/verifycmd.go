package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/measure"
	"tdx-agent/measure/tsm"
	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// verifyTimeout bounds one verification, with the fetch of its collateral.
const verifyTimeout = 90 * time.Second

// verifierFlags say how to judge evidence.
type verifierFlags struct {
	policy, root, at, state string
	image                   string
	staleGrace              time.Duration
	allowRollback           bool
	collateral, pccs        []string
	enclaves                bool     // the collateral is for SGX enclaves' quotes
	dial                    dialFunc // of collateral; nil: this process's own network
	isReal                  bool     // our TD is real, though this process may not see it
}

func (f *verifierFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.policy, "policy", "", "policy file (default: the built-in policy, which pins no image and no application)")
	cmd.Flags().StringVar(&f.image, "image", "", "metadata.json of the OS image, or its measurement.tdx.cbor: the registers are calculated from it and the evidence's vm_config")
	f.addSources(cmd)
}

func (f *verifierFlags) addSources(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "", "PEM file of the root certificate to trust instead of Intel's, as that of a simulated TD")
	cmd.Flags().StringArrayVar(&f.collateral, "collateral", nil, "file or folder of collateral (dcap-qvl's QuoteCollateralV3); with it nothing is fetched unless --pccs is given")
	cmd.Flags().StringArrayVar(&f.pccs, "pccs", nil, "base address of a PCCS to fetch collateral from (default: Intel's PCS)")
	cmd.Flags().StringVar(&f.at, "at", "", "judge at this time (RFC 3339) instead of now")
	cmd.Flags().DurationVar(&f.staleGrace, "stale-grace", 0, "use collateral for so long after its end where there is no newer one, at most 72h; the policy must say allow_stale_collateral")
	cmd.Flags().BoolVar(&f.allowRollback, "allow-collateral-rollback", false, "take collateral older than what was seen before: gives back revocations of the last 30 days")
	cmd.Flags().StringVar(&f.state, "state-dir", "", "folder of fetched collateral and the guard against older one (default "+stateDefault+", or below $XDG_STATE_HOME for users)")
}

const stateDefault = "/var/lib/tdx-agent"

// verifier makes the Verifier that the flags ask for.
func (f *verifierFlags) verifier(ctx context.Context, log *slog.Logger) (*remote.Verifier, *collateral.Store, error) {
	policy, store, err := f.sources(ctx, log)
	if err != nil {
		return nil, nil, err
	}
	now, err := f.clock()
	if err != nil {
		return nil, nil, err
	}
	v, err := remote.NewVerifier(remote.Config{Policy: policy, Collateral: store, Now: now, RealHardware: f.isReal || tsm.Present(tsm.Paths{})})
	return v, store, withExit(exitConfig, err)
}

// sources reads what the flags name.
func (f *verifierFlags) sources(ctx context.Context, log *slog.Logger) (*remote.Policy, *collateral.Store, error) {
	policy, err := f.readPolicy(ctx)
	if err != nil {
		return nil, nil, err
	}
	now, err := f.clock()
	if err != nil {
		return nil, nil, err
	}
	store, err := f.store(policy, now, log)
	return policy, store, err
}

func (f *verifierFlags) readPolicy(ctx context.Context) (p *remote.Policy, err error) {
	switch {
	case f.policy != "" && f.root != "":
		return nil, exitf(exitUsage, `--root does not go with --policy: a policy names its roots itself (root = "sha256:...")`)
	case f.policy != "":
		p, err = readPolicy(ctx, f.policy)
	case f.root != "":
		var pin [32]byte
		if pin, err = readRoot(f.root); err == nil {
			p = remote.BuiltinPolicy(pin)
		}
	default:
		p = remote.BuiltinPolicy()
	}
	if err == nil && f.image != "" {
		err = withExit(exitConfig, p.RequireImage(ctx, f.image))
	}
	return p, err
}

// readPolicy reads a policy with the images that it names.
func readPolicy(ctx context.Context, path string) (*remote.Policy, error) {
	b, err := readCapped(path, remote.MaxPolicy)
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	p, err := remote.ParsePolicy(path, b)
	if err == nil {
		if err = p.LoadImages(ctx); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	return p, withExit(exitConfig, err)
}

// readRoot returns the SHA-256 of the certificate in a PEM file.
func readRoot(path string) (pin [32]byte, err error) {
	b, err := readCapped(path, 64<<10)
	if err != nil {
		return pin, withExit(exitConfig, err)
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 && pemFollows(rest) {
		return pin, exitf(exitConfig, "%s: want one PEM certificate, that of a root", path)
	}
	return sha256.Sum256(block.Bytes), nil
}

func pemFollows(rest []byte) bool {
	block, _ := pem.Decode(rest)
	return block != nil
}

func (f *verifierFlags) clock() (func() time.Time, error) {
	if f.at == "" {
		return time.Now, nil
	}
	at, err := time.Parse(time.RFC3339, f.at)
	if err != nil {
		return nil, exitf(exitUsage, "--at is %q, want a time as 2026-11-25T12:00:00Z", f.at)
	}
	return func() time.Time { return at }, nil
}

// store makes the source of collateral. What is judged at another time than now must
// not touch what is remembered of the newest collateral.
func (f *verifierFlags) store(p *remote.Policy, now func() time.Time, log *slog.Logger) (*collateral.Store, error) {
	roots, err := p.Roots()
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	cfg := collateral.Config{Roots: roots, Enclaves: f.enclaves, Files: f.collateral, PCCS: f.pccs, Now: now, Logger: log,
		IntelPCS: len(f.collateral) == 0 && len(f.pccs) == 0 && slices.Contains(roots.Pins(), dcap.IntelRoot()),
		Dial:     f.dial, StaleGrace: f.staleGrace, AllowRollback: f.allowRollback}
	if (cfg.IntelPCS || len(f.pccs) > 0) && f.at == "" {
		if cfg.Dir, err = f.stateDir(); err != nil {
			return nil, err
		}
	}
	store, err := collateral.New(cfg)
	return store, withExit(exitConfig, err)
}

func (f *verifierFlags) stateDir() (string, error) {
	dir := f.state
	switch {
	case dir != "":
	case os.Getenv("STATE_DIRECTORY") != "": // systemd's StateDirectory=
		dir = os.Getenv("STATE_DIRECTORY")
	case os.Geteuid() == 0:
		dir = stateDefault
	default:
		base := os.Getenv("XDG_STATE_HOME")
		if base == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return "", exitf(exitConfig, "no folder for what is known of collateral: give --state-dir (%v)", err)
			}
			base = filepath.Join(home, ".local", "state")
		}
		dir = filepath.Join(base, "tdx-agent")
	}
	return dir, os.MkdirAll(dir, 0o700)
}

func newVerify() *cobra.Command {
	var in evidenceFlags
	var f verifierFlags
	var reportData, compose, mrConfig, format string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Judge the evidence of a TD: genuine, which TCB, what booted, which application, fresh",
		Long: `Judge the evidence of a TD, by its policy or the built-in one: the TCB is UpToDate by
complete and current collateral, the TD is no debug TD, has SEPT_VE_DISABLE and no
service TD. What nobody pinned is shown as NOT CHECKED.
Exit status 0 valid, 5 refused by the policy, 6 not genuine or not to be read.`,
		Example: `  tdx-agent verify --quote quote.json --report-data 1234
  tdx-agent verify --quote quote.bin --collateral bundle.json --at 2025-09-17T07:22:55Z
  tdx-agent verify --quote quote.json --policy policy.toml --format json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wantJSON(cmd) {
				format = "json"
			}
			write, ok := verdictFormats[format]
			if !ok {
				return exitf(exitUsage, "--format is %q, want text, json, dcap-qvl or dstack", format)
			}
			x, err := readExpect(cmd, reportData, compose, mrConfig)
			if err != nil {
				return err
			}
			r, err := judge(cmd, &in, &f, x)
			if err != nil {
				return err
			}
			exit := verdictExit(r)
			if err := write(cmd, r); err != nil && exit == nil {
				return err
			} else if err != nil {
				return withExit(exitCode(exit), err)
			}
			return exit
		},
	}
	in.add(cmd)
	f.add(cmd)
	addExpect(cmd, &reportData, &compose, &mrConfig)
	cmd.Flags().StringVar(&format, "format", "text", "text, json, dcap-qvl or dstack")
	jsonFlag(cmd)
	cmd.AddCommand(newVerifyServe())
	return cmd
}

// addExpect adds the flags that readExpect reads.
func addExpect(cmd *cobra.Command, reportData, compose, mrConfig *string) {
	cmd.Flags().StringVar(reportData, "report-data", "", "what the quote must bind: at most 64 bytes in hexadecimal, padded with zeros")
	cmd.Flags().StringVar(compose, "compose", "", "app-compose.json that must be the measured one")
	cmd.Flags().StringVar(mrConfig, "mr-config", "", "file with the document that a version 3 MRCONFIGID is the hash of (mr_config of .sys-config.json)")
}

func readExpect(cmd *cobra.Command, reportData, compose, mrConfig string) (x remote.Expect, err error) {
	x.AnyReportData = !cmd.Flags().Changed("report-data")
	if !x.AnyReportData {
		b, err := hex.DecodeString(reportData)
		if err == nil {
			x.ReportData, err = measure.NewReportData(b)
		}
		if err != nil {
			return x, exitf(exitUsage, "--report-data is %q, want at most 64 bytes in hexadecimal", reportData)
		}
	}
	if compose != "" {
		if x.Compose, err = readInput(compose); err != nil {
			return x, err
		}
	}
	if mrConfig != "" {
		b, err := readInput(mrConfig)
		if err != nil {
			return x, err
		}
		x.MRConfig = string(b)
	}
	return x, nil
}

// appraise returns the Result in either case.
func appraise(ctx context.Context, v *remote.Verifier, ev *measure.Evidence, x remote.Expect) (*remote.Result, error) {
	r, err := v.Appraise(ctx, ev, x)
	if rejection, ok := errors.AsType[*remote.Rejection](err); ok {
		return rejection.Result, nil
	}
	return r, err
}

// verdictFormats are the forms that verify prints.
var verdictFormats = map[string]func(*cobra.Command, *remote.Result) error{
	"text": func(cmd *cobra.Command, r *remote.Result) error {
		writeVerdict(cmd.OutOrStdout(), r)
		return nil
	},
	"json":   func(cmd *cobra.Command, r *remote.Result) error { return printJSON(cmd, makeVerdict(r)) },
	"dstack": func(cmd *cobra.Command, r *remote.Result) error { return printJSON(cmd, makeVerdict(r).dstack()) },
	"dcap-qvl": func(cmd *cobra.Command, r *remote.Result) error {
		q := makeVerdict(r).QVL
		if q == nil {
			return &remote.Rejection{Result: r} // dcap-qvl has no form for it
		}
		return printJSON(cmd, q)
	},
}

func printJSON(cmd *cobra.Command, v any) error {
	e := json.NewEncoder(cmd.OutOrStdout())
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// verdictExit gives a verdict its exit status. What failed has been shown.
func verdictExit(r *remote.Result) error {
	switch {
	case r.Accepted:
		return nil
	case r.Genuine():
		return exitf(exitPolicy, "not valid: policy %s refuses the evidence", r.Policy)
	}
	return exitf(exitEvidence, "not valid: the evidence is not genuine")
}
