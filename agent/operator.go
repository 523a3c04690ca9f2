package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"tdx-agent/agent/guestapi"
	"tdx-agent/measure"
)

// Schemas of the operators' API. They only ever grow.
const (
	logSchema  = "tdx-agent/log/v1"
	emitSchema = "tdx-agent/emit/v1"
)

// logDocument is the whole event log with what it replays to.
type logDocument struct {
	Schema    string           `json:"schema"`
	Simulated bool             `json:"simulated"`
	Boot      json.RawMessage  `json:"boot"`    // dstack's JSON form, RTMR0 to RTMR2
	Events    json.RawMessage  `json:"events"`  // the same form, RTMR3
	Records   []measure.Record `json:"records"` // RTMR3 with the register before and after
	Replayed  [4]string        `json:"replayed"`
	Registers [4]string        `json:"registers"` // as read; "" where not readable
	Problem   string           `json:"problem,omitempty"`
}

// operatorHandler serves agent.sock: facts only, none of which costs a quote.
func (d *daemon) operatorHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, d.status(r.Context()))
	})
	mux.HandleFunc("GET /v1/log", func(w http.ResponseWriter, r *http.Request) {
		doc, err := d.logDocument(r)
		if err != nil {
			replyError(w, err)
			return
		}
		reply(w, http.StatusOK, doc)
	})
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		if err := d.alive(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", d.serveReady)
	mux.Handle("GET /metrics", d.metrics.handler())
	return mux
}

func (d *daemon) serveReady(w http.ResponseWriter, r *http.Request) {
	s := d.status(r.Context())
	if !s.Ready {
		http.Error(w, strings.Join(s.NotReady, "\n"), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
	if r.URL.Query().Has("verbose") {
		fmt.Fprintf(w, "log %s\nquotes %d ok, last %s\n", s.Log.Verdict, s.Quotes.OK, s.Quotes.LastSuccess.Format(time.RFC3339))
	}
}

func (d *daemon) logDocument(r *http.Request) (*logDocument, error) {
	s, err := d.ledger.Snapshot(r.Context())
	doc := &logDocument{Schema: logSchema, Simulated: d.backend.simulated, Records: s.Records}
	if doc.Records == nil {
		doc.Records = []measure.Record{}
	}
	if err := d.report(err); err != nil {
		return nil, err
	}
	if err != nil {
		doc.Problem = err.Error()
	}
	boot, err := measure.Replay(d.backend.boot)
	if err != nil {
		return nil, fmt.Errorf("boot event log: %w", err)
	}
	boot[measure.RTMR3] = s.Log
	regs, regErr := d.registers()
	for i := range boot {
		doc.Replayed[i] = boot[i].String()
		if regErr == nil {
			doc.Registers[i] = regs.RTMR[i].String()
		}
	}
	if err := d.attester.CheckBoot(regs); regErr == nil && err != nil && doc.Problem == "" {
		doc.Problem = err.Error()
	}
	if doc.Boot, err = measure.FormatEventLog(d.backend.boot, false); err != nil {
		return nil, err
	}
	doc.Events, err = measure.FormatEventLog(s.Events(), false)
	return doc, err
}

// emitRequest is an event from an operator.
type emitRequest struct {
	Event   string `json:"event"`
	Payload string `json:"payload"` // hexadecimal
	Key     string `json:"idempotency_key"`
}

// emitReply is the record that answers it.
type emitReply struct {
	Schema    string         `json:"schema"`
	Simulated bool           `json:"simulated"`
	Record    measure.Record `json:"record"`
}

// adminHandler serves admin.sock, which only root (or, simulated, the owner) can open.
func (d *daemon) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/emit", func(w http.ResponseWriter, r *http.Request) {
		start, req := time.Now(), emitRequest{}
		b, err := readLimited(r.Body, "request", 64<<10)
		if err != nil {
			replyError(w, withExit(exitUsage, err))
			return
		}
		record, err := d.adminEmit(r.Context(), b, &req)
		d.recordRequest(r, socketAdmin, guestapi.Record{Method: "emit", Class: guestapi.ClassMeasure, Name: req.Event, Arguments: b, Took: time.Since(start)}, err)
		if err != nil {
			replyError(w, err)
			return
		}
		reply(w, http.StatusOK, emitReply{Schema: emitSchema, Simulated: d.backend.simulated, Record: record})
	})
	return mux
}

func (d *daemon) adminEmit(ctx context.Context, b []byte, req *emitRequest) (measure.Record, error) {
	if err := strictObject(b, map[string]*string{"event": &req.Event, "payload": &req.Payload, "idempotency_key": &req.Key}); err != nil {
		return measure.Record{}, withExit(exitUsage, fmt.Errorf("request: %w", err))
	}
	payload, err := hex.DecodeString(req.Payload)
	if err != nil {
		return measure.Record{}, exitf(exitUsage, "payload: %v", err)
	}
	if len(req.Key) > 128 {
		return measure.Record{}, exitf(exitUsage, "idempotency key has %d characters, want at most 128", len(req.Key))
	}
	if err := guestapi.CheckEvent(req.Event, payload); err != nil {
		return measure.Record{}, err // with its own exit status
	}
	return d.emit(ctx, measure.Entry{Name: req.Event, Payload: payload, Key: req.Key, Caller: "admin"})
}

// strictObject decodes one JSON object of strings, and nothing after it. What it
// leads to cannot be taken back, so a name that is unknown, written differently or
// there twice is refused: two parsers might not agree on what was asked.
func strictObject(b []byte, members map[string]*string) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errors.New("want a JSON object")
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		name, _ := t.(string)
		switch to := members[name]; {
		case to == nil:
			return fmt.Errorf("unknown member %q", name)
		case seen[name]:
			return fmt.Errorf("duplicate member %q", name)
		default:
			if t, err = dec.Token(); err != nil {
				return err
			}
			value, ok := t.(string)
			if !ok {
				return fmt.Errorf("%s: want a string", name)
			}
			*to, seen[name] = value, true
		}
	}
	if _, err := dec.Token(); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("something follows the object")
	}
	return nil
}

func reply(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code, b = http.StatusInternalServerError, []byte(`{"error":"the answer could not be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)+1))
	w.WriteHeader(code)
	w.Write(append(b, '\n'))
}

// refusalReply is the answer to a request that failed.
type refusalReply struct {
	Error string `json:"error"`
	// RetryAfter is when to try again, where that helps.
	RetryAfter int64 `json:"retry_after_ms,omitempty"`
}

func replyError(w http.ResponseWriter, err error) {
	w.Header().Set(guestapi.ExitHeader, strconv.Itoa(exitCode(err)))
	status, answer := http.StatusBadRequest, refusalReply{Error: err.Error()}
	var busy interface{ RetryAfter() time.Duration }
	if errors.As(err, &busy) {
		status, answer.RetryAfter = http.StatusTooManyRequests, max(1, busy.RetryAfter().Milliseconds())
	}
	reply(w, status, answer)
}
