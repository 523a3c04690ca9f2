package forward

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Most sessions are silent most of the time, and must not hold buffers for it.
const (
	smallBuffer = 1 << 10
	bigBuffer   = 32 << 10 // two TLS records
	// bulkPause is how long a big buffer waits for more.
	bulkPause = 50 * time.Millisecond
)

var bigBuffers = sync.Pool{New: func() any { return new([bigBuffer]byte) }}

// carry is io.Copy that waits with a small buffer, and takes a big one for as long as
// more comes. It uses from's read deadline.
func carry(to io.Writer, from net.Conn) (err error) {
	small := make([]byte, smallBuffer)
	for {
		n, err := step(to, from, small)
		if err == nil && n == len(small) {
			err = bulk(to, from)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func bulk(to io.Writer, from net.Conn) error {
	big := bigBuffers.Get().(*[bigBuffer]byte)
	defer bigBuffers.Put(big)
	defer from.SetReadDeadline(time.Time{})
	for {
		from.SetReadDeadline(time.Now().Add(bulkPause))
		if _, err := step(to, from, big[:]); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// step carries what one read brings.
func step(to io.Writer, from io.Reader, buffer []byte) (n int, err error) {
	n, err = from.Read(buffer)
	if n > 0 {
		if _, failed := to.Write(buffer[:n]); failed != nil {
			return n, failed
		}
	}
	return n, err
}
