package image

import "fmt"

// NUMA says what memory of huge pages makes of a machine. A vm_config does not: it says
// only that there are huge pages, and dstack's programs differ in what follows. Nothing
// of this has been seen in an event log of hardware. The zero value is NUMANode with
// huge pages, and NUMAOff without.
type NUMA int

// The forms. With GPUs on huge pages, whose bridges get their resources from the firmware,
// no form but NUMAOff has known tables.
const (
	// NUMAOff is a machine without a node: dstack's VMM in 2025 gave none to machines
	// without GPUs, huge pages or not.
	NUMAOff NUMA = 1 + iota
	// NUMANode is a node, which gives the machine an SRAT: what dstack's verifier
	// calculates for machines without GPUs.
	NUMANode
	// NUMABridge is a node with a host bridge of its own (pxb-pcie on slot 16, bus 5):
	// what dstack's VMM starts since.
	NUMABridge
)

func (n NUMA) String() string {
	switch n {
	case NUMAOff:
		return "off"
	case NUMANode:
		return "node"
	case NUMABridge:
		return "bridge"
	}
	return "unspecified"
}

// ParseNUMA is the inverse of String. "" is the zero value.
func ParseNUMA(s string) (NUMA, error) {
	if s == "" {
		return 0, nil
	}
	for n := NUMAOff; n <= NUMABridge; n++ {
		if s == n.String() {
			return n, nil
		}
	}
	return 0, fmt.Errorf("form of the NUMA node is %q, want off, node or bridge", s)
}

// numa decides what the machine says nothing of.
func (m *Machine) numa() NUMA {
	switch {
	case m.NUMA != 0:
		return m.NUMA
	case m.Hugepages:
		return NUMANode
	}
	return NUMAOff
}

func (m *Machine) checkNUMA() error {
	switch {
	case m.NUMA < 0 || m.NUMA > NUMABridge:
		return fmt.Errorf("form of the NUMA node %d, want off, node or bridge", int(m.NUMA))
	case m.NUMA > NUMAOff && !m.Hugepages:
		return fmt.Errorf("NUMA %v without hugepages, which are what gives a machine a node", m.NUMA)
	}
	return nil
}
