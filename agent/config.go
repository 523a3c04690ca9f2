package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"tdx-agent/measure"
	"tdx-agent/remote/tomlfile"
)

const (
	defaultConfig  = "/etc/tdx-agent/agent.toml"
	defaultRuntime = "/run/tdx-agent"
	maxConfig      = 1 << 20
)

// Config is agent.toml. agent.toml.example documents every key; a test holds the
// two together.
type Config struct {
	OnForeignExtend string         `toml:"on_foreign_extend"` // "refuse" or "serve"
	Kernel          KernelConfig   `toml:"kernel"`
	Boot            BootConfig     `toml:"boot"`
	Sockets         SocketsConfig  `toml:"sockets"`
	Compat          CompatConfig   `toml:"compat"`
	Egress          EgressConfig   `toml:"egress"`
	Endpoint        EndpointConfig `toml:"endpoint"`
	RATLS           RATLSConfig    `toml:"ratls"`
	Limits          LimitsConfig   `toml:"limits"`
	Worker          WorkerConfig   `toml:"worker"`
	Keys            KeysConfig     `toml:"keys"`

	Services []ServiceConfig `toml:"service"`
	Connects []ConnectConfig `toml:"connect"`

	Applications []ApplicationConfig `toml:"application"`
}

// KernelConfig says where the kernel's interfaces are.
type KernelConfig struct {
	Entry             string `toml:"entry"`
	CCEL              string `toml:"ccel"`
	AttestConf        string `toml:"attest_conf"`
	AllowEnvOverrides bool   `toml:"allow_env_overrides"`
}

// BootConfig says what the boot step measures.
type BootConfig struct {
	HostShared     string `toml:"host_shared"`
	AppKeys        string `toml:"app_keys"`
	Era            string `toml:"era"`
	AgentKey       bool   `toml:"agent_key"`
	DstackLogs     string `toml:"dstack_logs"`
	OSImageHash    string `toml:"os_image_hash"`
	RootFSHash     string `toml:"rootfs_hash"`
	CACertHash     string `toml:"ca_cert_hash"`
	MRKMS          string `toml:"mr_kms"`
	StorageFS      string `toml:"storage_fs"`
	GPUAttestation string `toml:"gpu_attestation"`
}

// SocketsConfig says where dstack's sockets are when systemd does not pass them.
type SocketsConfig struct {
	Dstack string `toml:"dstack"`
	Tappd  string `toml:"tappd"`
}

// CompatConfig loosens the agent for applications that count on it.
type CompatConfig struct {
	FullAccess    bool   `toml:"full_access"`
	RawReportData bool   `toml:"raw_report_data"`
	GPUInfo       string `toml:"gpu_info"`
}

func newConfig() *Config {
	return &Config{
		OnForeignExtend: "refuse",
		Kernel:          KernelConfig{Entry: "tdx-agent", CCEL: "/sys/firmware/acpi/tables/data/CCEL", AttestConf: "/etc/tdx-attest.conf"},
		Boot:            BootConfig{HostShared: "/dstack/.host-shared", Era: "0.5.11", AgentKey: true, DstackLogs: "/run/log"},
		Sockets:         SocketsConfig{Dstack: "/run/dstack.sock", Tappd: "/run/tappd.sock"},
		Limits:          defaultLimits(),
		Compat:          CompatConfig{RawReportData: true, GPUInfo: "/run/nvidia-gpu-attestation/attestation.out"},
		Keys:            newKeysConfig(),
		Egress:          newEgressConfig(),
		Endpoint:        newEndpointConfig(),
		RATLS:           newRATLSConfig(),
	}
}

// loadConfig reads the file. An empty path means the default one, which may be
// absent; a path that was asked for may not.
func loadConfig(path string) (*Config, error) {
	c := newConfig()
	asked := path != ""
	if !asked {
		path = defaultConfig
	}
	b, err := readCapped(path, maxConfig)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return c, nil
	}
	if err != nil {
		return nil, withExit(exitConfig, err)
	}
	if err := c.decode(path, b); err != nil {
		return nil, withExit(exitConfig, err)
	}
	return c, nil
}

func (c *Config) decode(path string, b []byte) error {
	file := tomlfile.File{Path: path, Hint: "agent.toml.example lists every key"}
	if err := file.Decode(b, c); err != nil {
		return err
	}
	if err := c.check(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (c *Config) check() error {
	if c.OnForeignExtend != "refuse" && c.OnForeignExtend != "serve" {
		return fmt.Errorf(`on_foreign_extend is %q, want "refuse" or "serve"`, c.OnForeignExtend)
	}
	if e := c.Kernel.Entry; e == "" || len(e) > 255 || strings.ContainsAny(e, "/\x00") || e == "." || e == ".." {
		return fmt.Errorf("kernel.entry is %q, want the name of a configfs entry", e)
	}
	if _, err := measure.ParseEra(c.Boot.Era); err != nil {
		return fmt.Errorf("boot.era: %w", err)
	}
	for name, path := range map[string]string{"kernel.ccel": c.Kernel.CCEL, "kernel.attest_conf": c.Kernel.AttestConf, "boot.host_shared": c.Boot.HostShared,
		"boot.app_keys": c.Boot.AppKeys, "boot.dstack_logs": c.Boot.DstackLogs, "boot.gpu_attestation": c.Boot.GPUAttestation, "compat.gpu_info": c.Compat.GPUInfo,
		"sockets.dstack": c.Sockets.Dstack, "sockets.tappd": c.Sockets.Tappd} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("%s is %q, want an absolute path", name, path)
		}
	}
	for name, v := range map[string]string{"boot.os_image_hash": c.Boot.OSImageHash, "boot.rootfs_hash": c.Boot.RootFSHash,
		"boot.ca_cert_hash": c.Boot.CACertHash, "boot.mr_kms": c.Boot.MRKMS} {
		if _, err := hash32(v); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, check := range []func() error{
		c.Egress.check,
		c.checkChannels,
		c.Limits.check,
		func() error { return checkApplications(c.Applications) },
		c.Worker.check,
		c.Keys.check,
	} {
		if err := check(); err != nil {
			return err
		}
	}
	if n := len(c.agentConfig()); n > maxAgentConfig {
		return fmt.Errorf("the settings that loosen defaults take %d bytes, and are measured with every quote: want at most %d; declare less, or with shorter names", n, maxAgentConfig)
	}
	return nil
}

// loosened lists the settings that loosen a default, by name, with their values. They
// are shown in status and measured as event agent-config.
func (c *Config) loosened() map[string]any {
	m := map[string]any{}
	if c.OnForeignExtend != "refuse" {
		m["on_foreign_extend"] = c.OnForeignExtend
	}
	if c.Kernel.AllowEnvOverrides {
		m["kernel.allow_env_overrides"] = true
	}
	if c.Compat.FullAccess {
		m["compat.full_access"] = true
	}
	c.loosenedServices(m)
	if c.RATLS.Endpoint {
		m["ratls.endpoint"] = true
	}
	for i := range c.Applications {
		c.Applications[i].loosened(m)
	}
	c.Keys.loosened(m)
	return m
}

// tighten sets what loosened lists back to the defaults.
func (c *Config) tighten() {
	def := newConfig()
	c.OnForeignExtend = def.OnForeignExtend
	c.Kernel.AllowEnvOverrides = def.Kernel.AllowEnvOverrides
	c.Compat.FullAccess = def.Compat.FullAccess
	c.Services = tightServices(c.Services)
	c.RATLS.Endpoint = def.RATLS.Endpoint
	c.Keys.Local.TCBStatus = def.Keys.Local.TCBStatus
	c.Applications = tightened(c.Applications)
}

// agentConfig is the payload of event agent-config: the loosened settings as JSON
// with sorted keys, or nothing when there are none.
func (c *Config) agentConfig() []byte {
	m := c.loosened()
	if len(m) == 0 {
		return nil
	}
	b, err := json.Marshal(m) // sorts the keys
	if err != nil {
		panic(err) // strings, numbers and booleans only
	}
	return b
}

// readCapped reads a regular file of at most limit bytes.
func readCapped(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO would wait for its writer
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return readLimited(f, path, limit)
}
