// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func configfs() {
	const A = "configfs"
	var st unix.Statfs_t
	unix.Statfs("/sys/kernel/config", &st)
	row(A, "statfs type", fmt.Sprintf("%#x", st.Type))
	for _, d := range []string{"/sys/kernel/config", "/sys/kernel/config/tsm", root} {
		i, err := os.Stat(d)
		if err == nil {
			row(A, "mode "+d, i.Mode())
		}
	}
	d := mk("a")
	list(A, d)
	b, err := rd(d + "/provider")
	row(A, "provider", fmt.Sprintf("%q", b), e(err))
	b, err = rd(d + "/generation")
	row(A, "generation, new entry", fmt.Sprintf("%q", b), e(err))
	row(A, "outblob before any inblob", out(d+"/outblob"), "gen", gen(d))
	row(A, "inblob 64 bytes", wr(d+"/inblob", unix.O_WRONLY, pat(0xa1, 64)), "gen", gen(d))
	row(A, "outblob after it", out(d+"/outblob"), "gen", gen(d))
	row(A, "outblob again (cached)", out(d+"/outblob"), "gen", gen(d))
	for _, n := range []int{0, 1, 32, 48, 63, 65, 128, 4096} {
		r := wr(d+"/inblob", unix.O_WRONLY, pat(byte(n), n))
		row(A, fmt.Sprintf("inblob %d bytes", n), r, "gen", gen(d), "then outblob", out(d+"/outblob"))
	}
	row(A, "inblob in two writes of 32, one open", wr(d+"/inblob", unix.O_WRONLY, pat(0xb1, 32), pat(0xb2, 32)), "gen", gen(d), out(d+"/outblob"))
	row(A, "inblob in 64 writes of 1", func() string {
		f, _ := os.OpenFile(d+"/inblob", os.O_WRONLY, 0)
		for i := 0; i < 64; i++ {
			f.Write([]byte{0xb3})
		}
		return "close=" + e(f.Close())
	}(), "gen", gen(d), out(d+"/outblob"))
	row(A, "inblob 64 then 1 more, one open", wr(d+"/inblob", unix.O_WRONLY, pat(0xb4, 64), pat(0xb4, 1)), "gen", gen(d), out(d+"/outblob"))
	row(A, "inblob 65 refused, then 64, one open", wr(d+"/inblob", unix.O_WRONLY, pat(0xb5, 65), pat(0xb5, 64)), "gen", gen(d), out(d+"/outblob"))
	row(A, "inblob opened for writing and closed, nothing written", wr(d+"/inblob", unix.O_WRONLY), "gen", gen(d))
	row(A, "inblob with O_TRUNC|O_CREAT", wr(d+"/inblob", unix.O_WRONLY|unix.O_TRUNC|unix.O_CREAT, pat(0xb6, 64)), "gen", gen(d), out(d+"/outblob"))
	func() {
		g0 := gen(d)
		fd, _ := unix.Open(d+"/inblob", unix.O_WRONLY, 0)
		unix.Write(fd, pat(0xb7, 64))
		row(A, "inblob written but not closed", "gen before", g0, "after write", gen(d), out(d+"/outblob"), "fsync="+e(unix.Fsync(fd)), "gen", gen(d))
		unix.Close(fd)
		row(A, "  and once closed", "gen", gen(d), out(d+"/outblob"))
	}()
	func() {
		fd, _ := unix.Open(d+"/inblob", unix.O_WRONLY, 0)
		fd2, _ := unix.Dup(fd)
		g0 := gen(d)
		unix.Write(fd, pat(0xb8, 64))
		unix.Close(fd)
		g1 := gen(d)
		unix.Close(fd2)
		row(A, "inblob fd duplicated: first close, last close", "gen", g0, g1, gen(d))
	}()
	for _, t := range []struct {
		n string
		f int
	}{{"inblob", unix.O_RDONLY}, {"inblob", unix.O_RDWR}, {"outblob", unix.O_WRONLY}, {"outblob", unix.O_RDWR}, {"generation", unix.O_WRONLY}, {"provider", unix.O_WRONLY}} {
		fd, err := unix.Open(d+"/"+t.n, t.f, 0)
		row(A, fmt.Sprintf("root opens %s %s", t.n, []string{"O_RDONLY", "O_WRONLY", "O_RDWR"}[t.f]), e(err))
		if err == nil {
			unix.Close(fd)
		}
	}
	for _, n := range []string{"privlevel", "privlevel_floor", "service_provider", "service_guid", "service_manifest_version", "auxblob", "manifestblob"} {
		_, err := os.Stat(d + "/" + n)
		row(A, "stat "+n, e(err))
	}
	func() {
		fd, _ := unix.Open(d+"/outblob", unix.O_RDONLY, 0)
		defer unix.Close(fd)
		buf := make([]byte, 600)
		n1, _ := unix.Read(fd, buf)
		wr(d+"/inblob", unix.O_WRONLY, pat(0xc1, 64))
		buf2 := make([]byte, 600)
		n2, err := unix.Read(fd, buf2)
		row(A, "inblob rewritten between two reads of one open outblob", n1, n2, e(err), fmt.Sprintf("rd bytes %02x (old if b8)", buf[568]), "gen", gen(d))
		_, err = unix.Seek(fd, 0, 0)
		_, err2 := unix.Pread(fd, buf, 0)
		row(A, "lseek and pread on outblob", e(err), e(err2))
		var s unix.Stat_t
		unix.Fstat(fd, &s)
		row(A, "outblob st_size", s.Size)
		_, err = unix.Open(d+"/outblob", unix.O_RDONLY|unix.O_NONBLOCK, 0)
		row(A, "outblob O_NONBLOCK open", e(err))
	}()
	row(A, "two writers, one entry: A writes, B writes, A reads", func() string {
		g0 := gen(d)
		wr(d+"/inblob", unix.O_WRONLY, pat(0xaa, 64))
		wr(d+"/inblob", unix.O_WRONLY, pat(0xbb, 64))
		return "gen " + g0 + " -> " + gen(d) + " " + out(d+"/outblob") + " (B's is bb)"
	}())
	row(A, "two writers, one entry, hammered", hammer(d))
	fd, _ := unix.Open(d+"/inblob", unix.O_WRONLY, 0)
	row(A, "flock on inblob", e(unix.Flock(fd, unix.LOCK_EX)))
	fd2, _ := unix.Open(d+"/inblob", unix.O_WRONLY, 0)
	row(A, "second flock NB", e(unix.Flock(fd2, unix.LOCK_EX|unix.LOCK_NB)))
	unix.Close(fd2)
	unix.Close(fd)
	row(A, "mkdir existing", e(os.Mkdir(d, 0o755)))
	row(A, "mkdir inside an entry", e(os.Mkdir(d+"/x", 0o755)))
	row(A, "mkdir beside report", e(os.Mkdir("/sys/kernel/config/tsm/x", 0o755)))
	row(A, "mkdir 255-byte name", e(os.Mkdir(root+"/"+strings.Repeat("n", 255), 0o755)))
	os.Remove(root + "/" + strings.Repeat("n", 255))
	row(A, "mkdir 256-byte name", e(os.Mkdir(root+"/"+strings.Repeat("n", 256), 0o755)))
	row(A, "create a file in an entry", wr(d+"/new", unix.O_WRONLY|unix.O_CREAT, pat(1, 1)))
	row(A, "unlink an attribute", e(unix.Unlink(d+"/inblob")))
	row(A, "rename an entry", e(os.Rename(d, root+"/b")))
	row(A, "rmdir report", e(unix.Rmdir(root)))
	row(A, "rmdir missing", e(unix.Rmdir(root+"/nope")))
	row(A, "os.RemoveAll(entry)", e(os.RemoveAll(d)))
	if _, err := os.Stat(d); err != nil {
		d = mk("a")
	}
	func() {
		d := mk("open")
		wr(d+"/inblob", unix.O_WRONLY, pat(1, 64))
		fo, _ := unix.Open(d+"/outblob", unix.O_RDONLY, 0)
		fi, _ := unix.Open(d+"/inblob", unix.O_WRONLY, 0)
		r := e(unix.Rmdir(d))
		_, er := unix.Read(fo, make([]byte, 64))
		_, ew := unix.Write(fi, pat(1, 64))
		row(A, "rmdir with its files open; then read, write, close", r, e(er), e(ew), e(unix.Close(fo)), e(unix.Close(fi)))
	}()
	row(A, "rmdir (os.Remove)", e(os.Remove(d)))
	list(A, root)

	// permissions
	row(A, "uid 1000 mkdir", as(1000, "mkdir", root+"/u"))
	d = mk("p")
	row(A, "uid 1000 quote through root's entry", as(1000, "quote", d))
	for _, n := range []string{"inblob", "outblob", "generation", "provider"} {
		row(A, "chown 1000 "+n, e(os.Chown(d+"/"+n, 1000, 1000)))
	}
	row(A, "uid 1000 quote through an entry given to it", as(1000, "quote", d))
	row(A, "chmod inblob 0666", e(os.Chmod(d+"/inblob", 0o666)))
	list(A, d)
	row(A, "uid 1000 rmdir root's entry", as(1000, "rmdir", d))
	os.Remove(d)
	row(A, "chown report dir", e(os.Chown(root, 1000, 1000)))
	row(A, "uid 1000 mkdir in a report dir given to it", as(1000, "mkdir", root+"/u"))
	list(A, root)
	row(A, "uid 1000 quote through its own entry", as(1000, "quote", root+"/u"))
	if i, err := os.Stat(root + "/u/inblob"); err == nil {
		row(A, "owner of its inblob", i.Sys().(*syscall.Stat_t).Uid, i.Mode())
	}
	row(A, "uid 1000 rmdir its own entry", as(1000, "rmdir", root+"/u"))
	os.Remove(root + "/u")
	os.Chown(root, 0, 0)
}

// hammer: two goroutines share an entry without a lock; how often does the
// quote read back carry the other one's data, and does generation show it?
func hammer(d string) string {
	var wrong, seen, missed, errs int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := 0; w < 2; w++ {
		wg.Add(1)
		go func(b byte) {
			defer wg.Done()
			for i := 0; i < 200; i++ {
				g0, _ := strconv.Atoi(gen(d))
				wr(d+"/inblob", unix.O_WRONLY, pat(b, 64))
				q, err := rd(d + "/outblob")
				g1, _ := strconv.Atoi(gen(d))
				mu.Lock()
				switch {
				case err != nil:
					errs++
				case q[568] != b && g1 != g0+1:
					wrong++
					seen++
				case q[568] != b:
					wrong++
					missed++
				}
				mu.Unlock()
			}
		}(byte(0xd0 + w))
	}
	wg.Wait()
	return fmt.Sprintf("400 quotes: wrong data %d, of those shown by generation %d, not shown %d, errors %d", wrong, seen, missed, errs)
}

func scale() {
	const A = "scale"
	t := time.Now()
	var ds []string
	for i := 0; i < 500; i++ {
		ds = append(ds, mk(fmt.Sprintf("s%03d", i)))
	}
	row(A, "mkdir 500 entries", time.Since(t).Round(time.Millisecond))
	t = time.Now()
	var wg sync.WaitGroup
	var mu sync.Mutex
	bad := map[string]int{}
	for i := range ds {
		wg.Add(1)
		go func(i int) {
			defer wg.Done()
			wr(ds[i]+"/inblob", unix.O_WRONLY, pat(byte(i), 64))
			q, err := rd(ds[i] + "/outblob")
			k := e(err)
			if err == nil && (len(q) < 632 || q[568] != byte(i)) {
				k = "wrong"
			}
			mu.Lock()
			bad[k]++
			mu.Unlock()
		}(i)
	}
	wg.Wait()
	row(A, "500 goroutines, an entry each", bad, time.Since(t).Round(time.Millisecond))
	t = time.Now()
	for _, d := range ds {
		os.Remove(d)
	}
	row(A, "rmdir 500", time.Since(t).Round(time.Millisecond))
	d := mk("one")
	t = time.Now()
	for i := 0; i < 200; i++ {
		wr(d+"/inblob", unix.O_WRONLY, pat(byte(i), 64))
		rd(d + "/outblob")
	}
	row(A, "200 quotes in turn", time.Since(t).Round(time.Millisecond))
	os.Remove(d)
}
