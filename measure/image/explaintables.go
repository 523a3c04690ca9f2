package image

import (
	"encoding/binary"
	"fmt"
	"strings"

	"tdx-agent/measure"
)

// judgeTables judges the three ACPI events together: against the configured machine, and
// where that does not fit or there is none, against the machines near it.
func (e *explainer) judgeTables() {
	e.tables = map[string]judgement{}
	got, ok := e.acpiDigests()
	if !ok {
		for _, name := range []string{nameLoader, nameRSDP, nameTables} {
			e.tables[name] = judgement{verdict: Opaque, hint: "the log does not have three ACPI events"}
		}
		return
	}
	base, configured := e.base()
	want, root, err := e.nearest(base, got)
	if configured && err == nil && want == got {
		hint := ""
		if base.Root == 0 {
			hint = fmt.Sprintf("with the root disk as %v", root)
		}
		e.setTables(got, want, Match, hint)
		return
	}
	e.out.Tables = tableLengths(got[0], got[1])
	if t := e.out.Tables; t != nil && !configured {
		base.VCPUs = t.VCPUs
	}
	found, changes := searchMachine(base, e.out.Memory, e.out.Tables, got)
	switch {
	case configured && err == nil && found != nil:
		e.setTables(got, want, Mismatch, "the configuration: fits with "+strings.Join(changes, ", or with "))
	case configured && err == nil:
		e.setTables(got, want, Mismatch, "vCPUs, memory, QEMU version or devices: "+e.lengthHint(base, root))
	case found != nil: // tables with these digests were built
		e.setTables(got, [3]measure.Digest{}, Match, fmt.Sprintf("fits %s; %s", found.describe(), e.unconfigured(err)))
	default:
		e.setTables(got, [3]measure.Digest{}, Opaque, e.unconfigured(err)+"; "+e.lengthHint(base, root))
	}
}

func (e *explainer) unconfigured(err error) string {
	if e.in.Machine != nil && err != nil {
		return "the configured machine: " + err.Error()
	}
	return "no configuration was given"
}

// base is the configured machine, or where there is none one that is like dstack's.
func (e *explainer) base() (Machine, bool) {
	if e.in.Machine == nil {
		return Machine{VCPUs: 1, MemoryBytes: max(e.out.Memory, 1<<30), QEMU: "8.2.2", NICs: 1}, false
	}
	m := *e.in.Machine
	if e.in.Image != nil {
		m.Root = e.in.Image.rootDisk(m)
	}
	return m, true
}

func (e *explainer) setTables(got, want [3]measure.Digest, v Verdict, hint string) {
	for i, name := range []string{nameLoader, nameRSDP, nameTables} {
		j := judgement{verdict: v, hint: hint}
		if v == Mismatch {
			if want[i] == got[i] {
				j = judgement{verdict: Match, hint: "the lengths of the tables are right"}
			} else {
				j.want = &want[i]
			}
		}
		e.tables[name] = j
	}
}

// roots are the root disks to try: the one that is known, else both.
func roots(m Machine) []RootDisk {
	if m.Root != 0 {
		return []RootDisk{m.Root}
	}
	return []RootDisk{RootVirtio, RootCDROM}
}

// nearest returns the digests of the machine, with the root disk that fits best where
// it is not known.
func (e *explainer) nearest(m Machine, got [3]measure.Digest) (best [3]measure.Digest, root RootDisk, err error) {
	most := -1
	for _, r := range roots(m) {
		d, problem := tableDigests(m, r)
		if problem != nil {
			return best, r, problem
		}
		equal := 0
		for i := range d {
			if d[i] == got[i] {
				equal++
			}
		}
		if equal > most {
			best, root, most = d, r, equal
		}
	}
	return best, root, nil
}

func tableDigests(m Machine, root RootDisk) (d [3]measure.Digest, err error) {
	t, err := tablesOf(m, root)
	if err != nil {
		return d, err
	}
	for i := range d {
		d[i] = t.events[i].Digest
	}
	return d, nil
}

// lengthHint says what the lengths in the log imply, beside those of the machine.
func (e *explainer) lengthHint(m Machine, root RootDisk) string {
	t := e.out.Tables
	if t == nil {
		return "no lengths of tables give the digests of loader and RSDP"
	}
	hint := t.String()
	built, _, err := buildTables(m, root)
	if e.in.Machine == nil || err != nil || len(built.Tables) < lengthFACS+8 {
		return hint
	}
	dsdt := int(binary.LittleEndian.Uint32(built.Tables[lengthFACS+4:]))
	hint += fmt.Sprintf("; the configuration, vCPUs = %d, gives a DSDT of %d bytes", m.VCPUs, dsdt)
	if d := t.DSDT - dsdt; t.VCPUs == m.VCPUs && d != 0 && d%slotLength == 0 {
		hint += fmt.Sprintf(", so the guest has %+d slots on its PCI bus", d/slotLength)
	}
	return hint
}

// slotLength is the length in the DSDT of a PCI slot with a device.
const slotLength = 17

// change is one way in which a machine may be another than it is said to be.
type change struct {
	text  string
	apply func(*Machine)
}

// searchMachine looks for a machine near base whose tables have these digests, and says
// in which ways base could be changed to be one: in at most two things besides memory and
// vCPUs, which are taken from the log where they were found out, and the root disk where
// it is not known.
func searchMachine(base Machine, memory uint64, t *TableLengths, got [3]measure.Digest) (found *Machine, ways []string) {
	if t == nil { // every machine's tables have lengths
		return nil, nil
	}
	start := base
	var fixed []string
	if memory != 0 && memory != base.MemoryBytes {
		start.MemoryBytes = memory
		fixed = append(fixed, fmt.Sprintf("memory = %d MiB", memory>>20))
	}
	if t.VCPUs != base.VCPUs {
		start.VCPUs = t.VCPUs
		fixed = append(fixed, fmt.Sprintf("vCPUs = %d", t.VCPUs))
	}
	var list []change
	for _, c := range changes() {
		if m := start; applied(c, &m) {
			list = append(list, c)
		}
	}
	try := func(cs ...change) {
		m, texts := start, fixed
		for _, c := range cs {
			c.apply(&m)
			texts = append(texts[:len(texts):len(texts)], c.text)
		}
		for _, r := range roots(m) {
			if d, err := tableDigests(m, r); err == nil && d == got {
				ways = append(ways, strings.Join(texts, ", "))
				if found == nil {
					m.Root = r
					found = &m
				}
				return
			}
		}
	}
	try()
	for i := 0; found == nil && i < len(list); i++ {
		try(list[i])
		for j := i + 1; found != nil && j < len(list); j++ { // the other ways of one change
			try(list[j])
		}
	}
	for i := 0; found == nil && i < len(list); i++ {
		for j := i + 1; found == nil && j < len(list); j++ {
			try(list[i], list[j])
		}
	}
	return found, ways
}

// describe says what a machine has, as far as its tables depend on it.
func (m *Machine) describe() string {
	s := fmt.Sprintf("vCPUs = %d, memory = %d MiB, QEMU %s, NICs = %d, root disk = %v", m.VCPUs, m.MemoryBytes>>20, m.QEMU, m.NICs, m.Root)
	for _, d := range []struct {
		name string
		n    int
	}{{"volumes", m.Volumes}, {"GPUs", m.GPUs}, {"NVSwitches", m.NVSwitches}} {
		if d.n > 0 {
			s += fmt.Sprintf(", %s = %d", d.name, d.n)
		}
	}
	if m.PIC != nil {
		s += fmt.Sprintf(", pic = %v", *m.PIC)
	}
	if m.HotplugOff {
		s += ", hotplug off"
	}
	if m.Hugepages {
		s += fmt.Sprintf(", hugepages (NUMA %v)", m.numa())
	}
	return s
}

// applied reports whether the change makes another machine of m.
func applied(c change, m *Machine) bool {
	before := *m
	c.apply(m)
	return *m != before
}

// changes are the ways in which configurations are wrong in practice.
func changes() []change {
	on, off := true, false
	list := []change{
		{"pic = on", func(m *Machine) { m.PIC = &on }},
		{"pic = off", func(m *Machine) { m.PIC = &off }},
		{"hotplug off", func(m *Machine) { m.HotplugOff = true }},
		{"hotplug on", func(m *Machine) { m.HotplugOff = false }},
		{"no hugepages", func(m *Machine) { m.Hugepages, m.NUMA = false, 0 }},
		{"root disk = virtio", func(m *Machine) { m.Root = RootVirtio }},
		{"root disk = cdrom", func(m *Machine) { m.Root = RootCDROM }},
		{"pci_hole64_size = default", func(m *Machine) { m.PCIHole64 = 0 }},
	}
	for n := NUMAOff; n <= NUMABridge; n++ {
		list = append(list, change{fmt.Sprintf("hugepages, NUMA %v", n), func(m *Machine) { m.Hugepages, m.NUMA = true, n }})
	}
	for _, v := range []string{"8.2.2", "9.1.0", "9.2.1", "10.0.0", "11.0.0", "11.1.0"} {
		list = append(list, change{"QEMU " + v, func(m *Machine) { m.QEMU = v }})
	}
	for n := range 9 {
		list = append(list, change{fmt.Sprintf("GPUs = %d", n), func(m *Machine) { m.GPUs = n }})
	}
	for n := range 5 {
		list = append(list,
			change{fmt.Sprintf("NICs = %d", n), func(m *Machine) { m.NICs = n }},
			change{fmt.Sprintf("volumes = %d", n), func(m *Machine) { m.Volumes = n }},
			change{fmt.Sprintf("NVSwitches = %d", n), func(m *Machine) { m.NVSwitches = n }})
	}
	return list
}
