package image_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

// platform is a measurement document that says nothing of a real image but its memory
// layout: all that RTMR0 needs besides the machine.
func platform(t testing.TB, l image.Layout) *image.Measurement {
	t.Helper()
	b := bytes.Replace(document(t), image.DstackLayout05().Witness(), l.Witness(), 1)
	m, err := image.ParseMaterial(b)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// realGuests are dstack guests on TDX hardware. RTMR0 is of the quote where there is one;
// the two logs without replay to the values that their publishers give.
var realGuests = []struct {
	file   string
	layout func() image.Layout
	vcpus  int // 0: all as in the vm_config
	mib    uint64
	root   image.RootDisk
	rtmr0  string
}{
	{"attestations/dx-report.json", image.DstackLayout03, 1, 1024, image.RootCDROM, "274c2344116db7c663470693b5ba62b8621eac28cb41d2f816ddf188f9f423f900a1c44d32386fd3c993dc814e62af9d"},
	{"eventlogs/ph-sim-eventlog.json", image.DstackLayout03, 1, 2048, image.RootCDROM, "85e0855a6384fa1c8a6ab36d0dcbfaa11a5753e5a070c08218ae5fe872fcb86967fd2449c29e22e59dc9fec998cb6547"},
	{"attestations/zk-livy.json", image.DstackLayout03, 2, 4096, image.RootCDROM, ""},
	{"attestations/dk-lite-getquote.json", image.DstackLayout05, 0, 0, 0, "f8438db36b96f85d8752ff7f24a89ec05c79ec9eda2ba732c897fb970ca429365b7471b1c054cb84f17b1c2b23ba6640"},
	{"attestations/dk-measurement-getquote.json", image.DstackLayout05, 0, 0, 0, ""},
	{"attestations/nr-gateway-report.json", image.DstackLayout05, 0, 0, 0, "fb14dc139f33d6fcf474bc8332cac001259fb31cfbcb6b34d4ceeb552a2c4466884a0cbde45ad98a05c5c060c23ad65a"},
	{"eventlogs/nm-mr-release.json", image.DstackLayout05, 8, 65536, image.RootVirtio, "e673be2f70beefb70b48a6109eed4715d7270d4683b3bf356fa25fafbf1aa76e39e9127e6e688ccda98bdab1d4d47f46"},
	{"eventlogs/nm-2511-tcbinfo.json", image.DstackLayout05, 8, 65536, image.RootVirtio, "e673be2f70beefb70b48a6109eed4715d7270d4683b3bf356fa25fafbf1aa76e39e9127e6e688ccda98bdab1d4d47f46"},
}

func machineOf(t testing.TB, g guest) image.Machine {
	t.Helper()
	c, err := image.ParseVMConfig([]byte(g.vmConfig))
	if err != nil {
		t.Fatal(err)
	}
	m, err := c.Machine()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestRealRTMR0 calculates every event of RTMR0 of real guests from their configuration
// alone.
func TestRealRTMR0(t *testing.T) {
	for _, v := range realGuests {
		t.Run(v.file, func(t *testing.T) {
			g := realGuest(t, v.file)
			m := image.Machine{VCPUs: v.vcpus, MemoryBytes: v.mib << 20, QEMU: "8.2.2", NICs: 1, Root: v.root}
			if v.vcpus == 0 {
				m = machineOf(t, g)
			}
			log, err := platform(t, v.layout()).RTMR0(m)
			if err != nil {
				t.Fatal(err)
			}
			var rtmr0 measure.Digest
			for _, e := range log {
				rtmr0 = rtmr0.Extend(e.Digest)
			}
			want := measure.Digest{}
			if g.quote != nil {
				want = g.quote.RTMR[0]
			}
			if v.rtmr0 != "" && want.IsZero() {
				want = digest(t, v.rtmr0)
			}
			if rtmr0 != want || v.rtmr0 != "" && rtmr0 != digest(t, v.rtmr0) {
				t.Errorf("RTMR0 is %v, want %v", rtmr0, want)
			}
			compareEvents(t, log, g.events)
		})
	}
}

// compareEvents compares what is predicted with the log: digests, types, and event data
// where it is predicted and was not stripped.
func compareEvents(t *testing.T, want []image.Event, log []measure.Event) {
	t.Helper()
	i := 0
	for _, e := range log {
		if e.IMR != 0 {
			continue
		}
		if i == len(want) {
			t.Fatalf("the log has more than the %d events predicted", i)
		}
		w := want[i]
		if e.Digest != w.Digest || e.Type != w.Type || len(e.Payload) > 0 && w.Payload != nil && !bytes.Equal(e.Payload, w.Payload) {
			t.Errorf("event %d, %s: predicted %#x %v %x, log has %#x %v %x", i, w.Name, w.Type, w.Digest, w.Payload, e.Type, e.Digest, e.Payload)
		}
		i++
	}
	if i != len(want) {
		t.Errorf("%d events predicted, the log has %d", len(want), i)
	}
}

// TestRealImage calculates every register of a real guest from its vm_config, which
// carries the image's measurement document.
func TestRealImage(t *testing.T) {
	for _, file := range []string{"attestations/dk-lite-getquote.json", "attestations/dk-measurement-getquote.json"} {
		g, c := realGuest(t, file), carried(t, file)
		m, err := image.ParseMaterial(c.Material)
		if err != nil {
			t.Fatal(err)
		}
		r, err := m.Measure(machineOf(t, g))
		if err != nil {
			t.Fatal(err)
		}
		if r.MRTD != g.quote.MRTD || r.RTMR != [3]measure.Digest(g.quote.RTMR[:3]) {
			t.Errorf("%s: got %v %v, want %v %v", file, r.MRTD, r.RTMR, g.quote.MRTD, g.quote.RTMR)
		}
		if got, want := r.MRAggregated(*g.quote), measure.MRAggregated(*g.quote); got != want {
			t.Errorf("%s: mr_aggregated is %x, want %x", file, got, want)
		}
		if got, want := r.MRSystem(nil), measure.MRSystem(*g.quote, nil); got != want {
			t.Errorf("%s: mr_system is %x, want %x", file, got, want)
		}
	}
}

// TestDecisions shows how a machine's open inputs are decided.
func TestDecisions(t *testing.T) {
	p := platform(t, image.DstackLayout05())
	on, off := true, false
	for _, v := range []struct {
		name   string
		m      image.Machine
		order  image.PageOrder
		pic    bool
		kernel image.KernelMode
	}{
		{"8.2.2", image.Machine{QEMU: "8.2.2"}, image.TwoPass, true, image.KernelPatched},
		{"no version", image.Machine{PIC: &off}, image.SinglePass, false, image.KernelPatched},
		{"9.2.1", image.Machine{QEMU: "9.2.1"}, image.SinglePass, false, image.KernelPatched},
		{"9.2.1 with fields", image.Machine{QEMU: "9.2.1", PIC: &on, PageOrder: image.TwoPass}, image.TwoPass, true, image.KernelPatched},
		{"10.1.0", image.Machine{QEMU: "10.1.0"}, image.SinglePass, false, image.KernelPatched},
	} {
		v.m.VCPUs, v.m.MemoryBytes, v.m.NICs = 1, 4<<30, 1
		r, err := p.Measure(v.m)
		if err != nil {
			t.Errorf("%s: %v", v.name, err)
			continue
		}
		if r.PageOrder != v.order || r.PIC != v.pic || r.Kernel != v.kernel {
			t.Errorf("%s: %v, pic %v, kernel %v; want %v, %v, %v", v.name, r.PageOrder, r.PIC, r.Kernel, v.order, v.pic, v.kernel)
		}
	}
	for name, m := range map[string]image.Machine{
		"raw kernel without the file": {QEMU: "10.2.0"}, "unknown QEMU": {QEMU: "12.0.0"}, "SMBIOS": {QEMU: "8.2.2", Firmware: image.Stable202505}, "between": {QEMU: "9.2.0"},
	} {
		m.VCPUs, m.MemoryBytes, m.NICs = 1, 4<<30, 1
		var not *image.UnmodelledError
		if _, err := p.Measure(m); !errors.As(err, &not) {
			t.Errorf("%s: got %v, want an UnmodelledError", name, err)
		}
	}
	if r, err := p.Measure(image.Machine{VCPUs: 1, MemoryBytes: 4 << 30, NICs: 1, QEMU: "12.0.0", AssumeProfile: true, Kernel: image.KernelPatched}); err != nil || !bytes.Contains([]byte(r.Proven), []byte("unproven")) {
		t.Errorf("assumed profile: %+v (%v)", r, err)
	}
}

// TestStable202505 has the sequence of edk2-stable202505, with its one opaque event.
func TestStable202505(t *testing.T) {
	smbios := digest(t, "fb669198"+hex.EncodeToString(make([]byte, 44)))
	events, err := platform(t, image.DstackLayout05()).RTMR0(image.Machine{VCPUs: 2, MemoryBytes: 2 << 30, NICs: 1, QEMU: "8.2.2", Firmware: image.Stable202505, SMBIOS: &smbios})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"TD HOB", "CFV", "fw_cfg BootMenu", "fw_cfg bootorder", "SecureBoot", "PK", "KEK", "db", "dbx", "separator", "acpi-loader", "acpi-rsdp", "acpi-tables", "SMBIOS", "BootOrder", "Boot0000", "Boot0001"}
	if len(events) != len(want) {
		t.Fatalf("%d events, want %d", len(events), len(want))
	}
	log := make([]measure.Event, len(events))
	for i, e := range events {
		log[i] = measure.Event{IMR: e.IMR, Type: e.Type, Digest: e.Digest}
		if e.Name != want[i] || e.Opaque != (e.Name == "SMBIOS") {
			t.Errorf("event %d is %s (opaque %v), want %s", i, e.Name, e.Opaque, want[i])
		}
	}
	// A log of that shape is recognised; its opaque event is not judged without a policy.
	m := image.Machine{VCPUs: 2, MemoryBytes: 2 << 30, NICs: 1, QEMU: "8.2.2"}
	x, err := image.Explain(image.Observation{Events: log, Machine: &m})
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range x.Findings[:len(want)] {
		if verdict := map[bool]image.Verdict{true: image.Opaque, false: image.Match}[f.Name == "SMBIOS"]; f.Verdict != verdict || f.Name != want[i] {
			t.Errorf("event %d is explained as %s, %s: %s", i, f.Name, f.Verdict, f.Hint)
		}
	}
	other := digest(t, hex.EncodeToString(make([]byte, 48)))
	m.SMBIOS = &other
	if x, err = image.Explain(image.Observation{Events: log, Machine: &m}); err != nil || x.First() == nil || x.First().Name != "SMBIOS" {
		t.Errorf("against a policy with another SMBIOS table: %+v (%v)", x.First(), err)
	}
}

// TestRealKernels calculates RTMR1 and RTMR2 of guests whose images are not here from the
// three digests of each.
func TestRealKernels(t *testing.T) {
	for _, v := range []struct {
		name                                  string
		kernel, cmdline, initrd, rtmr1, rtmr2 string
	}{
		{"dstack 0.4", "0db5964580e727672734da95797318d8455ab74b3e3d66fbb1aaa4ddd01a3f8555f4889e57c19a15c165594e31678dc0",
			"ad49ca7e80258d7580c5c580cd21ada7ecbf418dde5197d6f8c835493ceb6edec0f8954b733bd9b889f96f33e5f9cb05",
			"e0cdb72fbba75a0f4d396c0b80a4336db049b383a9730467160dec0b7059cb22aca87639dcc655d935d6c6356b3108ad",
			"6ba8f87f35d0641e8abca07e75e3882abdc9f19d7cc8f6e3fe04435bd5f694d4e3cf008b60d7c7233896e8d1f23c34a7",
			"03b1c4afcac07d00d8e853163aff3ba3f9af68ddfbdbeafab70210a8dc601b409c28873d74fb6dbe7dc33a8da7c09621"},
		{"dstack 0.5.8", "69e0bbb3861d993ddd4b79b40bb31cdc58ed540c754574e3c8af2432c5ac88e751a3b37bcf55a2352bad236b6ff4dc5c",
			"b9c214a020aaa317e6b62a6a7d2adfa14fd5b871849c714f747f8728cefda6d3c566e332044051aeac30bfa1fc9916a0",
			"dbfb59810302b3564182a02ae2fc5dcda5f8207380a7b18a9e6dd6fb648c33b1612eb10fb95ec620fb70b9c240ffda1c",
			"b598fde9491427341bc4683b75d10d3e36770af3a36a6954d8b6b7b22aa66358f13e1f172e51b7d6e6710d99a8d8532f",
			"9284cde236231d5ddace01104a440fd504df5182a2ad1ac3d2138b80c6a7864bd2c30f69041d8264217f3d24541580cf"},
	} {
		m := platform(t, image.DstackLayout05())
		m.Kernel, m.CommandLine, m.Initrd = digest(t, v.kernel), digest(t, v.cmdline), digest(t, v.initrd)
		r, err := m.Measure(image.Machine{VCPUs: 1, MemoryBytes: 64 << 30, NICs: 1, QEMU: "8.2.2"})
		if err != nil {
			t.Fatal(err)
		}
		if r.RTMR[1] != digest(t, v.rtmr1) || r.RTMR[2] != digest(t, v.rtmr2) || image.RTMR1(m.Kernel) != r.RTMR[1] {
			t.Errorf("%s: RTMR1 is %v, RTMR2 %v", v.name, r.RTMR[1], r.RTMR[2])
		}
	}
}
