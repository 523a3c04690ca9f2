package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Kinds of lines.
const (
	KindStart = "start" // the agent began to write
	KindCall  = "call"
)

// Results of calls.
const (
	OK        = "ok"
	Denied    = "denied"    // the caller may not
	Throttled = "throttled" // the caller may, and calls too often
	Failed    = "failed"    // anything else: a bad request, no quote
)

// Entry is one line. Hash and HMAC are hexadecimal.
type Entry struct {
	Seq  uint64    `json:"seq"` // from 1
	Time time.Time `json:"time"`
	Kind string    `json:"kind"`

	// Of a call: on which socket, which method, of which class (grant), and the name
	// that it is about, where there is one: the path of a key, the name of an event.
	Socket string `json:"socket,omitempty"`
	Method string `json:"method,omitempty"`
	Class  string `json:"class,omitempty"`
	Name   string `json:"name,omitempty"`

	Caller *Caller `json:"caller,omitempty"` // nil if the transport does not tell

	// Request is the HMAC-SHA-256 of method, a zero byte, and the arguments as they
	// were received, body or query; "" if they were not read.
	Request string `json:"request,omitempty"`
	Result  string `json:"result,omitempty"`
	Exit    int    `json:"exit,omitempty"`    // the program's exit status for the result
	Micros  int64  `json:"took_us,omitempty"` // until there was an answer
	// Missed is how many calls of the class by the caller before this one have no line of
	// their own, since there were too many: calls that failed, and quotes.
	Missed int `json:"missed,omitempty"`

	// Of a start: the agent's version, and how many bytes of a line that broke off were
	// removed.
	Version string `json:"version,omitempty"`
	Torn    int    `json:"torn,omitempty"`

	// Simulated is whether the agent's TD is. Every line says it: older ones are dropped.
	Simulated bool `json:"simulated,omitempty"`

	// Lost is how many lines before this one could not be written.
	Lost uint64 `json:"lost,omitempty"`
	// Prev is the hash of the line before, without its line feed; of the first line,
	// zeros.
	Prev string `json:"prev"`
}

// Caller is who called, as the kernel reported it when the connection was made.
type Caller struct {
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	PID       int32  `json:"pid"`
	Cgroup    string `json:"cgroup,omitempty"`
	Container string `json:"container,omitempty"`
}

// maxText bounds every text in a line that somebody else has chosen.
const maxText = 256

func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	return s[:maxText] + "..."
}

// maxLine bounds a line: the texts, each byte of which may become six, and the rest.
const maxLine = 5*6*(maxText+3) + 1024

// lineHash is what the next line calls Prev.
func lineHash(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// first is the Prev of the first line.
var first = hex.EncodeToString(make([]byte, sha256.Size))

// parse reads a line without its line feed.
func parse(line []byte) (Entry, error) {
	var e Entry
	if err := json.Unmarshal(line, &e); err != nil {
		return e, fmt.Errorf("not a line of this record: %w", err)
	}
	if e.Kind != KindStart && e.Kind != KindCall || e.Seq == 0 {
		return e, fmt.Errorf("not a line of this record: kind %q, seq %d", clip(e.Kind), e.Seq)
	}
	return e, nil
}
