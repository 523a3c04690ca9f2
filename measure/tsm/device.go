package tsm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tdx-agent/measure"
)

// The ioctls of /dev/tdx_guest. GET_REPORT0 is Linux's (uapi linux/tdx-guest.h): 64
// bytes of report data in, 1024 bytes of TD report out. Extending is dstack 0.5's own
// module's: 48 bytes of digest and the register's index in.
const (
	ioctlReport0 = 0xc4405401
	ioctlExtend  = 0x80315403
)

// TDReportSize is the length of a TD report in bytes.
const TDReportSize = 1024

// Offsets in a TD report (Intel TDX Module ABI, TDREPORT_STRUCT). The registers
// follow one another from MRTD to RTMR3.
const (
	tdReportType = 0
	tdReportData = 128
	tdReportMRTD = 528
)

// Device is /dev/tdx_guest. It implements [measure.RegisterBank] and may be used by
// many goroutines. It never involves the host.
type Device struct {
	path  string
	ioctl func(cmd uint, arg []byte) (result int, errno syscall.Errno) // a nil arg is the null pointer
	close func() error

	canExtend bool
	mu        sync.Mutex // held while a register is extended and read back
}

// OpenDevice opens the device, takes a TD report as proof that it is one, and asks
// it, without extending anything, whether it can extend. It is a
// [*measure.UnsupportedError] if there is no such device or if it gives no reports.
func OpenDevice(path string) (*Device, error) {
	unsupported := func(err error) error {
		return &measure.UnsupportedError{What: "take a TD report from " + path, Needs: "the driver tdx_guest of Linux 6.2 or later, in a TDX guest", Err: err}
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, unsupported(err)
	}
	if st.Mode().Type() != os.ModeDevice|os.ModeCharDevice {
		return nil, unsupported(fmt.Errorf("%s is not a character device", path))
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("the agent may need to be given the device (kernel-setup, DeviceAllow=): %w", err)
	}
	d := &Device{path: path, ioctl: fileIoctl(f), close: f.Close}
	if err := d.probe(); err != nil {
		f.Close()
		return nil, unsupported(err)
	}
	return d, nil
}

// probe calls the extending ioctl with a null pointer. dstack's module copies the
// argument before anything else and answers EFAULT; mainline's answers ENOTTY.
func (d *Device) probe() error {
	if _, err := d.TDReport(measure.ReportData{}); err != nil {
		return err
	}
	_, errno := d.ioctl(ioctlExtend, nil)
	d.canExtend = errno == syscall.EFAULT
	return nil
}

func fileIoctl(f *os.File) func(uint, []byte) (int, syscall.Errno) {
	return func(cmd uint, arg []byte) (result int, errno syscall.Errno) {
		conn, err := f.SyscallConn()
		if err != nil {
			return 0, syscall.EBADF
		}
		err = conn.Control(func(fd uintptr) {
			r, _, e := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(cmd), uintptr(unsafe.Pointer(unsafe.SliceData(arg))))
			result, errno = int(r), e
		})
		if err != nil { // closed
			return 0, syscall.EBADF
		}
		return result, errno
	}
}

// CanExtend reports whether the device's driver can extend RTMRs: dstack 0.5's can,
// Linux's own cannot.
func (d *Device) CanExtend() bool { return d.canExtend }

// Close closes the device.
func (d *Device) Close() error { return d.close() }

// TDReport returns the TD report for rd. Its MAC can only be checked on this
// machine; the host's quoting enclave does.
func (d *Device) TDReport(rd measure.ReportData) ([TDReportSize]byte, error) {
	buf := make([]byte, len(rd)+TDReportSize)
	copy(buf, rd[:])
	errno := syscall.EINTR
	for try := 0; try < extendTries && (errno == syscall.EINTR || errno == syscall.EBUSY); try++ {
		if try > 0 {
			time.Sleep(time.Second / extendTries)
		}
		_, errno = d.ioctl(ioctlReport0, buf)
	}
	if errno != 0 {
		return [TDReportSize]byte{}, fmt.Errorf("TD report: ioctl GET_REPORT0 of %s: %w", d.path, errno)
	}
	tdr := [TDReportSize]byte(buf[len(rd):])
	if tdr[tdReportType] != teeTypeTDX {
		return [TDReportSize]byte{}, fmt.Errorf("TD report: %s gave a report of type %#x, want %#x (TDX)", d.path, tdr[tdReportType], teeTypeTDX)
	}
	if !bytes.Equal(tdr[tdReportData:][:len(rd)], rd[:]) {
		return [TDReportSize]byte{}, fmt.Errorf("TD report: %s gave a report for other report data than %s", d.path, rd)
	}
	return tdr, nil
}

// Registers implements [measure.RegisterBank] by a TD report, so all are of one
// moment.
func (d *Device) Registers() (measure.Registers, error) {
	tdr, err := d.TDReport(measure.ReportData{})
	if err != nil {
		return measure.Registers{}, err
	}
	var r measure.Registers
	if _, err := binary.Decode(tdr[tdReportMRTD:], binary.LittleEndian, &r); err != nil {
		return measure.Registers{}, fmt.Errorf("TD report: %w", err)
	}
	return r, nil
}

// Extend implements [measure.RegisterBank]. It is a [*measure.UnsupportedError] on
// Linux's own driver. No other program may extend the same register meanwhile: the
// register is read before and after, because the ioctl's answer alone proves nothing.
func (d *Device) Extend(index int, digest measure.Digest) error {
	if err := checkIndex(index); err != nil {
		return err
	}
	if !d.canExtend {
		return &measure.UnsupportedError{What: fmt.Sprintf("extend RTMR%d", index), Needs: needsExtend}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	before, err := d.Registers()
	if err != nil {
		return fmt.Errorf("extend RTMR%d (nothing was extended): %w", index, err)
	}
	// The driver hands through the TDX module's status, of which ioctl keeps the low
	// half: an error may look like success with a result, or like success.
	result, errno := d.ioctl(ioctlExtend, append(digest[:], byte(index)))
	after, err := d.Registers()
	if err != nil {
		return fmt.Errorf("extend RTMR%d: it could not be read back: %w", index, err)
	}
	got, want := after.RTMR[index], before.RTMR[index].Extend(digest)
	switch {
	case errno != 0:
		return fmt.Errorf("extend RTMR%d: ioctl of %s (it is now %s): %w", index, d.path, got, errno)
	case result != 0:
		return fmt.Errorf("extend RTMR%d: the TDX module refused it, low half of its status %#x (it is now %s)", index, uint32(result), got)
	case got != want:
		return fmt.Errorf("extend RTMR%d: the kernel reported success, but it is %s, want %s", index, got, want)
	}
	return nil
}
