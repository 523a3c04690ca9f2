// Package tsm is the kernel side of a TD: quotes and measurement registers through
// the interfaces that Linux offers in an Intel TDX guest.
//
// [Detect] finds what this machine has and returns it as a [Kernel]. The parts can
// also be opened one by one: [OpenReports] makes quotes through configfs-tsm (Linux
// 6.7 and later), [OpenRegisterFiles] reads and extends registers through sysfs
// (Linux 6.16 and later), [OpenDevice] speaks to /dev/tdx_guest, and [OpenQGS] asks
// the host's quote generation service over vsock, which dstack OS 0.5 needs.
//
// Every path is an argument, so the same code runs against a simulated TD. Errors
// keep the kernel's errno: errors.Is(err, syscall.EBUSY) works on all of them.
//
// Nothing here checks a quote's signature. A quote that this package returns has the
// right form and carries the caller's report data, no more.
package tsm
