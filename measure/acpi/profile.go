package acpi

import (
	"fmt"
	"strconv"
	"strings"
)

// Profile is a line of QEMU releases that write the same tables for the same machine.
type Profile int

// The known profiles. The zero Profile is none of them.
//
// TDX came to QEMU with 10.1. The hosts of before run lines of Intel and Canonical that
// reported all interrupts as edges, because the TDX module lets nobody see an EOI. The series
// dropped that before it was merged, so 9.2 and later report what stock machines do.
const (
	QEMU7_2  Profile = iota + 1 // 7.2, on which no TD ran: what the tests hold the older forms to
	QEMU8                       // 8.0 to 8.2 of the TDX line that Intel and Canonical shipped
	QEMU9_1                     // 9.0 and 9.1 of that line
	QEMU9_2                     // 9.2 from 9.2.1
	QEMU10                      // 10.0 to 10.2
	QEMU11_0                    // 11.0
	QEMU11_1                    // 11.1
)

// dialect is how the tables of a profile differ from those of the others.
type dialect struct {
	name, proven   string
	interruptFlags byte                // of the links' extended interrupt descriptors
	overrides      func([]byte) []byte // appends the MADT's interrupt source overrides
	needsPIC       bool                // what the MADT says of a machine without PIC is not known
	maxCPUs        int                 // up to which tables are known
	portsNoHotplug bool                // root ports are known on machines without hotplug only
	routedExpander bool                // an expander has a table of its interrupt routes
	labelAlways    bool                // PDSM names an index even where a device has none
	deferredEject  bool                // CSCN notifies of removals after its scan
	selectorReset  bool                // PRES has an _INI that selects processor 0
	sharedSerial   bool                // COM1's interrupt is level, active low, shared
	before8        bool                // the forms of QEMU 7.2
}

func (d dialect) madtRevision() byte {
	if d.before8 {
		return 1
	}
	return 3
}

// Flags of an extended interrupt descriptor (ACPI 6.5, table 6.58): consumer, active high,
// shared, and the trigger.
const (
	levelTriggered = 0x09
	edgeTriggered  = 0x0b
)

func (p Profile) dialect() (d dialect, known bool) {
	stock := dialect{interruptFlags: levelTriggered, overrides: chipsetOverrides, routedExpander: true, deferredEject: true, maxCPUs: 4096}
	tdx := dialect{interruptFlags: edgeTriggered, overrides: edgeOverrides,
		portsNoHotplug: true, labelAlways: true, selectorReset: true, maxCPUs: 254}
	switch p {
	case QEMU7_2:
		d = stock
		d.maxCPUs, d.deferredEject, d.selectorReset, d.before8 = 255, false, true, true
		d.name, d.proven = "QEMU 7.2", "stock QEMU 7.2.22 over qtest"
	case QEMU8:
		d = tdx
		d.needsPIC = true
		d.name, d.proven = "QEMU 8", "event logs of TDX hardware (QEMU 8.2.2; 1 to 8 vCPUs, 1 to 64 GiB, 4 and 5 devices)"
	case QEMU9_1:
		d = tdx
		d.name, d.proven = "QEMU 9.0/9.1", "unproven: digests that dstack publishes for its own model of QEMU 9.1"
	case QEMU9_2:
		d = stock
		d.maxCPUs, d.portsNoHotplug, d.routedExpander = 254, true, false
		d.deferredEject, d.selectorReset = false, true
		d.name, d.proven = "QEMU 9.2", "registers published for a GPU guest without hotplug (QEMU 9.2.1); with hotplug unproven"
	case QEMU10:
		d = stock
		d.selectorReset = true
		d.name, d.proven = "QEMU 10", "stock QEMU 10.0.2 and 10.0.13 over qtest"
	case QEMU11_0:
		d = stock
		d.name, d.proven = "QEMU 11.0", "unproven: digests that dstack publishes for its own model of QEMU 11.0, between stock 10.0.13 and 11.1.3"
	case QEMU11_1:
		d = stock
		d.sharedSerial = true
		d.name, d.proven = "QEMU 11.1", "stock QEMU 11.1.3 over qtest"
	default:
		return dialect{}, false
	}
	return d, true
}

// String names the profile, such as "QEMU 9.2".
func (p Profile) String() string {
	if d, known := p.dialect(); known {
		return d.name
	}
	return fmt.Sprintf("unknown QEMU profile %d", int(p))
}

// Proven says against what the profile's bytes were proven: event logs of hardware, a stock
// QEMU over qtest, or nothing of these ("unproven: ..."). See the package comment for which
// machines of a profile the proof covers.
func (p Profile) Proven() string {
	if d, known := p.dialect(); known {
		return d.proven
	}
	return "unproven: " + p.String()
}

// Proven is what the profile's says, with what of this machine that proof does not cover.
func (m *Machine) Proven() string {
	s := m.QEMU.Proven()
	if _, ports := m.slots(); ports > 0 && (m.QEMU == QEMU8 || m.QEMU == QEMU9_1) {
		s += "; unproven: GPUs and NVSwitches, which are taken to be as on QEMU 9.2"
	}
	return s
}

// ParseProfile finds the profile of a QEMU version such as "8.2.2" or "10.0.3". What follows
// a space, hyphen, plus or tilde, a distribution's suffix, is not looked at. A version whose
// tables are not known is an error, also where its neighbours on both sides are known.
func ParseProfile(version string) (Profile, error) {
	number := version
	if i := strings.IndexAny(version, " -+~"); i >= 0 {
		number = version[:i]
	}
	parts := strings.Split(number, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return 0, fmt.Errorf("acpi: QEMU version %.40q: want major.minor or major.minor.micro", version)
	}
	var n [3]int
	for i, s := range parts {
		v, err := strconv.ParseUint(s, 10, 8)
		if err != nil {
			return 0, fmt.Errorf("acpi: QEMU version %.40q: want major.minor or major.minor.micro", version)
		}
		n[i] = int(v)
	}
	if p := profileOf(n[0], n[1], n[2]); p != 0 {
		return p, nil
	}
	return 0, fmt.Errorf("acpi: the tables of QEMU %s are not known", number)
}

// profileOf knows that stable releases changed one table too: 9.1.3 and 9.2.1 took over that
// PDSM leaves out an index of 0, and so may the last ones of 8.2 have.
func profileOf(major, minor, micro int) Profile {
	switch {
	case major == 7 && minor == 2:
		return QEMU7_2
	case major == 8 && minor < 2, major == 8 && minor == 2 && micro <= 8:
		return QEMU8
	case major == 9 && minor == 0, major == 9 && minor == 1 && micro <= 2:
		return QEMU9_1
	case major == 9 && minor == 2 && micro >= 1:
		return QEMU9_2
	case major == 10 && minor <= 2:
		return QEMU10
	case major == 11 && minor == 0:
		return QEMU11_0
	case major == 11 && minor == 1:
		return QEMU11_1
	}
	return 0
}
