package main

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tdx-agent/agent/status"
	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/cache"
)

// Labels have the program's own words as values, and names that the operator has given
// in agent.toml: never what a caller or a peer has said.

const metricPrefix = "tdx_agent_"

// seconds are the buckets for quotes (39 ms to 31 s) and handshakes.
var seconds = []float64{0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}

// metricSet is a registry of one process, with nothing in it that was not put there.
type metricSet struct{ registry *prometheus.Registry }

func newMetricSet() metricSet { return metricSet{prometheus.NewRegistry()} }

func (m *metricSet) counters(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricPrefix + name, Help: help}, labels)
	m.registry.MustRegister(c)
	return c
}

func (m *metricSet) histogram(name, help string) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricPrefix + name, Help: help, Buckets: seconds})
	m.registry.MustRegister(h)
	return h
}

// handler answers GET /metrics.
func (m *metricSet) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{DisableCompression: true, MaxRequestsInFlight: 4})
}

// snapshot makes metrics of what the process knows when it is asked.
type snapshot func(*snapshotWriter)

// Describe implements prometheus.Collector: what there is depends on the state.
func (snapshot) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s snapshot) Collect(to chan<- prometheus.Metric) { s(&snapshotWriter{to}) }

type snapshotWriter struct{ to chan<- prometheus.Metric }

// add adds a value with labels: name, value, name, value ...
func (w *snapshotWriter) add(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
	var names, values []string
	for i := 0; i+1 < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	w.to <- prometheus.MustNewConstMetric(prometheus.NewDesc(metricPrefix+name, help, names, nil), kind, value, values...)
}

func (w *snapshotWriter) gauge(name, help string, value float64, labels ...string) {
	w.add(prometheus.GaugeValue, name, help, value, labels...)
}

func (w *snapshotWriter) count(name, help string, n uint64, labels ...string) {
	w.add(prometheus.CounterValue, name, help, float64(n), labels...)
}

// lookups counts those of a cache.
func (w *snapshotWriter) lookups(name string, c cache.Counts) {
	const help = "Look-ups of what was verified before. Cache key_mode: peers that may use key mode, and were asked for a signature or for a quote."
	w.count("cache_lookups_total", help, c.Hits, "cache", name, "result", "hit")
	w.count("cache_lookups_total", help, c.Misses, "cache", name, "result", "miss")
}

func (w *snapshotWriter) flag(name, help string, is bool, labels ...string) {
	value := 0.0
	if is {
		value = 1
	}
	w.gauge(name, help, value, labels...)
}

// moment is a time, 0 if there is none.
func (w *snapshotWriter) moment(name, help string, t time.Time) {
	value := 0.0
	if !t.IsZero() {
		value = float64(t.UnixMilli()) / 1000
	}
	w.gauge(name, help, value)
}

// agentMetrics are those of serve.
type agentMetrics struct {
	metricSet
	quotes, calls, throttled *prometheus.CounterVec
	took                     prometheus.Histogram // of the host
	foreign                  prometheus.Counter
}

func newAgentMetrics(d *daemon) *agentMetrics {
	m := &agentMetrics{metricSet: newMetricSet()}
	m.quotes = m.counters("quote_requests_total", "Requests for quotes: local ones of this TD, channel ones for its peers.", "class", "result")
	m.calls = m.counters("api_requests_total", "Calls of applications, by service or application, method and HTTP status.", "service", "method", "code")
	m.throttled = m.counters("api_throttled_total", "Calls turned away because too many came.", "service", "method")
	m.took = m.histogram("quote_duration_seconds", "What the host took for a quote.")
	m.foreign = prometheus.NewCounter(prometheus.CounterOpts{Name: metricPrefix + "rtmr_foreign_extends_total", Help: "Times that a register was found to differ from its log."})
	m.registry.MustRegister(m.foreign, snapshot(d.collect))
	return m
}

// timedQuoter measures the host.
type timedQuoter struct {
	measure.Quoter
	took prometheus.Histogram
}

// Quote implements measure.Quoter.
func (q timedQuoter) Quote(ctx context.Context, rd measure.ReportData) ([]byte, error) {
	start := time.Now()
	b, err := q.Quoter.Quote(ctx, rd)
	if err == nil {
		q.took.Observe(time.Since(start).Seconds())
	}
	return b, err
}

// quoted counts a request for a quote.
func (m *agentMetrics) quoted(class string, err error) {
	result := "failed"
	switch {
	case err == nil:
		result = "ok"
	case errors.As(err, new(*measure.BusyError)):
		result = "busy"
	case errors.As(err, new(*measure.DivergenceError)):
		result = "diverged"
	case errors.Is(err, context.DeadlineExceeded):
		result = "timeout"
	case errors.Is(err, context.Canceled):
		result = "canceled"
	}
	m.quotes.WithLabelValues(class, result).Inc()
}

// called counts a call of an application. method is one of the surface's own, or "".
func (m *agentMetrics) called(service, method string, code int, isThrottled bool) {
	if method == "" {
		method = "unknown"
	}
	m.calls.WithLabelValues(service, method, strconv.Itoa(code)).Inc()
	if isThrottled {
		m.throttled.WithLabelValues(service, method).Inc()
	}
}

// collect adds what status knows. It makes no quote.
func (d *daemon) collect(w *snapshotWriter) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s := d.status(ctx)
	w.flag("build_info", "The program.", true, "version", s.Version, "go", runtime.Version(), "quotes", s.Backend.Quotes, "registers", s.Backend.Registers)
	w.moment("start_time_seconds", "When the agent started.", s.Started)
	w.flag("ready", "Whether log and registers agree, the boot step is done and a quote was made.", s.Ready)
	w.flag("simulator_active", "Whether the TD is simulated, so that nothing proves anything.", s.Simulated)
	for _, r := range s.Registers {
		name := strings.ToLower(r.Name)
		if r.Verdict == status.Match || r.Verdict == status.Mismatch {
			w.flag("rtmr_log_consistent", "Whether the register is what its event log replays to.", r.Verdict == status.Match, "rtmr", name)
		}
		if name != "mrtd" {
			w.count("rtmr_events_total", "Events in the log of the register.", uint64(r.Events), "rtmr", name)
		}
	}
	mended := d.ledger.Recoveries()
	for kind, n := range map[string]int{"torn": mended.Torn, "taken_back": mended.TakenBack, "set_aside": mended.SetAside} {
		w.count("eventlog_recoveries_total", "What was mended of the RTMR3 log: records that a crash tore, events that it kept from being extended, logs of an earlier boot.", uint64(n), "kind", kind)
	}
	if e, ok := d.backend.quoter.(interface{ Conflicts() int64 }); ok {
		w.count("quote_generation_conflicts_total", "Times that another program was seen to write to the agent's quote entry.", uint64(e.Conflicts()))
	}
	q := &s.Quotes
	const depth = "Quotes that wait for their turn."
	w.gauge("quote_queue_depth", depth, float64(q.Remote), "class", "channel")
	w.gauge("quote_queue_depth", depth, float64(q.Queued-q.Remote), "class", "local")
	w.flag("quote_inflight", "Whether the host works on a quote.", d.attester.Running() > 0)
	w.moment("last_quote_success_timestamp_seconds", "When the last quote was made; 0 before the first.", q.LastSuccess)
	w.moment("last_quote_failure_timestamp_seconds", "When a quote failed last; 0 if none has.", q.LastFailure)
	w.flag("audit_writable", "Whether the audit record can be written; only then are keys given.", s.Audit.Problem == "")
	w.flag("audit_untouched", "Whether nobody else was found to have changed the audit record since the agent started.", s.Audit.Damage == "")
	w.count("audit_lines_total", "Lines in the chain of the audit record.", uint64(s.Audit.Seq))
}

// channelMetrics are those of a process with channels.
type channelMetrics struct {
	metricSet
	accepted, refused      atomic.Int64
	handshakes, appraisals *prometheus.CounterVec
	took                   prometheus.Histogram
}

func newChannelMetrics(r *peerReport) *channelMetrics {
	m := &channelMetrics{metricSet: newMetricSet()}
	m.handshakes = m.counters("handshakes_total", "Handshakes that ended, by the step they got to, the code, whose refusal it was, and how the peer attested.", "direction", "code", "step", "by", "assurance")
	m.appraisals = m.counters("verify_total", "Appraisals of peers, with the first check that failed.", "direction", "result", "reason")
	m.took = m.histogram("handshake_duration_seconds", "From the connection to its end or opening.")
	m.registry.MustRegister(snapshot(r.collect))
	return m
}

func (m *channelMetrics) observe(h *atls.Handshake) {
	direction, by := directionOf(h.Role), "us"
	if failed, ok := errors.AsType[*atls.Error](h.Err); ok && failed.Remote {
		by = "peer"
	}
	m.handshakes.WithLabelValues(direction, string(h.Code), string(h.Step), by, h.Assurance).Inc()
	m.took.Observe(h.Duration.Seconds())
	if h.Code == atls.CodeOK {
		m.accepted.Add(1)
		if h.Assurance != "none" {
			m.appraisals.WithLabelValues(direction, "accepted", "").Inc()
		}
		return
	}
	m.refused.Add(1)
	if h.Step == atls.StepVerify && by == "us" {
		m.appraisals.WithLabelValues(direction, "refused", reasonOf(h)).Inc()
	}
}

// reasonOf is the first check that failed, or the code: both are the program's words.
func reasonOf(h *atls.Handshake) string {
	rejection, ok := errors.AsType[*remote.Rejection](h.Err)
	if !ok {
		return string(h.Code)
	}
	for _, c := range rejection.Result.Checks {
		if c.Outcome == remote.Failed {
			return c.Name
		}
	}
	return string(h.Code)
}

// collect adds what the process knows when it is asked.
func (r *peerReport) collect(w *snapshotWriter) {
	w.flag("build_info", "The program.", true, "version", version(), "go", runtime.Version(), "process", r.name)
	w.moment("start_time_seconds", "When the process started.", r.started)
	open := map[string]int{}
	var certificate time.Time
	for _, c := range r.end.Channels() {
		open[c.Peer().Assurance()]++
		if at := c.Peer().CertificateEnd(); !at.IsZero() && (certificate.IsZero() || at.Before(certificate)) {
			certificate = at
		}
	}
	for _, how := range []string{"certificate", "key", "none", "quote"} {
		w.gauge("channels_open", "Open channels, by how the peer attested: key is a quote kept from before, certificate is RA-TLS.", float64(open[how]), "assurance", how)
	}
	w.moment("peer_cert_expiry_timestamp_seconds", "When the first certificate ends of the peers of open RA-TLS channels, and the channel with it; 0 where there is none.", certificate)
	if r.renewer != nil {
		w.moment("own_cert_expiry_timestamp_seconds", "When our own RA-TLS certificate ends, which is renewed long before; 0 where there is none.", r.renewer.Until())
	}
	counts := r.end.Counts()
	const closed = "Connections closed before TLS: their address comes too often, or there is no room for it or at all."
	w.count("connections_refused_total", closed, counts.TooOften, "reason", "too_often")
	w.count("connections_refused_total", closed, counts.NoRoom, "reason", "no_room")
	w.lookups("key_mode", counts.KeyMode)
	for name, c := range r.verifier.CacheCounts() {
		w.lookups(name, c)
	}
	w.gauge("policy_generation", "Of the policy in force: each reload adds one.", float64(r.verifier.Generation()))
	h := r.verifier.Collateral().Health()
	w.gauge("collateral_platforms", "Platforms whose collateral is known.", float64(h.Platforms))
	w.moment("collateral_expiry_timestamp_seconds", "When the first of the collateral ends; 0 where none is known.", h.Until)
	w.moment("collateral_last_refresh_timestamp_seconds", "When the last of the collateral became known.", h.Since)
	w.count("collateral_refresh_failures_total", "Refreshes of known collateral that failed, since the last reload.", h.Failed)
	w.gauge("collateral_refused_platforms", "Platforms that no source had collateral for, lately.", float64(h.Refused))
}
