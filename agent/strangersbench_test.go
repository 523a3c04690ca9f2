package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// strangers dial an endpoint from many addresses of the loopback network: without a
// certificate, with garbage, with nothing, and as a peer whose quote is forged.
type strangers struct {
	address string
	forger  atls.Config

	dialled, present atomic.Int64
	group            sync.WaitGroup
}

func newStrangers(b *testing.B, address string, victim *daemon, own atls.Config) *strangers {
	old, err := victim.attester.Evidence(b.Context(), measure.ReportData{}, "")
	check(b, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(b, err)
	forged, err := atls.NewKey(key, func(_ context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		ev := *old
		ev.Quote = bytes.Clone(old.Quote)
		copy(ev.Quote[48+520:], rd[:]) // header, and what comes before it in the body
		return &ev, nil
	}, func(context.Context) (measure.Digest, error) {
		q, err := measure.ParseQuote(old.Quote)
		return q.Body.RTMR[measure.RTMR3], err
	})
	check(b, err)
	own.Attester = forged
	return &strangers{address: address, forger: own}
}

// dial is one of them, who stays for as long as he may.
func (s *strangers) dial(ctx context.Context, n int) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1+byte(n>>16), byte(n>>8), 1+byte(n%250))}}
	if n%4 == 0 {
		if d, err := atls.NewDialer(s.forger, from.DialContext); err == nil { // a new one has no reason to wait
			d.DialContext(ctx, "tcp", s.address, "echo", []string{"peer"})
		}
		return
	}
	c, err := from.DialContext(ctx, "tcp", s.address)
	if err != nil {
		return
	}
	c.(*net.TCPConn).SetLinger(0) // leaves no port behind
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	switch n % 4 {
	case 1:
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{atls.ALPN}})
		c.Write([]byte{1, 0, 0, 0})
	case 2:
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: everybody\r\n\r\n")
	}
	io.Copy(io.Discard, c)
}

// come has 1,000 of them a second until ctx ends.
func (s *strangers) come(ctx context.Context) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for range 5 {
			if n++; s.present.Load() > 3000 { // descriptors are bounded
				continue
			}
			s.present.Add(1)
			s.dialled.Add(1)
			s.group.Go(func() {
				defer s.present.Add(-1)
				s.dial(ctx, n)
			})
		}
	}
}

// besieged is the environment variable that makes BenchmarkBesiegedEndpoint one, with the
// runtime directory of the agent to ask.
const besieged = "TDX_AGENT_BENCH_BESIEGED"

// BenchmarkBesiegedEndpoint is an endpoint and the strangers who dial it, in a process of
// its own as an endpoint is, until its standard input ends.
func BenchmarkBesiegedEndpoint(b *testing.B) {
	base := os.Getenv(besieged)
	if base == "" {
		b.Skip("BenchmarkQuotesAmongStrangers starts it")
	}
	dir, err := clientRuntimeDir(base)
	check(b, err)
	attester, err := newChannelAttester(b.Context(), dir)
	check(b, err)
	client := benchDaemon(b)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	check(b, err)
	l, err := atls.NewListener(inner, atls.ListenerConfig{Services: []string{"echo"}, Config: atls.Config{Verifier: benchVerifier(b, client), Attester: attester, KeyTTL: time.Hour}})
	check(b, err)
	defer l.Close()
	go serveEcho(l)
	s := newStrangers(b, inner.Addr().String(), client, atls.Config{Verifier: benchVerifier(b, client)})
	ctx, stop := context.WithCancel(b.Context())
	s.group.Go(func() { s.come(ctx) })
	time.Sleep(time.Second) // the load is there
	start, before := time.Now(), s.dialled.Load()
	fmt.Println("besieged")
	io.Copy(io.Discard, os.Stdin)
	fmt.Printf("strangers %.0f\n", float64(s.dialled.Load()-before)/time.Since(start).Seconds())
	stop()
	s.group.Wait()
	if n := l.Counts(); n.TooOften > 0 {
		b.Errorf("%d strangers were not let in, so that they cost nothing", n.TooOften)
	}
}

// BenchmarkQuotesAmongStrangers is how many quotes an application gets while nobody dials
// the endpoint, and while 1,000 strangers a second do. They share its processors.
func BenchmarkQuotesAmongStrangers(b *testing.B) {
	d := benchDaemon(b)
	application := keptClient(d.dir.path("dstack.sock"))
	defer application.CloseIdleConnections()
	quotes := func(b *testing.B) {
		start := time.Now()
		for i := 0; b.Loop(); i++ {
			post(b, application, "/GetQuote", fmt.Sprintf(`{"report_data":"%08x"}`, i))
		}
		b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "quotes/s")
	}
	b.Run("alone", quotes)
	b.Run("among-strangers", func(b *testing.B) {
		cmd := exec.Command(os.Args[0], "-test.run=^$", "-test.bench=^BenchmarkBesiegedEndpoint$", "-test.benchtime=1x")
		cmd.Env = append(os.Environ(), besieged+"="+d.dir.path(""))
		in, err := cmd.StdinPipe()
		check(b, err)
		out, err := cmd.StdoutPipe()
		check(b, err)
		check(b, cmd.Start())
		said := bufio.NewScanner(out)
		for said.Scan() && said.Text() != "besieged" {
		}
		quotes(b)
		in.Close()
		for said.Scan() {
			if n, err := strconv.Atoi(strings.TrimPrefix(said.Text(), "strangers ")); err == nil {
				b.ReportMetric(float64(n), "strangers/s")
			}
		}
		check(b, cmd.Wait())
	})
	if n := d.attester.Stats().Remote; n > 0 {
		b.Errorf("%d quotes for strangers", n)
	}
}
