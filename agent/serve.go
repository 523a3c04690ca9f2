package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/status"
	"tdx-agent/measure"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	config     string
	runtimeDir string
	hostShared string
	simulate   bool
	reboot     bool
}

// serve runs the agent until ctx ends, or SIGHUP comes. Other commands reload their policy
// then; what serve is configured by has been measured, and whoever asks for other settings
// gets an end in order and not a kill.
func serve(ctx context.Context, o serveOptions, stderr io.Writer) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stop()
	if err := forbidDumps(); err != nil {
		return err
	}
	cfg, err := loadConfig(o.config)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	dir, err := serverRuntimeDir(o.runtimeDir, o.simulate)
	if err != nil {
		return err
	}
	lock, err := lockServe(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if o.reboot {
		if err := rebootSimulated(dir); err != nil {
			return err
		}
	}
	b, err := openBackend(cfg, dir, o.simulate)
	if err != nil {
		return err
	}
	defer b.close()
	if err := b.publishSimulated(dir); err != nil {
		return err
	}
	ledger, err := openLedger(ctx, cfg, dir, b)
	if err != nil {
		return err
	}
	defer ledger.Close()
	files, err := serveFiles(ctx, cfg, o, dir, ledger, log)
	if err != nil {
		return err
	}
	d, err := newDaemon(ctx, cfg, dir, b, ledger, o.hostShared, files, log)
	if err != nil {
		return err
	}
	defer d.keys.drop()
	listeners, err := listenAll(cfg, dir, o.simulate || o.runtimeDir != "")
	if err != nil {
		return err
	}
	d.openAudit() // not before the sockets are ours: a second agent must not write into this one's record
	return d.run(ctx, listeners, stderr)
}

// serveFiles reads the application's files, and in a simulated TD takes the boot
// step with them. On real machines the boot step is a service of its own, and an
// agent without files still gives quotes.
func serveFiles(ctx context.Context, cfg *Config, o serveOptions, dir runtimeDir, l *measure.Ledger, log *slog.Logger) (*measure.GuestFiles, error) {
	files, err := readGuest(cfg, o.hostShared, o.simulate)
	if err != nil {
		if o.simulate {
			return nil, err
		}
		log.Warn("serving without the application's files: Info will lack them", "error", err)
		return nil, nil
	}
	if !o.simulate {
		return files, nil
	}
	_, err = measureBoot(ctx, cfg, dir, l, files)
	if errors.As(err, new(*measure.DivergenceError)) {
		return files, nil // shown and refused where it matters; see OpenLedger
	}
	if errors.As(err, new(*measure.ConflictError)) {
		return nil, fmt.Errorf("%w; serve --simulate --simulate-reboot starts a fresh boot", err)
	}
	return files, err
}

// run serves on the listeners until ctx ends or a server fails.
func (d *daemon) run(ctx context.Context, listeners map[string]net.Listener, stderr io.Writer) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, g := range d.guestSockets(listeners) {
		d.access = append(d.access, g.access())
		d.start(ctx, group, d.guestServer(g), g.listener)
	}
	d.access = append(d.access, status.Access{Socket: listeners[socketAgent].Addr().String(), Grants: []string{"status", "log"}},
		status.Access{Socket: listeners[socketAdmin].Addr().String(), Grants: []string{"emit"}})
	if l := listeners[socketChannel]; l != nil {
		grants := []string{"channel evidence"}
		if d.cfg.RATLS.Endpoint {
			grants = append(grants, describeEvidence)
		}
		d.access = append(d.access, status.Access{Socket: l.Addr().String(), Grants: grants})
		d.start(ctx, group, newHTTPServer(d.channelHandler()), l)
	}
	if l := listeners[socketWorker]; l != nil {
		d.access = append(d.access, status.Access{Socket: l.Addr().String(), Grants: []string{"read", "application key's attestation"}})
		d.start(ctx, group, d.workerServer(), l)
	}
	// Last, since status reads the list of accesses.
	d.start(ctx, group, newHTTPServer(d.operatorHandler()), listeners[socketAgent])
	d.start(ctx, group, newHTTPServer(d.adminHandler()), listeners[socketAdmin])
	group.Go(func() error { d.background(ctx); return nil })
	group.Go(func() error { d.keepKeys(ctx); return nil })
	// A slow host does not count against the agent; a lock of the log or a quote that
	// nobody gives back does.
	group.Go(func() error { keepNotified(ctx, d.log, d.alive, d.statusLine); return nil })
	d.announce(stderr, listeners)
	err := group.Wait()
	d.closeAudit()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// server is an HTTP server of either kind.
type server interface {
	Serve(net.Listener) error
	Shutdown(context.Context) error
}

// start serves on l and stops with ctx: whoever is in a request has a moment to
// finish, but nobody waits for the host.
func (d *daemon) start(ctx context.Context, group *errgroup.Group, s server, l net.Listener) {
	group.Go(func() error {
		if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("socket %s: %w", l.Addr(), err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Shutdown(stop) // what is still open ends with the process
		return nil
	})
}

// The bounds of what is open at once on a socket that is not dstack's.
const (
	maxConns       = 128
	maxConnsPerUID = 64
)

// boundServer is an HTTP server that turns away connections beyond its bounds.
type boundServer struct{ *http.Server }

func (s boundServer) Serve(l net.Listener) error {
	return s.Server.Serve(guestapi.LimitListener(l, maxConns, maxConnsPerUID))
}

func newHTTPServer(h http.Handler) boundServer {
	return boundServer{&http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10, ConnContext: guestapi.ConnContext, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}}
}

// announce tells whoever started the agent that it serves. The self check came before;
// a quote does not, since the host may be silent for 31 s.
func (d *daemon) announce(stderr io.Writer, listeners map[string]net.Listener) {
	d.log.Info("serving", "version", version(), "simulated", d.backend.simulated, "quotes", d.backend.quoteSource, "registers", d.backend.registerSource,
		"sockets", sortedNames(listeners), "loosened", d.cfg.switches())
	if d.backend.simulated {
		where := ""
		if d.dir != simulatedDir() {
			where = " --runtime-dir " + string(d.dir)
		}
		fmt.Fprintf(stderr, "\n*** SIMULATED TD: its quotes prove nothing ***\nTry:\n  curl --unix-socket %s 'http://localhost/GetQuote?report_data=1234' > quote.json\n  tdx-agent verify --quote quote.json --report-data 1234 --root %s --collateral %s\n  tdx-agent status%s\n\n",
			listeners[socketDstack].Addr(), d.dir.simulatedRoot(), d.dir.simulatedCollateral(), where)
	}
}

func (d *daemon) statusLine() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := d.ledger.Snapshot(ctx)
	if err != nil {
		return err.Error()
	}
	q := d.attester.Stats()
	return fmt.Sprintf("RTMR3 ok seq=%d; quotes %d ok, %d failed", len(s.Records), q.OK, q.Failed)
}
