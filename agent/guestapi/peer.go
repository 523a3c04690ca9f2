package guestapi

import (
	"context"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerKey finds the *peerConn of a request in its context.
type peerKey struct{}

// peerConn is an accepted connection, who is at its other end, and the slot that it
// occupies until it is closed.
type peerConn struct {
	net.Conn
	caller  Caller
	release func()
	head    head // of its first request; the reader's alone
}

func (c *peerConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// ConnContext is for a server of another kind on a [LimitListener], as its ConnContext:
// [CallerOf] then knows who is calling.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, conn)
}

// CallerOf returns the caller of a request from its context, or an unknown one.
func CallerOf(ctx context.Context) Caller {
	if peer, _ := ctx.Value(peerKey{}).(*peerConn); peer != nil {
		return peer.caller
	}
	return Caller{}
}

// slots counts the open connections of one server. Known callers have a share of their
// user's: where most containers run as root, one must not shut out the others.
type slots struct {
	total, perUID, perAccount int

	mu        sync.Mutex // guards what follows
	open      int
	byUID     map[uint32]int     // of known callers; no entry is 0
	byAccount map[accountKey]int // the same
}

func newSlots(total, perUID, perAccount int) *slots {
	return &slots{total: total, perUID: perUID, perAccount: perAccount, byUID: map[uint32]int{}, byAccount: map[accountKey]int{}}
}

// take occupies a slot and returns what frees it, or reports that none is left.
func (s *slots) take(c Caller) (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= s.total || c.Known && (s.byUID[c.UID] >= s.perUID || s.byAccount[c.account()] >= s.perAccount) {
		return nil, false
	}
	s.open++
	if c.Known {
		s.byUID[c.UID]++
		s.byAccount[c.account()]++
	}
	return sync.OnceFunc(func() { s.free(c) }), true
}

func (s *slots) free(c Caller) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if !c.Known {
		return
	}
	if s.byUID[c.UID]--; s.byUID[c.UID] == 0 {
		delete(s.byUID, c.UID)
	}
	if s.byAccount[c.account()]--; s.byAccount[c.account()] == 0 {
		delete(s.byAccount, c.account())
	}
}

// LimitListener bounds how many connections of ln are open at once: total of all
// users, and perUID of one that the kernel knows. What is beyond is told so, with
// status 429, and closed.
func LimitListener(ln net.Listener, total, perUID int) net.Listener {
	return newPeerListener(ln, newSlots(total, perUID, perUID))
}

// peerListener accepts connections as *peerConn, and turns away those that find no
// slot.
type peerListener struct {
	net.Listener
	slots      *slots
	identify   *identifier
	turnedAway chan struct{} // holds one for each connection that is told so
}

func newPeerListener(ln net.Listener, s *slots) *peerListener {
	return &peerListener{Listener: ln, slots: s, identify: newIdentifier(), turnedAway: make(chan struct{}, maxTurnedAway)}
}

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		caller := l.identify.caller(conn)
		if release, ok := l.slots.take(caller); ok {
			return &peerConn{Conn: conn, caller: caller, release: release}, nil
		}
		l.turnAway(conn)
	}
}

// Bounds of what is done for connections that are turned away.
const (
	maxTurnedAway = 32 // at once; more are closed without waiting for their request
	awaitRequest  = time.Second
	awaitClose    = time.Second
)

// turnAway tells the other end why, and closes conn. To a client an answer that comes
// before its request, or an end while it still sends, is a broken connection. So that
// it gets to see the answer, turnAway waits a moment for the request, where few do.
func (l *peerListener) turnAway(conn net.Conn) {
	select {
	case l.turnedAway <- struct{}{}:
	default:
		refuse(conn)
		conn.Close()
		return
	}
	go func() { // ends by the deadlines
		defer func() { <-l.turnedAway }()
		defer conn.Close()
		conn.SetReadDeadline(time.Now().Add(awaitRequest))
		conn.Read(make([]byte, 1))
		refuse(conn)
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			c.CloseWrite()
		}
		conn.SetReadDeadline(time.Now().Add(awaitClose))
		io.Copy(io.Discard, io.LimitReader(conn, maxLargeBody+maxHeader))
	}()
}

// refuse writes an answer that fits into the empty socket buffer, so a client that
// does not read cannot hold up the others.
func refuse(conn net.Conn) {
	const body = "{\n  \"error\": \"too many open connections: close some or try again later\"\n}"
	const head = "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nContent-Length: 73\r\n" +
		"Retry-After: 1\r\n" + ExitHeader + ": 9\r\nConnection: close\r\n\r\n"
	if !control(conn, func(fd int) { unix.Write(fd, []byte(head+body)) }) { // Go's sockets do not block
		conn.SetWriteDeadline(time.Now().Add(time.Millisecond))
		conn.Write([]byte(head + body))
	}
}

// control runs f on the descriptor of conn, if it has one, and reports whether it did.
func control(conn net.Conn, f func(fd int)) bool {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) }) == nil
}

// awaitHangup returns when the peer has closed its end, or when ctx ends. To net/http
// a peer that has only ended its side of the conversation looks as if it was gone,
// but it may still read; the kernel reports the difference (POLLHUP), and not as an
// event that Go's runtime passes on.
func awaitHangup(ctx context.Context, conn net.Conn) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		gone := true
		control(conn, func(fd int) {
			fds := []unix.PollFd{{Fd: int32(fd)}}
			_, err := unix.Poll(fds, 0)
			gone = err != nil && err != unix.EINTR || fds[0].Revents != 0
		})
		if gone {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
