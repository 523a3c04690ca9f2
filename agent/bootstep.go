package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// openLedger opens the RTMR3 log of a TD. Beside dstack it honours dstack's lock and
// knows dstack's log.
func openLedger(ctx context.Context, cfg *Config, dir runtimeDir, b *backend) (*measure.Ledger, error) {
	lc := measure.LedgerConfig{Dir: dir.log(), Registers: b.registers}
	if !b.simulated && cfg.Boot.DstackLogs != "" {
		lc.DstackLock = filepath.Join(cfg.Boot.DstackLogs, "dstack/runtime_event.lock")
		lc.Imported = func() ([]measure.Event, error) {
			events, err := measure.ReadDstackLog(cfg.Boot.DstackLogs)
			if errors.As(err, new(*measure.TornLineError)) {
				err = nil // the whole lines may explain the register; if not, it diverges
			}
			return events, err
		}
	}
	return measure.OpenLedger(ctx, lc)
}

// measureBoot is the boot step: it extends RTMR3 with the application's identity, in
// the order of the configured era. It may be repeated at will: what is measured
// already is compared, not extended again, and a difference is an error. It returns
// how many events it has added. Of two that run at once, the second waits for the
// first and finds nothing left to do.
func measureBoot(ctx context.Context, cfg *Config, dir runtimeDir, l *measure.Ledger, files *measure.GuestFiles) (int, error) {
	lock, err := lockMeasure(ctx, dir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	s, err := l.Snapshot(ctx)
	if err != nil {
		return 0, err
	}
	if len(s.Records) > 0 && s.Records[0].Caller == "dstack" {
		return 0, checkDstackBoot(s.Events(), files)
	}
	if len(s.Records) == 0 {
		if err := forgetBoot(dir); err != nil {
			return 0, err
		}
	}
	if err := checkAgentKey(dir, s.Events()); err != nil {
		return 0, err
	}
	in, err := bootInput(cfg, dir, files)
	if err != nil {
		return 0, err
	}
	events, err := measure.BootSequence(in)
	if err != nil {
		return 0, withExit(exitConfig, err)
	}
	version := files.Compose.EventLogVersion
	added := 0
	for i, e := range events {
		if i < len(s.Records) {
			if err := sameEvent(s.Records[i], e, version); err != nil {
				return added, err
			}
			continue
		}
		if _, err := l.Record(ctx, measure.Entry{Name: e.Name, Payload: e.Payload, Version: version, Caller: "measure"}); err != nil {
			return added, err
		}
		added++
	}
	return added, nil
}

// measureWait bounds the wait for another boot step; one takes milliseconds.
const measureWait = 30 * time.Second

// lockMeasure waits until no other process takes the boot step. The lock ends with
// the process.
func lockMeasure(ctx context.Context, dir runtimeDir) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, measureWait)
	defer cancel()
	for {
		f, err := tryLock(dir.path("log/measure.lock"))
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("another boot step holds %s: %w", dir.path("log/measure.lock"), ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// forgetBoot removes what an earlier boot has left where the folder outlived it.
func forgetBoot(dir runtimeDir) error {
	for _, f := range []string{dir.agentKey(), dir.seed(), dir.appSeed()} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func sameEvent(r measure.Record, e measure.BootEvent, version int) error {
	want, err := measure.NewRuntimeEvent(e.Name, e.Payload, max(version, measure.EventV1))
	if err != nil {
		return err
	}
	if r.Name != e.Name {
		return withExit(exitFailure, &measure.ConflictError{Name: e.Name, Reason: fmt.Sprintf("event %d of this boot is %q; the order of events cannot change before a reboot", r.Seq, r.Name)})
	}
	if r.Digest != want.Digest {
		return &measure.ConflictError{Name: e.Name, Reason: fmt.Sprintf("measured payload %s, now %x; a second value is refused until a reboot", r.Payload, e.Payload)}
	}
	return nil
}

// checkDstackBoot judges a boot that dstack-util has measured: nothing is added to
// it, but what it measured must be this application.
func checkDstackBoot(events []measure.Event, files *measure.GuestFiles) error {
	id, err := measure.IdentityOf(events)
	if err != nil {
		return err
	}
	if !id.Ready {
		return errors.New("dstack-util has begun to measure this boot and has not finished (no system-ready event); run the boot step after it")
	}
	if h := sha256.Sum256(files.AppCompose); !bytes.Equal(h[:], id.ComposeHash) {
		return &measure.ConflictError{Name: measure.EventComposeHash, Reason: fmt.Sprintf("dstack-util measured %x, app-compose.json hashes to %x", id.ComposeHash, h)}
	}
	return nil
}

func bootInput(cfg *Config, dir runtimeDir, files *measure.GuestFiles) (measure.BootInput, error) {
	era, err := measure.ParseEra(cfg.Boot.Era)
	if err != nil {
		return measure.BootInput{}, withExit(exitConfig, err)
	}
	in := measure.BootInput{Files: files, Era: era, StorageFS: cfg.Boot.StorageFS, AgentConfig: cfg.agentConfig()}
	for _, h := range []struct {
		to   *[]byte
		from string
	}{{&in.OSImageHash, cfg.Boot.OSImageHash}, {&in.RootFSHash, cfg.Boot.RootFSHash}, {&in.CACertHash, cfg.Boot.CACertHash}, {&in.MRKMS, cfg.Boot.MRKMS}} {
		if *h.to, err = hash32(h.from); err != nil {
			return in, withExit(exitConfig, err)
		}
	}
	if p := cfg.Boot.GPUAttestation; p != "" {
		if in.GPUAttestation, err = readCapped(p, 4096); err != nil {
			return in, fmt.Errorf("boot.gpu_attestation: %w", err)
		}
	}
	if in.InstanceIDSeed, err = instanceSeed(dir, files); err != nil {
		return in, err
	}
	if cfg.Boot.AgentKey {
		key, err := agentKey(dir)
		if err != nil {
			return in, err
		}
		in.AgentKey = &key.PublicKey
	}
	return in, nil
}

// instanceSeed chooses the seed of the instance id once for a boot. It is kept so
// that a boot step that was interrupted goes on with the same one.
func instanceSeed(dir runtimeDir, files *measure.GuestFiles) ([]byte, error) {
	if seed, err := readCapped(dir.seed(), 20); err == nil && len(seed) == 20 {
		return seed, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	seed, err := measure.InstanceIDSeed(files, rand.Reader)
	if err != nil || len(seed) == 0 {
		return nil, err
	}
	return seed, renameio.WriteFile(dir.seed(), seed, 0o400)
}

// loadAgentKey loads the agent key that the boot step has left. The error is
// fs.ErrNotExist if there is none.
func loadAgentKey(dir runtimeDir) (*ecdsa.PrivateKey, error) {
	b, err := readCapped(dir.agentKey(), 4096)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM block", dir.agentKey())
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if ec, ok := key.(*ecdsa.PrivateKey); ok && err == nil && ec.Curve == elliptic.P256() {
		return ec, nil
	}
	return nil, fmt.Errorf("%s holds no P-256 key", dir.agentKey())
}

// checkAgentKey refuses to make a second agent key where this boot has measured one
// that is gone: nobody could tell it from a key of somebody else.
func checkAgentKey(dir runtimeDir, events []measure.Event) error {
	if !slices.ContainsFunc(events, func(e measure.Event) bool { return e.IsRuntime() && e.Name == measure.EventAgentKey }) {
		return nil
	}
	if _, err := loadAgentKey(dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("agent key %s is gone, and this boot has measured it: attested channels work again after the next boot", dir.agentKey())
	}
	return nil
}

// agentKey loads this boot's agent key, or makes it. It never leaves the runtime
// directory, which is in memory, and its public half is measured.
func agentKey(dir runtimeDir) (*ecdsa.PrivateKey, error) {
	if key, err := loadAgentKey(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	doc := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	defer clear(doc)
	return key, renameio.WriteFile(dir.agentKey(), doc, 0o400)
}

// readGuest reads the application's files: the folder given, else the configured
// one; in a simulated TD that was given none, the built-in sample.
func readGuest(cfg *Config, given string, simulate bool) (*measure.GuestFiles, error) {
	dir := cfg.Boot.HostShared
	if given != "" {
		dir = given
	} else if simulate {
		return measure.SampleApp(), nil
	}
	f, err := measure.ReadGuestFiles(dir, measure.GuestFileOptions{AppKeys: cfg.Boot.AppKeys, SysConfigOptional: true})
	if err != nil {
		return nil, fmt.Errorf("the application's files: %w", err)
	}
	return f, nil
}

// checkLoosened refuses settings that are looser than what this boot has measured: a
// remote verifier would not see them.
func checkLoosened(cfg *Config, events []measure.Event) error {
	now := cfg.agentConfig()
	if now == nil {
		return nil
	}
	for _, e := range events {
		if e.Name == measure.EventSystemReady {
			break
		}
		if e.Name == measure.EventAgentConfig && bytes.Equal(e.Payload, now) {
			return nil
		}
	}
	return exitf(exitConfig, "the settings %s loosen defaults, and RTMR3 holds no %s event that says so: run the boot step with the same configuration after a reboot, or set them back", now, measure.EventAgentConfig)
}
