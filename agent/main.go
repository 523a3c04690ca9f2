// Command tdx-agent is the attestation agent of an Intel TDX confidential VM: it
// measures the application into RTMR3, keeps the event log that explains RTMR3, and
// hands quotes to applications over dstack's Unix sockets.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// The kernel prefers a process's first thread for signals, and a signal breaks a
// quote that is being read. So the first thread stays with main.
func init() { runtime.LockOSThread() }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the program without the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(longDashes(args))
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "tdx-agent: %s\n", visible(strings.TrimSpace(err.Error())))
	return exitCode(err)
}

// visible writes what is not printable as Go does in strings, but for what parts lines:
// errors have words of others in them, which must not steer a terminal.
func visible(text string) string {
	var b strings.Builder
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		if part := text[:n]; r == '\n' || r == '\t' || strconv.IsPrint(r) && (r != utf8.RuneError || n > 1) {
			b.WriteString(part)
		} else {
			quoted := strconv.Quote(part)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		text = text[n:]
	}
	return b.String()
}

// globals are the flags of every command.
type globals struct {
	config     string
	runtimeDir string
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		SuggestionsMinimumDistance: 2,
		Use:                        "tdx-agent",
		Short:                      "Attestation agent for Intel TDX confidential VMs",
		Long: `tdx-agent runs inside an Intel TDX confidential VM. It measures the application
into RTMR3, keeps the event log that explains RTMR3, and hands quotes to
applications over dstack's Unix sockets.

Exit status: 0 ok, 1 failure, 2 usage, 3 not in a supported TEE, 4 agent not
reachable, 5 refused by policy, 6 evidence invalid, 7 log and register diverge,
8 denied, 9 throttled, 10 timeout, 78 configuration.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          unknownCommand,
		RunE:          needsSubcommand,
	}
	root.PersistentFlags().StringVar(&g.config, "config", "", "configuration file (default "+defaultConfig+", if it exists)")
	root.PersistentFlags().StringVar(&g.runtimeDir, "runtime-dir", "", "folder of sockets and log (default "+defaultRuntime+")")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return withExit(exitUsage, err) })
	root.AddCommand(holdsKeys(newServe(g)), holdsKeys(newMeasure(g)), newKernelSetup(g), newEmit(g), newQuote(g), newLog(g), newStatus(g), newPeers(g), newWait(g), newConfigCommand(g),
		newImage(), newVerify(), newPolicy(), newCollateral(), holdsKeys(newEndpoint(g)), newEgress(g), holdsKeys(newConnect(g)), holdsKeys(newFetch(g)), holdsKeys(newGetCert(g)), newDemo(), newVersion())
	root.InitDefaultCompletionCmd() // now, so that it gets the usage status as well
	for _, c := range root.Commands() {
		if c.HasSubCommands() && !c.Runnable() {
			c.RunE = needsSubcommand
		}
	}
	usageErrors(root)
	return root
}

// unknownCommand is the answer to a word that is no command.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := ""
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return fmt.Errorf("unknown command %q%s", args[0], hint)
}

// usageErrors gives wrong arguments of every command the usage status.
func usageErrors(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return withExit(exitUsage, fmt.Errorf("%w; see %s --help", err, cmd.CommandPath()))
			}
			return nil
		}
	}
	for _, c := range cmd.Commands() {
		usageErrors(c)
	}
}

// version is the module's version, as the build recorded it.
func version() string {
	if releaseVersion != "" {
		return releaseVersion
	}
	return "0.1.0-dev"
}

// releaseVersion is set by the release build with -ldflags -X.
var releaseVersion string

// revision is the commit the program was built from, or "unknown".
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "git:" + s.Value[:min(len(s.Value), 20)]
		}
	}
	return "unknown"
}
