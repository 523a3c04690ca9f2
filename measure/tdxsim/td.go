package tdxsim

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"tdx-agent/measure"
)

// TD is one simulated trust domain. It may be used by many goroutines, and the
// folder by many processes, at a time.
type TD struct {
	dir      string
	now      func() time.Time
	platform *platform
	boot     []measure.Event

	configfs  *fileLock // held by every configfs operation, through a whole quote
	registers *fileLock // on the state file; never held while waiting for the host

	interrupted chan struct{} // a signal for the reader, at most one pending
	closing     sync.Once
	closed      chan struct{}

	hostMu  sync.Mutex // guards what follows
	host    HostBehaviour
	request *request // the last one put to the host
}

var _ measure.RegisterBank = (*TD)(nil)

// Open opens the simulated TD in this folder. On first use the folder is made
// (0700) and a machine with fresh random keys is put into it and booted. Killing a
// process that has it open loses nothing that a kernel would keep.
func Open(dir string) (*TD, error) {
	return open(dir, Config{}, false)
}

// New makes the TD that cfg describes in a folder that has none yet. Tests use it;
// anything else wants [Open].
func New(dir string, cfg Config) (*TD, error) {
	return open(dir, cfg, true)
}

func open(dir string, cfg Config, fresh bool) (*TD, error) {
	dir, err := filepath.Abs(dir) // the process may change its folder later
	if err != nil {
		return nil, fmt.Errorf("tdxsim: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("tdxsim: %w", err)
	}
	configfs, err := openLock(filepath.Join(dir, "configfs.lock"))
	if err != nil {
		return nil, err
	}
	td := &TD{dir: dir, now: cfg.Now, boot: bootEvents(), configfs: configfs,
		interrupted: make(chan struct{}, 1), closed: make(chan struct{})}
	if td.now == nil {
		td.now = time.Now
	}
	release, err := configfs.acquire()
	if err != nil {
		configfs.file.Close()
		return nil, err
	}
	defer release()
	if err := td.power(cfg, fresh); err != nil {
		configfs.file.Close()
		return nil, err
	}
	return td, nil
}

// machine is the stored form of a platform.
type machine struct {
	Format  int       `json:"format"`
	Secret  string    `json:"secret"` // hexadecimal
	Created time.Time `json:"created"`
	Config  Config    `json:"config"`
}

const machineFormat = 1

// power loads the machine, or makes it, and boots it if it never was.
func (td *TD) power(cfg Config, fresh bool) error {
	m, err := loadMachine(td.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if m, err = makeMachine(td.dir, cfg, td.now()); err != nil {
			return err
		}
	case err != nil:
		return err
	case fresh:
		return fmt.Errorf("tdxsim: %s has a simulated TD already: use Open or another folder", td.dir)
	}
	secret, err := hex.DecodeString(m.Secret)
	if err != nil || len(secret) != sha256.Size {
		return fmt.Errorf("tdxsim: %s: secret is not 64 hexadecimal digits: remove the folder to start anew", td.machineFile())
	}
	if td.platform, err = newPlatform(secret, m.Created, m.Config); err != nil {
		return err
	}
	state := filepath.Join(td.dir, "state")
	if _, err := os.Stat(state); errors.Is(err, fs.ErrNotExist) {
		if err := replaceFile(td.dir, state, td.freshState()); err != nil {
			return err
		}
	}
	td.registers, err = openLock(state)
	return err
}

func (td *TD) machineFile() string { return filepath.Join(td.dir, "machine.json") }

func loadMachine(dir string) (*machine, error) {
	name := filepath.Join(dir, "machine.json")
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("tdxsim: %w", err)
	}
	m := new(machine)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("tdxsim: %s: %v: remove the folder to start anew", name, err)
	}
	if m.Format != machineFormat {
		return nil, fmt.Errorf("tdxsim: %s has format %d, want %d: remove the folder to start anew", name, m.Format, machineFormat)
	}
	return m, nil
}

func makeMachine(dir string, cfg Config, now time.Time) (*machine, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	secret := sha256.Sum256(cfg.Seed)
	if len(cfg.Seed) == 0 {
		// crypto/rand does not fail.
		_, _ = rand.Read(secret[:])
	}
	m := &machine{Format: machineFormat, Secret: hex.EncodeToString(secret[:]), Created: now.UTC(), Config: cfg}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("tdxsim: %v", err)
	}
	if err := renameio.WriteFile(filepath.Join(dir, "machine.json"), b, 0o600); err != nil {
		return nil, fmt.Errorf("tdxsim: %w", err)
	}
	return m, nil
}

// Reboot boots the machine again: the registers are what the boot leaves in them,
// RTMR3 is zero, the configfs entries are gone, and there is a new boot id. Keys
// and certificates stay. Other processes that have the TD open live on in the new
// boot.
func (td *TD) Reboot() error {
	release, err := td.configfs.acquire()
	if err != nil {
		return err
	}
	defer release()
	if err := td.writeState(td.freshState()); err != nil {
		return err
	}
	td.hostMu.Lock()
	td.request = nil
	td.hostMu.Unlock()
	return td.dropOldEntries()
}

// BootID returns the UUID of this boot, as /proc/sys/kernel/random/boot_id is one,
// or "" if the TD was closed.
func (td *TD) BootID() string {
	id, _, err := td.readState()
	if err != nil {
		return ""
	}
	return id
}

// Registers reads the registers. They are never held up by a quote.
func (td *TD) Registers() (measure.Registers, error) {
	_, regs, err := td.readState()
	return regs, err
}

// Extend extends RTMR[index], 0 to 3, with d in one step: whoever is killed has
// extended or has not. Errors are as the kernel's at the register's file.
func (td *TD) Extend(index int, d measure.Digest) error {
	fail := func(op string, err error) error {
		return &fs.PathError{Op: op, Path: registerPath(index), Err: err}
	}
	if index < 0 || index > 3 {
		return fail("open", errNoFile)
	}
	h := td.behaviour()
	if h.ExtendErrno == 0 || h.ExtendMoves {
		if err := td.extendState(index, d); err != nil {
			return fail("write", err)
		}
	}
	if h.ExtendErrno != 0 {
		return fail("write", h.ExtendErrno)
	}
	return nil
}

func registerPath(index int) string {
	return fmt.Sprintf("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr%d:sha384", index)
}

// CCEL returns the boot event log as the data area that the ACPI table CCEL points
// to: 64 KiB, padded with 0xff. RTMR0 to RTMR2 are its replay after every boot.
func (td *TD) CCEL() []byte { return encodeCCEL(td.boot) }

// RootPEM returns the certificate that this TD's quotes and collateral chain to.
func (td *TD) RootPEM() []byte { return pemChain(td.platform.pki.root) }

// QuoteOf returns a quote of another TD with these registers, which this platform's quoting
// enclave signs as it signs those of its own.
func (td *TD) QuoteOf(regs *measure.Registers, rd measure.ReportData) ([]byte, error) {
	return td.platform.quote(regs, rd)
}

// Close closes the TD in this process, which ends a call that waits for a quote
// with EINTR. The machine stays as it is.
func (td *TD) Close() (err error) {
	td.closing.Do(func() {
		close(td.closed)
		err = errors.Join(td.configfs.file.Close(), td.registers.file.Close())
	})
	return err
}
