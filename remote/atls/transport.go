package atls

import (
	"context"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"time"
)

// Transport makes HTTP requests over channels. Its pool lets many requests share an
// attestation, and keeps no channel whose session has ended: that one finishes the
// request that it has.
type Transport struct{ http.Transport }

// NewTransport makes HTTP requests over channels to a service, whatever host their
// URLs name: the address is that of the request. URLs must be http: the channel is
// below.
func NewTransport(d *Dialer, service string, entries []string) *Transport {
	return &Transport{http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := d.DialContext(ctx, network, address, service, entries)
			if err != nil {
				return nil, err
			}
			p := &pooled{Conn: c.(*Conn), isUsed: true} // it was dialled for a request
			p.whenDraining(p.retire)
			return p, nil
		},
		MaxIdleConns: 64, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute, ResponseHeaderTimeout: time.Minute, MaxResponseHeaderBytes: 64 << 10,
	}}
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	var used *pooled
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) {
			if used, _ = i.Conn.(*pooled); used != nil {
				used.take()
			}
		},
		PutIdleConn: func(error) {
			if used != nil {
				used.giveBack()
			}
		},
	})
	return t.Transport.RoundTrip(r.WithContext(ctx))
}

// pooled is a channel of a Transport's pool.
type pooled struct {
	*Conn

	mu        sync.Mutex // guards what follows
	isUsed    bool       // by a request
	isRetired bool
}

func (p *pooled) take() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isUsed = true
}

func (p *pooled) giveBack() {
	p.mu.Lock()
	p.isUsed = false
	isOver := p.isRetired
	p.mu.Unlock()
	if isOver {
		p.Close()
	}
}

// retire closes the channel once no request uses it. The pool finds out at once: it
// reads.
func (p *pooled) retire() {
	p.mu.Lock()
	p.isRetired = true
	isIdle := !p.isUsed
	p.mu.Unlock()
	if isIdle {
		p.Close()
	}
}
