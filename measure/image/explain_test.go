package image_test

import (
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

// TestTableLengths reads the lengths of a real guest's ACPI tables out of two digests.
func TestTableLengths(t *testing.T) {
	for _, v := range []struct {
		file             string
		dsdt, apic, cpus int
	}{
		{"attestations/dx-report.json", 8185, 230, 1},
		{"eventlogs/ph-sim-eventlog.json", 8185, 230, 1},
		{"attestations/dk-lite-getquote.json", 8285, 238, 2},
		{"eventlogs/nm-mr-release.json", 8802, 286, 8},
	} {
		x, err := image.Explain(image.Observation{Events: realGuest(t, v.file).events})
		if err != nil {
			t.Fatal(err)
		}
		if l := x.Tables; l == nil || l.DSDT != v.dsdt || l.APIC != v.apic || l.VCPUs != v.cpus || l.Overrides != 16 || l.SRAT != 0 || l.HPET {
			t.Errorf("%s: got %v, want DSDT %d, APIC %d", v.file, l, v.dsdt, v.apic)
		}
	}
}

// TestExplainLogAlone judges real logs without anything else: what is constant must
// match, and the size of memory and the firmware's layout are found.
func TestExplainLogAlone(t *testing.T) {
	for _, v := range []struct {
		file   string
		mib    uint64
		layout string
	}{
		{"attestations/dx-report.json", 1024, "dstack 0.3 and 0.4"},
		{"attestations/zk-livy.json", 4096, "dstack 0.3 and 0.4"},
		{"eventlogs/ph-sim-eventlog.json", 2048, "dstack 0.3 and 0.4"},
		{"attestations/dk-lite-getquote.json", 2048, "dstack 0.5 and later"},
		{"attestations/nr-gateway-report.json", 8192, "dstack 0.5 and later"},
		{"eventlogs/nm-mr-release.json", 65536, "dstack 0.5 and later"},
		{"eventlogs/nm-2511-tcbinfo.json", 65536, "dstack 0.5 and later"},
	} {
		g := realGuest(t, v.file)
		x, err := image.Explain(image.Observation{Events: g.events, Registers: g.quote})
		if err != nil {
			t.Fatal(err)
		}
		if x.Memory != v.mib<<20 || x.Layout != v.layout || !x.OK() {
			t.Errorf("%s: %d MiB, layout %q, first divergence %+v; want %d MiB, %q, none", v.file, x.Memory>>20, x.Layout, x.First(), v.mib, v.layout)
		}
		for _, f := range x.Findings {
			image := f.Name == "kernel" || f.Name == "cmdline" || f.Name == "initrd"
			if f.Verdict == "needs-image" != image || !image && !strings.HasPrefix(f.Name, "acpi") && f.Verdict != "match" {
				t.Errorf("%s: RTMR%d event %d (%s): %s, %s", v.file, f.IMR, f.Index, f.Name, f.Verdict, f.Hint)
			}
		}
	}
}

// TestExplainWrongInput gives a real guest's log with a configuration or an image that
// is wrong in one way: the first divergence is where it has to be, and the hint names
// what would have to differ.
func TestExplainWrongInput(t *testing.T) {
	const file = "attestations/dk-lite-getquote.json"
	g, c := realGuest(t, file), carried(t, file)
	off := false
	for _, v := range []struct {
		name  string
		spoil func(*image.Machine, *image.Measurement)
		first string // event, "" for none
		hint  string
	}{
		{"nothing", func(*image.Machine, *image.Measurement) {}, "", ""},
		{"memory", func(m *image.Machine, _ *image.Measurement) { m.MemoryBytes = 4 << 30 }, "TD HOB", "fits 2048 MiB"},
		{"vCPUs", func(m *image.Machine, _ *image.Measurement) { m.VCPUs = 4 }, "acpi-loader", "fits with vCPUs = 2"},
		{"NICs", func(m *image.Machine, _ *image.Measurement) { m.NICs = 2 }, "acpi-loader", "or with NICs = 1"},
		{"volumes", func(m *image.Machine, _ *image.Measurement) { m.Volumes = 1 }, "acpi-loader", "or with volumes = 0"},
		{"root disk", func(m *image.Machine, _ *image.Measurement) { m.Root = image.RootCDROM }, "acpi-loader", "fits with root disk = virtio"},
		{"QEMU", func(m *image.Machine, _ *image.Measurement) { m.QEMU = "10.0.2" }, "acpi-loader", "QEMU 8.2.2"},
		{"hotplug", func(m *image.Machine, _ *image.Measurement) { m.HotplugOff = true }, "acpi-loader", "fits with hotplug on"},
		{"PCI window", func(m *image.Machine, _ *image.Measurement) { m.PCIHole64 = 64 << 30 }, "acpi-tables", "fits with pci_hole64_size = default"},
		{"vCPUs and NICs", func(m *image.Machine, _ *image.Measurement) { m.VCPUs, m.NICs = 8, 3 }, "acpi-loader", "fits with vCPUs = 2, NICs = 1"},
		{"many things", func(m *image.Machine, _ *image.Measurement) {
			m.NICs, m.Volumes, m.NVSwitches, m.HotplugOff = 3, 4, 2, true
		}, "acpi-loader", "vCPUs = 2 and 16 interrupt overrides"},
		{"PIC on another QEMU", func(m *image.Machine, _ *image.Measurement) { m.QEMU, m.PIC = "9.1.0", &off }, "acpi-tables", "fits with"},
		{"profile", func(m *image.Machine, _ *image.Measurement) { m.Firmware = image.Stable202505 }, "fw_cfg BootMenu", "no such event"},
		{"layout", func(_ *image.Machine, i *image.Measurement) { i.Layout = image.DstackLayout03() }, "TD HOB", "firmware file"},
		{"CFV", func(_ *image.Machine, i *image.Measurement) { i.CFV[0]++ }, "CFV", "firmware file"},
		{"kernel", func(_ *image.Machine, i *image.Measurement) { i.Kernel[0]++ }, "kernel", "kernel file"},
		{"cmdline", func(_ *image.Machine, i *image.Measurement) { i.CommandLine[0]++ }, "cmdline", "command line"},
		{"initrd", func(_ *image.Machine, i *image.Measurement) { i.Initrd[0]++ }, "initrd", "initrd file"},
	} {
		t.Run(v.name, func(t *testing.T) {
			m := machineOf(t, g)
			i, err := image.ParseMaterial(c.Material)
			if err != nil {
				t.Fatal(err)
			}
			v.spoil(&m, i)
			x, err := image.Explain(image.Observation{Events: g.events, Registers: g.quote, Machine: &m, Image: i})
			if err != nil {
				t.Fatal(err)
			}
			first := x.First()
			if first == nil {
				if v.first != "" || !x.OK() && v.name == "nothing" {
					t.Fatalf("nothing diverges, want %s (%+v)", v.first, x.Registers)
				}
				return
			}
			if first.Name != v.first || !strings.Contains(first.Hint, v.hint) {
				t.Errorf("diverges at %s: %q; want %s, %q", first.Name, first.Hint, v.first, v.hint)
			}
		})
	}
}

// TestExplainRegisters tells a wrong page order from a wrong firmware, and a log that
// does not belong to the quote.
func TestExplainRegisters(t *testing.T) {
	const file = "attestations/dk-lite-getquote.json"
	g, c := realGuest(t, file), carried(t, file)
	for _, v := range []struct {
		name     string
		spoil    func(*image.Observation)
		register string
		hint     string
	}{
		{"page order", func(o *image.Observation) { o.Machine.PageOrder = image.SinglePass }, "MRTD", "fits two-pass"},
		{"firmware", func(o *image.Observation) { o.Image.MRTDTwoPass[0]++ }, "MRTD", "the firmware file"},
		{"cut log", func(o *image.Observation) { o.Events = o.Events[1:] }, "RTMR0", "does not replay"},
		{"other quote", func(o *image.Observation) { o.Registers.RTMR[2][0]++ }, "RTMR2", "does not replay"},
	} {
		m, q := machineOf(t, g), *g.quote
		i, err := image.ParseMaterial(c.Material)
		if err != nil {
			t.Fatal(err)
		}
		o := image.Observation{Events: g.events, Registers: &q, Machine: &m, Image: i}
		v.spoil(&o)
		x, err := image.Explain(o)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, r := range x.Registers {
			if r.Verdict == image.Mismatch {
				found = r.Name == v.register && strings.Contains(r.Hint, v.hint)
				break
			}
		}
		if !found || x.OK() {
			t.Errorf("%s: got %+v, want %s with %q", v.name, x.Registers, v.register, v.hint)
		}
	}
}

// TestExplainSequence finds events that are too many, and those that are missing,
// without losing step.
func TestExplainSequence(t *testing.T) {
	g := realGuest(t, "attestations/dx-report.json")
	verdicts := func(events []measure.Event) (bad []string) {
		x, err := image.Explain(image.Observation{Events: events})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range x.Findings {
			if f.Verdict == image.Mismatch {
				bad = append(bad, f.Name)
			}
		}
		return bad
	}
	without := append(slices.Clone(g.events[:1]), g.events[2:]...)
	if got := verdicts(without); !slices.Equal(got, []string{"CFV"}) {
		t.Errorf("without CFV: %q", got)
	}
	extra := slices.Insert(slices.Clone(g.events), 1, measure.Event{Type: 0x80000008})
	if got := verdicts(extra); !slices.Equal(got, []string{"event of type 0x80000008"}) {
		t.Errorf("with one more: %q", got)
	}
	if got := verdicts(nil); len(got) != 20 {
		t.Errorf("an empty log misses %d events, want 20: %q", len(got), got)
	}
	if _, err := image.Explain(image.Observation{Machine: &image.Machine{}}); err == nil {
		t.Error("a machine without vCPUs is explained")
	}
}

// TestExplainNoEcho changes each digest of a real log in turn: none is taken for right.
func TestExplainNoEcho(t *testing.T) {
	const file = "attestations/dk-lite-getquote.json"
	g, c := realGuest(t, file), carried(t, file)
	m := machineOf(t, g)
	i, err := image.ParseMaterial(c.Material)
	if err != nil {
		t.Fatal(err)
	}
	for n, e := range g.events {
		if e.IMR == measure.RTMR3 {
			continue
		}
		events := slices.Clone(g.events)
		events[n].Digest[47] ^= 1
		x, err := image.Explain(image.Observation{Events: events, Machine: &m, Image: i})
		if err != nil {
			t.Fatal(err)
		}
		if x.First() == nil {
			t.Errorf("event %d of RTMR%d may have any digest", n, e.IMR)
		}
	}
}

// FuzzExplain explains logs of any shape: what the bytes give are types and whether a
// digest is one that is expected somewhere.
func FuzzExplain(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7})
	p, err := image.ParseMaterial(document(f))
	if err != nil {
		f.Fatal(err)
	}
	m := image.Machine{VCPUs: 1, MemoryBytes: 4 << 30, QEMU: "8.2.2", NICs: 1}
	r, err := p.Measure(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var log []measure.Event
		right := len(b) == len(r.Log)
		for i, c := range b[:min(len(b), 64)] {
			e := r.Log[int(c)%len(r.Log)]
			log = append(log, measure.Event{IMR: e.IMR, Type: e.Type, Digest: e.Digest})
			right = right && int(c)%len(r.Log) == i
		}
		x, err := image.Explain(image.Observation{Events: log, Machine: &m, Image: p})
		if err != nil {
			t.Fatal(err)
		}
		judged := 0
		for _, f := range x.Findings {
			if f.Index >= 0 {
				judged++
			}
		}
		if judged != len(log) {
			t.Errorf("%d of %d events are judged", judged, len(log))
		}
		if right && !x.OK() {
			t.Errorf("the predicted log diverges at %+v", x.First())
		}
	})
}

// TestTableLengthsOfMachines finds the vCPUs of machines of every profile from two digests
// that are calculated, and explains the log without a configuration.
func TestTableLengthsOfMachines(t *testing.T) {
	p := platform(t, image.DstackLayout05())
	for _, m := range []image.Machine{
		{QEMU: "8.2.2", VCPUs: 3, MemoryBytes: 3 << 30},
		{QEMU: "8.2.2", VCPUs: 200, MemoryBytes: 512 << 30},
		{QEMU: "9.2.1", VCPUs: 16, MemoryBytes: 64 << 30, HotplugOff: true, GPUs: 1, PCIHole64: 1 << 40},
		{QEMU: "10.0.2", VCPUs: 2, MemoryBytes: 1 << 30},
		{QEMU: "11.1.0", VCPUs: 4, MemoryBytes: 4 << 30, Volumes: 2},
		{QEMU: "8.2.2", VCPUs: 4, MemoryBytes: 8 << 30, Hugepages: true},
		{QEMU: "10.0.2", VCPUs: 8, MemoryBytes: 1 << 30, Hugepages: true},
		{QEMU: "10.0.2", VCPUs: 8, MemoryBytes: 16 << 30, Hugepages: true, NUMA: image.NUMABridge},
	} {
		m.NICs, m.Root = 1, image.RootVirtio
		events, err := p.RTMR0(m)
		if err != nil {
			t.Fatal(err)
		}
		var log []measure.Event
		for _, e := range events {
			log = append(log, measure.Event{IMR: e.IMR, Type: e.Type, Digest: e.Digest})
		}
		x, err := image.Explain(image.Observation{Events: log})
		if err != nil {
			t.Fatal(err)
		}
		if x.Tables == nil || x.Tables.VCPUs != m.VCPUs || (x.Tables.SRAT > 0) != m.Hugepages {
			t.Errorf("%+v: lengths are %v", m, x.Tables)
		}
		for _, f := range x.Findings {
			if f.Name == "acpi-tables" && f.Verdict != image.Match && m.GPUs == 0 { // GPUs are too many changes away
				t.Errorf("%+v: %s, %s", m, f.Verdict, f.Hint)
			}
		}
	}
}
