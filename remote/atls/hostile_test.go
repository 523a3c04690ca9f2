package atls_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"tdx-agent/remote/atls"
)

// hostile is the address of a server without evidence, which does what answer does
// after each client's hello.
func hostile(t *testing.T, answer func(c net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	cfg := tlsOf(t)
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer raw.Close()
				c := tls.Server(raw, cfg)
				c.SetDeadline(time.Now().Add(30 * time.Second))
				if _, err := takeFrame(c); err == nil {
					answer(c)
					io.Copy(io.Discard, c)
				}
			}()
		}
	}()
	return l.Addr().String()
}

// helloServer is a server's hello that wants a quote.
func helloServer() []byte {
	return makeFrame(2, `{"v":1,"nonce":"`+zeros32+`","client_evidence":"quote","format":"dstack-tdx/1","order":"client-first","service":"echo","max_evidence":200000,"agent_key":"`+zeros32+`"}`)
}

func (p *pair) dialTo(ctx context.Context, address string) error {
	c, err := p.dialer.DialContext(ctx, "tcp", address, "echo", []string{"server"})
	if err == nil {
		c.Close()
	}
	return err
}

// TestRetryAfter takes every number that a stranger can say.
func TestRetryAfter(t *testing.T) {
	p := newPair(t, "")
	for _, tc := range []struct {
		said string
		want time.Duration
	}{{"9223372036855", time.Minute}, {"9223372036854775807", time.Minute}, {"-9223372036854775808", 0}, {"60000", time.Minute}, {"1500", 1500 * time.Millisecond}} {
		address := hostile(t, func(c net.Conn) {
			c.Write(makeFrame(4, `{"ok":false,"code":"busy","ref":"","ttl_s":0,"retry_after_ms":`+tc.said+`}`))
		})
		if e := wantCode(t, p.dialTo(context.Background(), address), atls.CodeBusy, true); e.RetryAfter != tc.want {
			t.Errorf("%s ms are %v, want %v", tc.said, e.RetryAfter, tc.want)
		}
	}
}

// TestBackOffIsNotThePeers has peers that would have a quote for every dial: one that
// is busy for no time at all, and one that is silent until the caller's time is over.
func TestBackOffIsNotThePeers(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"busy":   func(c net.Conn) { c.Write(makeFrame(4, `{"ok":false,"code":"busy","ref":"","ttl_s":0}`)) },
		"silent": func(net.Conn) {},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, "")
			address := hostile(t, func(c net.Conn) {
				c.Write(helloServer())
				if _, err := takeFrame(c); err == nil {
					answer(c)
				}
			})
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			if err := p.dialTo(ctx, address); err == nil {
				t.Fatal("accepted")
			}
			time.Sleep(10 * time.Millisecond)
			err := p.dialTo(context.Background(), address)
			if b, ok := errors.AsType[*atls.BackOffError](err); !ok || time.Until(b.Until) < 5*time.Second || p.client.quoted() != 1 {
				t.Errorf("got %v after %d quotes, want a back-off after 1", err, p.client.quoted())
			}
		})
	}
}

