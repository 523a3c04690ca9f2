package image_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"tdx-agent/measure/image"
)

// TestVMConfigSemantics reads what hosts write, not what the names say.
func TestVMConfigSemantics(t *testing.T) {
	for _, v := range []struct {
		text  string
		order image.PageOrder
		nics  int
	}{
		{`{"cpu_count":1,"memory_size":1073741824}`, 0, 1},
		{`{"cpu_count":1,"memory_size":1073741824,"qemu_single_pass_add_pages":true}`, image.TwoPass, 1},
		{`{"cpu_count":1,"memory_size":1073741824,"qemu_single_pass_add_pages":false,"num_nics":2}`, image.SinglePass, 2},
		{`{"cpu_count":1,"memory_size":1073741824,"qemu_single_pass_add_pages":null,"num_nics":0}`, 0, 0},
		{`{"vm_config":"{\"cpu_count\":1,\"memory_size\":1073741824}"}`, 0, 1},
	} {
		c, err := image.ParseVMConfig([]byte(v.text))
		if err != nil {
			t.Fatal(err)
		}
		m, err := c.Machine()
		if err != nil || m.PageOrder != v.order || m.NICs != v.nics || m.VCPUs != 1 || m.MemoryBytes != 1<<30 {
			t.Errorf("%s: got %+v (%v)", v.text, m, err)
		}
	}
}

func TestVMConfigRefused(t *testing.T) {
	const ok = `"cpu_count":1,"memory_size":1073741824`
	for _, v := range []struct{ name, text, want string }{
		{"not JSON", `{`, "JSON"},
		{"array", `[]`, "want a JSON object"},
		{"no CPUs", `{"memory_size":1073741824}`, "cpu_count is missing"},
		{"no memory", `{"cpu_count":1}`, "memory_size is missing"},
		{"twice", `{` + ok + `,"cpu_count":2}`, "is there twice"},
		{"case", `{"CPU_COUNT":1,"memory_size":1073741824}`, "cpu_count is missing"},
		{"negative", `{"cpu_count":-1,"memory_size":1073741824}`, "cpu_count"},
		{"fraction", `{"cpu_count":1.5,"memory_size":1073741824}`, "cpu_count"},
		{"text", `{"cpu_count":"1","memory_size":1073741824}`, "cpu_count"},
		{"overflow", `{"cpu_count":1,"memory_size":18446744073709551616}`, "memory_size"},
		{"hash", `{` + ok + `,"os_image_hash":"12"}`, "os_image_hash"},
		{"spec", `{` + ok + `,"spec_version":2}`, "spec_version"},
		{"material", `{` + ok + `,"tdx_measurement":{"measurement":"*"}}`, "tdx_measurement"},
		{"material's members", `{` + ok + `,"tdx_measurement":{"measurement":"","measurement":""}}`, "twice"},
		{"wrapped twice", `{"vm_config":"{\"vm_config\":\"{}\"}"}`, "in a vm_config in a"},
		{"wrapped number", `{"vm_config":1}`, "vm_config"},
		{"large", strings.Repeat(" ", 300<<10), "want at most"},
	} {
		if _, err := image.ParseVMConfig([]byte(v.text)); err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
	for _, v := range []struct {
		name, text string
		unmodelled bool
	}{
		{"TPM", `{` + ok + `,"swtpm":true}`, true},
		{"share", `{` + ok + `,"host_share_mode":"nfs"}`, true},
		{"variant", `{` + ok + `,"ovmf_variant":"next"}`, true},
		{"old QEMU", `{` + ok + `,"qemu_version":"7.2.0"}`, true},
		{"QEMU", `{` + ok + `,"qemu_version":"8.x"}`, false},
		{"QEMU of one number", `{` + ok + `,"qemu_version":"8"}`, false},
		{"CPUs", `{"cpu_count":0,"memory_size":1073741824}`, false},
		{"many CPUs", `{"cpu_count":4097,"memory_size":1073741824}`, false},
		{"memory", `{"cpu_count":1,"memory_size":1073741825}`, false},
		{"much memory", `{"cpu_count":1,"memory_size":18446744073708503040}`, false},
		{"GPUs", `{` + ok + `,"num_gpus":4294967295}`, false},
	} {
		c, err := image.ParseVMConfig([]byte(v.text))
		if err != nil {
			t.Fatal(err)
		}
		var not *image.UnmodelledError
		if _, err := c.Machine(); err == nil || errors.As(err, &not) != v.unmodelled {
			t.Errorf("%s: got %v", v.name, err)
		}
	}
	c, err := image.ParseVMConfig([]byte(`{` + ok + `,"zeta":1,"alpha":{}}`))
	if err != nil || !slices.Equal(c.UnknownMembers, []string{"alpha", "zeta"}) {
		t.Errorf("unknown members: got %+v (%v)", c, err)
	}
}

func FuzzVMConfig(f *testing.F) {
	f.Add([]byte(`{"cpu_count":1,"memory_size":1073741824,"qemu_version":"8.2.2","tdx_measurement":{"measurement":"AA==","checksum_file":""}}`))
	f.Add([]byte(`{"vm_config":"{\"cpu_count\":1,\"memory_size\":1073741824}"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := image.ParseVMConfig(b)
		if err != nil {
			return
		}
		if m, err := c.Machine(); err == nil && m.Check() != nil {
			t.Errorf("%q gives a machine that is none: %v", b, m.Check())
		}
	})
}
