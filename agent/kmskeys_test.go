package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/agent/keys"
	"tdx-agent/agent/keys/kmstest"
	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
	"tdx-agent/remote/forward"
)

// simulatedVerifier accepts every application of a simulated TD.
func simulatedVerifier(t *testing.T, td *tdxsim.TD) (v *remote.Verifier, policy, bundle string) {
	t.Helper()
	v, policy, bundle, err := makeVerifier(td, filepath.Join(t.TempDir(), "it"))
	check(t, err)
	return v, policy, bundle
}

// makeVerifier leaves its policy and collateral in NAME-policy.toml and
// NAME-collateral.json.
func makeVerifier(td *tdxsim.TD, name string) (v *remote.Verifier, policy, bundle string, err error) {
	policy, bundle = name+"-policy.toml", name+"-collateral.json"
	roots, err := dcap.NewRoots(td.RootPEM())
	if err != nil {
		return nil, "", "", err
	}
	text := fmt.Sprintf("version = 1\n[[peer]]\nname = \"it\"\nroot = \"sha256:%x\"\nallow_simulated = true\nallow_any_image = true\nallow_any_app = true\n", roots.Pins()[0])
	b, err := td.Collateral()
	if err != nil {
		return nil, "", "", err
	}
	if err := errors.Join(os.WriteFile(policy, []byte(text), 0o600), os.WriteFile(bundle, b, 0o600)); err != nil {
		return nil, "", "", err
	}
	p, err := remote.ParsePolicy(policy, []byte(text))
	if err != nil {
		return nil, "", "", err
	}
	store, err := collateral.New(collateral.Config{Roots: roots, Files: []string{bundle}})
	if err != nil {
		return nil, "", "", err
	}
	v, err = remote.NewVerifier(remote.Config{Policy: p, Collateral: store})
	return v, policy, bundle, err
}

// kmsMachine is the TD of a KMS.
type kmsMachine struct {
	td     *tdxsim.TD
	events []measure.Event
}

func newKMSMachine(t *testing.T) *kmsMachine {
	t.Helper()
	td, err := tdxsim.New(t.TempDir(), tdxsim.Config{})
	check(t, err)
	t.Cleanup(func() { td.Close() })
	m, err := bootKMSMachine(td)
	check(t, err)
	return m
}

func (m *kmsMachine) attest(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	c := m.td.Client()
	dir, err := c.MkdirTemp("/sys/kernel/config/tsm/report", "*")
	if err != nil {
		return nil, err
	}
	if err := c.WriteFile(dir+"/inblob", rd[:]); err != nil {
		return nil, err
	}
	quote, err := c.ReadFile(dir + "/outblob")
	return &measure.Evidence{Quote: quote, Events: m.events}, err
}

// lockedBuffer takes the log of a daemon.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// kmsSession is an agent whose application has its keys from a KMS.
type kmsSession struct {
	d      *daemon
	kms    *kmstest.Server
	listen net.Listener // of the KMS, which does not serve yet
	log    lockedBuffer
}

// newKMSSession starts an agent and an egress before its KMS.
func newKMSSession(t *testing.T) *kmsSession {
	t.Helper()
	base, err := os.MkdirTemp("", "tdx")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(base) })
	s := &kmsSession{}
	ctx, cancel := context.WithCancel(context.Background())
	dir, err := serverRuntimeDir(base, true)
	check(t, err)
	cfg := newConfig()
	cfg.Compat.FullAccess = true
	back, err := openBackend(cfg, dir, true)
	check(t, err)
	guest, err := tdxsim.Open(dir.td())
	check(t, err)
	t.Cleanup(func() { guest.Close() })
	guests, _, _ := simulatedVerifier(t, guest)
	machine := newKMSMachine(t)
	s.kms, err = kmstest.New(ctx, kmstest.Config{Host: "localhost", Guests: guests, Attest: machine.attest, Now: time.Now})
	check(t, err)
	s.listen, err = net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	_, port, _ := net.SplitHostPort(s.listen.Addr().String())
	cfg.Keys.KMS.URLs = []string{"https://localhost:" + port}
	_, cfg.Keys.KMS.Policy, _ = simulatedVerifier(t, machine.td)
	_, _, bundle := simulatedVerifier(t, machine.td)
	cfg.Keys.KMS.Collateral = []string{bundle}
	cfg.Boot.MRKMS, err = machine.mrAggregated()
	check(t, err)
	cfg.Boot.OSImageHash = strings.Repeat("ab", 32)
	files := *measure.SampleApp()
	files.AppCompose = fmt.Appendf(nil, `{"manifest_version":2,"name":"k","runner":"docker-compose","key_provider":"kms","key_provider_id":"%x","storage_fs":"ext4"}`, s.kms.Root())
	files.Compose, err = measure.ParseAppCompose(files.AppCompose)
	check(t, err)
	files.SysConfig.VMConfig = `{"os_image_hash":"` + cfg.Boot.OSImageHash + `"}`
	l, err := openLedger(ctx, cfg, dir, back)
	check(t, err)
	_, err = measureBoot(ctx, cfg, dir, l, &files)
	check(t, err)
	s.d, err = newDaemon(ctx, cfg, dir, back, l, "", &files, slog.New(slog.NewTextHandler(&s.log, nil)))
	check(t, err)
	listeners, err := listenAll(cfg, dir, true)
	check(t, err)
	destination, err := forward.ParseDestination("localhost:" + port)
	check(t, err)
	out, err := listenUnix(dir.egressSocket(), 0o600)
	check(t, err)
	done := make(chan error, 2)
	go func() {
		done <- forward.NewEgress(forward.EgressConfig{Allow: []forward.Destination{destination}, Logger: slog.New(slog.DiscardHandler)}).Serve(ctx, out)
	}()
	s.d.openAudit()
	go func() { done <- s.d.run(ctx, listeners, io.Discard) }()
	t.Cleanup(func() {
		cancel()
		check(t, <-done)
		check(t, <-done)
		l.Close()
		back.close()
		s.kms.Close()
	})
	return s
}

// TestKeysOfAKMS is a session of an agent that starts before its KMS: quotes and status
// work, keys are refused with the reason and come by themselves.
func TestKeysOfAKMS(t *testing.T) {
	s := newKMSSession(t)
	d := s.d
	socket := keptClient(d.dir.path("dstack.sock"))
	ask := func(method, body string) (int, string, http.Header) {
		t.Helper()
		resp, err := socket.Post("http://localhost/"+method, "application/json", strings.NewReader(body))
		check(t, err)
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		check(t, err)
		return resp.StatusCode, string(b), resp.Header
	}
	status, body, header := ask("GetKey", `{"path":"a"}`)
	if status != http.StatusTooManyRequests || header.Get("Retry-After") == "" || !strings.Contains(body, "the application's keys are not here yet") {
		t.Errorf("before the KMS serves: %d %s", status, body)
	}
	if status, body, _ := ask("GetQuote", `{}`); status != http.StatusOK {
		t.Errorf("without keys there are no quotes: %d %.300s", status, body)
	}
	if st := d.status(t.Context()); st.Ready || !strings.Contains(strings.Join(st.NotReady, "\n"), "keys are not here yet") {
		t.Errorf("status: ready %v, %q", st.Ready, st.NotReady)
	}

	served := make(chan error, 1)
	go func() { served <- s.kms.Serve(s.listen) }()
	t.Cleanup(func() { s.kms.Close(); <-served })
	for deadline := time.Now().Add(20 * time.Second); status != http.StatusOK; time.Sleep(20 * time.Millisecond) {
		if status, body, _ = ask("GetKey", `{"path":"vms","purpose":"signing"}`); time.Now().After(deadline) {
			t.Fatalf("no keys: %d %s\n%s", status, body, s.log.String())
		}
	}
	id, err := d.measuredIdentity(t.Context())
	check(t, err)
	key, signature, err := s.kms.AppKey(id.AppID)
	check(t, err)
	var got struct {
		Chain []string `json:"signature_chain"`
	}
	check(t, json.Unmarshal([]byte(body), &got))
	if len(got.Chain) != 2 || got.Chain[1] != hex.EncodeToString(signature) {
		t.Errorf("chain is %q, want the KMS's signature %x", got.Chain, signature)
	}
	status, body, _ = ask("GetTlsKey", `{"subject":"s","usage_ra_tls":true}`)
	if status != http.StatusOK || strings.Count(body, "BEGIN CERTIFICATE") != 3 {
		t.Errorf("GetTlsKey: %d, %d certificates: %.300s", status, strings.Count(body, "BEGIN CERTIFICATE"), body)
	}
	if st := d.status(t.Context()); strings.Contains(strings.Join(st.NotReady, "\n"), "keys") {
		t.Errorf("status: %q", st.NotReady)
	}
	for _, secret := range []string{hex.EncodeToString(key), string(key), "PRIVATE KEY"} {
		if strings.Contains(s.log.String(), secret) {
			t.Error("the log shows a key")
		}
	}
}

// TestKeysOfAnotherKMS has a KMS in whose name somebody else answers.
func TestKeysOfAnotherKMS(t *testing.T) {
	s := newKMSSession(t)
	other := newKMSMachine(t)
	guest, err := tdxsim.Open(s.d.dir.td())
	check(t, err)
	defer guest.Close()
	guests, _, _ := simulatedVerifier(t, guest)
	wrong, err := kmstest.New(t.Context(), kmstest.Config{Host: "localhost", Guests: guests, Attest: other.attest, Now: time.Now})
	check(t, err)
	served := make(chan error, 1)
	go func() { served <- wrong.Serve(s.listen) }()
	t.Cleanup(func() { wrong.Close(); <-served })
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := s.d.appKeys(t.Context())
		if err == nil {
			t.Fatal("a stranger's keys were taken")
		}
		if strings.Contains(err.Error(), "root_key") {
			if exitCode(err) != exitPolicy {
				t.Errorf("exit status is %d", exitCode(err))
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if got := wrong.Requests(); len(got) != 0 {
		t.Errorf("the stranger was asked %q", got)
	}
}

// TestKMSPolicyOfRealHardware: a real TD takes no simulated one for a KMS, also where its
// sandbox hides from it that it is real.
func TestKMSPolicyOfRealHardware(t *testing.T) {
	dir := runtimeDir(t.TempDir())
	td, err := tdxsim.Open(dir.td())
	check(t, err)
	defer td.Close()
	cfg := newConfig()
	cfg.Keys.KMS.URLs = []string{"https://localhost"}
	var bundle string
	_, cfg.Keys.KMS.Policy, bundle = simulatedVerifier(t, td)
	cfg.Keys.KMS.Collateral = []string{bundle}
	for _, simulated := range []bool{true, false} {
		d := &daemon{cfg: cfg, dir: dir, files: measure.SampleApp(), backend: &backend{simulated: simulated}, log: slog.New(slog.DiscardHandler)}
		if _, err := d.newKMS(t.Context()); (err == nil) != simulated || err != nil && exitCode(err) != exitConfig {
			t.Errorf("backend simulated %t: %v", simulated, err)
		}
	}
}

func TestKMSConfig(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"good":              {"urls = [\"https://kms.example:8000\"]\npolicy = \"/etc/p.toml\"\n", ""},
		"no policy":         {"urls = [\"https://kms.example\"]\n", "without one no KMS is accepted"},
		"policy alone":      {"policy = \"/etc/p.toml\"\n", "keys.kms.urls is empty"},
		"no https":          {"urls = [\"http://kms.example\"]\npolicy = \"/p\"\n", "keys.kms.urls"},
		"collateral":        {"urls = [\"https://k\"]\npolicy = \"/p\"\ncollateral = [\"x\"]\n", "keys.kms.collateral"},
		"too patient":       {"urls = [\"https://k\"]\npolicy = \"/p\"\ntimeout = \"1h\"\n", "keys.kms.timeout"},
		"a time that is no": {"urls = [\"https://k\"]\npolicy = \"/p\"\ntimeout = \"soon\"\n", "timeout"},
		"too many":          {"urls = [" + strings.Repeat("\"https://k\",", 9) + "]\npolicy = \"/p\"\n", "at most 8"},
	} {
		path := filepath.Join(t.TempDir(), "agent.toml")
		check(t, os.WriteFile(path, []byte("[keys.kms]\n"+c.text), 0o600))
		_, err := loadConfig(path)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLocalKeysConfig(t *testing.T) {
	const good = "url = \"vsock://2:12000/api\"\ncollateral = \"/etc/sgx.json\"\n"
	for name, c := range map[string]struct{ text, want string }{
		"good":                 {good, ""},
		"hardening":            {good + "tcb_status = [\"UpToDate\", \"SWHardeningNeeded\"]\n", ""},
		"collateral alone":     {"collateral = \"/etc/sgx.json\"\n", "keys.local.url is empty"},
		"no collateral":        {"url = \"vsock://2:12000/api\"\n", "without one no key provider is accepted"},
		"TCP":                  {"url = \"http://2:12000/api\"\n", "want vsock://CID:PORT/PATH"},
		"no port":              {"url = \"vsock://2/api\"\n", "want vsock://CID:PORT/PATH"},
		"a name":               {"url = \"vsock://host:1/api\"\n", "want vsock://CID:PORT/PATH"},
		"out of date accepted": {good + "tcb_status = [\"OutOfDate\"]\n", "keys.local.tcb_status"},
		"nothing accepted":     {good + "tcb_status = []\n", "nothing could match"},
		"impatient":            {good + "timeout = \"1ms\"\n", "keys.local.timeout"},
	} {
		path := filepath.Join(t.TempDir(), "agent.toml")
		check(t, os.WriteFile(path, []byte("[keys.local]\n"+c.text), 0o600))
		cfg, err := loadConfig(path)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			if _, loose := cfg.loosened()["keys.local.tcb_status"]; loose != (name == "hardening") {
				t.Errorf("%s: loosened %v", name, cfg.loosened())
			}
			cfg.tighten()
			if len(cfg.loosened()) != 0 {
				t.Errorf("%s: still loosened: %v", name, cfg.loosened())
			}
		}
	}
}

// TestRemoteProviders chooses the one that the application asks for.
func TestRemoteProviders(t *testing.T) {
	cfg, kms, local := newConfig(), new(keys.KMS), new(keys.Local)
	for kind, want := range map[measure.KeyProviderKind]keys.Provider{measure.KeyProviderKMS: kms, measure.KeyProviderLocal: local, measure.KeyProviderTPM: nil} {
		files := *measure.SampleApp()
		files.Compose.KeyProvider = kind
		if k := newAppKeys(cfg, "", runtimeDir("/r"), &files, kms, local); k.provider != want || k.remote != (want != nil) || (k.absent == nil) != (want != nil) {
			t.Errorf("%s: %v, remote %v, absent %v", kind, k.provider, k.remote, k.absent)
		}
	}
}

// TestKeysThatComeTooLate arrive when the agent has already dropped what it had.
func TestKeysThatComeTooLate(t *testing.T) {
	d, boot := idleDaemon(t)
	boot()
	late := keys.Ephemeral{Path: d.dir.appSeed()}
	d.keys = &appKeys{provider: late, remote: true, patience: time.Minute, here: make(chan struct{}), pending: &pendingKeys{}}
	d.keys.drop()
	check(t, d.fetchKeys(t.Context(), time.Second))
	if app, err := d.appKeys(t.Context()); app != nil || err == nil {
		t.Errorf("keys are there after they were dropped: %v", err)
	}
}
