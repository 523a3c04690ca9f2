package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

// RATLSConfig is about dstack's RA-TLS certificates, which are weaker than channels: see
// atls.RATLS.
type RATLSConfig struct {
	Endpoint   bool `toml:"endpoint"`
	LegacyOIDs bool `toml:"legacy_oids"`
}

func newRATLSConfig() RATLSConfig { return RATLSConfig{LegacyOIDs: true} }

// Certificates on channel.sock (ratls.endpoint, off by default). The processes that face
// the network make TLS keys of their own, and get evidence for them: they send a public
// key, and report data is made of it here, under dstack's tag for certificates. So
// whoever takes over such a process gets no quote for a channel or for an application's
// data. What he does get, unlike with channels, outlives the connection and the process:
// evidence for a key that he takes away, which verifiers of RA-TLS accept from anywhere,
// since they cannot tell how old its quote is. A KMS is one of these: to it he is the
// application, whose keys it gives. That is inherent in
// RA-TLS, and why the setting is off by default, measured into RTMR3 when it is on, and
// why policies must accept such certificates in so many words. A container cannot ask:
// channel.sock is open to the endpoint's user and group alone; where raw_report_data is
// on, whoever can open dstack.sock could ask there for the same.

var errNoRATLS = exitf(exitConfig, "this agent gives no evidence for RA-TLS certificates, which are weaker than attested channels: ratls.endpoint = true in agent.toml allows it, from the next boot on")

const (
	maxChangeWait = 20 * time.Second // for RTMR3 to be extended
	answerWait    = 5 * time.Second  // to write the answer in
)

// certificateReply is evidence for a key.
type certificateReply struct {
	Quote    []byte          `json:"quote"`
	EventLog json.RawMessage `json:"event_log"`
	VMConfig string          `json:"vm_config"`
}

// changedReply says whether RTMR3 or the vm_config are others than were asked about, and
// whether the TD is a simulated one.
type changedReply struct {
	Changed   bool `json:"changed"`
	Simulated bool `json:"simulated"`
}

// certificateRoutes adds what RA-TLS certificates need to channel.sock.
func (d *daemon) certificateRoutes(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/certificate-evidence", func(w http.ResponseWriter, r *http.Request) {
		extendDeadlines(w, quoteWait)
		start := time.Now()
		answer, err := d.attestCertificate(r)
		d.recordRequest(r, socketChannel, guestapi.Record{Method: "certificate-evidence", Class: guestapi.ClassQuote, Took: time.Since(start)}, err)
		if err != nil {
			d.report(err)
			replyError(w, err)
			return
		}
		reply(w, http.StatusOK, answer)
	})
	mux.HandleFunc("GET /v1/changed", func(w http.ResponseWriter, r *http.Request) {
		if !d.cfg.RATLS.Endpoint {
			replyError(w, errNoRATLS)
			return
		}
		extendDeadlines(w, maxChangeWait)
		changed, err := d.awaitChange(r.Context(), r.URL.Query().Get("rtmr3"), r.URL.Query().Get("vm_config_sha256"))
		if err != nil {
			replyError(w, err)
			return
		}
		reply(w, http.StatusOK, changedReply{changed, d.backend.simulated})
	})
}

// extendDeadlines lets an answer take longer than the server's other ones. The read
// deadline matters too: when it passes, the request counts as broken off.
func extendDeadlines(w http.ResponseWriter, wait time.Duration) {
	c, at := http.NewResponseController(w), time.Now().Add(wait+answerWait)
	c.SetReadDeadline(at) // an error says that the connection is gone
	c.SetWriteDeadline(at)
}

func (d *daemon) attestCertificate(r *http.Request) (*certificateReply, error) {
	if !d.cfg.RATLS.Endpoint {
		return nil, errNoRATLS
	}
	b, err := readLimited(r.Body, "request", 4<<10)
	if err != nil {
		return nil, withExit(exitUsage, err)
	}
	var text string
	if err := strictObject(b, map[string]*string{"spki": &text}); err != nil {
		return nil, withExit(exitUsage, fmt.Errorf("request: %w", err))
	}
	spki, err := parseP256SPKI(text)
	if err != nil {
		return nil, withExit(exitUsage, fmt.Errorf("request: spki: %w", err))
	}
	ctx, cancel := context.WithTimeout(r.Context(), quoteWait)
	defer cancel()
	ev, err := d.attester.Evidence(ctx, ratls.ReportData(spki), "certificate") // one caller among the others: no more than its turn
	if err != nil {
		return nil, err
	}
	answer := &certificateReply{Quote: ev.Quote, VMConfig: ev.VMConfig}
	answer.EventLog, err = measure.FormatEventLog(ev.Events, true)
	return answer, err
}

// parseP256SPKI takes a P-256 key in its one DER form: what is hashed under the tag is a
// key and nothing else.
func parseP256SPKI(text string) ([]byte, error) {
	spki, err := hex.DecodeString(text)
	if err != nil {
		return nil, errors.New("want a DER SubjectPublicKeyInfo in hexadecimal")
	}
	parsed, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("want a P-256 key")
	}
	if again, err := x509.MarshalPKIXPublicKey(key); err != nil || string(again) != string(spki) {
		return nil, errors.New("want the DER that x509 writes for this key")
	}
	return spki, nil
}

// awaitChange returns true once RTMR3 or the vm_config are not the ones given, and false
// after a while.
func (d *daemon) awaitChange(ctx context.Context, rtmr3, vmConfig string) (bool, error) {
	var known measure.Digest
	if err := known.UnmarshalText([]byte(rtmr3)); err != nil {
		return false, withExit(exitUsage, fmt.Errorf("rtmr3: %w", err))
	}
	own := ""
	if d.files != nil {
		own = d.files.SysConfig.VMConfig
	}
	if vmConfig != configHash(own) {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, maxChangeWait)
	defer cancel()
	for {
		rings := d.extended.wait() // before the look, so that nothing falls between
		s, err := d.ledger.Snapshot(ctx)
		if err := d.report(err); err != nil {
			return false, err
		}
		if s.Register != known {
			return true, nil
		}
		select {
		case <-rings:
		case <-ctx.Done():
			return false, nil
		}
	}
}

func configHash(vmConfig string) string {
	sum := sha256.Sum256([]byte(vmConfig))
	return hex.EncodeToString(sum[:])
}

// bell tells everybody who waits. The zero value is ready.
type bell struct {
	mu sync.Mutex
	ch chan struct{}
}

// wait returns what is closed by the next ring.
func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// certificateAttester asks the agent of this TD for the evidence of certificates. It
// implements ratls.Attester.
type certificateAttester struct{ socket string }

// Evidence implements ratls.Attester.
func (a *certificateAttester) Evidence(ctx context.Context, spki []byte) (*measure.Evidence, error) {
	body, err := json.Marshal(map[string]string{"spki": hex.EncodeToString(spki)})
	if err != nil {
		return nil, err
	}
	b, err := call(ctx, a.socket, http.MethodPost, "/v1/certificate-evidence", body)
	if err != nil {
		return nil, err
	}
	var answer certificateReply
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, fmt.Errorf("the agent's answer: %w", err)
	}
	events, err := measure.ParseEventLog(answer.EventLog)
	return &measure.Evidence{Quote: answer.Quote, Events: events, VMConfig: answer.VMConfig}, err
}

// Changed implements ratls.Attester.
func (a *certificateAttester) Changed(ctx context.Context, ev *measure.Evidence) error {
	quote, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		return err
	}
	query := url.Values{"rtmr3": {quote.Body.RTMR[measure.RTMR3].String()}, "vm_config_sha256": {configHash(ev.VMConfig)}}
	for ctx.Err() == nil {
		var answer changedReply
		if err := callJSON(ctx, a.socket, "/v1/changed?"+query.Encode(), &answer); err != nil {
			if ctx.Err() != nil {
				break
			}
			return err
		}
		if answer.Changed {
			return nil
		}
	}
	return ctx.Err()
}
