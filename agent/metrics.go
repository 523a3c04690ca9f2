package main

import (
	"context"
	"errors"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"tdx-agent/agent/status"
	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/atls"
)

// agentMetrics are the counters of serve. The rest of /metrics is its status.
type agentMetrics struct {
	quotes  *status.Counter  // class, result
	took    status.Histogram // of the host
	calls   *status.Counter  // service or application, method, code
	foreign atomic.Int64
}

func newAgentMetrics() *agentMetrics {
	return &agentMetrics{quotes: status.NewCounter("class", "result"), calls: status.NewCounter("service", "method", "code")}
}

// timedQuoter measures the host.
type timedQuoter struct {
	measure.Quoter
	took *status.Histogram
}

// Quote implements measure.Quoter.
func (q timedQuoter) Quote(ctx context.Context, rd measure.ReportData) ([]byte, error) {
	start := time.Now()
	b, err := q.Quoter.Quote(ctx, rd)
	if err == nil {
		q.took.Observe(time.Since(start))
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
	m.quotes.Inc(class, result)
}

// exposition is what GET /metrics of agent.sock says. It makes no quote.
func (d *daemon) exposition(ctx context.Context) *status.Exposition {
	s, e := d.status(ctx), &status.Exposition{}
	e.Gauge("build_info", "The program.", status.Flag(true, "version", s.Version, "go", runtime.Version(), "quotes", s.Backend.Quotes, "registers", s.Backend.Registers))
	e.Gauge("start_time_seconds", "When the agent started.", status.Moment(s.Started))
	e.Gauge("ready", "Whether log and registers agree, the boot step is done and a quote was made.", status.Flag(s.Ready))
	e.Gauge("simulator_active", "Whether the TD is simulated, so that nothing proves anything.", status.Flag(s.Simulated))
	var consistent, events []status.Sample
	for _, r := range s.Registers {
		name := strings.ToLower(r.Name)
		if r.Verdict == status.Match || r.Verdict == status.Mismatch {
			consistent = append(consistent, status.Flag(r.Verdict == status.Match, "rtmr", name))
		}
		if name != "mrtd" {
			events = append(events, status.Sample{Labels: []string{"rtmr", name}, Value: float64(r.Events)})
		}
	}
	e.Gauge("rtmr_log_consistent", "Whether the register is what its event log replays to.", consistent...)
	e.Counter("rtmr_events_total", "Events in the log of the register.", events...)
	e.Counter("rtmr_foreign_extends_total", "Times that a register was found to differ from its log.", status.Value(float64(d.metrics.foreign.Load())))
	d.exposeQuotes(e, &s.Quotes)
	e.Counter("api_requests_total", "Calls to the sockets of applications, by method and HTTP status.", d.metrics.calls.Samples()...)
	e.Gauge("audit_writable", "Whether the audit record can be written; only then are keys given.", status.Flag(s.Audit.Problem == ""))
	e.Counter("audit_lines_total", "Lines in the chain of the audit record.", status.Value(float64(s.Audit.Seq)))
	return e
}

func (d *daemon) exposeQuotes(e *status.Exposition, q *status.Quotes) {
	e.Counter("quote_requests_total", "Requests for quotes: local of this TD, channel of its peers.", d.metrics.quotes.Samples()...)
	e.Histogram("quote_duration_seconds", "What the host took for a quote.", &d.metrics.took)
	e.Gauge("quote_queue_depth", "Quotes that wait for their turn.",
		status.Sample{Labels: []string{"class", "channel"}, Value: float64(q.Remote)}, status.Sample{Labels: []string{"class", "local"}, Value: float64(q.Queued - q.Remote)})
	e.Gauge("quote_inflight", "Whether the host works on a quote.", status.Flag(d.attester.Running() > 0))
	e.Gauge("last_quote_success_timestamp_seconds", "When the last quote was made; 0 before the first.", status.Moment(q.LastSuccess))
	e.Gauge("last_quote_failure_timestamp_seconds", "When a quote failed last; 0 if none has.", status.Moment(q.LastFailure))
}

// called counts a call of an application. method is one of the surface's own, or "".
func (m *agentMetrics) called(service, method string, code int) {
	if method == "" {
		method = "unknown"
	}
	m.calls.Inc(service, method, strconv.Itoa(code))
}

// channelMetrics are the counters of a process with channels.
type channelMetrics struct {
	accepted, refused atomic.Int64
	handshakes        *status.Counter // direction, code, step, by, assurance
	appraisals        *status.Counter // direction, result, reason
	took              status.Histogram
}

func newChannelMetrics() channelMetrics {
	return channelMetrics{handshakes: status.NewCounter("direction", "code", "step", "by", "assurance"), appraisals: status.NewCounter("direction", "result", "reason")}
}

func (m *channelMetrics) observe(h *atls.Handshake) {
	direction, by := directionOf(h.Role), "us"
	failed, isError := errors.AsType[*atls.Error](h.Err)
	if isError && failed.Remote {
		by = "peer"
	}
	m.handshakes.Inc(direction, string(h.Code), string(h.Step), by, h.Assurance)
	m.took.Observe(h.Duration)
	if h.Code == atls.CodeOK {
		m.accepted.Add(1)
		if h.Assurance != "none" {
			m.appraisals.Inc(direction, "accepted", "")
		}
		return
	}
	m.refused.Add(1)
	if h.Step == atls.StepVerify && by == "us" {
		m.appraisals.Inc(direction, "refused", reasonOf(h))
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

// exposition is what GET /metrics of this process says.
func (r *peerReport) exposition() *status.Exposition {
	e, m := &status.Exposition{}, &r.metrics
	e.Gauge("build_info", "The program.", status.Flag(true, "version", version(), "go", runtime.Version(), "process", r.name))
	e.Gauge("start_time_seconds", "When the process started.", status.Moment(r.started))
	open := map[string]int{}
	for _, c := range r.channels() {
		open[c.Peer().Assurance()]++
	}
	var samples []status.Sample
	for _, how := range []string{"certificate", "key", "none", "quote"} {
		samples = append(samples, status.Sample{Labels: []string{"assurance", how}, Value: float64(open[how])})
	}
	e.Gauge("channels_open", "Open channels, by how the peer attested: key is a quote kept from before, certificate is RA-TLS.", samples...)
	e.Counter("handshakes_total", "Handshakes that ended, by the step they got to, the code, whose refusal it was, and how the peer attested.", m.handshakes.Samples()...)
	e.Histogram("handshake_duration_seconds", "From the connection to its end or opening.", &m.took)
	e.Counter("verify_total", "Appraisals of peers, with the first check that failed.", m.appraisals.Samples()...)
	e.Gauge("policy_generation", "Of the policy in force: each reload adds one.", status.Value(float64(r.verifier.Generation())))
	h := r.verifier.Collateral().Health()
	e.Gauge("collateral_platforms", "Platforms whose collateral is known.", status.Value(float64(h.Platforms)))
	e.Gauge("collateral_expiry_timestamp_seconds", "When the first of the collateral ends; 0 where none is known.", status.Moment(h.Until))
	e.Gauge("collateral_last_refresh_timestamp_seconds", "When the last of the collateral became known.", status.Moment(h.Since))
	e.Gauge("collateral_refused_platforms", "Platforms that no source had collateral for, lately.", status.Value(float64(h.Refused)))
	return e
}
