// Package status is the agent's state as operators see it: one value, which is JSON
// first, and the same as text.
package status

import (
	"time"

	"tdx-agent/measure"
)

// Schema names the JSON form. It only ever grows.
const Schema = "tdx-agent/status/v1"

// Status is the agent's state at one moment. Making one never takes a quote.
type Status struct {
	Schema    string `json:"schema"`
	Version   string `json:"version"`
	Simulated bool   `json:"simulated"` // nothing in it proves anything
	Started   Time   `json:"started"`

	Backend   Backend    `json:"backend"`
	Ready     bool       `json:"ready"`
	NotReady  []string   `json:"not_ready"` // what is missing, empty when ready
	Identity  Identity   `json:"identity"`
	Registers []Register `json:"registers"` // MRTD, RTMR0 to RTMR3
	Log       Log        `json:"log"`
	Quotes    Quotes     `json:"quotes"`
	// Loosened are the settings that are not at their default and loosen something.
	Loosened map[string]any `json:"loosened"`
	// Access says what each socket gives to whoever can open it.
	Access []Access `json:"access"`
	Audit  Audit    `json:"audit"`
	// Peers is what the processes with channels say. The status command asks them; the
	// agent does not know.
	Peers *PeersSummary `json:"peers,omitempty"`
	Notes []string      `json:"notes"`
}

// Time is a moment as RFC 3339 in UTC.
type Time = time.Time

// Backend says where quotes and registers come from.
type Backend struct {
	Quotes    string `json:"quotes"`    // "configfs-tsm", "qgs-vsock", "none"
	Registers string `json:"registers"` // "sysfs", "device", "none"
	CanExtend bool   `json:"can_extend"`
}

// Identity is what RTMR3 says of the application. Hashes and ids are hexadecimal.
type Identity struct {
	Measured    bool   `json:"measured"` // the boot step has finished: system-ready is in the log
	App         string `json:"app"`
	AppID       string `json:"app_id"`
	ComposeHash string `json:"compose_hash"`
	InstanceID  string `json:"instance_id"`
	KeyProvider string `json:"key_provider"`
	AgentKey    string `json:"agent_key"` // SHA-256 of the agent key's SubjectPublicKeyInfo
	// MRAggregated is over the whole log; MRAggregatedBoot over the log cut at
	// boot-mr-done, with no key provider.
	MRAggregated     string `json:"mr_aggregated"`
	MRAggregatedBoot string `json:"mr_aggregated_boot"`
}

// Verdicts on a register: whether the event log explains it.
const (
	Match    = "match"
	Mismatch = "mismatch"
	NoLog    = "no-log"        // nothing that could explain it
	Unread   = "unread"        // not readable here, and no quote was made yet
	Constant = "no-log-needed" // MRTD is not extended
)

// Register is one measurement register and what the log says of it.
type Register struct {
	Name     string `json:"name"`
	Value    string `json:"value"`
	Replayed string `json:"replayed,omitempty"` // given where it differs
	Verdict  string `json:"verdict"`
	Events   int    `json:"events"`
}

// Diverged says which register its log does not explain, or "" when there is none.
func (s *Status) Diverged() string {
	if s.Log.Verdict == Mismatch {
		return s.Log.Problem
	}
	for _, r := range s.Registers {
		if r.Verdict == Mismatch {
			return r.Name + " is not what its log replays to"
		}
	}
	return ""
}

// Log is the state of the RTMR3 log.
type Log struct {
	Events    int    `json:"events"`
	MaxEvents int    `json:"max_events"`
	Verdict   string `json:"verdict"` // Match, Mismatch or Unread
	Problem   string `json:"problem,omitempty"`
	Last      string `json:"last,omitempty"` // name of the last event
	LastTime  Time   `json:"last_time,omitzero"`
	// Parts are those of who may record events; the rest is the boot step's and the operator's.
	Parts []EventPart `json:"parts,omitempty"`
}

// EventPart is what somebody may have of the log, and has of it.
type EventPart struct {
	Owner     string `json:"owner"`
	Events    int    `json:"events"`
	MaxEvents int    `json:"max_events"`
	Bytes     int    `json:"bytes"`
	MaxBytes  int    `json:"max_bytes"`
	Full      bool   `json:"full"` // there is no room for even the smallest event
}

// Quotes counts quotes.
type Quotes = measure.QuoteStats

// Audit is the end of the audit record's chain.
type Audit struct {
	Seq     uint64 `json:"seq"`               // of the last line
	Head    string `json:"head"`              // SHA-256 of the last line
	Problem string `json:"problem,omitempty"` // why nothing can be written
	Lost    uint64 `json:"lost,omitempty"`    // lines since the last that could be
	Damage  string `json:"damage,omitempty"`  // what somebody else did to the file
}

// Access is what one socket gives.
type Access struct {
	Socket string   `json:"socket"`
	Grants []string `json:"grants"`
	// Application is who the socket was declared for; "" for the agent's own.
	Application string `json:"application,omitempty"`
	// UIDs are the only users that may call, where not everybody may who can open the
	// socket.
	UIDs []uint32 `json:"uids,omitempty"`
}
