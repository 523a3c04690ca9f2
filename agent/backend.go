package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/renameio/v2"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/measure/tsm"
)

const maxCCEL = 16 << 20

// backend is the TD the agent runs in: the kernel's, or a simulated one behind the
// same interfaces.
type backend struct {
	quoter         measure.Quoter // nil if the kernel offers no quotes
	registers      measure.RegisterBank
	quoteSource    string
	registerSource string
	canExtend      bool
	simulated      bool
	boot           []measure.Event // from the CCEL; nil if there is none
	notes          []string
	close          func() error
	td             *tdxsim.TD // nil if the TD is real
}

func kernelPaths(cfg *Config) tsm.Paths {
	p := tsm.Paths{AttestConf: cfg.Kernel.AttestConf, Entry: cfg.Kernel.Entry}
	if cfg.Kernel.AllowEnvOverrides {
		p.Env = os.Getenv
	}
	return p
}

func openBackend(cfg *Config, dir runtimeDir, simulate bool) (*backend, error) {
	if simulate {
		return openSimulated(cfg, dir)
	}
	k, err := tsm.Detect(kernelPaths(cfg))
	if err != nil {
		return nil, err
	}
	b := &backend{quoter: k.Quoter, registers: k.Registers, quoteSource: k.QuoteSource, registerSource: k.RegisterSource,
		canExtend: k.CanExtend, notes: k.Notes, close: k.Close}
	raw, err := readCCEL(dir.ccel(), cfg.Kernel.CCEL)
	if err != nil {
		b.notes = append(b.notes, fmt.Sprintf("no boot event log: %v", err))
		return b, nil
	}
	return b, b.parseCCEL(raw)
}

// readCCEL prefers the copy that kernel-setup made, since the original is for root.
func readCCEL(paths ...string) (raw []byte, err error) {
	for _, p := range paths {
		if raw, err = readCapped(p, maxCCEL); err == nil {
			return raw, nil
		}
	}
	return nil, err
}

func (b *backend) parseCCEL(raw []byte) (err error) {
	if b.boot, err = measure.ParseCCEL(raw); err != nil {
		b.close()
		return fmt.Errorf("boot event log (CCEL): %w", err)
	}
	return nil
}

func openSimulated(cfg *Config, dir runtimeDir) (*backend, error) {
	if tsm.Present(kernelPaths(cfg)) {
		return nil, exitf(exitUsage, "--simulate is refused: this is a real TDX guest; run without it")
	}
	td, err := tdxsim.Open(dir.td())
	if err != nil {
		return nil, fmt.Errorf("simulated TD: %w", err)
	}
	reports, err := tsm.OpenReports(tsm.ReportsConfig{Client: td.Client(), Entry: cfg.Kernel.Entry})
	if err != nil {
		td.Close()
		return nil, fmt.Errorf("simulated TD: %w", err)
	}
	b := &backend{quoter: reports, registers: td, quoteSource: "configfs-tsm", registerSource: "sysfs", canExtend: true, simulated: true, td: td,
		close: func() error { return errors.Join(reports.Close(), td.Close()) }}
	return b, b.parseCCEL(td.CCEL())
}

// publishSimulated leaves beside the sockets what a verifier needs to judge the
// simulated TD's quotes today: its root certificate and its collateral.
func (b *backend) publishSimulated(dir runtimeDir) error {
	if b.td == nil {
		return nil
	}
	bundle, err := b.td.Collateral()
	if err != nil {
		return err
	}
	return errors.Join(renameio.WriteFile(dir.simulatedRoot(), b.td.RootPEM(), 0o600), renameio.WriteFile(dir.simulatedCollateral(), bundle, 0o600))
}

// rebootSimulated starts a fresh boot of the simulated TD, if there is one.
func rebootSimulated(dir runtimeDir) error {
	if _, err := os.Stat(dir.td()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	td, err := tdxsim.Open(dir.td())
	if err != nil {
		return fmt.Errorf("simulated TD: %w", err)
	}
	defer td.Close()
	return td.Reboot()
}
