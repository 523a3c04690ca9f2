package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"tdx-agent/agent/status"
	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/ratls"
)

// Processes that have channels each say what they know of them on a socket of their own
// in the runtime directory's folder "peers": they face the network, so the agent asks
// them nothing and decides nothing by what they say. The commands peers and status read
// these sockets for whoever runs them.

// Schemas of this API. They only ever grow.
const (
	peerSchema     = "tdx-agent/peer/v1"
	failuresSchema = "tdx-agent/attest-failures/v1"
)

// peerReport is what a process knows of its channels.
type peerReport struct {
	name     string
	started  time.Time
	verifier *remote.Verifier
	end      channelEnd
	attester *channelAttester // nil: we prove nothing ourselves
	renewer  *ratls.Renewer   // nil: we show no RA-TLS certificate

	failures atls.Failures
	metrics  *channelMetrics
	lines    *rate.Limiter // of the log, for handshakes that failed
	unlogged atomic.Int64
}

// channelEnd is an atls.Listener or an atls.Dialer.
type channelEnd interface {
	Channels() []*atls.Conn
	Counts() atls.Counts
}

func newPeerReport() *peerReport {
	r := &peerReport{started: time.Now().UTC(), lines: rate.NewLimiter(10, 100)}
	r.metrics = newChannelMetrics(r)
	return r
}

// log writes a line about a handshake. Strangers can have as many fail as they like, so
// that there is a bound on these; metrics count all of them.
func (r *peerReport) log(log *slog.Logger, h *atls.Handshake) {
	args := []any{"remote", h.Remote, "service", h.Service, "ref", h.Ref, "entry", h.Entry, "assurance", h.Assurance, "took", h.Duration.Round(time.Microsecond)}
	if h.Code == atls.CodeOK {
		log.Info("channel", args...)
		return
	}
	if !r.lines.Allow() {
		r.unlogged.Add(1)
		return
	}
	if n := r.unlogged.Swap(0); n > 0 {
		log.Warn("more handshakes have failed than are logged", "unlogged", n)
	}
	log.Warn("no channel", append(args, "step", string(h.Step), "code", string(h.Code), "error", h.Err)...)
}

// observe counts a handshake and keeps it if it failed.
func (r *peerReport) observe(h atls.Handshake) {
	r.metrics.observe(&h)
	r.failures.Add(h)
}

// maxPeerSockets bounds the processes of one runtime directory.
const maxPeerSockets = 16

// start answers on a socket until ctx ends. given is its path, "none" for no socket, ""
// for the first that is free in the runtime directory; where that cannot be had, the
// process goes on without.
func (r *peerReport) start(ctx context.Context, group *errgroup.Group, g *globals, log *slog.Logger, name, given string, v *remote.Verifier, end channelEnd) error {
	if given == "none" {
		return nil
	}
	r.name, r.verifier, r.end = name, v, end
	l, err := listenPeers(g, name, given)
	if err != nil {
		if given != "" {
			return err
		}
		log.Warn("tdx-agent peers and status will not show these channels", "error", err)
		return nil
	}
	s := newHTTPServer(r.handler())
	group.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("socket %s: %w", l.Addr(), err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return s.Close()
	})
	return nil
}

func listenPeers(g *globals, name, given string) (net.Listener, error) {
	if given != "" {
		return listenUnix(given, 0o660)
	}
	dir, err := bindingRuntimeDir(g.runtimeDir)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir.peers(), 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err // the runtime directory itself is the agent's to make
	}
	var l net.Listener
	for n := 1; n <= maxPeerSockets; n++ {
		file := name
		if n > 1 {
			file = fmt.Sprintf("%s-%d", name, n)
		}
		if l, err = listenUnix(dir.peerSocket(file), 0o660); err == nil {
			return l, nil
		}
	}
	return nil, err
}

func (r *peerReport) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/peers", func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, r.document()) })
	mux.HandleFunc("GET /v1/peers/{ref}", func(w http.ResponseWriter, req *http.Request) {
		for _, p := range r.document().Processes[0].Peers {
			if p.Ref == req.PathValue("ref") {
				reply(w, http.StatusOK, struct {
					Schema string `json:"schema"`
					status.Peer
				}{peerSchema, p})
				return
			}
		}
		http.Error(w, "no open channel has this ref", http.StatusNotFound)
	})
	mux.HandleFunc("GET /v1/attest-failures", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, struct {
			Schema   string               `json:"schema"`
			Failures []status.PeerFailure `json:"failures"`
		}{failuresSchema, r.failed()})
	})
	mux.Handle("GET /metrics", r.metrics.handler())
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, req *http.Request) {
		if err := r.ready(req.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// ready says why no peer could be accepted, or accept us. It costs no quote; whether
// those work, the agent's own readiness says.
func (r *peerReport) ready(ctx context.Context) error {
	if h := r.verifier.Collateral().Health(); h.Platforms > 0 && time.Now().After(h.Until) {
		return fmt.Errorf("collateral has ended at %s and was not renewed", h.Until.UTC().Format(time.RFC3339))
	}
	if r.attester == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := callWith(ctx, r.attester.client, r.attester.socket, http.MethodGet, "/v1/key", nil)
	return err
}

// document is the whole report.
func (r *peerReport) document() *status.Peers {
	accepted, refused := r.metrics.accepted.Load(), r.metrics.refused.Load()
	p := status.PeerProcess{Name: r.name, PID: os.Getpid(), Started: r.started, Policy: r.verifier.Policy().ID, Generation: r.verifier.Generation(),
		Accepted: int(accepted), Refused: int(refused), Peers: []status.Peer{}, Failures: r.failed()}
	for _, c := range r.end.Channels() {
		p.Peers = append(p.Peers, peerOf(c))
	}
	slices.SortFunc(p.Peers, func(a, b status.Peer) int { return a.Opened.Compare(b.Opened) })
	return &status.Peers{Schema: status.PeersSchema, Processes: []status.PeerProcess{p}}
}

// directionOf is "in" if our part is the server's.
func directionOf(own atls.Role) string {
	if own == atls.Server {
		return "in"
	}
	return "out"
}

func peerOf(c *atls.Conn) status.Peer {
	of := c.Peer()
	p := status.Peer{Ref: of.Ref, Direction: "in", Address: of.Address, Service: of.Service, Assurance: of.Assurance(), Entry: of.Entry(), Simulated: of.Attested() && of.Result.IsSimulated(),
		Advisories: []string{}, VerifiedAt: of.VerifiedAt.UTC(), Opened: of.Opened.UTC(), Expires: of.Expires.UTC(), Draining: c.IsDraining()}
	if of.Role == atls.Server {
		p.Direction = "out"
	}
	p.BytesIn, p.BytesOut = c.Bytes()
	if !of.Attested() {
		return p
	}
	p.Policy, p.AgentKey = of.Result.Policy, hex.EncodeToString(of.AgentKey[:])
	if of.Result.Image != nil {
		p.Image = of.Result.Image.Name
	}
	proven(&p, of.Result)
	return p
}

// proven fills in what the peer's evidence proves, by an appraisal that accepted it.
func proven(p *status.Peer, r *remote.Result) {
	c := r.Claims
	if id, err := r.Identity(); err == nil {
		p.AppID, p.InstanceID, p.ComposeHash = hex.EncodeToString(id.AppID), hex.EncodeToString(id.InstanceID), hex.EncodeToString(id.ComposeHash)
		if kp, err := measure.ParseKeyProvider([]byte(id.KeyProvider)); err == nil {
			p.KeyProvider = string(kp.Kind)
		}
	}
	p.MRTD = c.Quote.Body.MRTD.String()
	if c.Report != nil {
		p.QuoteSHA256, p.TCBStatus = hex.EncodeToString(c.Report.QuoteSHA256[:]), string(c.Report.Merged.Status)
		p.Advisories = append(p.Advisories, c.Report.Merged.Advisories...)
	}
}

// failed lists the failures, the latest first.
func (r *peerReport) failed() []status.PeerFailure {
	list := []status.PeerFailure{}
	for _, f := range r.failures.List() {
		checks := []status.FailedCheck{}
		for _, c := range f.Checks {
			checks = append(checks, status.FailedCheck{Name: c.Name, Code: c.Code, Got: c.Got, Want: c.Want, Hint: c.Hint})
		}
		list = append(list, status.PeerFailure{Time: f.Time.UTC(), Millis: f.Duration.Milliseconds(), Direction: directionOf(f.Role), Address: f.Remote, Service: f.Service,
			Ref: f.Ref, Step: string(f.Step), Code: string(f.Code), ByPeer: f.Refused, Entry: f.Entry, Error: f.Text, Checks: checks})
	}
	slices.Reverse(list)
	return list
}
