package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/agent/status"
)

func newPeers(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peers [REF]",
		Short: "Show the peers of open channels, and the handshakes that failed",
		Long: `Show who is at the other end of every open channel and how that is known, and the last
64 handshakes that failed, with what was there and what was wanted. REF, which both ends
log, shows one of them. It reads the sockets of the endpoint and connect processes in the
runtime directory.`,
		Example: "  tdx-agent peers\n  tdx-agent peers --json\n  tdx-agent peers 7f3a09c4d2e15b68",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withAgent(cmd, g, 10*time.Second, func(ctx context.Context, dir runtimeDir) error {
				p := readPeers(ctx, dir, cmd.ErrOrStderr())
				if len(args) == 1 {
					if p = p.Only(args[0]); len(p.Processes) == 0 {
						return fmt.Errorf("no open channel has the ref %q, and none of the last failures; the log of tdx-agent endpoint has older ones", args[0])
					}
				}
				if wantJSON(cmd) {
					return json.NewEncoder(cmd.OutOrStdout()).Encode(p)
				}
				return p.WriteText(cmd.OutOrStdout())
			})
		},
	}
	jsonFlag(cmd)
	return cmd
}

// readPeers asks every process that answers in the folder. What goes wrong with one is
// told and costs the others nothing.
func readPeers(ctx context.Context, dir runtimeDir, stderr io.Writer) *status.Peers {
	all := &status.Peers{Schema: status.PeersSchema, Processes: []status.PeerProcess{}}
	if _, err := os.ReadDir(dir.peers()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(stderr, "open channels are not shown: %v\n", err)
		return all
	}
	sockets, err := filepath.Glob(dir.peerSocket("*"))
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", dir.peers(), err)
	}
	for i, socket := range sockets {
		if i == 2*maxPeerSockets {
			fmt.Fprintf(stderr, "%s holds %d sockets; only %d were asked\n", dir.peers(), len(sockets), i)
			break
		}
		p, err := readPeersOf(ctx, socket)
		switch {
		case exitCode(err) == exitUnreachable: // of a process that has ended
		case err != nil:
			fmt.Fprintf(stderr, "%s: %q\n", socket, err)
		default:
			all.Processes = append(all.Processes, p.Processes...)
		}
	}
	return all
}

func readPeersOf(ctx context.Context, socket string) (*status.Peers, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var p status.Peers
	if err := callJSON(ctx, socket, "/v1/peers", &p); err != nil {
		return nil, err
	}
	if p.Schema != status.PeersSchema {
		return nil, fmt.Errorf("schema is %.40q, want %s", p.Schema, status.PeersSchema)
	}
	return &p, nil
}
