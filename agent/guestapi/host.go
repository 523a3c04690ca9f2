package guestapi

import (
	"bytes"
)

// hostHeader is put into a connection's first request if that has none. HTTP/1.1 demands
// one and net/http insists, dstack's server does neither, and the client for Tappd in
// dstack's Rust SDK, which has a connection for each request, sends none.
const hostHeader = "Host: localhost\r\n"

// maxHead is how much of a request is looked at.
const maxHead = maxHeader + 4<<10

// head is the state of a connection's first request.
type head struct {
	seen    bool   // it has passed
	pending []byte // what is still to be read of it
	err     error  // and then
}

// Read implements net.Conn.
func (c *peerConn) Read(b []byte) (int, error) {
	if c.head.seen && len(c.head.pending) == 0 && c.head.err == nil {
		return c.Conn.Read(b)
	}
	if !c.head.seen {
		n, err := c.Conn.Read(b)
		if lacks, whole := lacksHost(b[:n]); err == nil && whole && !lacks {
			c.head.seen = true // as nearly always
			return n, nil
		}
		c.head.pending, c.head.err = append(c.head.pending, b[:n]...), err
		c.readHead()
	}
	n := copy(b, c.head.pending)
	c.head.pending = c.head.pending[n:]
	if len(c.head.pending) > 0 || c.head.err == nil {
		return n, nil
	}
	err := c.head.err
	c.head.err = nil
	return n, err
}

// readHead reads the head to its end and adds what it lacks.
func (c *peerConn) readHead() {
	h := &c.head
	h.seen = true
	chunk := make([]byte, 4<<10)
	for h.err == nil {
		lacks, whole := lacksHost(h.pending)
		if lacks {
			end := bytes.IndexByte(h.pending, '\n') + 1
			h.pending = append(h.pending[:end:end], append([]byte(hostHeader), h.pending[end:]...)...)
		}
		if whole || len(h.pending) >= maxHead {
			return
		}
		var n int
		n, h.err = c.Conn.Read(chunk)
		h.pending = append(h.pending, chunk[:n]...)
	}
}

// lacksHost tells whether b begins with the whole head of a request, and whether that is
// one without a Host header.
func lacksHost(b []byte) (lacks, whole bool) {
	lacks = true
	for lines := 0; ; lines++ {
		end := bytes.IndexByte(b, '\n')
		if end < 0 {
			return false, false
		}
		line := bytes.TrimSuffix(b[:end], []byte("\r"))
		b = b[end+1:]
		if len(line) == 0 {
			return lacks && lines > 0, true
		}
		if name, _, ok := bytes.Cut(line, []byte(":")); lines > 0 && ok && bytes.EqualFold(name, []byte("host")) {
			lacks = false
		}
	}
}
