package measure

import "fmt"

// sampleCompose is a small app-compose.json in dstack's form.
const sampleCompose = `{"allowed_envs":[],"docker_compose_file":"services:\n  web:\n    image: nginx@sha256:0000000000000000000000000000000000000000000000000000000000000000\n    volumes:\n      - /var/run/dstack.sock:/var/run/dstack.sock\n","features":[],"gateway_enabled":false,"key_provider":"none","kms_enabled":false,"local_key_provider_enabled":false,"manifest_version":2,"name":"tdx-agent-sample","no_instance_id":false,"public_logs":true,"public_sysinfo":true,"public_tcbinfo":true,"runner":"docker-compose","storage_fs":"ext4"}`

// sampleSysConfig describes a VM that no image stands behind: the hash is zero.
const sampleSysConfig = `{"vm_config":"{\"os_image_hash\":\"0000000000000000000000000000000000000000000000000000000000000000\",\"cpu_count\":2,\"memory_size\":2147483648,\"num_gpus\":0,\"num_nvswitches\":0,\"hugepages\":false,\"hotplug_off\":false,\"pci_hole64_size\":0}"}`

// SampleApp returns the files of an application that a simulated TD can measure
// when none is given. They are always the same and hold no secret. The application
// has no key provider, so its instance id still differs from boot to boot.
func SampleApp() *GuestFiles {
	f := GuestFiles{AppCompose: []byte(sampleCompose)}
	var err error
	if f.Compose, err = ParseAppCompose(f.AppCompose); err == nil {
		f.SysConfig, err = ParseSysConfig([]byte(sampleSysConfig))
	}
	if err != nil {
		panic(fmt.Sprintf("sample application: %v", err)) // a constant of this file is wrong
	}
	return &f
}
