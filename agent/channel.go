package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"sync"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// channel.sock is where the processes that face the network get channel evidence. It
// takes what binds a TLS session and nothing else: report data and signature are made
// here, under tdx-atls/1's own tag, so that whoever takes over such a process can pose
// as this TD on its own connections only.

// loadChannelKey takes the agent key that the boot step has left and measured.
func (d *daemon) loadChannelKey() error {
	key, err := loadAgentKey(d.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("agent key: %w", err)
	}
	d.channel, err = atls.NewKey(key, func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		ev, err := d.attester.RemoteEvidence(ctx, rd)
		d.metrics.quoted("channel", err)
		return ev, err
	}, func(ctx context.Context) (measure.Digest, error) {
		regs, err := d.ledger.Check(ctx)
		if err == nil {
			err = d.attester.CheckBoot(regs)
		}
		return regs.RTMR[measure.RTMR3], err
	})
	return err
}

// channelRequest is a session that evidence is wanted for: hashes in hexadecimal.
type channelRequest struct {
	Role       string `json:"role"` // "C" or "S"
	Exporter   string `json:"exporter"`
	Transcript string `json:"transcript"`
	ClientKey  string `json:"client_key"`
	ServerKey  string `json:"server_key"`
	Mode       string `json:"mode"` // "quote" or "key"
}

// channelReply is a statement about it.
type channelReply struct {
	AgentKey  []byte          `json:"agent_key"` // DER
	RTMR3     measure.Digest  `json:"rtmr3"`
	Signature []byte          `json:"signature"`
	Quote     []byte          `json:"quote,omitempty"`
	EventLog  json.RawMessage `json:"event_log,omitempty"`
	VMConfig  string          `json:"vm_config,omitempty"`
}

// channelKeyReply is the hash of the agent key, whether the TD is a simulated one, and what
// is loosened by a configuration that this boot has measured.
type channelKeyReply struct {
	AgentKey  []byte         `json:"agent_key_sha256"`
	Simulated bool           `json:"simulated"`
	Loosened  map[string]any `json:"loosened,omitempty"`
}

func (d *daemon) channelHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/key", func(w http.ResponseWriter, _ *http.Request) {
		if d.channel == nil {
			replyError(w, errNoAgentKey)
			return
		}
		hash := d.channel.AgentKey()
		reply(w, http.StatusOK, channelKeyReply{hash[:], d.backend.simulated, d.cfg.loosened()})
	})
	d.certificateRoutes(mux)
	mux.HandleFunc("POST /v1/attest", func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		answer, err := d.attestChannel(r)
		d.recordRequest(r, socketChannel, guestapi.Record{Method: "attest", Class: guestapi.ClassQuote, Took: time.Since(start)}, err)
		if err != nil {
			d.report(err)
			replyError(w, err)
			return
		}
		reply(w, http.StatusOK, answer)
	})
	return mux
}

var errNoAgentKey = exitf(exitConfig, "this boot has no agent key, which channels need: the boot step makes and measures it (boot.agent_key)")

func (d *daemon) attestChannel(r *http.Request) (*channelReply, error) {
	if d.channel == nil {
		return nil, errNoAgentKey
	}
	b, err := readLimited(r.Body, "request", 4<<10)
	if err != nil {
		return nil, withExit(exitUsage, err)
	}
	var req channelRequest
	if err := strictObject(b, map[string]*string{"role": &req.Role, "exporter": &req.Exporter, "transcript": &req.Transcript,
		"client_key": &req.ClientKey, "server_key": &req.ServerKey, "mode": &req.Mode}); err != nil {
		return nil, withExit(exitUsage, fmt.Errorf("request: %w", err))
	}
	session, err := req.session()
	if err != nil {
		return nil, withExit(exitUsage, err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), atls.AttestTimeout)
	defer cancel()
	st, err := d.channel.Attest(ctx, session, req.Mode == "key")
	if err != nil {
		return nil, err
	}
	answer := &channelReply{AgentKey: st.AgentKey, RTMR3: st.RTMR3, Signature: st.Signature}
	if st.Evidence != nil {
		answer.Quote, answer.VMConfig = st.Evidence.Quote, st.Evidence.VMConfig
		answer.EventLog, err = measure.FormatEventLog(st.Evidence.Events, true)
	}
	return answer, err
}

func (req *channelRequest) session() (*atls.Session, error) {
	s := &atls.Session{}
	if req.Role != string(atls.Client) && req.Role != string(atls.Server) {
		return nil, fmt.Errorf(`role is %.10q, want "C" or "S"`, req.Role)
	}
	s.Role = atls.Role(req.Role[0])
	if req.Mode != "quote" && req.Mode != "key" {
		return nil, fmt.Errorf(`mode is %.10q, want "quote" or "key"`, req.Mode)
	}
	for _, f := range []struct {
		name, got string
		into      *[32]byte
	}{{"exporter", req.Exporter, &s.Exporter}, {"transcript", req.Transcript, &s.Transcript}, {"client_key", req.ClientKey, &s.ClientKey}, {"server_key", req.ServerKey, &s.ServerKey}} {
		b, err := hex.DecodeString(f.got)
		if err != nil || len(b) != len(f.into) {
			return nil, fmt.Errorf("%s has %d characters, want %d hexadecimal digits", f.name, len(f.got), 2*len(f.into))
		}
		*f.into = [32]byte(b)
	}
	return s, nil
}

// channelAttester asks the agent of this TD for channel evidence. It implements
// atls.Attester.
type channelAttester struct {
	socket   string
	key      [32]byte
	isReal   bool
	loosened map[string]any
	client   *http.Client // keeps connections: a signature costs less than a new one

	mu     sync.Mutex // guards what follows
	text   string     // of the last event log
	events []measure.Event
}

// eventLog reads an event log, which is mostly the last one.
func (a *channelAttester) eventLog(text []byte) ([]measure.Event, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.text != "" && a.text == string(text) {
		return a.events, nil
	}
	events, err := measure.ParseEventLog(text)
	if err == nil {
		a.text, a.events = string(text), events
	}
	return events, err
}

// channelIdle is how long a connection to channel.sock is kept: less than serve does.
const channelIdle = 5 * time.Second

func newChannelAttester(ctx context.Context, dir runtimeDir) (*channelAttester, error) {
	var answer channelKeyReply
	if err := callJSON(ctx, dir.channelSocket(), "/v1/key", &answer); err != nil {
		return nil, err
	}
	if len(answer.AgentKey) != 32 {
		return nil, fmt.Errorf("the agent's key has a hash of %d bytes, want 32", len(answer.AgentKey))
	}
	return &channelAttester{socket: dir.channelSocket(), key: [32]byte(answer.AgentKey), isReal: !answer.Simulated, loosened: answer.Loosened,
		client: &http.Client{Transport: &http.Transport{DialContext: dialUnix(dir.channelSocket()), MaxIdleConnsPerHost: 8, IdleConnTimeout: channelIdle}}}, nil
}

// AgentKey implements atls.Attester.
func (a *channelAttester) AgentKey() [32]byte { return a.key }

// Attest implements atls.Attester.
func (a *channelAttester) Attest(ctx context.Context, s *atls.Session, keyMode bool) (*atls.Statement, error) {
	mode := "quote"
	if keyMode {
		mode = "key"
	}
	body, err := json.Marshal(channelRequest{Role: string(s.Role), Exporter: hex.EncodeToString(s.Exporter[:]), Transcript: hex.EncodeToString(s.Transcript[:]),
		ClientKey: hex.EncodeToString(s.ClientKey[:]), ServerKey: hex.EncodeToString(s.ServerKey[:]), Mode: mode})
	if err != nil {
		return nil, err
	}
	b, err := callWith(ctx, a.client, a.socket, http.MethodPost, "/v1/attest", body)
	if err != nil {
		return nil, err
	}
	var answer channelReply
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, fmt.Errorf("the agent's answer: %w", err)
	}
	// To the peer it would look like an attack.
	if sum := sha256.Sum256(answer.AgentKey); sum != a.key {
		return nil, errors.New("the agent has another agent key than when this process started, as after a reboot of a simulated TD: start this process anew")
	}
	st := &atls.Statement{AgentKey: answer.AgentKey, RTMR3: answer.RTMR3, Signature: answer.Signature}
	if keyMode {
		return st, nil
	}
	events, err := a.eventLog(answer.EventLog)
	st.Evidence = &measure.Evidence{Quote: answer.Quote, Events: events, VMConfig: answer.VMConfig}
	return st, err
}
