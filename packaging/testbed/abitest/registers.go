// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha512"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func report0() string {
	fd, err := unix.Open("/dev/tdx_guest", unix.O_RDWR, 0)
	if err != nil {
		return "open=" + e(err)
	}
	defer unix.Close(fd)
	var q [64 + 1024]byte
	for i := 0; i < 64; i++ {
		q[i] = 0x5a
	}
	_, _, n := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), 0xc4405401, uintptr(unsafe.Pointer(&q[0])))
	if n != 0 {
		return e(n)
	}
	return fmt.Sprintf("ok rd=%02x", q[64+128])
}

func dev() {
	const A = "dev"
	i, err := os.Stat("/dev/tdx_guest")
	if err != nil {
		row(A, "stat", e(err))
		return
	}
	row(A, "mode", i.Mode())
	row(A, "GET_REPORT0", report0())
	fd, _ := unix.Open("/dev/tdx_guest", unix.O_RDWR, 0)
	defer unix.Close(fd)
	ext := func(cmd uintptr, idx byte) string {
		var q [49]byte
		q[48] = idx
		r, _, n := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), cmd, uintptr(unsafe.Pointer(&q[0])))
		switch {
		case n != 0:
			return e(n)
		case r != 0:
			return fmt.Sprint("result=", r)
		}
		return "ok"
	}
	row(A, "EXTEND_RTMR as _IOR('T',3,49)", ext(0x80315403, 3), "index 4:", ext(0x80315403, 4))
	row(A, "EXTEND_RTMR as _IOW('T',3,49)", ext(0x40315403, 3))
	_, _, n := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), 0x80315403, 0)
	row(A, "EXTEND_RTMR with a null pointer (asks for support, extends nothing)", e(n))
	_, err = unix.Read(fd, make([]byte, 8))
	row(A, "read()", e(err))
}

func sysfs() {
	const A = "sysfs"
	list(A, mrs)
	_, err := os.Stat("/sys/class/misc/tdx_guest/measurements/rtmr3:sha384")
	row(A, "same under /sys/class/misc", e(err))
	p := mrs + "/rtmr3:sha384"
	val := func() []byte { b, _ := rd(p); return b }
	ext := func(v, d []byte) []byte { h := sha512.Sum384(append(append([]byte{}, v...), d...)); return h[:] }
	try := func(q string, d []byte, f func() string) {
		v := val()
		r := f()
		n := val()
		what := "not extended"
		switch {
		case bytes.Equal(n, v):
		case bytes.Equal(n, ext(v, d)):
			what = "extended once"
		case bytes.Equal(n, ext(ext(v, d), d)):
			what = "extended twice"
		default:
			what = "changed in some other way"
		}
		row(A, q, r, "->", what)
	}
	d := pat(0x31, 48)
	row(A, "read", len(val()))
	func() {
		fd, _ := unix.Open(p, unix.O_RDONLY, 0)
		defer unix.Close(fd)
		b := make([]byte, 20)
		n, err := unix.Pread(fd, b, 40)
		n2, err2 := unix.Pread(fd, b, 48)
		n3, err3 := unix.Pread(fd, b, 100)
		row(A, "pread 20 at 40, at 48, at 100", n, e(err), n2, e(err2), n3, e(err3))
		a := make([]byte, 48)
		unix.Pread(fd, a, 0)
		wr(p, unix.O_WRONLY, d)
		c := make([]byte, 48)
		unix.Pread(fd, c, 0)
		row(A, "an open fd sees a later extend by pread at 0", bytes.Equal(c, ext(a, d)))
	}()
	for _, n := range []int{48, 0, 1, 47, 49, 64, 96, 4096} {
		try(fmt.Sprintf("write %d", n), d, func() string { return wr(p, unix.O_WRONLY, pat(0x31, n)) })
	}
	try("write 24 then 24, one open", d, func() string { return wr(p, unix.O_WRONLY, d[:24], d[:24]) })
	try("write 48 then 48, one open", d, func() string { return wr(p, unix.O_WRONLY, d, d) })
	try("pwrite 48 at 0 twice, one open", d, func() string {
		fd, _ := unix.Open(p, unix.O_WRONLY, 0)
		defer unix.Close(fd)
		_, a := unix.Pwrite(fd, d, 0)
		_, b := unix.Pwrite(fd, d, 0)
		return e(a) + " " + e(b)
	})
	try("pwrite 47 at 1", d, func() string {
		fd, _ := unix.Open(p, unix.O_WRONLY, 0)
		defer unix.Close(fd)
		_, a := unix.Pwrite(fd, d[:47], 1)
		return e(a)
	})
	try("pwrite 48 at 48", d, func() string {
		fd, _ := unix.Open(p, unix.O_WRONLY, 0)
		defer unix.Close(fd)
		_, a := unix.Pwrite(fd, d, 48)
		return e(a)
	})
	try("writev 24+24", d, func() string {
		fd, _ := unix.Open(p, unix.O_WRONLY, 0)
		defer unix.Close(fd)
		n, a := unix.Writev(fd, [][]byte{d[:24], d[24:]})
		return fmt.Sprint(n, " ", e(a))
	})
	try("O_APPEND", d, func() string { return wr(p, unix.O_WRONLY|unix.O_APPEND, d) })
	try("O_TRUNC|O_CREAT (os.WriteFile)", d, func() string { return e(os.WriteFile(p, d, 0o644)) })
	try("os.WriteFile of 49", d, func() string { return e(os.WriteFile(p, pat(0x31, 49), 0o644)) })
	try("O_RDWR: read 48, then write 48", d, func() string {
		fd, err := unix.Open(p, unix.O_RDWR, 0)
		if err != nil {
			return e(err)
		}
		defer unix.Close(fd)
		unix.Read(fd, make([]byte, 48))
		_, err = unix.Write(fd, d)
		return e(err)
	})
	for _, n := range []string{"mrtd:sha384", "mrconfigid", "rtmr0:sha384", "rtmr1:sha384", "rtmr2:sha384"} {
		row(A, "root writes 48 to "+n, wr(mrs+"/"+n, unix.O_WRONLY, d))
	}
	for _, n := range []syscall.Errno{unix.EBUSY, unix.EIO, unix.ENXIO} {
		set("extend_errno", int(n))
		try("hardware fails with "+unix.ErrnoName(n), d, func() string { return wr(p, unix.O_WRONLY, d) })
	}
	set("extend_errno", 0)
	row(A, "uid 1000 reads rtmr3", as(1000, "read", p))
	row(A, "uid 1000 writes rtmr3", as(1000, "write", p))
	row(A, "chown rtmr3 to 1000", e(os.Chown(p, 1000, 1000)))
	row(A, "uid 1000 writes its rtmr3", as(1000, "write", p))
	os.Chown(p, 0, 0)
	fd, _ := unix.Open(p, unix.O_WRONLY, 0)
	row(A, "flock on rtmr3", e(unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)))
	unix.Close(fd)
	n0, _ := os.ReadFile(knob + "n_extends")
	var wg sync.WaitGroup
	for g := 0; g < 8; g++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; i < 50; i++ {
				wr(p, unix.O_WRONLY, pat(byte(g), 48))
			}
		}()
	}
	wg.Wait()
	n1, _ := os.ReadFile(knob + "n_extends")
	row(A, "8 goroutines x 50 extends: count before, after", string(n0), string(n1))
	t := time.Now()
	for i := 0; i < 1000; i++ {
		wr(p, unix.O_WRONLY, d)
	}
	row(A, "1000 extends", time.Since(t).Round(time.Millisecond))
	e0 := mk("m")
	wr(e0+"/inblob", unix.O_WRONLY, pat(1, 64))
	q, _ := rd(e0 + "/outblob")
	row(A, "quote's RTMR3 equals sysfs", len(q) > 568 && bytes.Equal(q[520:568], val()))
	wr(p, unix.O_WRONLY, d)
	q2, _ := rd(e0 + "/outblob")
	row(A, "after an extend, outblob reread without a new inblob is the stale cached quote", len(q2) > 568 && bytes.Equal(q2[520:568], q[520:568]) && !bytes.Equal(q2[520:568], val()))
	wr(e0+"/inblob", unix.O_WRONLY, pat(1, 64))
	q2, _ = rd(e0 + "/outblob")
	row(A, "  and after the same inblob is written again, the new value", len(q2) > 568 && bytes.Equal(q2[520:568], val()))
	os.Remove(e0)
}
