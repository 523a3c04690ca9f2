package collateral

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tdx-agent/remote/dcap"
)

const (
	floorSchema  = "tdx-agent/collateral-floor/v1"
	maxFloor     = 1 << 20 // bytes of the file
	maxPlatforms = 1024    // there are a few dozen FMSPCs in the world
)

// mark is how far a document came: its evaluation number or CRL number, and its
// issueDate or thisUpdate. Both only ever rise. The size of a CRL says nothing: it
// shrinks when certificates expire, and Intel's went from 57 entries to 129 and back.
type mark struct {
	Number uint64    `json:"number"`
	Issued time.Time `json:"issued"`
}

// floorKey names the marks of a platform. The channels have different evaluation
// numbers at the same time.
type floorKey struct {
	platform
	channel string
}

func (k floorKey) compare(other floorKey) int {
	return cmp.Or(bytes.Compare(k.fmspc[:], other.fmspc[:]), cmp.Compare(k.ca, other.ca), cmp.Compare(k.channel, other.channel))
}

// marks are those of the documents in the order of [dcap.Collateral.Documents].
type marks map[floorKey][4]mark

// floorFile is the file's JSON.
type floorFile struct {
	Schema    string          `json:"schema"`
	Platforms []floorPlatform `json:"platforms"` // in the order of their keys
}

type floorPlatform struct {
	FMSPC      string `json:"fmspc"`
	CA         string `json:"ca"`
	Channel    string `json:"update_channel"`
	TCBInfo    mark   `json:"tcb_info"`
	QEIdentity mark   `json:"qe_identity"`
	PCKCRL     mark   `json:"pck_crl"`
	RootCRL    mark   `json:"root_crl"`
}

func (m marks) encode() ([]byte, error) {
	f := floorFile{Schema: floorSchema, Platforms: []floorPlatform{}}
	for _, k := range slices.SortedFunc(maps.Keys(m), floorKey.compare) {
		d := m[k]
		f.Platforms = append(f.Platforms, floorPlatform{hex.EncodeToString(k.fmspc[:]), k.ca, k.channel, d[0], d[1], d[2], d[3]})
	}
	text, err := json.MarshalIndent(f, "", "  ")
	return append(text, '\n'), err
}

// decodeMarks reads the floor's file. It takes nothing but what encode writes, byte
// for byte, so that damage does not pass for a low floor.
func decodeMarks(text []byte) (marks, error) {
	if len(text) > maxFloor {
		return nil, fmt.Errorf("%d bytes, want at most %d", len(text), maxFloor)
	}
	var f floorFile
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, err
	}
	if f.Schema != floorSchema || len(f.Platforms) > maxPlatforms {
		return nil, fmt.Errorf("schema %q with %d platforms, want %q with at most %d", f.Schema, len(f.Platforms), floorSchema, maxPlatforms)
	}
	m := make(marks, len(f.Platforms))
	for _, p := range f.Platforms {
		fmspc, err := hex.DecodeString(p.FMSPC)
		if err != nil || len(fmspc) != 6 || !isCA(p.CA) || !isChannel(p.Channel) {
			return nil, fmt.Errorf("platform %q, %q, %q is none", p.FMSPC, p.CA, p.Channel)
		}
		m[floorKey{platform{[6]byte(fmspc), p.CA}, p.Channel}] = [4]mark{p.TCBInfo, p.QEIdentity, p.PCKCRL, p.RootCRL}
	}
	if again, err := m.encode(); err != nil || !bytes.Equal(again, text) {
		return nil, errors.New("not as it was written")
	}
	return m, nil
}

// merge raises m to at least other.
func (m marks) merge(other marks) {
	for k, theirs := range other {
		ours := m[k]
		for i := range ours {
			ours[i] = ours[i].raised(theirs[i])
		}
		m[k] = ours
	}
}

func (m mark) raised(other mark) mark {
	if other.Issued.After(m.Issued) {
		m.Issued = other.Issued
	}
	return mark{max(m.Number, other.Number), m.Issued}
}

// check returns an error if one of the documents is behind.
func (m marks) check(k floorKey, documents [4]dcap.Document) *Error {
	for i, seen := range m[k] {
		d := documents[i]
		if d.Number < seen.Number || d.Issued.Before(seen.Issued) {
			return &Error{Code: "rolled_back", Got: describe(d.Name, d.Number, d.Issued), Want: "at least " + describe(d.Name, seen.Number, seen.Issued),
				Hint: "the source serves an older set than was seen before: ask another source, or allow rollback if that is meant"}
		}
	}
	return nil
}

func describe(name string, number uint64, issued time.Time) string {
	return fmt.Sprintf("%s number %d of %s", name, number, issued.UTC().Format(time.RFC3339))
}

// floor is the marks in memory and, if state is not nil, on disk.
type floor struct {
	state  *state
	marks  atomic.Pointer[marks] // never changed, but replaced
	latest atomic.Int64          // the latest date in marks, in seconds of Unix time

	mu sync.Mutex // over raise, which may take the time of a disk
}

// openFloor reads the floor. st may be nil.
func openFloor(st *state) (*floor, error) {
	f := &floor{state: st}
	stored := make(marks)
	if st != nil {
		var err error
		if stored, err = st.readFloor(); err != nil {
			return nil, err
		}
	}
	f.set(stored)
	return f, nil
}

// set is called under mu, or before anybody else has f.
func (f *floor) set(m marks) {
	f.marks.Store(&m)
	for _, documents := range m {
		for _, d := range documents {
			f.latest.Store(max(f.latest.Load(), d.Issued.Unix()))
		}
	}
}

// checkClock returns an error if it is earlier than a document that was seen.
func (f *floor) checkClock(now time.Time) error {
	latest := f.latest.Load()
	if latest == 0 || now.Unix() >= latest {
		return nil
	}
	return &Error{Code: "clock", Got: now.UTC().Format(time.RFC3339), Want: "not before " + time.Unix(latest, 0).UTC().Format(time.RFC3339) + ", when collateral was issued that was seen already",
		Hint: "the clock went backwards: set it"}
}

func (f *floor) check(k floorKey, documents [4]dcap.Document) *Error {
	return f.marks.Load().check(k, documents)
}

// raise raises the floor to these documents, if they are not behind it or behind is
// allowed. Other processes' marks are taken in first. save, unless nil, is called before
// the floor rises, so that a set which raised the floor can be found again.
func (f *floor) raise(k floorKey, documents [4]dcap.Document, allowBehind bool, save func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state != nil {
		unlock, err := f.state.lock()
		if err != nil {
			return err
		}
		defer unlock()
		stored, err := f.state.readFloor()
		if err != nil {
			return err
		}
		stored.merge(*f.marks.Load())
		f.set(stored)
	}
	if err := f.check(k, documents); err != nil && !allowBehind {
		return err
	}
	raised := maps.Clone(*f.marks.Load())
	var to [4]mark
	for i, d := range documents {
		to[i] = mark{d.Number, d.Issued.UTC().Truncate(time.Second)}
	}
	raised.merge(marks{k: to})
	if len(raised) > maxPlatforms {
		return &Error{Code: "floor_full", Got: fmt.Sprint(len(raised), " platforms"), Want: fmt.Sprint("at most ", maxPlatforms), Hint: "the store has met more platforms than there are: look at where they came from"}
	}
	if save != nil {
		save()
	}
	if f.state != nil {
		if err := f.state.writeFloor(raised); err != nil {
			return err
		}
	}
	f.set(raised)
	return nil
}
