package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tdx-agent/measure"
	"tdx-agent/remote"
)

// Bounds of verify serve.
const (
	maxVerifyBody    = 2*(10<<20) + 4096 // an attestation of dstack's own bound, in hexadecimal
	maxVerifications = 32                // at once; more are told to come back
	// Few requests are larger than this, or do not say how large they are, and one takes
	// some 80 MiB of memory to read: only so many of them at once.
	largeVerifyBody       = 1 << 20
	maxLargeVerifications = 2
)

func newVerifyServe() *cobra.Command {
	var f verifierFlags
	var listen string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve dstack-verifier's HTTP API: POST /verify, GET /health",
		Long: `Serve dstack-verifier's HTTP API. A request carries attestation, or quote with
event_log and vm_config; the answer's is_valid is this program's verdict under the
policy. The request does not say which report data it expects: compare report_data.
There is no TLS and no authorisation: keep it on a loopback address, or behind a proxy.
SIGHUP reloads the policy; one that cannot be read leaves the last one in force.`,
		Example: "  tdx-agent verify serve --policy policy.toml --listen 127.0.0.1:8080",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.policy == "" {
				return exitf(exitUsage, "verify serve needs --policy")
			}
			if f.at != "" {
				return exitf(exitUsage, "verify serve judges at the time of each request: --at is for verify")
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			v, store, err := f.verifier(cmd.Context(), log)
			if err != nil {
				return err
			}
			l, err := listenAddress(cmd.Context(), listen, 0o600)
			if err != nil {
				return err
			}
			for _, n := range v.Policy().Loosened() {
				log.Warn("policy", "note", n)
			}
			reload := f.reloader(v, store, log)
			group, ctx := errgroup.WithContext(cmd.Context())
			reload.start(ctx, group, nil)
			log.Info("serving", "address", l.Addr().String(), "policy", v.Policy().ID, "generation", v.Generation(), "simulated", v.Policy().Simulated())
			group.Go(func() error { return serveHTTP(ctx, newHTTPServer(verifyHandler(v)), l) })
			if err := group.Wait(); cmd.Context().Err() == nil {
				return err
			}
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:8080", "address to listen on, or unix:PATH")
	return cmd
}

// serveHTTP serves until ctx ends; requests then have a moment to finish.
func serveHTTP(ctx context.Context, s server, l net.Listener) error {
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := s.Shutdown(stop)
	<-done
	return err
}

// verifyRequest is dstack-verifier's request: attestation, or the other three. Its
// debug is ignored, as are members that are not known.
type verifyRequest struct{ Attestation, Quote, EventLog, VMConfig *string }

func parseVerifyRequest(body io.Reader) (req verifyRequest, err error) {
	text, err := io.ReadAll(body)
	if err != nil {
		return req, err
	}
	doc, err := object(text)
	if err != nil {
		return req, err
	}
	for name, into := range map[string]**string{"attestation": &req.Attestation, "quote": &req.Quote, "event_log": &req.EventLog, "vm_config": &req.VMConfig} {
		if value := doc[name]; value != nil {
			if err := json.Unmarshal(value, into); err != nil {
				return req, fmt.Errorf("%s: %v", name, err)
			}
		}
	}
	return req, nil
}

func verifyHandler(v *remote.Verifier) http.Handler {
	small, large := make(chan struct{}, maxVerifications), make(chan struct{}, maxLargeVerifications)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, map[string]string{"status": "ok", "service": "dstack-verifier"})
	})
	mux.HandleFunc("POST /verify", func(w http.ResponseWriter, r *http.Request) {
		slots := small
		if r.ContentLength < 0 || r.ContentLength > largeVerifyBody {
			slots = large
		}
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			w.Header().Set("Retry-After", "1")
			http.Error(w, "busy", http.StatusServiceUnavailable)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), 18*time.Second)
		defer cancel()
		reply(w, http.StatusOK, verifyOne(ctx, v, http.MaxBytesReader(w, r.Body, maxVerifyBody)))
	})
	return mux
}

// verifyOne answers one request. What cannot be judged is not valid, with the reason:
// dstack-verifier has status 200 for that too.
func verifyOne(ctx context.Context, v *remote.Verifier, body io.Reader) any {
	ev, err := readVerifyRequest(body)
	if err != nil {
		return refusedVerdict(err)
	}
	r, err := appraise(ctx, v, ev, remote.Expect{AnyReportData: true})
	if err != nil {
		return refusedVerdict(err)
	}
	full := makeVerdict(r)
	full.Reason = full.dstack().Reason
	return full
}

func refusedVerdict(err error) *dstackVerdict {
	reason := "Quote verification failed: " + err.Error()
	return &dstackVerdict{Reason: &reason, Details: verdictDetails{TEEVariant: "dstack-tdx", AdvisoryIDs: []string{}}}
}

func readVerifyRequest(body io.Reader) (*measure.Evidence, error) {
	req, err := parseVerifyRequest(body)
	if err != nil {
		return nil, fmt.Errorf("request: %v", err)
	}
	if req.Attestation != nil {
		b, err := hexText(*req.Attestation)
		if err != nil {
			return nil, fmt.Errorf("attestation: %v", err)
		}
		a, err := measure.ParseAttestation(b)
		if err != nil {
			return nil, err
		}
		return a.Evidence()
	}
	if req.Quote == nil || req.EventLog == nil || req.VMConfig == nil {
		return nil, errors.New("request: want attestation, or quote, event_log and vm_config")
	}
	quote, err := hexText(*req.Quote)
	if err != nil {
		return nil, fmt.Errorf("quote: %v", err)
	}
	events, err := measure.ParseEventLog([]byte(*req.EventLog))
	return &measure.Evidence{Quote: quote, Events: events, VMConfig: *req.VMConfig}, err
}
