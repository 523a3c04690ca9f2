package tsm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// Paths are the places where the kernel's interfaces are looked for. An empty field
// is the place a TDX guest has it at.
type Paths struct {
	Reports      string // configfs-tsm: /sys/kernel/config/tsm/report
	Measurements string // registers: /sys/devices/virtual/misc/tdx_guest/measurements
	Device       string // /dev/tdx_guest
	AttestConf   string // dstack's, names the host's QGS port: /etc/tdx-attest.conf
	Entry        string // the name of our report entry: tdx-agent

	// Env looks up dstack's overrides, DCAP_TDX_QUOTE_CONFIGFS_PATH and
	// DCAP_TDX_RTMR_SYSFS_PATH. While it is nil they are ignored: with it the agent
	// trusts whoever sets its environment.
	Env func(string) string
}

func (p Paths) orDefaults() Paths {
	for _, d := range []struct {
		to   *string
		path string
	}{
		{&p.Reports, reportPath},
		{&p.Measurements, "/sys/devices/virtual/misc/tdx_guest/measurements"},
		{&p.Device, "/dev/tdx_guest"},
		{&p.AttestConf, "/etc/tdx-attest.conf"},
		{&p.Entry, defaultEntry},
	} {
		if *d.to == "" {
			*d.to = d.path
		}
	}
	if p.Env == nil {
		p.Env = func(string) string { return "" }
	}
	return p
}

// Kernel is what this TD's kernel offers. Sources are "configfs-tsm" or "qgs-vsock"
// for quotes, and "sysfs", "device" or "none" for registers.
type Kernel struct {
	Quoter         measure.Quoter
	Registers      measure.RegisterBank // never nil; it says so itself when it cannot do something
	QuoteSource    string
	RegisterSource string
	CanExtend      bool     // the kernel can extend RTMRs
	Notes          []string // what an operator should know: overrides in force, what was passed over and why

	device    *Device // nil until it is needed
	deviceErr error
	closers   []io.Closer
}

// Close lets go of everything. The report entry stays (see [Reports.Close]).
func (k *Kernel) Close() error {
	var errs []error
	for _, c := range slices.Backward(k.closers) {
		errs = append(errs, c.Close())
	}
	k.closers = nil
	return errors.Join(errs...)
}

// Detect finds the interfaces, in the order in which dstack's tdx-attest looks for
// them. Quotes: the override, configfs-tsm, QGS over vsock. Registers: the override,
// sysfs, the device. An override that is set and bad is an error. Without any way to
// make quotes the error is a [*measure.UnsupportedError]; without one to extend,
// CanExtend is false and Registers.Extend says what is missing.
func Detect(p Paths) (*Kernel, error) {
	p = p.orDefaults()
	k := &Kernel{}
	err := k.findQuotes(p)
	if err == nil {
		err = k.findRegisters(p)
	}
	if err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

func (k *Kernel) note(format string, args ...any) {
	k.Notes = append(k.Notes, fmt.Sprintf(format, args...))
}

func (k *Kernel) findQuotes(p Paths) error {
	const override = "DCAP_TDX_QUOTE_CONFIGFS_PATH"
	if entry := p.Env(override); entry != "" {
		if err := checkEntryOverride(entry); err != nil {
			return fmt.Errorf("%s=%q: %w", override, entry, err)
		}
		k.note("quotes come from %s, because %s says so", entry, override)
		return k.openReports(filepath.Dir(entry), filepath.Base(entry))
	}
	missing, refused := fmt.Errorf("there is no %s", p.Reports), error(nil)
	if isDir(p.Reports) {
		err := k.openReports(p.Reports, p.Entry)
		var unsupported *measure.UnsupportedError
		switch {
		case errors.As(err, &unsupported):
			missing = fmt.Errorf("%s has no quote provider: %w", p.Reports, unsupported.Err)
		case errors.Is(err, fs.ErrPermission):
			refused, missing = err, err // who may not make an entry is not told that there is no provider
		default:
			return err
		}
	}
	port, err := readAttestConf(p.AttestConf)
	if err != nil {
		return err
	}
	if port > 0 {
		k.note("quotes come from the host's QGS at vsock port %d, because %v", port, missing)
		return k.openQGS(p, port)
	}
	if refused != nil {
		return refused
	}
	what := "make quotes"
	if !exists(p.Device) && !isDir(p.Measurements) {
		what = "attest"
		missing = fmt.Errorf("%w, no %s and no %s: this is not a TDX guest, or its driver tdx_guest is not loaded", missing, p.Measurements, p.Device)
	}
	return &measure.UnsupportedError{
		What:  what,
		Needs: "a TDX guest with configfs-tsm (Linux 6.7 or later), or with the host's QGS port in " + p.AttestConf,
		Err:   missing,
	}
}

// checkEntryOverride asks what dstack's tdx-attest asks of the variable. It reads the
// provider, which hangs while a quote runs; only development has this variable.
func checkEntryOverride(entry string) error {
	if !filepath.IsAbs(entry) || len(entry) >= 240 || !isDir(entry) {
		return errors.New("want the absolute path of a report entry, shorter than 240 characters")
	}
	c := &dirClient{reports: filepath.Dir(entry)}
	provider, err := c.ReadFile(filepath.Join(reportPath, filepath.Base(entry), "provider"))
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(provider), defaultProvider) {
		return fmt.Errorf("its provider is %q, want %q", strings.TrimSpace(string(provider)), defaultProvider)
	}
	return nil
}

func (k *Kernel) openReports(dir, entry string) error {
	r, err := OpenReports(ReportsConfig{Client: &dirClient{reports: dir}, Entry: entry})
	if err != nil {
		return err
	}
	if r.entry != entry {
		k.note("report entries cannot be made here, so quotes go through the entry %s, which others may use too", r.entry)
	}
	k.Quoter, k.QuoteSource = r, "configfs-tsm"
	k.closers = append(k.closers, r)
	return nil
}

func (k *Kernel) openQGS(p Paths, port uint32) error {
	d, err := k.openDevice(p)
	if err != nil {
		return fmt.Errorf("%s names a QGS port, which needs a TD report: %w", p.AttestConf, err)
	}
	q, err := OpenQGS(QGSConfig{Report: d.TDReport, Port: port})
	if err != nil {
		return err
	}
	k.Quoter, k.QuoteSource = q, "qgs-vsock"
	return nil
}

func (k *Kernel) openDevice(p Paths) (*Device, error) {
	if k.device == nil && k.deviceErr == nil {
		k.device, k.deviceErr = OpenDevice(p.Device)
		if k.device != nil {
			k.closers = append(k.closers, k.device)
		}
	}
	return k.device, k.deviceErr
}

func (k *Kernel) findRegisters(p Paths) error {
	const override = "DCAP_TDX_RTMR_SYSFS_PATH"
	if dir := p.Env(override); dir != "" {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("%s=%q: want an absolute path", override, dir)
		}
		k.note("registers come from %s, because %s says so", dir, override)
		if err := k.openRegisterFiles(dir); err != nil {
			return fmt.Errorf("%s: %w", override, err)
		}
		return nil
	}
	if isDir(p.Measurements) {
		return k.openRegisterFiles(p.Measurements)
	}
	d, err := k.openDevice(p)
	if err != nil {
		k.note("registers can be neither read nor extended: %v", err)
		k.Registers, k.RegisterSource = noRegisters{err}, "none"
		return nil
	}
	if !d.CanExtend() {
		k.note("RTMRs cannot be extended: that needs %s", needsExtend)
	}
	k.Registers, k.RegisterSource, k.CanExtend = d, "device", d.CanExtend()
	return nil
}

func (k *Kernel) openRegisterFiles(dir string) error {
	f, err := OpenRegisterFiles(dir)
	if err != nil {
		return err
	}
	k.closers = append(k.closers, f)
	rtmr3 := filepath.Join(dir, rtmrName(measure.RTMR3))
	if err := unix.Faccessat(unix.AT_FDCWD, rtmr3, unix.W_OK, unix.AT_EACCESS); err != nil {
		k.note("this process may not extend RTMR3 (%s: %v): run kernel-setup as root", rtmr3, err)
	}
	k.Registers, k.RegisterSource, k.CanExtend = f, "sysfs", true
	return nil
}

// noRegisters is the register bank of a machine that has none.
type noRegisters struct{ err error }

func (n noRegisters) Registers() (measure.Registers, error) {
	return measure.Registers{}, &measure.UnsupportedError{What: "read the registers", Needs: "Linux 6.16 or later, or access to /dev/tdx_guest", Err: n.err}
}

func (n noRegisters) Extend(index int, _ measure.Digest) error {
	return &measure.UnsupportedError{What: fmt.Sprintf("extend RTMR%d", index), Needs: needsExtend, Err: n.err}
}

const maxAttestConf = 64 << 10

// readAttestConf returns the QGS port that dstack's configuration names, 0 if it
// names none or does not exist.
func readAttestConf(path string) (uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return 0, nil
		}
		return 0, fmt.Errorf("QGS port: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAttestConf+1))
	if err != nil {
		return 0, fmt.Errorf("QGS port: %w", err)
	}
	if len(b) > maxAttestConf {
		return 0, fmt.Errorf("QGS port: %s is longer than %d bytes", path, maxAttestConf)
	}
	return parseAttestConf(string(b)), nil
}

// parseAttestConf returns the first port that parses, as tdx-attest does.
func parseAttestConf(conf string) uint32 {
	for line := range strings.Lines(conf) {
		key, value, ok := strings.Cut(line, "=")
		if !ok || strings.TrimSpace(key) != "port" {
			continue
		}
		if port, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32); err == nil {
			return uint32(port)
		}
	}
	return 0
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Present reports whether this may be a real TDX guest, so that a simulated one must
// not be offered in its place: there are TDX registers or the TDX device, or configfs
// has the quote provider tdx_guest or will not say which it has.
func Present(p Paths) bool {
	p = p.orDefaults()
	return isDir(p.Measurements) || exists(p.Device) || isDir(p.Reports) && mayProvideTDX(&dirClient{reports: p.Reports}, p.Entry)
}

// mayProvideTDX asks an entry for its provider; it makes one if there is none.
func mayProvideTDX(c Client, entry string) bool {
	entries, err := c.ReadDir(reportPath)
	if err != nil {
		return true
	}
	if len(entries) == 0 {
		name := filepath.Join(reportPath, entry)
		if err := c.Mkdir(name); err != nil {
			return !errors.Is(err, syscall.ENXIO)
		}
		defer c.RemoveAll(name)
		return providesTDX(c, entry)
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool { return providesTDX(c, e.Name()) })
}

func providesTDX(c Client, entry string) bool {
	b, err := c.ReadFile(filepath.Join(reportPath, entry, "provider"))
	if err != nil { // ENXIO: an entry whose provider has gone
		return !errors.Is(err, syscall.ENXIO)
	}
	return strings.HasPrefix(string(b), defaultProvider)
}
