package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// runtimeDir is where sockets, the log and a simulated TD live. Everything below it
// is named in this file.
type runtimeDir string

func (d runtimeDir) path(name string) string { return filepath.Join(string(d), name) }
func (d runtimeDir) log() string             { return d.path("log") }
func (d runtimeDir) ccel() string            { return d.path("log/ccel") }
func (d runtimeDir) agentKey() string        { return d.path("log/agent.key") }
func (d runtimeDir) seed() string            { return d.path("log/instance-id-seed") }
func (d runtimeDir) appSeed() string         { return d.path("log/app-seed") }
func (d runtimeDir) kmsCollateral() string   { return d.path("log/kms-collateral") }
func (d runtimeDir) td() string              { return d.path("td") }
func (d runtimeDir) simulatedRoot() string {
	return d.path("simulated-root.pem")
}
func (d runtimeDir) simulatedCollateral() string {
	return d.path("simulated-collateral.json")
}
func (d runtimeDir) agentSocket() string { return d.path("agent.sock") }
func (d runtimeDir) adminSocket() string { return d.path("admin.sock") }
func (d runtimeDir) peers() string       { return d.path("peers") }
func (d runtimeDir) peerSocket(name string) string {
	return filepath.Join(d.peers(), name+".sock")
}
func (d runtimeDir) channelSocket() string { return d.path("channel.sock") }
func (d runtimeDir) egressSocket() string  { return d.path("egress.sock") }

// serverRuntimeDir returns the folder for a process that serves or measures, made
// where that is its business.
func serverRuntimeDir(given string, simulate bool) (runtimeDir, error) {
	dir := runtimeDir(defaultRuntime)
	switch {
	case given != "":
		abs, err := filepath.Abs(given)
		if err != nil {
			return "", err
		}
		dir = runtimeDir(abs)
	case simulate:
		dir = simulatedDir()
	}
	mode := fs.FileMode(0o755)
	if simulate {
		mode = 0o700
	}
	if err := os.MkdirAll(string(dir), mode); err != nil {
		return "", fmt.Errorf("runtime directory: %w", err)
	}
	if simulate && given == "" {
		if err := ownPrivate(string(dir)); err != nil {
			return "", err
		}
	}
	if err := checkTrustedPath(string(dir)); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir.log(), 0o700); err != nil {
		return "", fmt.Errorf("log directory: %w", err)
	}
	return dir, ownPrivate(dir.log())
}

// bindingRuntimeDir is clientRuntimeDir for a process that binds a socket there.
func bindingRuntimeDir(given string) (runtimeDir, error) {
	dir, err := clientRuntimeDir(given)
	if err != nil {
		return "", err
	}
	return dir, checkTrustedPath(string(dir))
}

// clientRuntimeDir finds a running agent: the folder given, the system's agent, or
// this user's simulated one.
func clientRuntimeDir(given string) (runtimeDir, error) {
	if given != "" {
		abs, err := filepath.Abs(given)
		return runtimeDir(abs), err
	}
	system := runtimeDir(defaultRuntime)
	if _, err := os.Stat(system.agentSocket()); err == nil {
		return system, nil
	}
	sim := simulatedDir()
	switch err := ownPrivate(string(sim)); {
	case err == nil:
		return sim, nil
	case errors.Is(err, fs.ErrNotExist):
		return system, nil
	default:
		return "", err
	}
}

func simulatedDir() runtimeDir {
	base := os.Getenv("XDG_RUNTIME_DIR")
	if base == "" {
		base = os.TempDir()
	}
	return runtimeDir(filepath.Join(base, fmt.Sprintf("tdx-agent-%d", os.Getuid())))
}

// ownPrivate demands a real folder that belongs to this user and is open to nobody
// else: in a shared parent somebody else may have made it first.
func ownPrivate(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory", dir)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, want %d", dir, st.Uid, os.Geteuid())
	case st.Mode&0o077 != 0:
		return fmt.Errorf("%s has mode %o, want 700", dir, st.Mode&0o777)
	}
	return nil
}
