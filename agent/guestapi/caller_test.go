package guestapi

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// accepted returns our end of a connection from this process.
func accepted(t testing.TB) net.Conn {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); conn.Close() })
	return conn
}

// kernels are what older kernels lack.
var kernels = map[string]func(*identifier){
	"this": func(*identifier) {},
	"6.5 to 6.12": func(i *identifier) {
		i.info = func(int, *unix.PidfdInfo) error { return unix.ENOTTY }
	},
	"before 6.5": func(i *identifier) {
		i.pidfd = func(int) (int, error) { return -1, unix.ENOPROTOOPT }
	},
}

func TestCallerOnEveryKernel(t *testing.T) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for name, older := range kernels {
		t.Run(name, func(t *testing.T) {
			i := newIdentifier()
			older(i)
			for range 2 { // the second time from what is remembered
				c := i.caller(accepted(t))
				if c.PID != int32(os.Getpid()) || c.UID != uint32(os.Getuid()) || c.GID != uint32(os.Getgid()) || !c.Known {
					t.Errorf("caller is %+v", c)
				}
				if c.Cgroup == "" || c.Cgroup != groupPath(own) {
					t.Errorf("control group is %q, want that of %q", c.Cgroup, own)
				}
				if name != "this" && c.CgroupID != 0 {
					t.Errorf("control group %d, from a kernel that does not tell", c.CgroupID)
				}
			}
		})
	}
}

// TestCallerThatIsGone connects from a process that has ended before it is looked at.
func TestCallerThatIsGone(t *testing.T) {
	for name, older := range kernels {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			cmd := exec.Command(os.Args[0], "-test.run=TestConnectAndEnd")
			cmd.Env = append(os.Environ(), "TDX_AGENT_CONNECT="+path)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			conn, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			i := newIdentifier()
			older(i)
			c := i.caller(conn)
			if c.PID != int32(cmd.Process.Pid) || !c.Known || c.UID != uint32(os.Getuid()) {
				t.Errorf("caller is %+v, want pid %d", c, cmd.Process.Pid)
			}
			if c.Cgroup != "" || c.Container != "" {
				t.Errorf("a process that is gone is in control group %q", c.Cgroup)
			}
			// Whoever forks for each connection, and becomes other users, has one account.
			other := Caller{PID: c.PID + 1, UID: c.UID + 1, Known: true}
			if c.account() != other.account() || c.account() == (&Caller{}).account() {
				t.Errorf("it is account %q, and the next one %q", c.Account(), other.Account())
			}
		})
	}
}

func TestConnectAndEnd(t *testing.T) {
	path := os.Getenv("TDX_AGENT_CONNECT")
	if path == "" {
		return // it is TestCallerThatIsGone's other process
	}
	if _, err := net.DialTimeout("unix", path, 10*time.Second); err != nil {
		t.Fatal(err)
	}
}

// TestReusedPID lets the process number go to another process while it is looked at.
func TestReusedPID(t *testing.T) {
	i := newIdentifier()
	kernels["before 6.5"](i)
	starts := 0
	i.read = func(_ int32, name string) ([]byte, error) {
		if name == "cgroup" {
			return []byte("0::/another\n"), nil
		}
		starts++
		return fmt.Appendf(nil, "1 (a) b) S%s %d 0\n", strings.Repeat(" 1", 18), starts), nil
	}
	if c := i.caller(accepted(t)); c.Cgroup != "" || starts != 2 {
		t.Errorf("control group %q after %d looks, want none after 2", c.Cgroup, starts)
	}
	i.pidfd = func(int) (int, error) { return -1, unix.ESRCH } // the kernel knows that it is gone
	if c := i.caller(accepted(t)); c.Cgroup != "" || starts != 2 {
		t.Errorf("control group %q of a process that is gone", c.Cgroup)
	}
	kernels["before 6.5"](i)
	i.read = func(int32, string) ([]byte, error) { return nil, fs.ErrNotExist }
	if c := i.caller(accepted(t)); c.Cgroup != "" || !c.Known {
		t.Errorf("caller is %+v without /proc", c)
	}
	i = newIdentifier()
	ids := uint64(0)
	i.info = func(_ int, info *unix.PidfdInfo) error { // it is moved while it is looked at
		ids++
		info.Mask, info.Cgroupid = unix.PIDFD_INFO_CGROUPID, ids
		return nil
	}
	if c := i.caller(accepted(t)); c.Cgroup != "" || c.CgroupID != 1 {
		t.Errorf("caller is %+v, want group 1 without a path", c)
	}
	i.info = func(_ int, info *unix.PidfdInfo) error { info.Mask = 0; return nil }
	if c := i.caller(accepted(t)); c.CgroupID != 0 || c.Cgroup == "" {
		t.Errorf("caller is %+v, want the path from /proc", c)
	}
}

func TestRememberedGroupsAreBounded(t *testing.T) {
	i := newIdentifier()
	for id := range uint64(5 * maxGroups) {
		i.remember(id, "/g")
		if len(i.paths) > maxGroups {
			t.Fatalf("%d groups are remembered", len(i.paths))
		}
	}
}

func TestGroupPath(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/a.service\n":                                 "/system.slice/a.service",
		"2:cpu:/x\n1:name=systemd:/user.slice\n0::/system.slice/b:c\n": "/system.slice/b:c",
		"2:cpu:/x\n1:name=systemd:/user.slice\n":                       "/user.slice",
		"2:cpu:/x\n":                                                   "",
		"0::/cut":                                                      "",
		"0::/a\\012b\n":                                                "/a\\012b",
		"0::" + strings.Repeat("/x", 3000) + "\n":                      "",
		"":                  "",
		"nonsense\n:\n0:\n": "",
	} {
		if got := groupPath([]byte(text)); got != want {
			t.Errorf("%.60q: %q, want %q", text, got, want)
		}
	}
}

func TestContainerOf(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for path, want := range map[string]string{
		"/system.slice/docker-" + id + ".scope": id,
		"/docker/" + id:                         id,
		"/docker/" + id + "/init.scope":         id,
		"/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope": id,
		"/machine.slice/libpod-" + id + ".scope/container":                    id,
		"/system.slice/docker-" + id + "0.scope":                              "",
		"/system.slice/x" + id:                                                "",
		"/docker/" + strings.ToUpper(id):                                      "",
		"/docker/" + id[1:]:                                                   "",
		"/system.slice/ssh.service":                                           "",
		"/":                                                                   "",
		"":                                                                    "",
		id:                                                                    id,
	} {
		if got := containerOf(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

func TestAccount(t *testing.T) {
	base := Caller{PID: 7, UID: 1000, Known: true}
	for want, c := range map[string]Caller{
		"unknown":            {},
		"no known cgroup":    base,
		"uid 1000 cgroup 12": {PID: 7, UID: 1000, Known: true, CgroupID: 12, Cgroup: "/a"},
		"uid 1000 cgroup /a": {PID: 7, UID: 1000, Known: true, Cgroup: "/a"},
		// A container is one caller, and what its id says is not asked.
		"container cgroup 12":   {PID: 7, UID: 1000, Known: true, CgroupID: 12, Cgroup: "/docker/x", Container: "x"},
		"container cgroup /d/x": {PID: 7, UID: 1000, Known: true, Cgroup: "/d/x", Container: "x"},
	} {
		if got := c.Account(); got != want {
			t.Errorf("%+v: %q, want %q", c, got, want)
		}
	}
}

// BenchmarkCaller identifies a caller whose control group is known; its floor is
// SO_PEERCRED alone.
func BenchmarkCaller(b *testing.B) {
	conn := accepted(b)
	for name, older := range kernels {
		i := newIdentifier()
		older(i)
		b.Run(name, func(b *testing.B) {
			paired(b, func() {
				control(conn, func(fd int) { unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED) })
			}, func() {
				if c := i.caller(conn); !c.Known {
					b.Fatal(errors.New("unknown caller"))
				}
			})
		})
	}
}
