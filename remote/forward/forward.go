// Package forward carries bytes between attested channels and local services, so that
// applications need no TLS code: a local socket in, a local socket out.
//
// [Inbound] connects peers to the local service that they were accepted for, and tells it
// who they are if it wants to know; [Outbound] opens a channel for each local connection.
// Both end with their context. A connection ends with its channel, which is cut when its
// session is over and its drain too. [Egress] dials for processes without a network.
//
// What is cut short does not look like an end to a local TCP peer, which gets a reset, nor
// to the peer of the channel: whoever is between two channels' ends can cut them. Unix
// sockets have no such word, and so neither has what goes by way of an [Egress]: what is cut
// there reads like an end. Where the protocol above does not say how long a message is, give
// the service a TCP port on the loopback address, and no egress in between.
package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"tdx-agent/remote/atls"
)

// dialTimeout bounds a connection to a local service.
const dialTimeout = 5 * time.Second

// Service is a local service that peers reach over channels.
type Service struct {
	// Dial connects to it. Required.
	Dial func(context.Context) (net.Conn, error)
	// ProxyProtocol sends the header of PROXY protocol version 2 first, with the channel's
	// addresses and, in a field of type [TLVIdentity], an [Identity]. Whoever else can
	// connect to the service can send such a header too. Not with HTTP.
	ProxyProtocol bool
	// HTTP passes requests on instead of bytes, so that each says who the peer is:
	// headers X-Attested-App-Id, -Instance-Id, -Compose-Hash, -Image, -Policy-Entry,
	// -Assurance and -Ref as in [Identity], names escaped as in a URL's path. What the peer
	// sent under these names, or what could be taken for them, is gone, and so are the
	// trailers of its requests.
	HTTP bool
	// FlashbotsHeaders adds X-Flashbots-Measurement and X-Flashbots-Attestation-Type, with
	// HTTP. They are removed from what the peer sends in any case.
	FlashbotsHeaders bool
}

// Inbound accepts channels until ctx ends, and connects each with its service. It
// closes l.
func Inbound(ctx context.Context, l *atls.Listener, log *slog.Logger, services map[string]Service) error {
	servers := map[string]*httpServer{}
	for name, s := range services {
		if s.HTTP {
			servers[name] = newHTTPServer(ctx, &s, log)
			defer servers[name].close()
		}
	}
	return each(ctx, l, maxInbound, log, func(accepted net.Conn) {
		c := accepted.(*atls.Conn)
		name := c.Peer().Service
		if h := servers[name]; h != nil {
			h.serve(ctx, c)
			return
		}
		s := services[name]
		local, err := s.connect(ctx, c)
		if err != nil {
			log.Warn("the local service does not answer", "service", name, "ref", c.Peer().Ref, "error", err)
			end(c, false)
			return
		}
		join(ctx, c, local, 0)
	})
}

// connect opens a connection to the service for a channel.
func (s *Service) connect(ctx context.Context, c *atls.Conn) (net.Conn, error) {
	if s.Dial == nil {
		return nil, errors.New("there is no such service")
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	local, err := s.Dial(ctx)
	if err != nil || !s.ProxyProtocol {
		return local, err
	}
	header, err := proxyHeader(c)
	if err == nil {
		local.SetWriteDeadline(time.Now().Add(dialTimeout))
		_, err = local.Write(header)
		local.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		local.Close()
	}
	return local, err
}

// Outbound accepts local connections until ctx ends, and connects each with a channel
// of its own that dial opens. The context of dial ends when the client has gone without
// having sent anything: nobody else would use the channel. Outbound closes l.
func Outbound(ctx context.Context, l net.Listener, log *slog.Logger, dial func(context.Context) (net.Conn, error)) error {
	return each(ctx, l, maxConnections, log, func(local net.Conn) {
		c, err := whileThere(ctx, local, dial)
		if err != nil {
			log.Warn("no channel", "error", err)
			end(local, false)
			return
		}
		join(ctx, local, c, 0)
	})
}

// Bounds of what one Outbound, and one Inbound, carries at once: more wait in the
// listener's queue. That of a channel's Listener is its own MaxConnections.
const (
	maxConnections = 1024
	maxInbound     = 1 << 16
)

// each runs serve for each connection, of most at once, and closes it after that.
func each(ctx context.Context, l net.Listener, most int, log *slog.Logger, serve func(net.Conn)) error {
	var group sync.WaitGroup
	defer group.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	slots := make(chan struct{}, most)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := accept(ctx, l, log)
		if err != nil {
			l.Close()
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		group.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			serve(c)
		})
	}
}

// Pauses of accept. What is short of descriptors has others to wait for.
const (
	firstPause = 5 * time.Millisecond
	lastPause  = time.Second
)

// accept waits out what ends by itself, as net/http does: too many open files must not
// end what is carried already.
func accept(ctx context.Context, l net.Listener, log *slog.Logger) (net.Conn, error) {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		c, err := l.Accept()
		if temporary, ok := errors.AsType[interface {
			error
			Temporary() bool
		}](err); !ok || !temporary.Temporary() {
			return c, err
		}
		log.Warn("no connection can be accepted", "error", err, "again_in", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// join copies both ways until both ends are done, ctx ends, one way fails, or neither way
// carries anything for about idle (0: for however long). It closes both.
func join(ctx context.Context, a, b net.Conn, idle time.Duration) {
	var isWhole [2]atomic.Bool // from a to b, from b to a
	defer context.AfterFunc(ctx, func() { end(a, isWhole[1].Load()); end(b, isWhole[0].Load()) })()
	var group sync.WaitGroup
	moved := newMoved()
	for i, way := range [][2]net.Conn{{a, b}, {b, a}} {
		group.Go(func() {
			from, to := way[0], way[1]
			var err error
			if idle == 0 { // one of them is a channel, so the kernel cannot copy
				err = carry(to, from)
			} else {
				err = moved.copy(i, to, from, idle)
			}
			isWhole[i].Store(err == nil)
			if err != nil || !closeWrite(to) {
				end(to, err == nil)
				end(from, isWhole[1-i].Load())
			}
		})
	}
	group.Wait()
	end(a, isWhole[1].Load())
	end(b, isWhole[0].Load())
}

// end closes a connection, in a way that does not look like an end if it can and not all
// was sent that was to be.
func end(c net.Conn, isWhole bool) {
	if !isWhole {
		switch c := c.(type) {
		case *net.TCPConn:
			c.SetLinger(0) // a reset
		case interface{ Cut() }:
			c.Cut()
		}
	}
	c.Close()
}

// closeWrite ends one direction, where the connection has two.
func closeWrite(c net.Conn) bool {
	half, ok := c.(interface{ CloseWrite() error })
	return ok && half.CloseWrite() == nil
}

// Pipe connects a channel with a reader and a writer, as standard input and output are,
// until the channel ends. It closes the channel. A read that is under way then may go on.
func Pipe(ctx context.Context, c net.Conn, in io.Reader, out io.Writer) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	go func() { // ends with in, or with the process: a read of standard input cannot be ended
		io.Copy(c, in)
		closeWrite(c)
	}()
	_, err := io.Copy(out, c)
	return err
}
