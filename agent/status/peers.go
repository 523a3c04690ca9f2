package status

// PeersSchema names the JSON form of [Peers]. It only ever grows.
const PeersSchema = "tdx-agent/peers/v1"

// Peers is what the processes that have channels say of them. They face the network, so
// this is for people to read: nothing decides by it.
type Peers struct {
	Schema    string        `json:"schema"`
	Processes []PeerProcess `json:"processes"`
}

// PeerProcess is an endpoint, or a connect that serves a local socket.
type PeerProcess struct {
	Name       string        `json:"name"` // "endpoint", "connect"
	PID        int           `json:"pid"`
	Started    Time          `json:"started"`
	Policy     string        `json:"policy"`
	Generation uint64        `json:"policy_generation"`
	Accepted   int           `json:"accepted"` // handshakes since the start
	Refused    int           `json:"refused"`  // those that failed, by whichever end
	Peers      []Peer        `json:"peers"`
	Failures   []PeerFailure `json:"failures"` // the last 64, the latest first
}

// Peer is one end of an open channel. Hashes and ids are hexadecimal.
type Peer struct {
	Ref       string `json:"ref"`       // the same at the peer
	Direction string `json:"direction"` // "in": the peer has dialled
	Address   string `json:"address"`
	Service   string `json:"service"`
	// Assurance says how the peer attested on this channel: "quote", "key" (its measured
	// key signed; the quote is of an earlier channel), "certificate" (RA-TLS, which is
	// weaker: it can be relayed, and its quote may be old) or "none": it proved nothing,
	// and no claim is known.
	Assurance string `json:"assurance"`
	Entry     string `json:"entry"` // of the policy
	Policy    string `json:"policy"`
	Simulated bool   `json:"simulated"` // its quote does not end in Intel's root

	AppID       string   `json:"app_id"`
	InstanceID  string   `json:"instance_id"`
	ComposeHash string   `json:"compose_hash"`
	KeyProvider string   `json:"key_provider"`
	Image       string   `json:"image"` // of the policy, "" if any may boot
	MRTD        string   `json:"mrtd"`
	TCBStatus   string   `json:"tcb_status"`
	Advisories  []string `json:"advisories"`
	AgentKey    string   `json:"agent_key"`
	QuoteSHA256 string   `json:"quote_sha256"`

	VerifiedAt Time  `json:"verified_at,omitzero"` // when the quote was accepted
	Opened     Time  `json:"opened"`
	Expires    Time  `json:"expires"`
	Draining   bool  `json:"draining"` // the session has ended
	BytesIn    int64 `json:"bytes_in"` // of the application, from the peer
	BytesOut   int64 `json:"bytes_out"`
}

// PeerFailure is a handshake that failed.
type PeerFailure struct {
	Time      Time   `json:"time"`
	Millis    int64  `json:"took_ms"`
	Direction string `json:"direction"`
	Address   string `json:"address"`
	Service   string `json:"service"` // the peer's word, where it has dialled
	Ref       string `json:"ref"`     // "" before both hellos
	Step      string `json:"step"`
	Code      string `json:"code"`
	ByPeer    bool   `json:"by_peer"` // the peer refused, and its log has the reason
	Entry     string `json:"entry"`   // of the policy, that came closest
	Error     string `json:"error"`
	// Checks are those that failed, with what was there and what was wanted.
	Checks []FailedCheck `json:"checks"`
}

// FailedCheck is a check of an appraisal that failed: a remote.Check as an operator
// needs it.
type FailedCheck struct {
	Name string `json:"name"`
	Code string `json:"code"`
	Got  string `json:"got"`
	Want string `json:"want"`
	Hint string `json:"hint"`
}

// PeersSummary is what a status shows of [Peers].
type PeersSummary struct {
	Processes int          `json:"processes"`
	Open      int          `json:"open"`
	Accepted  int          `json:"accepted"`
	Refused   int          `json:"refused"`
	Last      *PeerFailure `json:"last_failure,omitempty"`
}

// Summary counts. Nil: there is no process with channels.
func (p *Peers) Summary() *PeersSummary {
	if len(p.Processes) == 0 {
		return nil
	}
	s := &PeersSummary{Processes: len(p.Processes)}
	for i := range p.Processes {
		of := &p.Processes[i]
		s.Open += len(of.Peers)
		s.Accepted += of.Accepted
		s.Refused += of.Refused
		for j := range of.Failures {
			if s.Last == nil || of.Failures[j].Time.After(s.Last.Time) {
				s.Last = &of.Failures[j]
			}
		}
	}
	return s
}

// Only keeps what has this ref.
func (p *Peers) Only(ref string) *Peers {
	kept := &Peers{Schema: p.Schema, Processes: []PeerProcess{}}
	for _, of := range p.Processes {
		peers, failures := of.Peers, of.Failures
		of.Peers, of.Failures = []Peer{}, []PeerFailure{}
		for _, peer := range peers {
			if peer.Ref == ref {
				of.Peers = append(of.Peers, peer)
			}
		}
		for _, f := range failures {
			if f.Ref == ref {
				of.Failures = append(of.Failures, f)
			}
		}
		if len(of.Peers)+len(of.Failures) > 0 {
			kept.Processes = append(kept.Processes, of)
		}
	}
	return kept
}
