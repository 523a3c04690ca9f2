package image

import (
	"crypto/sha512"
	"fmt"

	"tdx-agent/measure"
)

// Observation is a real log and what is known of the TD it comes from. Only Events must
// be there; the more is known, the more is judged.
type Observation struct {
	Events    []measure.Event
	Registers *measure.Registers // of the quote that belongs to the log
	Machine   *Machine           // the configuration, as from vm_config
	Image     *Measurement
}

// Verdict is the judgement of one event.
type Verdict string

// The verdicts.
const (
	Match      Verdict = "match"       // the digest follows from what is known
	Mismatch   Verdict = "mismatch"    // another digest follows, or no such event
	Opaque     Verdict = "opaque"      // nothing that is known here determines the digest
	NeedsImage Verdict = "needs-image" // the digest is of the image, which was not given
)

// Finding is the judgement of one event of RTMR0 to RTMR2, or of one that is missing.
type Finding struct {
	IMR     int
	Index   int            // among the log's events of this register, from 0; -1: missing
	Name    string         // what the event measures
	Digest  measure.Digest // the log's
	Want    *measure.Digest
	Verdict Verdict
	Hint    string // what moves the digest, or what was found out; may be empty
}

// Explanation is the judgement of a log.
type Explanation struct {
	Findings  []Finding
	Registers []RegisterFinding
	Firmware  FirmwareProfile
	Layout    string        // the known firmware layout that fits, "" if none does or the image gave it
	Memory    uint64        // bytes that fit the TD HOB, 0 if none was found
	Tables    *TableLengths // what the ACPI events imply, nil if nothing
}

// RegisterFinding compares one register of the quote with what it should be.
type RegisterFinding struct {
	Name    string // "MRTD", "RTMR0", ...
	Quoted  measure.Digest
	Want    measure.Digest // MRTD: computed; RTMRs: replayed from the log
	Verdict Verdict
	Hint    string
}

// First returns the first event that diverges, nil if none does.
func (x *Explanation) First() *Finding {
	for i := range x.Findings {
		if x.Findings[i].Verdict == Mismatch {
			return &x.Findings[i]
		}
	}
	return nil
}

// OK reports whether nothing diverges: no event, and no register.
func (x *Explanation) OK() bool {
	for _, r := range x.Registers {
		if r.Verdict == Mismatch {
			return false
		}
	}
	return x.First() == nil
}

// Explain judges every event of RTMR0 to RTMR2 against what follows from the
// configuration, the image and the specifications. What was not given is searched for:
// the size of memory, the known firmware layouts, and near-by machines; a match that
// rests on such a search says so in its hint, and is no proof that the machine is the
// intended one. No digest is ever taken from the log. It is an error if the machine is
// none that can be.
func Explain(o Observation) (*Explanation, error) {
	if o.Machine != nil {
		if err := o.Machine.Check(); err != nil {
			return nil, err
		}
	}
	e := &explainer{in: o, out: &Explanation{}}
	for _, ev := range o.Events {
		if ev.IMR >= 0 && ev.IMR < len(e.log) {
			e.log[ev.IMR] = append(e.log[ev.IMR], ev)
		}
	}
	e.out.Firmware = e.profile()
	e.judgeMemory()
	e.judgeTables()
	for imr, expected := range [][]expectation{e.rtmr0(), e.rtmr1(), e.rtmr2()} {
		e.align(imr, expected)
	}
	e.judgeRegisters()
	return e.out, nil
}

// expectation is one event of the sequence that a register should have.
type expectation struct {
	typ   uint32
	name  string
	judge func(measure.Digest) judgement
}

type judgement struct {
	verdict Verdict
	want    *measure.Digest
	hint    string
}

// is expects the digest of a predicted event; hint is for when it is another.
func is(ev Event, hint string) expectation {
	return expectation{ev.Type, ev.Name, func(got measure.Digest) judgement {
		if got == ev.Digest {
			return judgement{verdict: Match}
		}
		return judgement{Mismatch, &ev.Digest, hint}
	}}
}

// unknown expects an event whose digest nothing here determines.
func unknown(typ uint32, name string, v Verdict, hint string) expectation {
	return expectation{typ, name, func(measure.Digest) judgement { return judgement{verdict: v, hint: hint} }}
}

type explainer struct {
	in     Observation
	out    *Explanation
	log    [3][]measure.Event
	hob    func(measure.Digest) judgement
	tables map[string]judgement // of the three ACPI events
}

// profile is the configured one, else that of the image, else the one that the log has
// the shape of.
func (e *explainer) profile() FirmwareProfile {
	if m := e.in.Machine; m != nil && m.Firmware != "" {
		return m.Firmware
	}
	if e.in.Image != nil && e.in.Image.Firmware != "" {
		return e.in.Image.Firmware
	}
	for _, ev := range e.log[0] {
		if ev.Type == typeHandoffTables {
			return Stable202505
		}
	}
	return Pre202505
}

func (e *explainer) rtmr0() []expectation {
	list := []expectation{{typeHandoffTables2, "TD HOB", e.hob}, e.cfv()}
	if e.out.Firmware == Stable202505 {
		for _, ev := range fwCfgEvents() {
			list = append(list, is(ev, "QEMU's boot menu or boot order options"))
		}
	}
	for i, v := range secureVariables {
		var data []byte
		if e.in.Image != nil {
			data = e.in.Image.variables[i]
		}
		list = append(list, variableExpectation(v, data))
	}
	list = append(list, is(separator(0), "the firmware has met an error"))
	for _, name := range []string{nameLoader, nameRSDP, nameTables} {
		j := e.tables[name]
		list = append(list, expectation{typePlatformConfig, name, func(measure.Digest) judgement { return j }})
	}
	if e.out.Firmware == Stable202505 {
		list = append(list, e.smbios())
	}
	for _, ev := range e.out.Firmware.bootEvents() {
		list = append(list, is(ev, fmt.Sprintf("the firmware profile; this is not %s, or QEMU was given boot options", e.out.Firmware)))
	}
	return list
}

// variableExpectation tells a firmware that was built with Secure Boot from others.
func variableExpectation(v variableName, data []byte) expectation {
	x := is(variableEvent(v, data), "the Secure Boot keys of another firmware file")
	plain := x.judge
	x.judge = func(got measure.Digest) judgement {
		j := plain(got)
		for value, state := range []string{"off", "on"} {
			if j.verdict == Mismatch && v.name == "SecureBoot" && got == variableEvent(v, []byte{byte(value)}).Digest {
				j.hint = "the firmware file: one built with Secure Boot, which is " + state
			}
		}
		return j
	}
	return x
}

func (e *explainer) cfv() expectation {
	if e.in.Image != nil {
		return is(cfvEvent(e.in.Image.CFV, MemoryRange{}), "the firmware file: its variable store is another")
	}
	blank := blankStoreDigest()
	return expectation{typeFirmwareBlob2, "CFV", func(got measure.Digest) judgement {
		if got == blank {
			return judgement{verdict: Match, hint: "OVMF's blank variable store of the 4 MiB build"}
		}
		return judgement{verdict: NeedsImage, hint: "not OVMF's blank variable store of the 4 MiB build"}
	}}
}

func (e *explainer) smbios() expectation {
	if m := e.in.Machine; m != nil && m.SMBIOS != nil {
		return is(Event{Type: typeHandoffTables, Name: "SMBIOS", Digest: *m.SMBIOS}, "host CPU, memory or QEMU version; the policy has the digest of another host")
	}
	return unknown(typeHandoffTables, "SMBIOS", Opaque, "depends on host CPU, memory and QEMU version; a policy may name its digest")
}

func (e *explainer) rtmr1() []expectation {
	list := make([]expectation, 0, 5)
	for i, ev := range rtmr1Events(measure.Digest{}) {
		if i == 0 {
			list = append(list, e.kernel())
			continue
		}
		list = append(list, is(ev, "the kernel was not started, or not at the first attempt"))
	}
	return list
}

// kernel expects the kernel as the machine's QEMU serves it. The other ways are tried
// for the hint.
func (e *explainer) kernel() expectation {
	const name = "kernel"
	img := e.in.Image
	if img == nil {
		return unknown(typeBootServices, name, NeedsImage, "the kernel's Authenticode digest")
	}
	m := Machine{MemoryBytes: e.out.Memory}
	if e.in.Machine != nil {
		m = *e.in.Machine
	}
	v, err := m.version()
	if err != nil || m.MemoryBytes == 0 {
		return unknown(typeBootServices, name, Opaque, "neither the configuration nor the TD HOB says how much memory there is")
	}
	mode := m.kernelMode(v, img.normalized, e.out.Firmware)
	return expectation{typeBootServices, name, func(got measure.Digest) judgement {
		want, err := img.KernelDigest(mode, m.MemoryBytes)
		if err == nil && got == want {
			return judgement{verdict: Match}
		}
		for other := KernelPatched; other <= KernelRaw; other++ {
			for _, memory := range []uint64{m.MemoryBytes, e.out.Memory, 4 << 30} {
				if d, err := img.KernelDigest(other, memory); memory != 0 && err == nil && d == got {
					return judgement{Mismatch, &want, fmt.Sprintf("kernel mode or memory: fits as %v with %d MiB, configured are %v and %d MiB", other, memory>>20, mode, m.MemoryBytes>>20)}
				}
			}
		}
		if err != nil {
			return judgement{verdict: Opaque, hint: err.Error()}
		}
		return judgement{Mismatch, &want, "the kernel file, or the size of the initrd, whose address QEMU writes into the kernel's header"}
	}}
}

func (e *explainer) rtmr2() []expectation {
	var list []expectation
	for _, ev := range rtmr2Events(measure.Digest{}, measure.Digest{}) {
		switch {
		case e.in.Image == nil:
			list = append(list, unknown(ev.Type, ev.Name, NeedsImage, "the image's "+ev.Name))
		case ev.Name == "cmdline":
			list = append(list, is(rtmr2Events(e.in.Image.CommandLine, e.in.Image.Initrd)[0], "the kernel command line: metadata.json of another image, or dstack.rootfs_hash in it"))
		default:
			list = append(list, is(rtmr2Events(e.in.Image.CommandLine, e.in.Image.Initrd)[1], "the initrd file"))
		}
	}
	return list
}

// align walks a register's log along what is expected. Where the types differ, either
// the log has an event too many or one is missing.
func (e *explainer) align(imr int, expected []expectation) {
	log := e.log[imr]
	for i := 0; i < len(log) || len(expected) > 0; {
		switch {
		case i == len(log):
			e.missing(imr, expected[0])
			expected = expected[1:]
		case len(expected) == 0 || log[i].Type != expected[0].typ && i+1 < len(log) && log[i+1].Type == expected[0].typ:
			e.add(Finding{imr, i, fmt.Sprintf("event of type %#x", log[i].Type), log[i].Digest, nil, Mismatch, fmt.Sprintf("not in the sequence of firmware profile %s", e.out.Firmware)})
			i++
		case log[i].Type != expected[0].typ:
			e.missing(imr, expected[0])
			expected = expected[1:]
		default:
			j := expected[0].judge(log[i].Digest)
			e.add(Finding{imr, i, expected[0].name, log[i].Digest, j.want, j.verdict, j.hint})
			expected = expected[1:]
			i++
		}
	}
}

func (e *explainer) missing(imr int, x expectation) {
	e.add(Finding{IMR: imr, Index: -1, Name: x.name, Verdict: Mismatch, Hint: "the log has no such event here"})
}

func (e *explainer) add(f Finding) { e.out.Findings = append(e.out.Findings, f) }

// judgeRegisters compares the quote's registers with the log's replay, and MRTD with the
// image's.
func (e *explainer) judgeRegisters() {
	q := e.in.Registers
	if q == nil {
		return
	}
	if img := e.in.Image; img != nil {
		e.out.Registers = append(e.out.Registers, e.mrtd(img))
	}
	for imr, log := range e.log {
		var replayed measure.Digest
		for _, ev := range log {
			replayed = replayed.Extend(ev.Digest)
		}
		f := RegisterFinding{fmt.Sprintf("RTMR%d", imr), q.RTMR[imr], replayed, Match, "the log replays to it"}
		if replayed != q.RTMR[imr] {
			f.Verdict, f.Hint = Mismatch, "the log does not replay to the quote: an event was cut off, added or changed, or they do not belong together"
		}
		e.out.Registers = append(e.out.Registers, f)
	}
}

func (e *explainer) mrtd(img *Measurement) RegisterFinding {
	q := e.in.Registers.MRTD
	m := Machine{}
	if e.in.Machine != nil {
		m = *e.in.Machine
	}
	v, err := m.version()
	if err != nil {
		return RegisterFinding{"MRTD", q, measure.Digest{}, Opaque, err.Error()}
	}
	order := m.pageOrder(v)
	other := TwoPass + SinglePass - order
	f := RegisterFinding{"MRTD", q, img.mrtd(order), Match, ""}
	switch {
	case q == f.Want:
	case q == img.mrtd(other) && e.in.Machine == nil:
		f.Want, f.Hint = q, fmt.Sprintf("fits %v; no configuration was given", other)
	case q == img.mrtd(other):
		f.Verdict, f.Hint = Mismatch, fmt.Sprintf("the page order: fits %v, configured is %v (QEMU %v)", other, order, v)
	default:
		f.Verdict, f.Hint = Mismatch, "the firmware file"
	}
	return f
}

// acpiDigests finds the three ACPI events of the log: those of the type behind the
// separator, which the fw_cfg events are before.
func (e *explainer) acpiDigests() (d [3]measure.Digest, ok bool) {
	n := 0
	behind := false
	for _, ev := range e.log[0] {
		switch {
		case ev.Type == typeSeparator:
			behind = true
		case ev.Type == typePlatformConfig && behind && n < len(d):
			d[n] = ev.Digest
			n++
		}
	}
	return d, n == len(d)
}

func sha384(b []byte) measure.Digest { return sha512.Sum384(b) }
