package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/collateral"
)

func newDemo() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See two simulated CVMs attest each other, and three attacks fail",
		Long: `On any machine, boot two simulated CVMs that measure an application each, let them
attest each other over tdx-atls/1 and exchange a message; then try a relay, a wrong
image and a changed event log. Everything is made in a temporary folder. Exit status 1
if a step does not end as it must.`,
		Example: "  tdx-agent demo",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Minute)
			defer cancel()
			dir, err := os.MkdirTemp("", "tdx-agent-demo-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			d := &demo{out: cmd.OutOrStdout(), isQuiet: wantJSON(cmd)}
			err = d.run(ctx, dir)
			if d.isQuiet && err == nil {
				return printJSON(cmd, map[string]any{"schema": "tdx-agent/demo/v1", "simulated": true, "steps": d.steps})
			}
			return err
		},
	}
	jsonFlag(cmd)
	return cmd
}

// demo tells what happens, step by step.
type demo struct {
	out     io.Writer
	isQuiet bool
	steps   []demoStep
}

type demoStep struct {
	Title  string `json:"title"`
	Result string `json:"result"`
	Proves string `json:"proves"`
}

func (d *demo) step(title, result, proves string) {
	d.steps = append(d.steps, demoStep{title, result, proves})
	if !d.isQuiet {
		fmt.Fprintf(d.out, "\n%d. %s\n   %s\n   -> %s\n", len(d.steps), title, result, proves)
	}
}

const demoService = "greeting"

func (d *demo) run(ctx context.Context, dir string) error {
	if !d.isQuiet {
		fmt.Fprintln(d.out, "*** SIMULATED TDs: nothing here proves anything about hardware ***")
	}
	alice, err := bootDemo(ctx, filepath.Join(dir, "alice"), "alice")
	if err != nil {
		return err
	}
	defer alice.close()
	bob, err := bootDemo(ctx, filepath.Join(dir, "bob"), "bob")
	if err != nil {
		return err
	}
	defer bob.close()
	d.step("Two CVMs boot, and each measures its application into RTMR3", fmt.Sprintf("alice: RTMR3 %.16s   bob: RTMR3 %.16s", alice.rtmr3(), bob.rtmr3()),
		"each has a CPU, a TDX module and an agent key of its own; the key's hash is in RTMR3 too, so nobody else can speak for the agent")
	for _, attempt := range []func(context.Context, *demoCVM, *demoCVM) error{d.greet, d.relay, d.wrongImage, d.changedLog} {
		if err := attempt(ctx, alice, bob); err != nil {
			return err
		}
	}
	return nil
}

// greet opens a channel and exchanges a message.
func (d *demo) greet(ctx context.Context, alice, bob *demoCVM) error {
	var answer string
	peer, err := demoDial(ctx, alice, bob, alice.policy(bob, ""), bob.policy(alice, ""), bob.key, nil, &answer)
	if err != nil {
		return fmt.Errorf("the greeting failed: %w", err)
	}
	d.step("alice dials bob; each appraises the other's fresh evidence under its own policy, then a message flows",
		fmt.Sprintf("bob was accepted by entry %q (ref %s) and answers: %q", peer.Entry(), peer.Ref, answer),
		"the other end is the CVM of that firmware, kernel and application, now, at the end of this very connection")
	return nil
}

// relay puts somebody between the two.
func (d *demo) relay(ctx context.Context, alice, bob *demoCVM) error {
	_, err := demoDial(ctx, alice, bob, alice.policy(bob, ""), bob.policy(alice, ""), bob.key, relayTo, nil)
	if err := mustRefuse(err, atls.CodeBindingMismatch); err != nil {
		return err
	}
	d.step("Somebody in the network ends both connections with keys of his own and passes every message on", "refused: "+refusal(err),
		"evidence covers the TLS session it is shown on: genuine evidence of a genuine CVM does not open a relay's channel")
	return nil
}

// wrongImage dials a CVM whose kernel is not the expected one.
func (d *demo) wrongImage(ctx context.Context, alice, bob *demoCVM) error {
	_, err := demoDial(ctx, alice, bob, alice.policy(bob, "rtmr1"), bob.policy(alice, ""), bob.key, nil, nil)
	if err := mustRefuse(err, atls.CodePolicyDenied); err != nil {
		return err
	}
	d.step("alice expects another kernel than bob has booted", "refused: "+refusal(err), "the kernel was measured into RTMR1 before it ran, and the refusal says what was there and what was wanted")
	return nil
}

// changedLog dials a CVM that shows another event log than its registers have seen.
func (d *demo) changedLog(ctx context.Context, alice, bob *demoCVM) error {
	liar, err := atls.NewKey(bob.private, func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		ev, err := bob.quote(ctx, rd)
		if err == nil {
			ev.Events = ev.Events[:len(ev.Events)-1]
		}
		return ev, err
	}, bob.live)
	if err != nil {
		return err
	}
	_, err = demoDial(ctx, alice, bob, alice.policy(bob, ""), bob.policy(alice, ""), liar, nil, nil)
	if err := mustRefuse(err, atls.CodeEvidenceInvalid); err != nil {
		return err
	}
	d.step("bob hides the last event of his log", "refused: "+refusal(err), "a log counts only if it replays to the registers of the signed quote")
	return nil
}

func mustRefuse(err error, code atls.Code) error {
	if e, ok := errors.AsType[*atls.Error](err); !ok || e.Code != code {
		return fmt.Errorf("the attack ended with %v, want %s", err, code)
	}
	return nil
}

// refusal is the first reason of a refusal.
func refusal(err error) string {
	if r, ok := errors.AsType[*remote.Rejection](err); ok {
		first := r.Result.Failed()[0]
		return first.String()
	}
	return err.Error()
}

// demoCVM is a simulated CVM with its agent's parts.
type demoCVM struct {
	name     string
	backend  *backend
	ledger   *measure.Ledger
	attester *measure.Attester
	private  *ecdsa.PrivateKey
	key      *atls.Key
	evidence *measure.Evidence // of the boot
	root     [32]byte
	bundle   string // file
}

func bootDemo(ctx context.Context, path, name string) (c *demoCVM, err error) {
	cfg, dir := newConfig(), runtimeDir(path)
	if err := os.MkdirAll(dir.log(), 0o700); err != nil {
		return nil, err
	}
	c = &demoCVM{name: name}
	if c.backend, err = openSimulated(cfg, dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.ledger, err = openLedger(ctx, cfg, dir, c.backend); err != nil {
		return nil, err
	}
	if _, err := measureBoot(ctx, cfg, dir, c.ledger, measure.SampleApp()); err != nil {
		return nil, err
	}
	if c.private, err = agentKey(dir); err != nil {
		return nil, err
	}
	c.attester = measure.NewAttester(measure.AttesterConfig{Quoter: c.backend.quoter, Ledger: c.ledger, Boot: c.backend.boot})
	if c.key, err = atls.NewKey(c.private, c.quote, c.live); err != nil {
		return nil, err
	}
	if err := c.backend.publishSimulated(dir); err != nil {
		return nil, err
	}
	c.bundle = dir.simulatedCollateral()
	if c.root, err = readRoot(dir.simulatedRoot()); err != nil {
		return nil, err
	}
	c.evidence, err = c.quote(ctx, measure.ReportData{})
	return c, err
}

func (c *demoCVM) close() {
	if c.ledger != nil {
		c.ledger.Close()
	}
	c.backend.close()
}

func (c *demoCVM) quote(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
	return c.attester.RemoteEvidence(ctx, rd)
}

// live is RTMR3, as the log explains it.
func (c *demoCVM) live(ctx context.Context) (measure.Digest, error) {
	s, err := c.ledger.Snapshot(ctx)
	return s.Register, err
}

func (c *demoCVM) rtmr3() string {
	q, err := measure.ParseQuote(c.evidence.Quote)
	if err != nil {
		return err.Error()
	}
	return q.Body.RTMR[measure.RTMR3].String()
}

// policy accepts peer for the service, as c would write it after checking every value.
// The register named by wrong is another one.
func (c *demoCVM) policy(peer *demoCVM, wrong string) string {
	q, err := measure.ParseQuote(peer.evidence.Quote)
	if err != nil {
		return ""
	}
	compose := measure.ComposeHash(measure.SampleApp().AppCompose)
	var b strings.Builder
	fmt.Fprintf(&b, "version = 1\n[[peer]]\nname = %q\nservice = [%q]\nroot = \"sha256:%x\"\nallow_simulated = true\nimage = [\"demo\"]\ncompose_hash = [\"%x\"]\n[image.demo]\n",
		peer.name, demoService, peer.root, compose)
	for _, r := range []struct {
		name  string
		value measure.Digest
	}{{"mrtd", q.Body.MRTD}, {"rtmr0", q.Body.RTMR[0]}, {"rtmr1", q.Body.RTMR[1]}, {"rtmr2", q.Body.RTMR[2]}} {
		if r.name == wrong {
			r.value[0] ^= 0xff
		}
		fmt.Fprintf(&b, "%s = [\"%s\"]\n", r.name, r.value)
	}
	return b.String()
}

// verifier is a Verifier under a policy about peer.
func (c *demoCVM) verifier(peer *demoCVM, policy string) (*remote.Verifier, error) {
	p, err := remote.ParsePolicy(c.name+"'s policy", []byte(policy))
	if err != nil {
		return nil, err
	}
	roots, err := p.Roots()
	if err != nil {
		return nil, err
	}
	store, err := collateral.New(collateral.Config{Roots: roots, Files: []string{peer.bundle}})
	if err != nil {
		return nil, err
	}
	return remote.NewVerifier(remote.Config{Policy: p, Collateral: store})
}

// demoDial lets alice dial bob, perhaps through somebody in between, and returns whom
// alice has at the other end.
func demoDial(ctx context.Context, alice, bob *demoCVM, alicePolicy, bobPolicy string, bobKey atls.Attester, between func(context.Context, *errgroup.Group, string) (string, error), answer *string) (*atls.Peer, error) {
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	defer group.Wait()
	defer cancel()
	aliceVerifier, err := alice.verifier(bob, alicePolicy)
	if err != nil {
		return nil, err
	}
	bobVerifier, err := bob.verifier(alice, bobPolicy)
	if err != nil {
		return nil, err
	}
	inner, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	listener, err := atls.NewListener(inner, atls.ListenerConfig{Config: atls.Config{Verifier: bobVerifier, Attester: bobKey}, Services: []string{demoService}})
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	group.Go(func() error { return demoServe(listener) })
	address := inner.Addr().String()
	if between != nil {
		if address, err = between(ctx, group, address); err != nil {
			return nil, err
		}
	}
	dialer, err := atls.NewDialer(atls.Config{Verifier: aliceVerifier, Attester: alice.key}, nil)
	if err != nil {
		return nil, err
	}
	c, err := dialer.DialContext(ctx, "tcp", address, demoService, []string{bob.name})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if answer != nil {
		if *answer, err = demoTalk(c); err != nil {
			return nil, err
		}
	}
	peer, _ := atls.PeerFromConn(c)
	return peer, nil
}

// demoServe greets each peer by the name of its policy entry.
func demoServe(l *atls.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return nil // closed
		}
		peer, _ := atls.PeerFromConn(c)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		io.CopyN(io.Discard, c, int64(len(demoHello)))
		fmt.Fprintf(c, "hello %s, your RTMR3 fits", peer.Entry())
		c.Close()
	}
}

const demoHello = "hello bob"

func demoTalk(c net.Conn) (string, error) {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, demoHello); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(c, 1024))
	return string(b), err
}

// relayTo listens, ends TLS on both sides, and passes on what it reads.
func relayTo(ctx context.Context, group *errgroup.Group, address string) (string, error) {
	leaf, err := demoCertificate()
	if err != nil {
		return "", err
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{*leaf}, ClientAuth: tls.RequireAnyClientCert, InsecureSkipVerify: true, NextProtos: []string{atls.ALPN}, MinVersion: tls.VersionTLS13}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	group.Go(func() error {
		defer l.Close()
		raw, err := l.Accept()
		if err != nil {
			return nil
		}
		client := tls.Server(raw, cfg)
		defer client.Close()
		server, err := tls.Dial("tcp", address, cfg)
		if err != nil {
			return nil
		}
		defer server.Close()
		defer context.AfterFunc(ctx, func() { client.Close(); server.Close() })()
		group.Go(func() error { io.Copy(server, client); return nil })
		io.Copy(client, server)
		return nil
	})
	group.Go(func() error { <-ctx.Done(); l.Close(); return nil })
	return l.Addr().String(), nil
}

// demoCertificate is one that anybody can make.
func demoCertificate() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
