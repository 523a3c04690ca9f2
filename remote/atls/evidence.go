package atls

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"tdx-agent/measure"
)

// evidenceFrame is an EVIDENCE frame. The quote and the log are most of a handshake's
// bytes, so both are taken as they are, without encoding/json.
type evidenceFrame struct {
	format         string
	quote          []byte
	eventLog       []byte // JSON, not checked
	vmConfig       string
	collateral     json.RawMessage
	agentKey       []byte
	rtmr3          measure.Digest
	signature      []byte
	serverEvidence string
}

// encodeStatement is the EVIDENCE frame of a statement.
func encodeStatement(st *Statement, serverEvidence string, limit int) ([]byte, error) {
	b := []byte(`{"format":"` + formatDstack + `"`)
	if st.Evidence != nil {
		log, err := measure.FormatEventLog(st.Evidence.Events, true)
		if err != nil {
			return nil, err
		}
		b = append(make([]byte, 0, len(log)+2*len(st.Evidence.Quote)+len(st.Evidence.VMConfig)+1024), b...)
		b = appendBytes(b, "quote", st.Evidence.Quote)
		b = append(append(b, `,"event_log":`...), log...)
		if st.Evidence.VMConfig != "" {
			text, err := json.Marshal(st.Evidence.VMConfig)
			if err != nil {
				return nil, err
			}
			b = append(append(b, `,"vm_config":`...), text...)
		}
	}
	b = appendBytes(b, "agent_spki", st.AgentKey)
	b = hex.AppendEncode(append(b, `,"rtmr3":"`...), st.RTMR3[:])
	b = appendBytes(append(b, '"'), "sig", st.Signature)
	if serverEvidence != "" {
		b = append(append(append(b, `,"server_evidence":"`...), serverEvidence...), '"')
	}
	return frameOf(frameEvidence, append(b, '}'), min(limit, maxEvidence))
}

func appendBytes(b []byte, name string, value []byte) []byte {
	b = append(append(append(b, `,"`...), name...), `":"`...)
	return append(base64.StdEncoding.AppendEncode(b, value), '"')
}

// decodeEvidence reads an EVIDENCE frame. The values are parts of it.
func decodeEvidence(frame []byte) (*evidenceFrame, error) {
	all, err := members(frame[4:])
	if err != nil {
		return nil, err
	}
	e := &evidenceFrame{}
	into := map[string]any{"format": &e.format, "vm_config": &e.vmConfig, "collateral": &e.collateral, "agent_spki": &e.agentKey, "rtmr3": &e.rtmr3, "sig": &e.signature,
		"server_evidence": &e.serverEvidence}
	for _, m := range all {
		switch target, known := into[m.name]; {
		case m.name == "quote":
			e.quote, err = decodeBytes(m.value)
		case m.name == "event_log":
			e.eventLog = m.value
		case known:
			err = json.Unmarshal(m.value, target)
		case !json.Valid(m.value):
			err = fmt.Errorf("the value of %.40q is no JSON", m.name)
		}
		if err != nil {
			return nil, &formError{m.name + ": " + err.Error()}
		}
	}
	return e, nil
}

// decodeBytes reads a JSON string of base64.
func decodeBytes(value []byte) ([]byte, error) {
	if len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' || bytes.ContainsAny(value, "\r\n") { // which base64 would pass over
		return nil, fmt.Errorf("%.10q is no string of base64", value)
	}
	return base64.StdEncoding.AppendDecode(nil, value[1:len(value)-1])
}

// statement takes a statement out of an EVIDENCE frame. Its log is not read yet.
func (e *evidenceFrame) statement(keyMode bool) (*Statement, error) {
	st := &Statement{AgentKey: e.agentKey, RTMR3: e.rtmr3, Signature: e.signature}
	switch {
	case e.format != formatDstack:
		return nil, &unsupportedError{fmt.Sprintf("format %.40q", e.format)}
	case len(e.agentKey) > 256 || len(e.signature) > 256:
		return nil, &formError{"agent_spki or sig is too long"}
	case keyMode && (e.quote != nil || e.eventLog != nil || e.vmConfig != "" || e.collateral != nil):
		return nil, &formError{"evidence in key mode"}
	case keyMode:
		return st, nil
	}
	st.unread = e.eventLog
	st.Evidence = &measure.Evidence{Quote: e.quote, VMConfig: e.vmConfig}
	return st, nil
}

// knownLog is an event log as it was received, and what it says.
type knownLog struct {
	text   string
	events []measure.Event // shared: nobody changes them
}

// readLog reads the event log of evidence that was received. known is that of an earlier
// statement of the same peer, or nil.
func (st *Statement) readLog(known *knownLog) (*knownLog, error) {
	if known == nil || known.text != string(st.unread) {
		events, err := measure.ParseEventLog(st.unread)
		if err != nil {
			return nil, &evidenceError{err}
		}
		known = &knownLog{string(st.unread), events}
	}
	st.Evidence.Events = known.events
	return known, nil
}

// evidenceError says that evidence cannot be read.
type evidenceError struct{ err error }

func (e *evidenceError) Error() string { return "evidence: " + e.err.Error() }
func (e *evidenceError) Unwrap() error { return e.err }
