// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func host() {
	const A = "host"
	d := mk("h")
	defer os.Remove(d)
	q := func() string {
		t := time.Now()
		wr(d+"/inblob", unix.O_WRONLY, pat(0xe0, 64))
		s := out(d + "/outblob")
		return s + " in " + time.Since(t).Round(10*time.Millisecond).String()
	}
	row(A, "plain", q())
	for _, n := range []syscall.Errno{unix.EIO, unix.EBUSY, unix.ETIMEDOUT, unix.ENOMEM, unix.EINVAL, unix.EAGAIN} {
		set("quote_errno", int(n))
		row(A, "host fails with "+unix.ErrnoName(n), q(), "gen", gen(d))
	}
	set("quote_errno", 0)
	row(A, "after failures, same inblob reread", out(d+"/outblob"))
	set("quote_empty", "Y")
	row(A, "empty quote", q())
	set("quote_empty", "N")
	for _, n := range []int{636, 8168, 131048, 131049} {
		set("quote_len", n)
		row(A, fmt.Sprintf("quote of %d", n), q())
	}
	set("quote_max", 1<<30)
	for _, n := range []int{1 << 20, 16 << 20, 16<<20 + 1} {
		set("quote_len", n)
		row(A, fmt.Sprintf("quote of %d, driver limit lifted", n), q())
	}
	set("quote_len", 0)
	set("quote_max", 131048)
	set("poll_ms", 1000)
	set("quote_delay_ms", 100)
	row(A, "host takes 100 ms, poll 1000 ms", q())
	set("poll_ms", 20)
	set("quote_delay_ms", 2000)
	set("timeout_ms", 400)
	row(A, "host takes 2 s, limit 0.4 s", q())
	row(A, "  at once again", q())
	time.Sleep(2 * time.Second)
	set("timeout_ms", 30000)
	set("quote_delay_ms", 0)
	row(A, "  2 s later", q())

	// a signal while the host works
	set("quote_delay_ms", 1500)
	wr(d+"/inblob", unix.O_WRONLY, pat(0xe1, 64))
	got := make(chan string, 1)
	tid := make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		fd, _ := unix.Open(d+"/outblob", unix.O_RDONLY, 0)
		tid <- unix.Gettid()
		t := time.Now()
		n, err := unix.Read(fd, make([]byte, 16384))
		s := fmt.Sprintf("n=%d %s after %s", n, e(err), time.Since(t).Round(10*time.Millisecond))
		n, err = unix.Read(fd, make([]byte, 16384))
		s += fmt.Sprintf("; same fd at once: n=%d %s", n, e(err))
		time.Sleep(1600 * time.Millisecond)
		n, err = unix.Read(fd, make([]byte, 16384))
		s += fmt.Sprintf("; same fd when the host is done: n=%d %s", n, e(err))
		unix.Close(fd)
		got <- s
	}()
	id := <-tid
	time.Sleep(300 * time.Millisecond)
	unix.Tgkill(os.Getpid(), id, unix.SIGURG)
	row(A, "SIGURG (handler with SA_RESTART) during a read", <-got)

	set("quote_delay_ms", 300)
	row(A, "five quotes of 0.3 s, a SIGHUP to the process every 25 ms", storm(d, false))
	row(A, "  the same, all signals blocked on the reading thread", storm(d, true))

	// what else waits while a quote is being made
	set("quote_delay_ms", 2000)
	d2 := mk("h2")
	wr(d2+"/inblob", unix.O_WRONLY, pat(0xe2, 64))
	go out(d2 + "/outblob")
	time.Sleep(200 * time.Millisecond)
	var wg sync.WaitGroup
	for _, c := range []struct {
		n string
		f func() string
	}{
		{"read generation of another entry", func() string { return gen(d) }},
		{"read provider of another entry", func() string { b, _ := rd(d + "/provider"); return strings.TrimSpace(string(b)) }},
		{"write inblob of another entry", func() string { return wr(d+"/inblob", unix.O_WRONLY, pat(0xe3, 64)) }},
		{"mkdir a new entry", func() string { return e(os.Mkdir(root+"/h3", 0o755)) }},
		{"rmdir an idle entry", func() string { dd := root + "/h4"; return e(os.Remove(dd)) }},
		{"ls report", func() string { es, err := os.ReadDir(root); return fmt.Sprint(len(es), e(err)) }},
		{"read rtmr3 in sysfs", func() string { b, err := rd(mrs + "/rtmr3:sha384"); return fmt.Sprint(len(b), e(err)) }},
		{"GET_REPORT0", func() string { return report0() }},
	} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			t := time.Now()
			r := c.f()
			row(A, "while a 2 s quote runs: "+c.n, r, "took", time.Since(t).Round(10*time.Millisecond))
		}()
	}
	// can a process stuck behind it be killed?
	cmd := exec.Command("/proc/self/exe", "read", d+"/provider")
	cmd.Start()
	time.Sleep(300 * time.Millisecond)
	st, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	cmd.Process.Kill()
	t := time.Now()
	cmd.Wait()
	f := strings.Fields(string(st))
	if len(f) > 2 {
		row(A, "a process waiting behind it: state, time to die of SIGKILL", f[2], time.Since(t).Round(10*time.Millisecond))
	}
	wg.Wait()
	os.Remove(root + "/h3")
	os.Remove(d2)
	// SIGKILL the reader itself
	set("quote_delay_ms", 1500)
	time.Sleep(100 * time.Millisecond)
	cmd = exec.Command("/proc/self/exe", "quote", d)
	cmd.Start()
	time.Sleep(400 * time.Millisecond)
	cmd.Process.Kill()
	t = time.Now()
	cmd.Wait()
	took := time.Since(t).Round(10 * time.Millisecond)
	s := out(d + "/outblob")
	time.Sleep(1600 * time.Millisecond)
	set("quote_delay_ms", 0)
	row(A, "SIGKILL the reader: time to die, next read by another, and later", took, s, out(d+"/outblob"))
}

// storm: what five quotes see while signals for the whole process arrive. block
// keeps them off the reading thread.
func storm(d string, block bool) map[string]int {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	got := map[string]int{}
	for range 5 {
		done := make(chan string)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its mask
			if block {
				var all unix.Sigset_t
				for i := range all.Val {
					all.Val[i] = ^all.Val[i]
				}
				unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil)
			}
			wr(d+"/inblob", unix.O_WRONLY, pat(0xe1, 64))
			done <- out(d + "/outblob")
		}()
		for end := false; !end; {
			select {
			case s := <-done:
				got[s]++
				end = true
			case <-time.After(25 * time.Millisecond):
				unix.Kill(os.Getpid(), unix.SIGHUP)
			}
		}
		time.Sleep(400 * time.Millisecond)
	}
	return got
}
