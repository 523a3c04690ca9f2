package main

import (
	"errors"
	"net/http"

	"tdx-agent/agent/audit"
	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/status"
)

// refusalLines are how many lines a caller has, in each class, for calls that fail. Such
// calls cost him nothing, and the record keeps a limited number of lines.
var refusalLines = guestapi.Rate{PerSecond: 10, Burst: 200}

var errNoAudit = errors.New("the audit record could not be opened when the agent started; its log says why")

// openAudit continues the audit record. Without it the agent starts all the same, and
// gives nothing of a key.
func (d *daemon) openAudit() {
	l, err := audit.Open(d.dir.log(), audit.Options{Version: version(), Simulated: d.backend.simulated})
	if err != nil {
		d.log.Error("no audit record: keys will not be given", "error", err)
		return
	}
	d.audit = l
	var rates guestapi.Rates
	for class := range rates {
		rates[class] = refusalLines
	}
	d.refusals = guestapi.NewLimiter(rates)
	h := l.Head()
	d.log.Info("audit record", "line", h.Seq, "head", h.Hash)
	d.reportAudit(h)
}

// closeAudit logs the head: while no agent runs, the log is what knows it.
func (d *daemon) closeAudit() {
	if d.audit == nil {
		return
	}
	d.audit.Close()
	h := d.audit.Head()
	d.log.Info("audit record ends", "line", h.Seq, "head", h.Hash)
}

// record writes one call to the audit record.
func (d *daemon) record(socket string, r guestapi.Record) error {
	if d.audit == nil {
		return errNoAudit
	}
	missed := 0
	if r.Exit != 0 {
		var err error
		if missed, err = d.refusals.Take(r.Caller, r.Class); err != nil {
			return nil // the next line says that it was there
		}
	}
	e := audit.Entry{Socket: socket, Method: r.Method, Class: r.Class.String(), Name: r.Name, Result: resultOf(r.Exit), Exit: r.Exit,
		Micros: r.Took.Microseconds(), Missed: missed}
	if c := r.Caller; c.Known {
		e.Caller = &audit.Caller{UID: c.UID, GID: c.GID, PID: c.PID, Cgroup: c.Cgroup, Container: c.Container}
	}
	err := d.audit.Call(e, r.Arguments)
	d.reportAudit(d.audit.Head())
	return err
}

// recordRequest writes a call of the agent's own sockets, which ended with err.
func (d *daemon) recordRequest(r *http.Request, socket string, rec guestapi.Record, err error) {
	rec.Caller, rec.Exit = guestapi.CallerOf(r.Context()), exitCode(err)
	d.record(socket, rec) // status and log tell if it failed
}

func resultOf(exit int) string {
	switch exit {
	case 0:
		return audit.OK
	case exitDenied:
		return audit.Denied
	case exitThrottled:
		return audit.Throttled
	}
	return audit.Failed
}

// reportAudit logs a problem with the record when it is new.
func (d *daemon) reportAudit(h audit.Head) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h.Problem != "" && d.auditHead.Problem == "" {
		d.log.Error("the audit record cannot be written: keys are not given until it can", "error", h.Problem)
	}
	if h.Damage != "" && d.auditHead.Damage == "" {
		d.log.Error("somebody else has changed the audit record", "damage", h.Damage)
	}
	d.auditHead = h
}

func (d *daemon) auditStatus() status.Audit {
	if d.audit == nil {
		return status.Audit{Problem: errNoAudit.Error()}
	}
	h := d.audit.Head()
	return status.Audit{Seq: h.Seq, Head: h.Hash, Problem: h.Problem, Lost: h.Lost, Damage: h.Damage}
}
