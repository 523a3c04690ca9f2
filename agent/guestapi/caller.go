package guestapi

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Caller is the process at the other end of a connection, as the kernel reported it
// once, when the connection was accepted. The connection may since have been handed to
// another process, and the PID may have been reused.
type Caller struct {
	PID      int32
	UID, GID uint32 // as they were when the caller connected (SO_PEERCRED)
	Known    bool   // false when the transport reports no credentials
	// CgroupID is the kernel's number of the caller's control group, which is not used
	// again before the next boot; 0 where the kernel does not tell (before Linux 6.13).
	CgroupID uint64
	// Cgroup is the path of that group, as seen from the agent's; "" if it could not be
	// read before the caller was gone.
	Cgroup string
	// Container is the id of the container whose group that is, 64 hexadecimal digits,
	// or "". It is read from the path, and so as good as whoever makes control groups.
	Container string
}

// String returns the caller for people and logs.
func (c Caller) String() string {
	if !c.Known {
		return "unknown"
	}
	text := fmt.Sprintf("pid %d, uid %d, gid %d", c.PID, c.UID, c.GID)
	switch {
	case c.Container != "":
		text += ", container " + c.Container[:12]
	case c.Cgroup != "":
		text += ", cgroup " + c.Cgroup
	}
	return text
}

// accountKey is whom a caller's calls count against.
type accountKey struct {
	known     bool
	uid       uint32 // 0 for a container
	container bool
	group     uint64
	cgroup    string
}

// account is the user in his control group, as a process that forks stays in it. All
// whose group is not known are one account, that of callers which ended at once: who
// forks for every connection has no more of it. A container is one account, whoever calls from it: its
// root may become any user. Only its group tells which, as anybody may give a group that
// he may make the name of another's container.
func (c *Caller) account() accountKey {
	a := accountKey{known: c.Known, uid: c.UID, group: c.CgroupID}
	switch {
	case !c.Known:
		return accountKey{}
	case c.CgroupID == 0 && c.Cgroup == "":
		return accountKey{known: true}
	case c.CgroupID == 0:
		a.cgroup = c.Cgroup
	}
	if c.Container != "" {
		a.uid, a.container = 0, true
	}
	return a
}

// Account names whom a caller's calls count against: the user in his control group, or the
// container; or all together whose group is not known.
func (c Caller) Account() string {
	a := c.account()
	who := "uid " + strconv.FormatUint(uint64(a.uid), 10)
	if a.container {
		who = "container"
	}
	switch {
	case !a.known:
		return "unknown"
	case a.group != 0:
		return who + " cgroup " + strconv.FormatUint(a.group, 10)
	case a.cgroup != "":
		return who + " cgroup " + a.cgroup
	}
	return "no known cgroup"
}

// maxGroups bounds the control groups whose paths are remembered.
const maxGroups = 1024

// identifier asks the kernel who calls.
type identifier struct {
	pidfd func(conn int) (int, error)                  // SO_PEERPIDFD, Linux 6.5
	info  func(pidfd int, info *unix.PidfdInfo) error  // PIDFD_GET_INFO, Linux 6.13
	read  func(pid int32, name string) ([]byte, error) // of a file in /proc/PID

	mu    sync.Mutex        // guards what follows
	paths map[uint64]string // of control groups, by number
}

func newIdentifier() *identifier {
	return &identifier{
		pidfd: func(conn int) (int, error) { return unix.GetsockoptInt(conn, unix.SOL_SOCKET, unix.SO_PEERPIDFD) },
		info:  unix.IoctlPidfdInfo,
		read:  readProc,
		paths: map[uint64]string{},
	}
}

// caller identifies the peer of a connection.
func (i *identifier) caller(conn net.Conn) (c Caller) {
	control(conn, func(fd int) {
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil || cred.Pid <= 0 {
			return
		}
		c = Caller{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid, Known: true}
		c.CgroupID, c.Cgroup = i.group(fd, cred.Pid)
		c.Container = containerOf(c.Cgroup)
	})
	return c
}

// group finds the control group of the peer. With a descriptor of the process itself
// nothing can be mistaken for it; without one, its start time is compared before and
// after, which leaves the moment between connecting and the first look: a process that
// ends in it can be taken for another that was given its number.
func (i *identifier) group(conn int, pid int32) (id uint64, path string) {
	pidfd, err := i.pidfd(conn)
	switch {
	case err == unix.ENOPROTOOPT:
		return 0, i.pathBetween(pid, func() (string, error) { return i.startTime(pid) })
	case err != nil:
		return 0, "" // there is no such process any more, and its number may be another's
	}
	defer unix.Close(pidfd)
	id, err = i.groupID(pidfd)
	if err != nil {
		return 0, i.pathBetween(pid, func() (string, error) { return "", alive(pidfd) })
	}
	i.mu.Lock()
	path, known := i.paths[id]
	i.mu.Unlock()
	if known {
		return id, path
	}
	path = i.pathBetween(pid, func() (string, error) {
		now, err := i.groupID(pidfd)
		return fmt.Sprint(now), err
	})
	if path != "" {
		i.remember(id, path)
	}
	return id, path
}

// remember keeps a path. Groups are few; that there are too many is no reason to keep
// the old ones.
func (i *identifier) remember(id uint64, path string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.paths) >= maxGroups {
		clear(i.paths)
	}
	i.paths[id] = path
}

func (i *identifier) groupID(pidfd int) (uint64, error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CGROUPID}
	if err := i.info(pidfd, &info); err != nil {
		return 0, err
	}
	if info.Mask&unix.PIDFD_INFO_CGROUPID == 0 || info.Cgroupid == 0 {
		return 0, errors.New("the kernel does not tell the control group")
	}
	return info.Cgroupid, nil
}

// alive reports whether the process has not ended. It does not end when a descriptor of
// it is open, but its number cannot go to another before it has.
func alive(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return err
	}
	if fds[0].Revents != 0 {
		return errors.New("the process has ended")
	}
	return nil
}

// pathBetween reads the path of a process's control group, if same says the same before
// and after.
func (i *identifier) pathBetween(pid int32, same func() (string, error)) string {
	before, err := same()
	if err != nil {
		return ""
	}
	b, err := i.read(pid, "cgroup")
	if err != nil {
		return ""
	}
	if after, err := same(); err != nil || after != before {
		return ""
	}
	return groupPath(b)
}

// startTime is when the process started, in ticks since the boot: field 22 of stat,
// counted behind the command, which may hold anything.
func (i *identifier) startTime(pid int32) (string, error) {
	b, err := i.read(pid, "stat")
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has %d fields after the command", pid, len(fields))
	}
	return fields[19], nil
}

func readProc(pid int32, name string) ([]byte, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 8<<10) // the kernel gives either in one piece
	n, err := f.Read(b)
	return b[:n], err
}

// groupPath finds the path in /proc/PID/cgroup: that of cgroup v2, or of systemd's v1
// hierarchy where there is no other.
func groupPath(b []byte) (path string) {
	for line := range strings.Lines(string(b)) {
		line, whole := strings.CutSuffix(line, "\n")
		_, rest, _ := strings.Cut(line, ":")
		name, at, ok := strings.Cut(rest, ":")
		switch {
		case !whole || !ok || len(at) > 4096:
		case strings.HasPrefix(line, "0::"):
			return at
		case name == "name=systemd":
			path = at
		}
	}
	return path
}

// containerOf finds the id in the path of a container's control group, as Docker, Podman,
// containerd and CRI-O make them: docker-ID.scope, /docker/ID, cri-containerd-ID.scope.
func containerOf(path string) string {
	const digits = 64
	for path != "" {
		cut := strings.LastIndexByte(path, '/')
		name := strings.TrimSuffix(path[cut+1:], ".scope")
		if at := len(name) - digits; at == 0 || at > 0 && name[at-1] == '-' {
			if id := name[at:]; strings.Trim(id, "0123456789abcdef") == "" {
				return id
			}
		}
		path = path[:max(cut, 0)]
	}
	return ""
}
