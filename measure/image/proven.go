package image

// What the choices of a [Result] were proven against: event logs of hardware, a stock QEMU,
// other programs, or nothing of these ("unproven: ..."). For the ACPI tables it is
// Result.Proven.

// Proven says against what the profile's events and their order were proven.
func (p FirmwareProfile) Proven() string {
	switch p {
	case Pre202505:
		return "event logs of TDX hardware (dstack 0.3 to 0.6)"
	case Stable202505:
		return "unproven: from the sources of dstack and edk2, no event log has been seen; bootorder as stock QEMU 10.0.2 serves it"
	}
	return "unproven: unknown firmware profile"
}

// Proven says against what the kernel's digest in this mode was proven.
func (m KernelMode) Proven() string {
	switch m {
	case KernelPatched:
		return "the header that stock QEMU 7.2.22 and 10.0.2 serve, and dstack-mr's digest; not a log of hardware"
	case KernelRaw:
		return "unproven: from QEMU's sources, no event log has been seen"
	case KernelNormalized:
		return "unproven: from dstack's sources, no event log has been seen"
	}
	return "unproven: unknown kernel mode"
}

// Proven says against what MRTD in this order was proven.
func (o PageOrder) Proven() string {
	switch o {
	case TwoPass:
		return "dstack-mr's MRTD of Debian's firmwares; not hardware"
	case SinglePass:
		return "gce-tcb-verifier's MRTD of Debian's firmwares; not hardware"
	}
	return "unproven: unknown page order"
}
