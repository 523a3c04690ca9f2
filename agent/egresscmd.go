package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tdx-agent/remote/collateral"
	"tdx-agent/remote/forward"
)

// EgressConfig says where the machine's processes may connect to.
type EgressConfig struct {
	Allow          []string `toml:"allow"` // HOST:PORT
	MaxConnections int      `toml:"max_connections"`
}

func newEgressConfig() EgressConfig { return EgressConfig{Allow: []string{}, MaxConnections: 4096} }

func (c *EgressConfig) check() error {
	if c.MaxConnections < 1 || c.MaxConnections > 1<<16 {
		return fmt.Errorf("egress.max_connections is %d, want 1 to %d", c.MaxConnections, 1<<16)
	}
	for _, s := range c.Allow {
		if _, err := forward.ParseDestination(s); err != nil {
			return fmt.Errorf("egress.allow: %w", err)
		}
	}
	return nil
}

// destinations are where egress may connect to, sorted: those of [egress] allow, and what
// the rest of the file asks for by itself.
func (c *Config) destinations() (all []forward.Destination) {
	list := slices.Clone(c.Egress.Allow)
	for i := range c.Services {
		list = append(list, c.Services[i].Backend) // a unix: one is none of egress's
	}
	for i := range c.Connects {
		list = append(list, c.Connects[i].Address)
	}
	urls := slices.Concat(c.Endpoint.PCCS, c.Keys.KMS.URLs, c.Keys.KMS.PCCS)
	e, kms := &c.Endpoint, &c.Keys.KMS
	if e.Policy != "" && len(e.PCCS)+len(e.Collateral) == 0 || kms.Policy != "" && len(kms.PCCS)+len(kms.Collateral) == 0 {
		urls = append(urls, collateral.IntelURLs()...)
	}
	for _, base := range urls {
		list = append(list, hostOf(base))
	}
	seen := map[forward.Destination]bool{}
	for _, s := range list {
		if d, err := forward.ParseDestination(s); err == nil && !seen[d] {
			seen[d] = true
			all = append(all, d)
		}
	}
	slices.SortFunc(all, func(a, b forward.Destination) int { return strings.Compare(a.String(), b.String()) })
	return all
}

// hostOf is HOST:PORT of a URL.
func hostOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// dialFunc connects as net.Dialer.DialContext does.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// throughEgress dials by way of the egress of the runtime directory.
func throughEgress(runtimeDir string) (dialFunc, error) {
	dir, err := clientRuntimeDir(runtimeDir)
	if err != nil {
		return nil, err
	}
	return forward.Through(dir.egressSocket()), nil
}

func newEgress(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "egress",
		Short: "Connect to listed destinations for the processes that have no network",
		Long: `Listen on egress.sock, take HTTP CONNECT requests and relay bytes to the destinations
that agent.toml lists ([egress] allow) or needs (back ends, peers, collateral). It is the
one process that dials. TLS ends in the asker.`,
		Example: `  tdx-agent egress
  socat TCP-LISTEN:3128,bind=127.0.0.1,fork UNIX-CONNECT:/run/tdx-agent/egress.sock &
  curl -p -x http://127.0.0.1:3128 https://pccs.example.org:8081/`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(g.config)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			l, err := listenEgress(g.runtimeDir)
			if err != nil {
				return err
			}
			allow := cfg.destinations()
			e := forward.NewEgress(forward.EgressConfig{Allow: allow, MaxConnections: cfg.Egress.MaxConnections, Logger: log})
			if len(allow) == 0 {
				log.Warn("no destination is allowed: agent.toml has no [egress] allow, and nothing else that needs one")
			}
			log.Info("listening", "socket", l.Addr().String(), "allow", fmt.Sprint(allow))
			group, ctx := errgroup.WithContext(cmd.Context())
			group.Go(func() error { return e.Serve(ctx, l) })
			group.Go(func() error {
				keepNotified(ctx, log, func(context.Context) error { return nil }, func() string {
					open, relayed, refused := e.Counts()
					return fmt.Sprintf("relays %d open, %d in all; %d refused", open, relayed, refused)
				})
				return nil
			})
			return endGroup(cmd.Context(), group)
		},
	}
}

// listenEgress takes the socket from systemd, or binds it in the runtime directory.
func listenEgress(runtimeDir string) (net.Listener, error) {
	if l, err := passedListener(socketEgress); l != nil || err != nil {
		return l, err
	}
	dir, err := bindingRuntimeDir(runtimeDir)
	if err != nil {
		return nil, err
	}
	return listenUnix(dir.egressSocket(), 0o660)
}
