package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// TestMetrics holds names and help to Prometheus' rules, and makes no quote.
func TestMetrics(t *testing.T) {
	d := benchDaemon(t)
	for end := time.Now().Add(20 * time.Second); d.attester.Stats().OK == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	before := d.attester.Stats().OK
	d.metrics.called("DstackGuest", "", 404, false)
	d.metrics.called("DstackGuest", "Info", 429, true)
	for _, err := range []error{nil, &measure.BusyError{}, fmt.Errorf("quote: %w", &measure.DivergenceError{}), context.DeadlineExceeded, context.Canceled, errors.New("host")} {
		d.metrics.quoted("channel", err)
	}
	problems, err := testutil.GatherAndLint(d.metrics.registry)
	check(t, err)
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for name, want := range map[string]int{"ready": 1, "rtmr_log_consistent": 4, "rtmr_events_total": 4, "quote_queue_depth": 2, "quote_duration_seconds": 1, "api_requests_total": 2, "api_throttled_total": 1, "build_info": 1,
		"eventlog_recoveries_total": 3, "quote_generation_conflicts_total": 1} {
		if n, err := testutil.GatherAndCount(d.metrics.registry, metricPrefix+name); err != nil || n != want {
			t.Errorf("%s has %d series, %v, want %d", name, n, err, want)
		}
	}
	if n := testutil.CollectAndCount(d.metrics.quotes); n < 6 {
		t.Errorf("%d results of quotes, want one for each", n)
	}
	for range 50 {
		if _, err := d.metrics.registry.Gather(); err != nil {
			t.Fatal(err)
		}
	}
	if now := d.attester.Stats().OK; now-before > 10 { // a few are made in the background
		t.Errorf("reading metrics made %d quotes", now-before)
	}
}

// TestChannelMetrics counts by the step, the code and whose refusal it was, and never by
// a word of the peer.
func TestChannelMetrics(t *testing.T) {
	r := &peerReport{}
	m := newChannelMetrics(r)
	for i := range 100 {
		m.observe(&atls.Handshake{Role: atls.Server, Code: atls.CodeBadFrame, Step: atls.StepHello, Assurance: "none", Service: fmt.Sprint(i), Remote: fmt.Sprint(i), Ref: fmt.Sprint(i), Err: errors.New(fmt.Sprint(i))})
	}
	m.observe(&atls.Handshake{Role: atls.Client, Code: atls.CodePolicyDenied, Step: atls.StepWaitEvidence, Assurance: "none", Err: &atls.Error{Remote: true, Code: atls.CodePolicyDenied}})
	m.observe(&atls.Handshake{Role: atls.Client, Code: atls.CodeOK, Step: atls.StepOpen, Assurance: "key"})
	if n := testutil.CollectAndCount(m.handshakes); n != 3 {
		t.Errorf("%d series of handshakes, want 3", n)
	}
	if n := testutil.ToFloat64(m.handshakes.WithLabelValues("in", "bad_frame", "hello", "us", "none")); n != 100 {
		t.Errorf("%v bad hellos, want 100", n)
	}
	if n := testutil.ToFloat64(m.handshakes.WithLabelValues("out", "policy_denied", "wait_evidence", "peer", "none")); n != 1 {
		t.Errorf("%v refusals of a peer, want 1", n)
	}
	if n := testutil.ToFloat64(m.appraisals.WithLabelValues("out", "accepted", "")); n != 1 || m.accepted.Load() != 1 || m.refused.Load() != 101 {
		t.Errorf("%v appraisals, %d and %d handshakes", n, m.accepted.Load(), m.refused.Load())
	}
}

// TestFailuresDoNotFloodTheLog has strangers fail as often as they like: what is not
// logged is counted, and what succeeds is logged all the same.
func TestFailuresDoNotFloodTheLog(t *testing.T) {
	var b bytes.Buffer
	r, log := newPeerReport(), slog.New(slog.NewTextHandler(&b, nil))
	for range 5000 {
		r.log(log, &atls.Handshake{Code: atls.CodeTimeout, Step: atls.StepTLS})
		r.log(log, &atls.Handshake{Code: atls.CodeOK, Step: atls.StepOpen})
	}
	failed, opened := strings.Count(b.String(), "no channel"), strings.Count(b.String(), "msg=channel")
	if failed < 100 || failed > 1000 || opened != 5000 || r.unlogged.Load() == 0 {
		t.Errorf("%d failures and %d channels in the log, %d not logged", failed, opened, r.unlogged.Load())
	}
}
