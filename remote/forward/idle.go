package forward

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// moved is when each way of a pair of connections carried something last.
type moved [2]atomic.Int64 // nanoseconds since 1970

var errIdle = errors.New("nothing was carried for too long")

func newMoved() *moved {
	m := new(moved)
	now := time.Now().UnixNano()
	m[0].Store(now)
	m[1].Store(now)
	return m
}

// copy is io.Copy for way i, which it interrupts now and then to see whether anything
// moves: in between the kernel may copy by itself.
func (m *moved) copy(i int, to, from net.Conn, idle time.Duration) error {
	for {
		start := time.Now()
		from.SetReadDeadline(start.Add(idle / 2))
		// One write that takes as long as this is stuck, and what it holds is lost.
		to.SetWriteDeadline(start.Add(idle / 2 * 3))
		n, err := io.Copy(to, from)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		now := time.Now()
		if n > 0 {
			m[i].Store(now.UnixNano())
		}
		if last := max(m[0].Load(), m[1].Load()); now.UnixNano()-last >= int64(idle) || now.Sub(start) >= idle/2*3 {
			return errIdle
		}
	}
}
