package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"tdx-agent/agent/guestapi"
	"tdx-agent/agent/keys"
	"tdx-agent/agent/status"
	"tdx-agent/measure"
)

func trimSpace(b []byte) []byte { return bytes.TrimSpace(b) }

// Info implements guestapi.Guest. It takes no quote: the registers are read, and the
// answer is kept until they change.
func (d *daemon) Info(ctx context.Context) (guestapi.Info, error) {
	s, err := d.ledger.Snapshot(ctx)
	if err := d.report(err); err != nil {
		return guestapi.Info{}, err
	}
	regs, err := d.registers()
	if err != nil {
		return guestapi.Info{}, err
	}
	key := infoKey{regs: regs, records: len(s.Records)}
	d.mu.Lock()
	info, fresh, cert := d.info, d.infoOf == key, d.appCert
	d.mu.Unlock()
	if !fresh {
		if info, err = d.newInfo(s, regs); err != nil {
			return info, err
		}
		d.mu.Lock()
		d.info, d.infoOf = info, key
		d.mu.Unlock()
	}
	info.AppCert = cert
	return info, nil
}

func (d *daemon) newInfo(s measure.Snapshot, regs measure.Registers) (guestapi.Info, error) {
	events := s.Events()
	id, err := measure.IdentityOf(events)
	if err != nil {
		d.log.Warn("identity events are not in order", "error", err)
	}
	replayed := regs
	replayed.RTMR[measure.RTMR3] = s.Log
	aggregated, device := measure.MRAggregated(replayed), measure.DeviceID(nil)
	info := guestapi.Info{
		AppID: id.AppID, InstanceID: id.InstanceID, ComposeHash: id.ComposeHash, DeviceID: device[:], MRAggregated: aggregated[:],
		KeyProviderInfo: id.KeyProvider, CloudVendor: d.cloud[0], CloudProduct: d.cloud[1],
	}
	tcb := guestapi.TCBInfo{MRTD: regs.MRTD, RTMR: regs.RTMR, MRAggregated: aggregated[:], ComposeHash: id.ComposeHash, DeviceID: device[:],
		Events: slices.Concat(d.backend.boot, events)}
	if d.files != nil {
		info.AppName, info.VMConfig = d.files.Compose.Name, d.files.SysConfig.VMConfig
		info.OSImageHash = osImageHash(info.VMConfig)
		tcb.AppCompose, tcb.OSImageHash = string(d.files.AppCompose), info.OSImageHash
	}
	info.TCBInfo, err = tcb.Format()
	return info, err
}

// osImageHash is a claim of the host, as in dstack's own Info.
func osImageHash(vmConfig string) []byte {
	var c struct {
		Hash string `json:"os_image_hash"`
	}
	if json.Unmarshal([]byte(vmConfig), &c) != nil {
		return nil
	}
	h, err := hex.DecodeString(c.Hash)
	if err != nil || len(h) != sha256.Size {
		return nil
	}
	return h
}

// status makes the operators' view. It takes no quote.
func (d *daemon) status(ctx context.Context) *status.Status {
	s, err := d.ledger.Snapshot(ctx)
	st := &status.Status{
		Schema: status.Schema, Version: version(), Simulated: d.backend.simulated, Started: d.started,
		Backend:  status.Backend{Quotes: d.backend.quoteSource, Registers: d.backend.registerSource, CanExtend: d.backend.canExtend},
		Log:      status.Log{Events: len(s.Records), MaxEvents: measure.DefaultMaxEvents, Verdict: status.Match},
		Quotes:   d.attester.Stats(),
		Loosened: d.cfg.loosened(), Access: d.access, Audit: d.auditStatus(), Notes: slices.Clone(d.backend.notes), NotReady: []string{},
	}
	if n := len(s.Records); n > 0 {
		st.Log.Last, st.Log.LastTime = s.Records[n-1].Name, s.Records[n-1].Time
	}
	events := s.Events()
	switch {
	case err != nil:
		st.Log.Verdict, st.Log.Problem = status.Mismatch, err.Error()
		st.NotReady = append(st.NotReady, err.Error())
	case s.Unread:
		st.Log.Verdict = status.Unread
	}
	d.report(err)
	if d.cfg.givesKeys() && d.keys.absent != nil {
		st.Notes = append(st.Notes, d.keys.absent.Error())
	}
	if f, ok := d.keys.provider.(keys.File); ok {
		if note := f.Exposed(); note != "" {
			st.Notes = append(st.Notes, note)
		}
	}
	d.identity(st, events, s)
	st.Notes = append(st.Notes, d.keyNotes(st.Identity.KeyProvider)...)
	if st.Quotes.LastSuccess.IsZero() {
		why := "no quote was made yet"
		if d.backend.quoter == nil {
			why = "this kernel offers no quotes"
		}
		st.NotReady = append(st.NotReady, why)
	}
	if why := d.keys.missing(); why != nil {
		st.NotReady = append(st.NotReady, why.Error())
	}
	st.Ready = len(st.NotReady) == 0
	if st.Notes == nil {
		st.Notes = []string{}
	}
	return st
}

func (d *daemon) identity(st *status.Status, events []measure.Event, s measure.Snapshot) {
	id, err := measure.IdentityOf(events)
	if err != nil {
		st.Notes = append(st.Notes, err.Error())
	}
	st.Identity = status.Identity{Measured: d.measured(events), AppID: hex.EncodeToString(id.AppID), ComposeHash: hex.EncodeToString(id.ComposeHash),
		InstanceID: hex.EncodeToString(id.InstanceID), KeyProvider: id.KeyProvider, AgentKey: hex.EncodeToString(id.AgentKey)}
	if !st.Identity.Measured {
		st.NotReady = append(st.NotReady, "the boot step (tdx-agent measure) has not finished")
	}
	if d.files != nil {
		st.Identity.App = d.files.Compose.Name
	}
	regs, err := d.registers()
	if err != nil {
		st.Notes = append(st.Notes, fmt.Sprintf("registers: %v", err))
		st.Registers = []status.Register{}
		return
	}
	st.Registers = d.judge(regs, s)
	if err := d.attester.CheckBoot(regs); err != nil {
		st.NotReady = append(st.NotReady, err.Error())
	}
	replayed := regs
	replayed.RTMR[measure.RTMR3] = s.Log
	st.Identity.MRAggregated = hexOf(measure.MRAggregated(replayed))
	if boot, ok := measure.BootTimeEvents(events); ok {
		if r, err := measure.Replay(boot); err == nil {
			replayed.RTMR[measure.RTMR3] = r[measure.RTMR3]
			st.Identity.MRAggregatedBoot = hexOf(measure.MRAggregated(replayed))
		}
	}
}

func hexOf(h [32]byte) string { return hex.EncodeToString(h[:]) }

// judge compares every register with the log that should explain it.
func (d *daemon) judge(regs measure.Registers, s measure.Snapshot) []status.Register {
	boot, err := measure.Replay(d.backend.boot)
	counts := map[int]int{measure.RTMR3: len(s.Records)}
	for i := range d.backend.boot {
		counts[d.backend.boot[i].IMR]++
	}
	out := []status.Register{{Name: "MRTD", Value: regs.MRTD.String(), Verdict: status.Constant}}
	for i, r := range regs.RTMR {
		reg := status.Register{Name: fmt.Sprintf("RTMR%d", i), Value: r.String(), Verdict: status.Match, Events: counts[i]}
		log := boot[i]
		if i == measure.RTMR3 {
			log = s.Log
		}
		switch {
		case i != measure.RTMR3 && len(d.backend.boot) == 0:
			reg.Verdict = status.NoLog
		case log != r || err != nil:
			reg.Verdict, reg.Replayed = status.Mismatch, log.String()
		}
		out = append(out, reg)
	}
	return out
}

// switches names the loosened settings, for a log line.
func (c *Config) switches() []string { return slices.Sorted(maps.Keys(c.loosened())) }
