package main

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/forward"
)

// channelFlags are what both ends of channels need.
type channelFlags struct {
	verifierFlags
	keyTTL time.Duration
	egress bool
	ratls  bool
	// peersSocket is where to say what is known of channels; see peerReport.start.
	peersSocket string
	report      *peerReport
}

func (f *channelFlags) add(cmd *cobra.Command) {
	f.verifierFlags.add(cmd)
	cmd.Flags().BoolVar(&f.egress, "egress", false, "dial by way of tdx-agent egress, as a process without a network of its own")
	cmd.Flags().BoolVar(&f.ratls, "ratls", false, ratlsUsage)
	cmd.Flags().DurationVar(&f.keyTTL, "key-ttl", 0, "how long a peer may use its measured key instead of a quote, where the policy says require = \"key\"")
}

func (f *channelFlags) addPeersSocket(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.peersSocket, "peers-socket", "", "socket to say on what is known of channels, for tdx-agent peers and status, and /metrics (default one in the runtime directory; none: no socket)")
}

// fromConfig fills in what no flag says. A process that is set up by agent.toml has no
// network of its own.
func (f *channelFlags) fromConfig(cmd *cobra.Command, g *globals) (*Config, error) {
	cfg, err := loadConfig(g.config)
	if err != nil {
		return nil, err
	}
	is := cmd.Flags().Changed
	if !is("policy") {
		f.policy = cfg.Endpoint.Policy
	}
	if !is("collateral") && !is("pccs") {
		f.collateral, f.pccs = cfg.Endpoint.Collateral, cfg.Endpoint.PCCS
	}
	if !is("key-ttl") {
		f.keyTTL = cfg.Endpoint.KeyTTL
	}
	if !is("egress") {
		f.egress = true
	}
	return cfg, nil
}

// config makes the common part of an end. The policy is required: the built-in one
// pins no application.
func (f *channelFlags) config(ctx context.Context, g *globals, log *slog.Logger, isAttested bool) (cfg atls.Config, reload *reloader, err error) {
	if f.policy == "" {
		return cfg, nil, exitf(exitUsage, "give --policy, or endpoint.policy in agent.toml: it says which peers are accepted")
	}
	if f.egress {
		if f.dial, err = throughEgress(g.runtimeDir); err != nil {
			return cfg, nil, err
		}
	}
	f.report = newPeerReport()
	if isAttested && !f.ratls {
		attester, err := f.attester(ctx, g)
		if err != nil {
			return cfg, nil, err
		}
		cfg.Attester, f.isReal, f.report.attester = attester, attester.isReal, attester
	}
	var certificates *certificateAttester
	if isAttested && f.ratls {
		if certificates, err = f.certificateAttester(ctx, g); err != nil {
			return cfg, nil, err
		}
	}
	v, store, err := f.verifier(ctx, log)
	if err != nil {
		return cfg, nil, err
	}
	cfg.Verifier, cfg.KeyTTL, cfg.Observe = v, f.keyTTL, func(h atls.Handshake) {
		f.report.log(log, &h)
		f.report.observe(h)
	}
	reload = f.reloader(v, store, log)
	if f.ratls {
		cfg.RATLS, reload.renewer, err = ratlsEnd(g, log, certificates)
		f.report.renewer = reload.renewer
	}
	return cfg, reload, err
}

// attester asks the agent of this TD for evidence.
func (f *channelFlags) attester(ctx context.Context, g *globals) (*channelAttester, error) {
	dir, err := clientRuntimeDir(g.runtimeDir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return newChannelAttester(ctx, dir)
}

// endpointFlags are endpoint's own.
type endpointFlags struct {
	channelFlags
	listen     string
	services   []string
	unattested []string
}

func newEndpoint(g *globals) *cobra.Command {
	var f endpointFlags
	cmd := &cobra.Command{
		Use:   "endpoint",
		Short: "Accept attested channels from peers and connect them with local services",
		Long: `Accept attested channels (tdx-atls/1) and connect each with the local service that its
peer asks for, if an entry of the policy accepts the peer for that service. It holds no
keys: it asks the running agent for evidence, over channel.sock.
Services are those of agent.toml, whose TCP back ends it reaches by way of tdx-agent egress,
or with --service those that are given. Other flags replace what agent.toml says.
SIGHUP reloads the policy, and drains the channels of peers that it denies now; one
that cannot be read leaves the last one in force.`,
		Example: `  tdx-agent endpoint
  tdx-agent endpoint --listen :8443 --policy policy.toml --service jobs=127.0.0.1:8080`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.configure(cmd, g)
			if err != nil {
				return err
			}
			return f.run(cmd, g, cfg)
		},
	}
	f.add(cmd)
	f.addPeersSocket(cmd)
	cmd.Flags().StringVar(&f.listen, "listen", "127.0.0.1:8443", "address to listen on, or unix:PATH")
	cmd.Flags().StringArrayVar(&f.services, "service", nil, "NAME=ADDRESS: a service that peers may ask for, and where it listens (HOST:PORT or unix:PATH)")
	cmd.Flags().StringArrayVar(&f.unattested, "allow-unattested-clients", nil, "name of a --service that takes clients which prove nothing; the policy must allow it too")
	return cmd
}

// configure completes the flags by the configuration, and the configuration by the flags:
// with --service it is not read at all.
func (f *endpointFlags) configure(cmd *cobra.Command, g *globals) (*Config, error) {
	if len(f.services) > 0 {
		cfg := newConfig()
		services, err := parseServices(f.services, f.unattested)
		cfg.Services = services
		return cfg, err
	}
	if len(f.unattested) > 0 {
		return nil, exitf(exitUsage, "--allow-unattested-clients goes with --service; agent.toml says allow_unattested")
	}
	cfg, err := f.fromConfig(cmd, g)
	if err != nil {
		return nil, err
	}
	if !cmd.Flags().Changed("listen") {
		f.listen = cfg.Endpoint.Listen
	}
	if len(cfg.Services) == 0 {
		return nil, exitf(exitConfig, "there is nothing for peers to reach: declare [[service]] in agent.toml, or give --service NAME=ADDRESS")
	}
	return cfg, nil
}

// run accepts channels for the services of cfg until the command is stopped.
func (f *endpointFlags) run(cmd *cobra.Command, g *globals, cfg *Config) error {
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	ends, reload, err := f.config(cmd.Context(), g, log, true)
	if err != nil {
		return err
	}
	lc, err := listenerConfig(ends, cfg)
	if err != nil {
		return err
	}
	if err := f.checkMeasured(cmd.Context(), g, cfg); err != nil {
		return err
	}
	for _, name := range lc.Services {
		if !slices.ContainsFunc(ends.Verifier.Policy().Entries, func(e remote.Entry) bool { return slices.Contains(e.Service, name) }) {
			log.Warn("no entry of the policy has this service: nobody can reach it", "service", name)
		}
	}
	for _, name := range lc.Unattested {
		log.Warn("clients of this service prove nothing", "service", name)
	}
	inner, err := passedListener(socketEndpoint)
	if inner == nil && err == nil {
		inner, err = listenAddress(cmd.Context(), f.listen, 0o600)
	}
	if err != nil {
		return err
	}
	l, err := atls.NewListener(inner, lc)
	if err != nil {
		inner.Close()
		return err
	}
	services := map[string]forward.Service{}
	for i := range cfg.Services {
		services[cfg.Services[i].Name] = cfg.Services[i].forwarded(f.dial)
	}
	group, ctx := errgroup.WithContext(cmd.Context())
	reload.start(ctx, group, l.Reappraise)
	if err := f.report.start(ctx, group, g, log, "endpoint", f.peersSocket, ends.Verifier, l); err != nil {
		l.Close()
		return err
	}
	log.Info("listening", "address", inner.Addr().String(), "services", lc.Services, "policy", ends.Verifier.Policy().ID, "generation", ends.Verifier.Generation())
	group.Go(func() error { return forward.Inbound(ctx, l, log, services) })
	group.Go(func() error {
		keepNotified(ctx, log, isAlive, func() string { return fmt.Sprintf("%d services, %d channels", len(services), len(l.Channels())) })
		return nil
	})
	return endGroup(cmd.Context(), group)
}

// isAlive is for processes whose own status line takes every lock that could be stuck.
func isAlive(context.Context) error { return nil }

// listenerConfig holds the declared services against the policy: what no peer could ever
// reach is a mistake.
func listenerConfig(ends atls.Config, cfg *Config) (atls.ListenerConfig, error) {
	e := &cfg.Endpoint
	lc := atls.ListenerConfig{Config: ends, Entries: map[string][]string{}, MaxConnections: e.MaxConnections, MaxHandshakes: e.MaxHandshakes, MaxPerAddress: e.MaxPerAddress, PerSecond: e.PerSecond, Burst: e.Burst}
	policy := ends.Verifier.Policy()
	for i := range cfg.Services {
		s := &cfg.Services[i]
		lc.Services = append(lc.Services, s.Name)
		if len(s.Peers) > 0 {
			lc.Entries[s.Name] = s.Peers
		}
		for _, name := range s.Peers {
			if !policy.Lets(name, s.Name) {
				return lc, exitf(exitConfig, "service %q: peers: the policy has no entry %q with service %q", s.Name, name, s.Name)
			}
		}
		if s.AllowUnattested && !policy.AllowsUnattested(s.Name) {
			return lc, exitf(exitConfig, "service %q takes unattested clients: no entry of the policy has that service and allow_unattested_clients = true", s.Name)
		}
		if s.AllowUnattested {
			lc.Unattested = append(lc.Unattested, s.Name)
		}
	}
	slices.Sort(lc.Services)
	return lc, nil
}

// checkMeasured refuses what is loosened by agent.toml unless the agent says that this
// boot has measured it.
func (f *endpointFlags) checkMeasured(ctx context.Context, g *globals, cfg *Config) error {
	isLoose := func(s ServiceConfig) bool { return s.AllowUnattested }
	if len(f.services) > 0 || !slices.ContainsFunc(cfg.Services, isLoose) {
		return nil // given by hand, or nothing to check
	}
	agent, err := f.attester(ctx, g)
	if err != nil {
		return err
	}
	for i := range cfg.Services {
		if s := &cfg.Services[i]; isLoose(*s) && agent.loosened[s.loosenedKey()] != true {
			return exitf(exitConfig, "service %q: allow_unattested = true was not measured by this boot: agent.toml was changed after the boot step", s.Name)
		}
	}
	return nil
}

// endGroup is the end of a command that runs until it is stopped.
func endGroup(ctx context.Context, group *errgroup.Group) error {
	if err := group.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

// parseServices reads --service and --allow-unattested-clients.
func parseServices(list, unattested []string) (services []ServiceConfig, err error) {
	find := func(name string) int {
		return slices.IndexFunc(services, func(s ServiceConfig) bool { return s.Name == name })
	}
	for _, s := range list {
		name, address, ok := strings.Cut(s, "=")
		if !ok || name == "" || address == "" || find(name) >= 0 {
			return nil, exitf(exitUsage, "--service is %q, want NAME=HOST:PORT or NAME=unix:PATH, each name once", s)
		}
		services = append(services, ServiceConfig{Name: name, Backend: address})
	}
	for _, name := range unattested {
		i := find(name)
		if i < 0 {
			return nil, exitf(exitUsage, "--allow-unattested-clients %s: there is no such --service", name)
		}
		services[i].AllowUnattested = true
	}
	return services, nil
}

// listenAddress listens on TCP, or on a Unix socket of this mode.
func listenAddress(ctx context.Context, address string, mode fs.FileMode) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return listenUnix(path, mode)
	}
	return new(net.ListenConfig).Listen(ctx, "tcp", address)
}

// dialAddress connects to a Unix socket by itself, and to TCP with dial (nil: by itself).
func dialAddress(ctx context.Context, dial dialFunc, address string) (net.Conn, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return dial(ctx, "tcp", address)
}

// dialer is dialAddress for one address.
func dialer(dial dialFunc, address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return dialAddress(ctx, dial, address) }
}
