package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tdx-agent/remote/atls"
	"tdx-agent/remote/forward"
)

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

// dialer opens channels to the service that the flags name.
func (f *dialFlags) dialer(cmd *cobra.Command, g *globals, log *slog.Logger) (*atls.Dialer, *reloader, error) {
	return f.dialerTo(cmd, g, log, []outbound{{service: f.service, expect: f.expect}})
}

// dialerTo holds what is to be dialled against the policy: an entry that is not there could
// accept nobody.
func (f *dialFlags) dialerTo(cmd *cobra.Command, g *globals, log *slog.Logger, all []outbound) (*atls.Dialer, *reloader, error) {
	for _, o := range all {
		if f.ratls && o.service != "" {
			return nil, nil, exitf(exitUsage, "--service does not go with --ratls: RA-TLS names no service")
		}
		if o.service == "" && !f.ratls || len(o.expect) == 0 {
			return nil, nil, exitf(exitUsage, "give --service and --expect: the service at the peer, and the policy entry that may accept it")
		}
	}
	cfg, reload, err := f.config(cmd.Context(), g, log, !f.unattested)
	if err != nil {
		return nil, nil, err
	}
	policy := cfg.Verifier.Policy()
	for _, o := range all {
		for _, name := range o.expect {
			if !policy.Has(name) {
				return nil, nil, exitf(exitConfig, "expect: the policy has no entry %q: it could accept nobody", name)
			}
		}
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
		Use:   "connect [ADDRESS]",
		Short: "Open attested channels to a peer's service, for a local socket or this terminal",
		Long: `Open an attested channel to a service of the peer at ADDRESS (HOST:PORT or unix:PATH)
for each connection to a local socket, or with standard input and output. Without
ADDRESS, serve the local sockets that agent.toml declares ([[connect]]), and dial by way of
tdx-agent egress. Where it serves local sockets, SIGHUP reloads the policy as for endpoint.`,
		Example: `  tdx-agent connect
  tdx-agent connect --policy policy.toml --expect worker --service jobs --listen unix:/run/jobs.sock 10.0.0.2:8443
  echo hello | tdx-agent connect --policy policy.toml --expect worker --service echo 10.0.0.2:8443`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return f.connectDeclared(cmd, g, listen)
			}
			if listen == "" {
				return f.connectOnce(cmd, g, args[0])
			}
			l, err := listenAddress(cmd.Context(), listen, 0o600)
			if err != nil {
				return err
			}
			return f.serve(cmd, g, []outbound{{listener: l, address: args[0], service: f.service, expect: f.expect}})
		},
	}
	f.add(cmd)
	f.addPeersSocket(cmd)
	cmd.Flags().StringVar(&listen, "listen", "", "local socket to serve: unix:PATH, or HOST:PORT, which every container with the host's network can reach")
	return cmd
}

// connectOnce opens one channel for standard input and output.
func (f *dialFlags) connectOnce(cmd *cobra.Command, g *globals, address string) error {
	d, reload, err := f.dialer(cmd, g, warnings(cmd.ErrOrStderr()))
	if err != nil {
		return err
	}
	defer reload.once(cmd.Context())()
	c, err := d.DialContext(cmd.Context(), "tcp", address, f.service, f.expect)
	if err != nil {
		return channelExit(err)
	}
	peer, _ := atls.PeerFromConn(c)
	fmt.Fprintf(cmd.ErrOrStderr(), "%sconnected to %q, assurance %s%s\n", banner(peer.Result.IsSimulated()), peer.Entry(), peer.Assurance(), refText(peer.Ref))
	return forward.Pipe(cmd.Context(), c, cmd.InOrStdin(), cmd.OutOrStdout())
}

// outbound is a local socket that leads to a service of a peer.
type outbound struct {
	listener         net.Listener
	address, service string
	expect           []string
}

// connectDeclared serves the sockets of [[connect]].
func (f *dialFlags) connectDeclared(cmd *cobra.Command, g *globals, listen string) error {
	if f.service != "" || len(f.expect) > 0 || f.unattested || listen != "" {
		return exitf(exitUsage, "give ADDRESS too, or none of --service, --expect, --unattested and --listen: then agent.toml says them")
	}
	cfg, err := f.fromConfig(cmd, g)
	if err != nil {
		return err
	}
	if len(cfg.Connects) == 0 {
		return exitf(exitConfig, "there is nothing to connect: declare [[connect]] in agent.toml, or give ADDRESS")
	}
	passed, err := activation.ListenersWithNames()
	if err != nil {
		return fmt.Errorf("sockets from systemd: %w", err)
	}
	for name, ls := range passed {
		if len(ls) != 1 || !slices.ContainsFunc(cfg.Connects, func(c ConnectConfig) bool { return c.Name == name }) {
			return exitf(exitConfig, "systemd passed %d sockets named %q, want one for a [[connect]] of this name (FileDescriptorName=)", len(ls), name)
		}
	}
	var all []outbound
	for i := range cfg.Connects {
		c := &cfg.Connects[i]
		var l net.Listener
		if ls := passed[c.Name]; len(ls) == 1 {
			l = ls[0]
		} else if l, err = listenAddress(cmd.Context(), c.Listen, socketModesAllowed[c.SocketMode]); err != nil {
			for _, o := range all {
				o.listener.Close()
			}
			return fmt.Errorf("connect %q: %w", c.Name, err)
		}
		all = append(all, outbound{l, c.Address, c.Service, c.Expect})
	}
	return f.serve(cmd, g, all)
}

// serve opens a channel for each connection to a local socket, until the command is
// stopped. It closes the sockets.
func (f *dialFlags) serve(cmd *cobra.Command, g *globals, all []outbound) error {
	defer func() {
		for _, o := range all {
			o.listener.Close()
		}
	}()
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	d, reload, err := f.dialerTo(cmd, g, log, all)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(cmd.Context())
	reload.start(ctx, group, d.Reappraise)
	if err := f.report.start(ctx, group, g, log, "connect", f.peersSocket, reload.verifier, d); err != nil {
		return err
	}
	for _, o := range all {
		log.Info("listening", "address", o.listener.Addr().String(), "peer", o.address, "service", o.service, "expect", o.expect)
		group.Go(func() error {
			return forward.Outbound(ctx, o.listener, log, func(ctx context.Context) (net.Conn, error) {
				return d.DialContext(ctx, "tcp", o.address, o.service, o.expect)
			})
		})
	}
	group.Go(func() error {
		keepNotified(ctx, log, isAlive, func() string { return fmt.Sprintf("%d local sockets", len(all)) })
		return nil
	})
	return endGroup(cmd.Context(), group)
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
