package forward

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hangupEvery is how often to look: the kernel tells a client that is gone from one that
// has only finished what it sends, and not as an event that Go's runtime passes on.
const hangupEvery = 100 * time.Millisecond

// whileThere runs dial for a local client, and ends its context when the client is gone.
func whileThere(ctx context.Context, local net.Conn, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		awaitHangup(ctx, local)
		cancel()
	}()
	c, err := dial(ctx)
	cancel()
	<-watched
	return c, err
}

// awaitHangup returns when nobody can read an answer any more, and nothing is left that
// was sent before, or when ctx ends. It reads nothing. A TCP client that has closed looks
// like one that has finished sending, unless it was reset.
func awaitHangup(ctx context.Context, c net.Conn) {
	ticker := time.NewTicker(hangupEvery)
	defer ticker.Stop()
	for !isGone(c) {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func isGone(c net.Conn) (is bool) {
	sys, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sys.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		if _, err := unix.Poll(fds, 0); err != nil || fds[0].Revents == 0 {
			return
		}
		unread, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		is = fds[0].Revents&unix.POLLERR != 0 || err == nil && unread == 0
	})
	return err == nil && is
}
