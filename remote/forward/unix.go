package forward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// unixConn is a Unix socket that can be closed in a way that does not look like an end.
// Such a socket has no reset of its own, but Linux tells the other side ECONNRESET, once
// it has read what was sent, where bytes of its own are left unread. So the last byte that
// Read has returned stays in the kernel's queue, behind SO_PEEK_OFF, until there is another
// one or an end in order. Whoever has sent nothing yet cannot be told.
type unixConn struct {
	*net.UnixConn
	raw syscall.RawConn

	mu     sync.Mutex // guards what follows, and the queue
	isKept bool       // the queue begins with a byte that Read has returned
	first  [1]byte    // to read that into
}

func newUnixConn(c *net.UnixConn) (*unixConn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0) }); err != nil {
		return nil, err
	}
	return &unixConn{UnixConn: c, raw: raw}, failed
}

// cuttable is c, or where c is a Unix socket one that can be cut.
func cuttable(c net.Conn) net.Conn {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c
	}
	if cut, err := newUnixConn(u); err == nil {
		return cut
	}
	return c
}

// Read implements net.Conn.
func (c *unixConn) Read(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	b = b[:min(len(b), bigBuffer)]
	failed := c.raw.Read(func(fd uintptr) bool {
		n, err = c.take(int(fd), b)
		return err != unix.EAGAIN
	})
	switch {
	case failed != nil:
		return 0, failed
	case err != nil:
		return 0, &net.OpError{Op: "read", Net: "unix", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// take reads what is there behind the byte that is kept, and then drops all but the last.
func (c *unixConn) take(fd int, b []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := 0
	if c.isKept {
		kept = 1
	}
	if there, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil && there-kept > len(b) { // what stays is another byte
		if n, _, _, _, err = unix.RecvmsgBuffers(fd, [][]byte{c.first[:kept], b}, nil, unix.MSG_DONTWAIT); err == nil {
			c.isKept = false
			if n > kept {
				return n - kept, nil
			}
			kept = 0
		}
	}
	for {
		if n, _, err = unix.Recvfrom(fd, b, unix.MSG_PEEK|unix.MSG_DONTWAIT); err != unix.EINTR {
			break
		}
	}
	if err != nil || n == 0 {
		return 0, err
	}
	c.isKept = true
	return n, drop(fd, kept+n-1)
}

// drop takes n bytes out of the queue, which are there.
func drop(fd, n int) error {
	if n == 0 {
		return nil
	}
	into := bigBuffers.Get().(*[bigBuffer]byte)
	defer bigBuffers.Put(into)
	for n > 0 {
		got, _, err := unix.Recvfrom(fd, into[:n], unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
		case err != nil || got == 0:
			return fmt.Errorf("%d bytes that were there are gone: %w", n, errors.Join(err, io.ErrNoProgress))
		}
		n -= max(got, 0)
	}
	return nil
}

// Close implements net.Conn. It is an end in order.
func (c *unixConn) Close() error {
	c.raw.Control(func(fd uintptr) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.isKept {
			c.isKept = false
			drop(int(fd), 1)
		}
	})
	return c.UnixConn.Close()
}

// Cut closes the socket so that the other side does not take it for an end, if it has
// sent anything.
func (c *unixConn) Cut() { c.UnixConn.Close() }
