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
// moves. While much comes the kernel copies by itself; it has a pipe for that, two
// descriptors, which a silent relay must not hold.
func (m *moved) copy(i int, to, from net.Conn, idle time.Duration) error {
	small := make([]byte, smallBuffer)
	for isBulk := false; ; {
		start, wait := time.Now(), idle/2
		if isBulk {
			wait = min(wait, bulkPause)
		}
		from.SetReadDeadline(start.Add(wait))
		// One write that takes as long as this is stuck, and what it holds is lost.
		to.SetWriteDeadline(start.Add(idle / 2 * 3))
		var n int64
		var err error
		if isBulk {
			if n, err = io.Copy(to, from); err == nil {
				return nil
			}
		} else {
			var few int
			few, err = step(to, from, small)
			n = int64(few)
		}
		now := time.Now()
		if n > 0 {
			m[i].Store(now.UnixNano())
		}
		switch {
		case err == nil:
			isBulk = n == smallBuffer
			continue
		case err == io.EOF:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		}
		isBulk = isBulk && n > 0
		if last := max(m[0].Load(), m[1].Load()); now.UnixNano()-last >= int64(idle) || now.Sub(start) >= idle/2*3 {
			return errIdle
		}
	}
}
