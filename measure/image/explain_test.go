package image_test

import (
	"strings"
	"testing"

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
