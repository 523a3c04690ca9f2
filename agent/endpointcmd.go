package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tdx-agent/remote/atls"
	"tdx-agent/remote/dcap"
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

// config makes the common part of an end. The policy is required: the built-in one
// pins no application.
func (f *channelFlags) config(ctx context.Context, g *globals, log *slog.Logger, isAttested bool) (cfg atls.Config, reload *reloader, err error) {
	if f.policy == "" {
		return cfg, nil, exitf(exitUsage, "give --policy: it says which peers are accepted")
	}
	if f.egress {
		if f.dial, err = throughEgress(g.runtimeDir); err != nil {
			return cfg, nil, err
		}
	}
	v, store, err := f.verifier(ctx, log)
	if err != nil {
		return cfg, nil, err
	}
	f.report = newPeerReport()
	cfg = atls.Config{Verifier: v, KeyTTL: f.keyTTL, Observe: func(h atls.Handshake) {
		logHandshake(log, h)
		f.report.observe(h)
	}}
	reload = f.reloader(v, store, log)
	if f.ratls {
		cfg.RATLS, reload.renewer, err = ratlsEnd(ctx, g, log, isAttested)
		return cfg, reload, err
	}
	if isAttested {
		dir, err := clientRuntimeDir(g.runtimeDir)
		if err != nil {
			return cfg, nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		attester, err := newChannelAttester(ctx, dir)
		if err != nil {
			return cfg, nil, err
		}
		cfg.Attester = attester
	}
	return cfg, reload, nil
}

func logHandshake(log *slog.Logger, h atls.Handshake) {
	args := []any{"remote", h.Remote, "service", h.Service, "ref", h.Ref, "entry", h.Entry, "assurance", h.Assurance, "took", h.Duration.Round(time.Microsecond)}
	if h.Code == atls.CodeOK {
		log.Info("channel", args...)
		return
	}
	log.Warn("no channel", append(args, "step", string(h.Step), "code", string(h.Code), "error", h.Err)...)
}

func newEndpoint(g *globals) *cobra.Command {
	var f channelFlags
	var listen string
	var services, unattested []string
	cmd := &cobra.Command{
		Use:   "endpoint",
		Short: "Accept attested channels from peers and connect them with local services",
		Long: `Accept attested channels (tdx-atls/1) and connect each with the local service that its
peer asks for, if an entry of the policy accepts the peer for that service. It holds no
keys: it asks the running agent for evidence, over channel.sock.
SIGHUP reloads the policy, and drains the channels of peers that it denies now; one
that cannot be read leaves the last one in force.`,
		Example: "  tdx-agent endpoint --listen :8443 --policy policy.toml --service jobs=127.0.0.1:8080",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			targets, err := parseServices(services)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			cfg, reload, err := f.config(cmd.Context(), g, log, true)
			if err != nil {
				return err
			}
			lc := atls.ListenerConfig{Config: cfg, Unattested: unattested}
			for name := range targets {
				lc.Services = append(lc.Services, name)
			}
			for _, name := range unattested {
				if _, ok := targets[name]; !ok {
					return exitf(exitUsage, "--allow-unattested-clients %s: there is no such --service", name)
				}
				if !cfg.Verifier.Policy().AllowsUnattested(name) {
					return exitf(exitConfig, "--allow-unattested-clients %s: no entry of the policy has that service and allow_unattested_clients = true", name)
				}
				log.Warn("clients of this service prove nothing", "service", name)
			}
			inner, err := listenAddress(cmd.Context(), listen)
			if err != nil {
				return err
			}
			l, err := atls.NewListener(inner, lc)
			if err != nil {
				inner.Close()
				return err
			}
			group, ctx := errgroup.WithContext(cmd.Context())
			reload.start(ctx, group, l.Reappraise)
			if err := f.report.start(ctx, group, g, log, "endpoint", f.peersSocket, cfg.Verifier, l.Channels); err != nil {
				l.Close()
				return err
			}
			log.Info("listening", "address", inner.Addr().String(), "services", lc.Services, "policy", cfg.Verifier.Policy().ID, "generation", cfg.Verifier.Generation())
			group.Go(func() error {
				return forward.Inbound(ctx, l, log, func(ctx context.Context, peer *atls.Peer) (net.Conn, error) {
					return dialAddress(ctx, f.dial, targets[peer.Service])
				})
			})
			return endGroup(cmd.Context(), group)
		},
	}
	f.add(cmd)
	f.addPeersSocket(cmd)
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:8443", "address to listen on, or unix:PATH")
	cmd.Flags().StringArrayVar(&services, "service", nil, "NAME=ADDRESS: a service that peers may ask for, and where it listens (HOST:PORT or unix:PATH)")
	cmd.Flags().StringArrayVar(&unattested, "allow-unattested-clients", nil, "name of a service that takes clients which prove nothing; the policy must allow it too")
	return cmd
}

// endGroup is the end of a command that runs until it is stopped.
func endGroup(ctx context.Context, group *errgroup.Group) error {
	if err := group.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

func parseServices(list []string) (map[string]string, error) {
	targets := map[string]string{}
	for _, s := range list {
		name, address, ok := strings.Cut(s, "=")
		if !ok || name == "" || address == "" || targets[name] != "" {
			return nil, exitf(exitUsage, "--service is %q, want NAME=HOST:PORT or NAME=unix:PATH, each name once", s)
		}
		targets[name] = address
	}
	if len(targets) == 0 {
		return nil, exitf(exitUsage, "give --service NAME=ADDRESS: what peers may reach")
	}
	return targets, nil
}

// listenAddress listens on TCP, or on a Unix socket for this user.
func listenAddress(ctx context.Context, address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return listenUnix(path, 0o600)
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

// dialFlags say whom to dial.
type dialFlags struct {
	channelFlags
	service    string
	expect     []string
	unattested bool
}

func (f *dialFlags) add(cmd *cobra.Command) {
	f.channelFlags.add(cmd)
	cmd.Flags().StringVar(&f.service, "service", "", "name of the service at the peer")
	cmd.Flags().StringArrayVar(&f.expect, "expect", nil, "policy entry that may accept the peer (required: addresses prove nothing)")
	cmd.Flags().BoolVar(&f.unattested, "unattested", false, "prove nothing ourselves, as from a machine that is no TD: only for services that allow it")
}

func (f *dialFlags) dialer(cmd *cobra.Command, g *globals, log *slog.Logger) (*atls.Dialer, *reloader, error) {
	if f.ratls && f.service != "" {
		return nil, nil, exitf(exitUsage, "--service does not go with --ratls: RA-TLS names no service")
	}
	if f.service == "" && !f.ratls || len(f.expect) == 0 {
		return nil, nil, exitf(exitUsage, "give --service and --expect: the service at the peer, and the policy entry that may accept it")
	}
	cfg, reload, err := f.config(cmd.Context(), g, log, !f.unattested)
	if err != nil {
		return nil, nil, err
	}
	d, err := atls.NewDialer(cfg, func(ctx context.Context, _, address string) (net.Conn, error) {
		return dialAddress(ctx, f.dial, address)
	})
	return d, reload, err
}

// channelExit gives a handshake's failure its exit status.
func channelExit(err error) error {
	e, ok := errors.AsType[*atls.Error](err)
	if !ok {
		return err
	}
	switch e.Code {
	case atls.CodePolicyDenied, atls.CodeCollateralUnavailable:
		return withExit(exitPolicy, err)
	case atls.CodeEvidenceInvalid, atls.CodeBindingMismatch:
		return withExit(exitEvidence, err)
	case atls.CodeBusy:
		return withExit(exitThrottled, err)
	case atls.CodeTimeout:
		return withExit(exitTimeout, err)
	}
	return err
}

func newConnect(g *globals) *cobra.Command {
	var f dialFlags
	var listen string
	cmd := &cobra.Command{
		Use:   "connect ADDRESS",
		Short: "Open attested channels to a peer's service, for a local socket or this terminal",
		Long: `Open an attested channel to a service of the peer at ADDRESS (HOST:PORT or unix:PATH)
for each connection to a local socket, or with standard input and output. With --listen,
SIGHUP reloads the policy as for endpoint.`,
		Example: `  tdx-agent connect --policy policy.toml --expect worker --service jobs --listen unix:/run/jobs.sock 10.0.0.2:8443
  echo hello | tdx-agent connect --policy policy.toml --expect worker --service echo 10.0.0.2:8443`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			log := warnings(cmd.ErrOrStderr())
			if listen != "" {
				log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			}
			d, reload, err := f.dialer(cmd, g, log)
			if err != nil {
				return err
			}
			dial := func(ctx context.Context) (net.Conn, error) {
				return d.DialContext(ctx, "tcp", args[0], f.service, f.expect)
			}
			if listen == "" {
				defer reload.once(cmd.Context())()
				c, err := dial(cmd.Context())
				if err != nil {
					return channelExit(err)
				}
				peer, _ := atls.PeerFromConn(c)
				fmt.Fprintf(cmd.ErrOrStderr(), "%sconnected to %q, assurance %s%s\n", banner(isSimulated(peer)), peer.Entry(), peer.Assurance(), refText(peer.Ref))
				return forward.Pipe(cmd.Context(), c, cmd.InOrStdin(), cmd.OutOrStdout())
			}
			l, err := listenAddress(cmd.Context(), listen)
			if err != nil {
				return err
			}
			group, ctx := errgroup.WithContext(cmd.Context())
			reload.start(ctx, group, d.Reappraise)
			if err := f.report.start(ctx, group, g, log, "connect", f.peersSocket, reload.verifier, d.Channels); err != nil {
				l.Close()
				return err
			}
			log.Info("listening", "address", l.Addr().String(), "peer", args[0], "service", f.service, "expect", f.expect)
			group.Go(func() error { return forward.Outbound(ctx, l, log, dial) })
			return endGroup(cmd.Context(), group)
		},
	}
	f.add(cmd)
	f.addPeersSocket(cmd)
	cmd.Flags().StringVar(&listen, "listen", "", "local socket to serve: unix:PATH, or HOST:PORT, which every container with the host's network can reach")
	return cmd
}

func refText(ref string) string {
	if ref == "" {
		return "" // RA-TLS has none
	}
	return ", ref " + ref
}

func newFetch(g *globals) *cobra.Command {
	var f dialFlags
	cmd := &cobra.Command{
		Use:   "fetch URL",
		Short: "Get an http URL over an attested channel, or an https URL of a dstack peer",
		Example: `  tdx-agent fetch --policy policy.toml --expect worker --service web http://10.0.0.2:8443/status
  tdx-agent fetch --ratls --policy policy.toml --expect gateway https://10.0.0.3:8000/status`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case f.ratls && !strings.HasPrefix(args[0], "https://"):
				return exitf(exitUsage, "URL is %q, want https://HOST:PORT/PATH with --ratls", args[0])
			case !f.ratls && !strings.HasPrefix(args[0], "http://"):
				return exitf(exitUsage, "URL is %q, want http://HOST:PORT/PATH: the attested channel is below HTTP", args[0])
			}
			d, reload, err := f.dialer(cmd, g, warnings(cmd.ErrOrStderr()))
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), verifyTimeout)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, args[0], nil)
			if err != nil {
				return withExit(exitUsage, err)
			}
			transport := atls.NewTransport(d, f.service, f.expect)
			defer transport.CloseIdleConnections()
			defer reload.once(ctx)()
			if f.ratls {
				transport.DialTLSContext = transport.DialContext // the connection has its TLS
			}
			resp, err := transport.RoundTrip(req) // no redirect: another host may be another service
			if err != nil {
				return channelExit(err)
			}
			defer resp.Body.Close()
			if _, err := io.Copy(cmd.OutOrStdout(), resp.Body); err != nil {
				return err
			}
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("the peer answers %s", resp.Status)
			}
			return nil
		},
	}
	f.add(cmd)
	return cmd
}

// isSimulated reports whether the peer's quote ends in another root than Intel's.
func isSimulated(p *atls.Peer) bool {
	return p.Result != nil && p.Result.Claims.Report != nil && p.Result.Claims.Report.Root != dcap.IntelRoot()
}
