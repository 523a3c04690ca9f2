package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// The sockets by the names systemd passes them under (FileDescriptorName=).
const (
	socketDstack   = "dstack"
	socketTappd    = "tappd"
	socketAgent    = "agent"
	socketAdmin    = "admin"
	socketChannel  = "channel"  // optional: only where the machine has attested channels
	socketEgress   = "egress"   // of tdx-agent egress
	socketEndpoint = "endpoint" // of tdx-agent endpoint
	socketWorker   = "worker"   // optional: only with worker.listen
)

// socketModes returns the sockets of serve. Containers have arbitrary user ids, so
// dstack's two are open to all, and what they give is limited instead. An application's
// is in a folder of its own: into whichever container that is mounted, can open it.
func socketModes(cfg *Config) map[string]fs.FileMode {
	modes := map[string]fs.FileMode{socketDstack: 0o666, socketTappd: 0o666, socketAgent: 0o660, socketAdmin: 0o600, socketChannel: 0o660, socketWorker: 0o666}
	for i := range cfg.Applications {
		modes[socketOf(cfg.Applications[i].Name)], modes[tappdOf(cfg.Applications[i].Name)] = 0o666, 0o666
	}
	return modes
}

// listenAll takes the sockets from systemd, all of them and by name, or binds them.
func listenAll(cfg *Config, dir runtimeDir, given bool) (map[string]net.Listener, error) {
	passed, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("sockets from systemd: %w", err)
	}
	if len(passed) > 0 {
		return takeListeners(passed, cfg)
	}
	paths := map[string]string{socketDstack: cfg.Sockets.Dstack, socketTappd: cfg.Sockets.Tappd, socketAgent: dir.agentSocket(), socketAdmin: dir.adminSocket(), socketChannel: dir.channelSocket()}
	if given {
		paths[socketDstack], paths[socketTappd] = dir.path("dstack.sock"), dir.path("tappd.sock")
	}
	for i := range cfg.Applications {
		name := cfg.Applications[i].Name
		paths[socketOf(name)], paths[tappdOf(name)] = dir.applicationSocket(name), dir.applicationTappd(name)
	}
	switch cfg.Worker.Listen {
	case "":
	case workerInherited:
		return nil, exitf(exitConfig, "worker.listen is %q, but systemd has passed no sockets; start tdx-agent-worker.socket, or give the path of a Unix socket", workerInherited)
	default:
		paths[socketWorker] = cfg.Worker.Listen
	}
	if err := checkSocketPaths(paths); err != nil {
		return nil, withExit(exitConfig, err)
	}
	return bindListeners(paths, socketModes(cfg))
}

// maxSocketPath is what the kernel takes: sun_path of unix(7), less a zero at its end.
const maxSocketPath = 107

// checkSocketPaths finds what the kernel would refuse in fewer words.
func checkSocketPaths(paths map[string]string) error {
	at := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(paths)) {
		path := filepath.Clean(paths[name])
		if len(path) > maxSocketPath {
			return fmt.Errorf("socket %s: the path %s has %d bytes, and the kernel takes at most %d; choose a shorter one", name, path, len(path), maxSocketPath)
		}
		if other, taken := at[path]; taken {
			return fmt.Errorf("sockets %s and %s have the same path %s", other, name, path)
		}
		at[path] = name
	}
	return nil
}

func bindListeners(paths map[string]string, modes map[string]fs.FileMode) (map[string]net.Listener, error) {
	all := map[string]net.Listener{}
	for name, path := range paths {
		l, err := listenUnix(path, modes[name])
		if err != nil {
			closeAll(all)
			return nil, err
		}
		all[name] = l
	}
	return all, nil
}

// takeListeners takes what systemd has passed.
func takeListeners(passed map[string][]net.Listener, cfg *Config) (map[string]net.Listener, error) {
	all := map[string]net.Listener{}
	modes := socketModes(cfg)
	optional := []string{socketChannel, socketWorker}
	for i := range cfg.Applications {
		name := cfg.Applications[i].Name
		passed[socketOf(name)], passed[tappdOf(name)] = byPath(passed[socketOf(name)])
		optional = append(optional, tappdOf(name))
	}
	var problems []error
	for name, ls := range passed {
		if _, known := modes[name]; known && len(ls) == 0 {
			continue // missing, see below
		} else if !known || len(ls) != 1 {
			problems = append(problems, fmt.Errorf("systemd passed %d sockets named %q; want one of each of dstack, tappd, agent, admin, app-NAME of every application in agent.toml, which may have its tappd.sock as well, and perhaps channel and worker (FileDescriptorName=)", len(ls), name))
			continue
		}
		all[name] = ls[0]
	}
	for name := range modes {
		if len(passed[name]) == 0 && !slices.Contains(optional, name) {
			problems = append(problems, fmt.Errorf("systemd passed no socket named %q; start the .socket units (of application NAME: tdx-agent-app@NAME.socket)", name))
		}
	}
	switch worker := cfg.Worker.Listen; {
	case worker == workerInherited && all[socketWorker] == nil:
		problems = append(problems, fmt.Errorf("worker.listen is %q, but systemd passed no socket named %q; start tdx-agent-worker.socket", worker, socketWorker))
	case worker != workerInherited && all[socketWorker] != nil:
		problems = append(problems, fmt.Errorf("systemd passed a socket named %q, but worker.listen is %q; write listen = %q under [worker], or disable tdx-agent-worker.socket", socketWorker, worker, workerInherited))
	case worker != workerInherited && worker != "":
		problems = append(problems, fmt.Errorf("worker.listen is %q, but systemd passes the sockets; write listen = %q under [worker], and let ListenStream= of tdx-agent-worker.socket name the path", worker, workerInherited))
	}
	if len(problems) > 0 {
		closeAll(all)
		return nil, withExit(exitConfig, errors.Join(problems...))
	}
	return all, nil
}

// byPath tells the sockets of an application apart, which one unit passes under one name.
func byPath(ls []net.Listener) (dstack, tappd []net.Listener) {
	for _, l := range ls {
		if filepath.Base(l.Addr().String()) == "tappd.sock" {
			tappd = append(tappd, l)
		} else {
			dstack = append(dstack, l)
		}
	}
	return dstack, tappd
}

// listenUnix binds a socket in the place of one that a dead process left behind. The
// caller holds the lock that keeps a second agent out of this folder.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("socket %s: something else is there (%s); remove it", path, st.Mode().Type())
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("socket %s: another process answers on it", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func closeAll(all map[string]net.Listener) {
	for _, l := range all {
		l.Close()
	}
}

// lockServe keeps a second agent out of the runtime directory. The lock ends with
// the process.
func lockServe(dir runtimeDir) (*os.File, error) {
	f, err := tryLock(filepath.Join(dir.log(), "serve.lock"))
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("another agent serves from %s already", dir)
	}
	return f, err
}

// tryLock takes the lock on a file, which is made if need be. The error is
// EWOULDBLOCK when another process has it.
func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	return f, nil
}

func sortedNames(all map[string]net.Listener) string {
	names := make([]string, 0, len(all))
	for _, l := range all {
		names = append(names, l.Addr().String())
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}
