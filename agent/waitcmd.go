package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func newWait(g *globals) *cobra.Command {
	var what string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:     "wait",
		Short:   "Wait until the agent is ready, or a peer has an open channel",
		Example: "  tdx-agent wait --for=ready --timeout 1m\n  tdx-agent wait --for=peer=worker",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			peer, isPeer := strings.CutPrefix(what, "peer=")
			if what != "ready" && peer == "" {
				return exitf(exitUsage, "--for is %q, want ready or peer=ID", what)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if isPeer {
				return waitPeer(ctx, g, peer)
			}
			return waitReady(ctx, g)
		},
	}
	cmd.Flags().StringVar(&what, "for", "ready", "what to wait for: ready (log consistent, one quote made), or peer=ID (an attested channel with that policy entry, app-id or instance-id)")
	cmd.Flags().DurationVar(&timeout, "timeout", 90*time.Second, "how long to wait")
	return cmd
}

// waitReady asks until the answer is yes. The agent may not have started yet, so
// there is nothing to subscribe to, and its folder is looked for each time.
func waitReady(ctx context.Context, g *globals) error {
	last := errors.New("the agent did not answer")
	for {
		dir, err := clientRuntimeDir(g.runtimeDir)
		if err == nil {
			_, err = call(ctx, dir.agentSocket(), http.MethodGet, "/readyz", nil)
		}
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return exitf(exitTimeout, "not ready in time: %v", last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// waitPeer asks until an attested peer of this policy entry, app-id or instance-id has
// an open channel.
func waitPeer(ctx context.Context, g *globals, id string) error {
	for {
		dir, err := clientRuntimeDir(g.runtimeDir)
		if err != nil {
			return err
		}
		for _, of := range readPeers(ctx, dir, io.Discard).Processes {
			for _, p := range of.Peers {
				if p.Assurance != "none" && !p.Draining && slices.Contains([]string{p.Entry, p.AppID, p.InstanceID}, id) {
					return nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return exitf(exitTimeout, "no peer %q has an open channel; tdx-agent peers shows those that have, and what was refused", id)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
