package atls_test

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"tdx-agent/remote/atls"
)

// The clock of these tests is not the real one: a minute passes at once.

func newPipePair(t *testing.T) *pair {
	p := newPairOf(t, &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true), pipes: make(pipes)}, "")
	p.echo(t)
	return p
}

// trickle writes a byte each 200 ms for as long as they are taken.
func trickle(c net.Conn, b []byte) {
	for i := range b {
		if _, err := c.Write(b[i : i+1]); err != nil {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// wantEnd wants the other end to close the connection after this time.
func wantEnd(t *testing.T, c net.Conn, begun time.Time, after time.Duration) {
	t.Helper()
	io.Copy(io.Discard, c)
	if took := time.Since(begun); took < after || took > after+2*time.Second { // a second for the refusal to be read
		t.Errorf("the connection ends after %v, want %v", took, after)
	}
}

// TestSlowFrames has clients that are slow in each state: its deadline is absolute, and
// a byte now and then does not move it.
func TestSlowFrames(t *testing.T) {
	for name, tc := range map[string]struct {
		limit time.Duration
		code  atls.Code
		step  atls.Step
		reach func(t *testing.T, p *pair) (c net.Conn, slowly []byte)
	}{
		"TLS": {10 * time.Second, atls.CodeTimeout, atls.StepTLS, func(t *testing.T, p *pair) (net.Conn, []byte) {
			c, err := p.connect(t.Context(), "tcp", "")
			if err != nil {
				t.Fatal(err)
			}
			return c, append([]byte{22, 3, 1, 1, 0, 1}, make([]byte, 250)...) // a ClientHello that is long in coming
		}},
		"HELLO": {5 * time.Second, atls.CodeTimeout, atls.StepHello, func(t *testing.T, p *pair) (net.Conn, []byte) {
			c := p.stranger(t, tlsOf(t))
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			return c, makeFrame(1, hello())
		}},
		"EVIDENCE": {20 * time.Second, atls.CodeTimeout, atls.StepWaitEvidence, func(t *testing.T, p *pair) (net.Conn, []byte) {
			h := p.byHand(t)
			return h, h.evidence(t)
		}},
		"RESULT": {10 * time.Second, atls.CodeTimeout, atls.StepWaitResult, func(t *testing.T, p *pair) (net.Conn, []byte) {
			h := p.byHand(t)
			h.accepted(t)
			return h, makeFrame(4, `{"ok":true,"code":"ok","ref":"`+h.ref()+`","ttl_s":60}`)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPipePair(t)
				c, slowly := tc.reach(t, p)
				begun := time.Now()
				done := make(chan struct{})
				go func() { trickle(c, slowly); close(done) }()
				wantEnd(t, c, begun, tc.limit)
				c.Close()
				<-done
				if f := p.failed(t, 1)[0]; f.Code != tc.code || f.Step != tc.step {
					t.Errorf("the server has kept %+v", f)
				}
			})
		})
	}
}

// TestSlowServers has servers that are slow in each state.
func TestSlowServers(t *testing.T) {
	for name, tc := range map[string]struct {
		limit   time.Duration
		step    atls.Step
		answers [][]byte // the last of them slowly
	}{
		"HELLO":    {5 * time.Second, atls.StepHello, [][]byte{helloServer()}},
		"EVIDENCE": {20 * time.Second, atls.StepWaitEvidence, [][]byte{helloServer(), makeFrame(3, string(make([]byte, 200)))}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &pair{server: newMachine(t, "server", true), client: newMachine(t, "client", true), pipes: make(pipes)}
				d, err := atls.NewDialer(atls.Config{Verifier: verifier(t, p.server.entry("server", "other", ""), p.server), Attester: p.client.attester(t)}, p.connect)
				if err != nil {
					t.Fatal(err)
				}
				p.dialer = d
				cfg := tlsOf(t)
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					raw := <-p.pipes
					defer raw.Close()
					c := tls.Server(raw, cfg)
					for i, b := range tc.answers {
						takeFrame(c)
						if i+1 < len(tc.answers) {
							c.Write(b)
							continue
						}
						done := make(chan struct{})
						go func() { trickle(c, b); close(done) }()
						takeFrame(c)
						<-done
					}
				}()
				begun := time.Now()
				e := wantCode(t, p.dialTo(t.Context(), "nowhere"), atls.CodeTimeout, false)
				if took := time.Since(begun); took < tc.limit || took > tc.limit+2*time.Second || e.Step != tc.step {
					t.Errorf("after %v: %v, want the end of %s after %v", took, e, tc.step, tc.limit)
				}
				<-ended
			})
		})
	}
}
