package acpi_test

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tdx-agent/measure/acpi"
)

// A guest is a machine on TDX hardware and the digests of its event log. file names the
// log in the shared fixtures.
type guest struct {
	name, file           string
	machine              acpi.Machine
	loader, rsdp, tables string
}

// dstack's machines of QEMU 8.2.2: up to OS 0.4 the root file system is a CD-ROM.
func qemu8(cpus int, memory uint64, cdrom bool) acpi.Machine {
	return acpi.Machine{QEMU: acpi.QEMU8, CPUs: cpus, Memory: memory, PIC: true, CDROM: cdrom, NICs: 1}
}

var guests = []guest{
	{
		name: "A: 1 vCPU, 1 GiB, OS 0.3", file: "attestations/dx-report.json", machine: qemu8(1, 1<<30, true),
		loader: "68cd79315e70aecd4afe7c1b23a5ed7b3b8e51a477e1739f111b3156def86bbc56ebf239dcd4591bc7a9fff90023f481",
		rsdp:   "6bc203b3843388cc4918459c3f5c6d1300a796fb594781b7ecfaa3ae7456975f095bfcc1156c9f2d25e8b8bc1b520f66",
		tables: "444cf35d277a7b6049faf4ff23165e256e716eaad4650aeef6afae8e2dca3359b40c1b2eb997c5568f956616310c9147",
	},
	{
		name: "B: 1 vCPU, 2 GiB, OS 0.3", file: "eventlogs/ph-sim-eventlog.json", machine: qemu8(1, 2<<30, true),
		loader: "68cd79315e70aecd4afe7c1b23a5ed7b3b8e51a477e1739f111b3156def86bbc56ebf239dcd4591bc7a9fff90023f481",
		rsdp:   "6bc203b3843388cc4918459c3f5c6d1300a796fb594781b7ecfaa3ae7456975f095bfcc1156c9f2d25e8b8bc1b520f66",
		tables: "ec9e8622a100c399d71062a945f95d8e4cdb7294e8b1c6d17a6a8d37b5084444000a78b007ef533f290243421256d25c",
	},
	{
		name: "2 vCPUs, 2 GiB, OS 0.3", file: "attestations/zk-livy.json", machine: qemu8(2, 2<<30, true),
		loader: "142aa9710a7187d649bfafab0a4226e554859c7fb0cd3e6707f31291e332e399b4ae8f851876ef0af8e607a59b60cc8e",
		rsdp:   "07d867a2ead8d8e3b1240f17e461089b819ab63ac34eff3b29459445c67409c2342dfdc9335d2335a5aaf591fe1483e1",
		tables: "da8447b3b4ae0110934f6b7fb9cb017962243eb62e3a971243fde4fd878f26f6ead8e59eba4a1a5b2211a5073cd66506",
	},
	{
		name: "D: 2 vCPUs, 2 GiB, OS 0.6", file: "attestations/dk-lite-getquote.json", machine: qemu8(2, 2<<30, false),
		loader: "095d04cf26fe03aef6e3561fa24c1aa1cea93f4aeaf563b1f9f7616184c53454875925759434769cec2490acb563a337",
		rsdp:   "8d9a4d4777a1bc77ecd9d8d37a4628129a80052a510320159a20a923bd07a0e90d8d1f2e1ebf088992b25f0d0fa672ef",
		tables: "3070721e169bc41884724cb0e6b3082e1baf249083d8b389181ba50b9afa951057876c380b8870e8c2facf2eff67a2b6",
	},
	{
		name: "gateway: 4 vCPUs, 8 GiB, OS 0.5", file: "attestations/nr-gateway-report.json", machine: qemu8(4, 8<<30, false),
		loader: "331d1d482d04a6415b6733f16288a89bd13a2fa7977b4f7c81a52f35bad542de6ceed4a75f9234dd52f1cba64675fce0",
		rsdp:   "4ec75e379af417800fce8458a5a2709e654e7c2fa72fde5cef3acd43c9aba8cf78dac91bb72f8fd5a5dce66e64c12220",
		tables: "557cc395901d6f9dbc35609ed51753ca7915cf2e9aece2f9cf9003baee61318672aea1a405c9b4f51b337f5e58403971",
	},
	{
		name: "F: 8 vCPUs, 64 GiB, OS 0.5", file: "eventlogs/nm-2511-tcbinfo.json", machine: qemu8(8, 64<<30, false),
		loader: "6dae15170c9fea6455681e3f838941a642ff9001a02a333e9ca8549af1db4ba47f01403e31dabe6e8a0b41ddd38b6d99",
		rsdp:   "b3a62232ef6be064cce25a8b92cf55d4a6c099ee7a9c0852ce0c7d572393dae84895c0f59a9db5000f0b34a90c1b1bec",
		tables: "b6ed8ff3fca3c308f3f1ec7889054cc900b1c6dad9b14aedd0144d046626c81a5dbae47937f4949bb2d674a0bd699a7b",
	},
}

// TestHardware rebuilds what TDX hardware measured, from the configuration alone.
func TestHardware(t *testing.T) {
	for _, g := range guests {
		got := build(t, g.machine)
		for _, f := range []struct {
			name, want string
			got        []byte
		}{{"loader", g.loader, got.Loader}, {"rsdp", g.rsdp, got.RSDP}, {"tables", g.tables, got.Tables}} {
			if digest := sha512.Sum384(f.got); hex.EncodeToString(digest[:]) != f.want {
				t.Errorf("%s: %s is %x, want %s", g.name, f.name, digest, f.want)
			}
		}
	}
}

// TestHardwareLogs looks the digests up in the logs of real evidence: the digests above are
// not this package's own.
func TestHardwareLogs(t *testing.T) {
	dir := os.Getenv("TDX_AGENT_FIXTURES")
	if dir == "" {
		dir = "../../../shared/fixtures"
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no real evidence: set TDX_AGENT_FIXTURES to its folder (%v)", err)
	}
	for _, g := range guests {
		log, err := os.ReadFile(filepath.Join(dir, g.file))
		if err != nil {
			t.Error(err)
			continue
		}
		rest := string(log)
		for _, digest := range []string{g.loader, g.rsdp, g.tables} { // the order the firmware reads them in
			_, after, found := strings.Cut(rest, digest)
			if !found {
				t.Errorf("%s: %s has no event %s, or out of order", g.name, g.file, digest)
			}
			rest = after
		}
	}
}

// TestRegister replays RTMR0 of a GPU guest of QEMU 9.2.1, of which only the configuration
// and the register are published: 24 vCPUs, 256 GiB, one GPU, no hotplug, a hole of 1 PiB.
func TestRegister(t *testing.T) {
	got := build(t, acpi.Machine{
		QEMU: acpi.QEMU9_2, CPUs: 24, Memory: 256 << 30, NICs: 1, GPUs: 1, HotplugOff: true, PCIHole64: 1 << 50,
	})
	const want = "24c15e08c07aa01c531cbd7e8ba28f8cb62e78f6171bf6a8e0800714a65dd5efd3a06bf0cf5433c02bbfac839434b418"
	events := []string{ // what else the firmware measures there
		"53463ae04b471637983d15f9f41780859a60e70595e56be96bc69acf6efc3174a3fa258b5da897785cad4ca8fcb8a723", // TD HOB
		"344bc51c980ba621aaa00da3ed7436f7d6e549197dfe699515dfa2c6583d95e6412af21c097d473155875ffd561d6790", // variable volume
		"9dc3a1f80bcec915391dcda5ffbb15e7419f77eab462bbf72b42166fb70d50325e37b36f93537a863769bcf9bedae6fb", // SecureBoot
		"6f2e3cbc14f9def86980f5f66fd85e99d63e69a73014ed8a5633ce56eca5b64b692108c56110e22acadcef58c3250f1b", // PK
		"d607c0efb41c0d757d69bca0615c3a9ac0b1db06c557d992e906c6b7dee40e0e031640c7bfd7bcd35844ef9edeadc6f9", // KEK
		"08a74f8963b337acb6c93682f934496373679dd26af1089cb4eaf0c30cf260a12e814856385ab8843e56a9acea19e127", // db
		"18cc6e01f0c6ea99aa23f8a280423e94ad81d96d0aeb5180504fc0f7a40cb3619dd39bd6a95ec1680a86ed6ab0f9828d", // dbx
		"394341b7182cd227c5c6b07ef8000cdfd86136c4292b8e576573ad7ed9ae41019f5818b4b971c9effc60e1ad9f1289f0", // separator
	}
	for _, file := range [][]byte{got.Loader, got.RSDP, got.Tables} {
		digest := sha512.Sum384(file)
		events = append(events, hex.EncodeToString(digest[:]))
	}
	events = append(events,
		"1dd6f7b457ad880d840d41c961283bab688e94e4b59359ea45686581e90feccea3c624b1226113f824f315eb60ae0a7c", // BootOrder
		"23ada07f5261f12f34a0bd8e46760962d6b4d576a416f1fea1c64bc656b1d28eacf7047ae6e967c58fd2a98bfa74c298") // Boot0000
	var register [48]byte
	for _, e := range events {
		digest, err := hex.DecodeString(e)
		if err != nil {
			t.Fatal(err)
		}
		register = sha512.Sum384(append(register[:], digest...))
	}
	if hex.EncodeToString(register[:]) != want {
		t.Errorf("RTMR0 is %x, want %s", register, want)
	}
}

// TestPublished holds the profiles against digests that dstack publishes for its own model
// (SHA-256 of etc/acpi/tables), made without this code: what there is for QEMUs that no
// Debian release has.
func TestPublished(t *testing.T) {
	plain := func(p acpi.Profile, edit func(*acpi.Machine)) acpi.Machine {
		m := acpi.Machine{QEMU: p, CPUs: 1, Memory: 2 << 30, NICs: 1}
		edit(&m)
		return m
	}
	none := func(*acpi.Machine) {}
	for _, c := range []struct {
		name    string
		machine acpi.Machine
		want    string
	}{
		{"9.1", plain(acpi.QEMU9_1, none), "ff0c03c7f4026a95b0b2f2e08cef7d501a3a44b4df036c9f26de91828f0215f6"},
		{"9.2.1", plain(acpi.QEMU9_2, none), "b183eba66c6e96556f28cefe60ca92620b82488fcefaf66167aad61e2b2e73d1"},
		{"10.0", plain(acpi.QEMU10, none), "d0410a8abdbba6d86a19a2eefd491376727e4e2d80c54349d7f30deca14ca6e1"},
		{"11.0", plain(acpi.QEMU11_0, none), "e211dd453e651ef320d28c65d23f578e96468614614e7b1172f18df5052d0f1f"},
		{"11.1", plain(acpi.QEMU11_1, none), "09f99e5dcf36b80a9258e849b3a9a70e7914244008e6a92a689eb22e4cc17a8f"},
		{"2 vCPUs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.CPUs = 2 }), "1362c6f473801b34f93df4e2966b2d3350f7f9113750da78a2cb799177157da8"},
		{"8 vCPUs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.CPUs = 8 }), "0f9fc08c5efd03f1cb3cfaa1a0a09c45dcfbc18183dbc5aa1367ad10eb65135a"},
		{"64 vCPUs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.CPUs = 64 }), "089fda95fb5d45ba9a5f46ebc99d85e1331daa4dd38f60597eec9a3d95c94bb5"},
		{"256 vCPUs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.CPUs = 256 }), "d1c3291dbdf0ccc4acdecce5f78fbe80e0ca7d6d803a62c9f5b59ee8c7e0a1b5"},
		{"4096 vCPUs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.CPUs = 4096 }), "6a4bbd704addd10996632d6535432598c742789e60b29d055a7784be927588a5"},
		{"no NIC", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.NICs = 0 }), "93a140bbc031dc313ed4011b838c8b22ffdecb474435d9fcb294be97194c953c"},
		{"2 NICs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.NICs = 2 }), "fbf083121cc3b46b3b7913e45e635e6bb31e11f0cb6e029aa504bc4de68e2d64"},
		{"4 volumes", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.Volumes = 4 }), "7d722d7e3d811aa7978030af1d2a6c6aa68a5ab9267d7dff4e57babdf1476870"},
		{"1 GPU", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.GPUs, m.HotplugOff, m.PCIHole64 = 1, true, 32<<30 }), "0948490885eb9a777d553c7c0c529e3647533f4251b394f2f7f0a9862dadb4ca"},
		{"8 GPUs", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.GPUs, m.HotplugOff, m.PCIHole64 = 8, true, 32<<30 }), "93946fc370652394d13211bd1e9361a27128a56339017f9e3645d86f0bddc1bd"},
		{"1 GPU, 1 NVSwitch", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.GPUs, m.NVSwitches, m.HotplugOff, m.PCIHole64 = 1, 1, true, 32<<30 }),
			"bc29add92b02f264c41cfbde65beb24499cbb43e10fefe191f3a513284c050de"},
		{"1 GPU, 4 NVSwitches", plain(acpi.QEMU11_1, func(m *acpi.Machine) { m.GPUs, m.NVSwitches, m.HotplugOff, m.PCIHole64 = 1, 4, true, 32<<30 }),
			"323e607f82db7a002bd6a71e7a6ac1ed746e94e3daba75dde2958751861c1a57"},
	} {
		if digest := sha256.Sum256(build(t, c.machine).Tables); hex.EncodeToString(digest[:]) != c.want {
			t.Errorf("%s: etc/acpi/tables is %x, want %s", c.name, digest, c.want)
		}
	}
}

func build(t *testing.T, m acpi.Machine) *acpi.Tables {
	t.Helper()
	tables, err := acpi.Build(m)
	if err != nil {
		t.Fatalf("%+v: %v", m, err)
	}
	return tables
}
