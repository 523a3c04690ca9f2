package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"tdx-agent/agent/status"
)

func newServe(g *globals) *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the agent: hand out quotes on dstack's sockets",
		Example: `  tdx-agent serve                      in a TDX VM, under systemd
  tdx-agent serve --simulate           on any machine, with a simulated TD`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.reboot && !o.simulate {
				return exitf(exitUsage, "--simulate-reboot goes with --simulate")
			}
			o.config, o.runtimeDir = g.config, g.runtimeDir
			return serve(cmd.Context(), o, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&o.simulate, "simulate", false, "use a simulated TD, whose quotes prove nothing (refused in a real TDX guest)")
	cmd.Flags().BoolVar(&o.reboot, "simulate-reboot", false, "start a fresh boot of the simulated TD first")
	cmd.Flags().StringVar(&o.hostShared, "host-shared", "", "folder of app-compose.json and the host's other files (default boot.host_shared; simulated: a built-in sample)")
	return cmd
}

func newMeasure(g *globals) *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "measure",
		Short: "The boot step: extend RTMR3 with the application's identity",
		Long: `Extend RTMR3 with the application's identity, in the order of the configured
dstack era. The step may be repeated: what is measured already is compared and not
extended again. Where dstack-util has measured, its log is taken over.`,
		Example: "  tdx-agent measure\n  tdx-agent measure --simulate --host-shared ./my-app",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.config, o.runtimeDir = g.config, g.runtimeDir
			return measureCommand(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&o.simulate, "simulate", false, "use the simulated TD of the runtime directory")
	cmd.Flags().StringVar(&o.hostShared, "host-shared", "", "folder of app-compose.json and the host's other files (default boot.host_shared; simulated: a built-in sample)")
	return cmd
}

func measureCommand(ctx context.Context, o serveOptions, out io.Writer) error {
	cfg, err := loadConfig(o.config)
	if err != nil {
		return err
	}
	dir, err := serverRuntimeDir(o.runtimeDir, o.simulate)
	if err != nil {
		return err
	}
	b, err := openBackend(cfg, dir, o.simulate)
	if err != nil {
		return err // where there is no TD, nothing else matters
	}
	defer b.close()
	files, err := readGuest(cfg, o.hostShared, o.simulate)
	if err != nil {
		return err
	}
	l, err := openLedger(ctx, cfg, dir, b)
	if err != nil {
		return err
	}
	defer l.Close()
	added, err := measureBoot(ctx, cfg, dir, l, files)
	if err != nil {
		return err
	}
	s, err := l.Snapshot(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s%d events extended, %d in the log, RTMR3 %s\n", banner(b.simulated), added, len(s.Records), s.Register)
	return nil
}

// banner begins every answer that comes from a simulated TD.
func banner(simulated bool) string {
	if simulated {
		return "SIMULATED: "
	}
	return ""
}

func newKernelSetup(g *globals) *cobra.Command {
	var owner string
	cmd := &cobra.Command{
		Use:    "kernel-setup",
		Short:  "Give the kernel's interfaces to the agent's user (run by root, before serve)",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(g.config)
			if err != nil {
				return err
			}
			return kernelSetup(cfg, owner, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&owner, "user", "tdx-agent", "user that the agent runs as")
	return cmd
}

func newEmit(g *globals) *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use:     "emit NAME [HEX|@FILE]",
		Short:   "Extend RTMR3 with an application event",
		Example: "  tdx-agent emit release 1f2e\n  tdx-agent emit config @/etc/app.conf --idempotency-key boot-config",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := emitRequest{Event: args[0], Key: key}
			if len(args) == 2 {
				payload, err := payloadArg(args[1])
				if err != nil {
					return err
				}
				req.Payload = hex.EncodeToString(payload)
			}
			body, err := json.Marshal(req)
			if err != nil {
				return err
			}
			return withAgent(cmd, g, 15*time.Second, func(ctx context.Context, dir runtimeDir) error {
				b, err := call(ctx, dir.adminSocket(), http.MethodPost, "/v1/emit", body)
				if err != nil {
					return err
				}
				return printEmit(cmd, b)
			})
		},
	}
	cmd.Flags().StringVar(&key, "idempotency-key", "", "a second event with this key is not extended again")
	jsonFlag(cmd)
	return cmd
}

func printEmit(cmd *cobra.Command, b []byte) error {
	if wantJSON(cmd) {
		_, err := cmd.OutOrStdout().Write(b)
		return err
	}
	var r emitReply
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%sevent %d %q extended, RTMR3 %s\n", banner(r.Simulated), r.Record.Seq, r.Record.Name, r.Record.Next)
	return nil
}

func payloadArg(s string) ([]byte, error) {
	if path, ok := strings.CutPrefix(s, "@"); ok {
		return readCapped(path, 64<<10)
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil, exitf(exitUsage, "payload %q: want hexadecimal or @FILE", s)
	}
	return b, nil
}

func newQuote(g *globals) *cobra.Command {
	var data, out, format string
	cmd := &cobra.Command{
		Use:     "quote",
		Short:   "Get a quote and the event log that explains it",
		Example: "  tdx-agent quote --report-data 1234 -o quote.json\n  tdx-agent quote --format raw -o quote.bin",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "json" && format != "raw" {
				return exitf(exitUsage, "--format is %q, want json or raw", format)
			}
			if _, err := hex.DecodeString(data); err != nil || len(data) > 128 {
				return exitf(exitUsage, "--report-data is %q, want at most 64 bytes in hexadecimal", data)
			}
			return withAgent(cmd, g, 80*time.Second, func(ctx context.Context, dir runtimeDir) error {
				return quoteCommand(ctx, cmd, g, dir, data, out, format)
			})
		},
	}
	cmd.Flags().StringVar(&data, "report-data", "", "what to bind into the quote: at most 64 bytes in hexadecimal, padded with zeros")
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write (default: standard output)")
	cmd.Flags().StringVar(&format, "format", "json", "json: GetQuote's answer; raw: the quote alone")
	return cmd
}

func quoteCommand(ctx context.Context, cmd *cobra.Command, g *globals, dir runtimeDir, data, out, format string) error {
	socket, err := dstackSocket(g, dir)
	if err != nil {
		return err
	}
	body, err := json.Marshal(map[string]string{"report_data": data})
	if err != nil {
		return err
	}
	answer, err := call(ctx, socket, http.MethodPost, "/GetQuote", body)
	if err != nil {
		return err
	}
	if format == "raw" {
		var q struct {
			Quote string `json:"quote"`
		}
		if err := json.Unmarshal(answer, &q); err != nil {
			return err
		}
		if answer, err = hex.DecodeString(q.Quote); err != nil {
			return err
		}
	}
	if out != "" {
		return os.WriteFile(out, answer, 0o644)
	}
	_, err = cmd.OutOrStdout().Write(answer)
	return err
}

// dstackSocket is where the agent of this folder serves dstack's API.
func dstackSocket(g *globals, dir runtimeDir) (string, error) {
	if string(dir) != defaultRuntime {
		return dir.path("dstack.sock"), nil
	}
	cfg, err := loadConfig(g.config)
	if err != nil {
		return "", err
	}
	return cfg.Sockets.Dstack, nil
}

func newStatus(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show registers, log, identity and readiness",
		Long:    "Show registers, log, identity and readiness. It never costs a quote. Exit status 7 when a register and its log diverge.",
		Example: "  tdx-agent status\n  tdx-agent status --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withAgent(cmd, g, 10*time.Second, func(ctx context.Context, dir runtimeDir) error {
				b, err := call(ctx, dir.agentSocket(), http.MethodGet, "/v1/status", nil)
				if err != nil {
					return err
				}
				var s status.Status
				if err := json.Unmarshal(b, &s); err != nil {
					return err
				}
				s.Peers = readPeers(ctx, dir, cmd.ErrOrStderr()).Summary()
				if wantJSON(cmd) {
					err = json.NewEncoder(cmd.OutOrStdout()).Encode(&s)
				} else {
					err = s.WriteText(cmd.OutOrStdout())
				}
				if problem := s.Diverged(); err == nil && problem != "" {
					err = exitf(exitDiverged, "%s", problem)
				}
				return err
			})
		},
	}
	jsonFlag(cmd)
	return cmd
}

func newConfigCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Check or show the configuration", Args: cobra.NoArgs, RunE: needsSubcommand}
	cmd.AddCommand(&cobra.Command{
		Use: "check", Short: "Check the configuration file", Args: cobra.NoArgs, Example: "  tdx-agent config check --config ./agent.toml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(g.config)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "ok")
			for _, s := range cfg.switches() {
				fmt.Fprintf(cmd.OutOrStdout(), "loosened: %s = %s (will be measured as event agent-config)\n", s, status.Setting(cfg.loosened()[s]))
			}
			return nil
		},
	}, &cobra.Command{
		Use: "show", Short: "Show the configuration in force, defaults included", Args: cobra.NoArgs, Example: "  tdx-agent config show",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(g.config)
			if err != nil {
				return err
			}
			var b bytes.Buffer
			enc := toml.NewEncoder(&b)
			enc.Indent = ""
			if err := enc.Encode(cfg); err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(b.Bytes())
			return err
		},
	})
	return cmd
}

func needsSubcommand(cmd *cobra.Command, _ []string) error {
	return exitf(exitUsage, "%s needs a subcommand; see %s --help", cmd.CommandPath(), cmd.CommandPath())
}

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use: "version", Short: "Show the version", Args: cobra.NoArgs, Example: "  tdx-agent version --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wantJSON(cmd) {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]string{"schema": "tdx-agent/version/v1", "version": version(), "rev": revision(), "go": runtime.Version()})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "tdx-agent %s (%s, %s)\n", version(), revision(), runtime.Version())
			return nil
		},
	}
	jsonFlag(cmd)
	return cmd
}

func jsonFlag(cmd *cobra.Command) { cmd.Flags().Bool("json", false, "print JSON") }

func wantJSON(cmd *cobra.Command) bool {
	v, err := cmd.Flags().GetBool("json")
	return err == nil && v
}

// withAgent runs f against the agent of the runtime directory, with a deadline.
func withAgent(cmd *cobra.Command, g *globals, timeout time.Duration, f func(context.Context, runtimeDir) error) error {
	dir, err := clientRuntimeDir(g.runtimeDir)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
	defer cancel()
	return f(ctx, dir)
}
