package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"tdx-agent/measure/tsm"
)

// kernelSetup is the only part of the agent that runs as root: it hands the pieces
// that an unprivileged agent needs to the agent's user, and nothing else. What this
// machine does not have is said and skipped.
func kernelSetup(cfg *Config, userName string, out io.Writer) error {
	owner, err := lookupOwner(userName)
	if err != nil {
		return err
	}
	notes, err := tsm.Setup(kernelPaths(cfg), owner)
	for _, n := range notes {
		fmt.Fprintln(out, n)
	}
	if err != nil {
		return err
	}
	if err := copyCCEL(cfg, owner, out); err != nil {
		return err
	}
	return shareDstackLog(cfg.Boot.DstackLogs, owner, out)
}

func lookupOwner(name string) (tsm.Owner, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return tsm.Owner{}, withExit(exitConfig, fmt.Errorf("user %q: %w", name, err))
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return tsm.Owner{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	return tsm.Owner{UID: uid, GID: gid}, err
}

// copyCCEL copies the boot event log, which only root can read. It cannot change
// after the kernel has started.
func copyCCEL(cfg *Config, owner tsm.Owner, out io.Writer) error {
	b, err := readCapped(cfg.Kernel.CCEL, maxCCEL)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(out, "no boot event log at %s\n", cfg.Kernel.CCEL)
		return nil
	}
	if err != nil {
		return fmt.Errorf("boot event log: %w", err)
	}
	path := runtimeDir(defaultRuntime).ccel()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o400), renameio.IgnoreUmask())
	if err != nil {
		return fmt.Errorf("copy the boot event log: %w", err)
	}
	defer f.Cleanup()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Chown(owner.UID, owner.GID); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}

// shareDstackLog lets the agent's group take dstack's lock and read dstack's log.
// Both stay root's.
func shareDstackLog(dir string, owner tsm.Owner, out io.Writer) error {
	if dir == "" {
		return nil
	}
	for _, f := range []struct {
		name string
		add  uint32 // permission bits of the group
	}{{"dstack", 0o050}, {"dstack/runtime_event.lock", 0o060}, {"dstack/runtime_events.log", 0o040}, {"dstack/runtime_event_version", 0o040},
		{"tdx_mr3", 0o050}, {"tdx_mr3/tdx_events.log", 0o040}} {
		path := filepath.Join(dir, f.name)
		switch err := shareFile(path, f.add, owner.GID); {
		case err == nil:
			fmt.Fprintf(out, "%s is open to the agent's group\n", path)
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("dstack's log: give %s to the agent's group: %w", path, err)
		}
	}
	return nil
}

func shareFile(path string, add uint32, gid int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if err := unix.Fchown(fd, -1, gid); err != nil {
		return err
	}
	return unix.Fchmod(fd, st.Mode&0o7777|add)
}
