package acpi

import (
	"fmt"
	"strconv"
	"strings"
)

// Profile is a line of QEMU releases that write the same tables for the same machine.
type Profile int

// The known profiles. The zero Profile is none of them.
const (
	QEMU8   Profile = iota + 1 // 8.x of the Intel and Canonical TDX line
	QEMU9_1                    // 9.0 and 9.1, as dstack's compatibility mode describes them
	QEMU9_2                    // 9.2
	QEMU10                     // 10.x
)

// ParseProfile finds the profile of a QEMU version such as "8.2.2" or "10.0.3". Text after
// the first space or hyphen, a distribution's suffix, is not looked at.
func ParseProfile(version string) (Profile, error) {
	number, _, _ := strings.Cut(version, " ")
	number, _, _ = strings.Cut(number, "-")
	parts := strings.Split(number, ".")
	if len(parts) < 2 || len(parts) > 4 {
		return 0, fmt.Errorf("acpi: QEMU version %q: want major.minor", version)
	}
	var n [2]int
	for i := range n {
		v, err := strconv.ParseUint(parts[i], 10, 8)
		if err != nil {
			return 0, fmt.Errorf("acpi: QEMU version %q: want major.minor", version)
		}
		n[i] = int(v)
	}
	switch major, minor := n[0], n[1]; {
	case major == 8:
		return QEMU8, nil
	case major == 9 && minor <= 1:
		return QEMU9_1, nil
	case major == 9 && minor == 2:
		return QEMU9_2, nil
	case major == 10:
		return QEMU10, nil
	}
	return 0, fmt.Errorf("acpi: the tables of QEMU %s are not known", version)
}

// Proven says against what the profile's bytes were proven.
func (p Profile) Proven() string { return "unproven" }
