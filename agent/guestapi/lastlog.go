package guestapi

import (
	"bytes"
	"slices"
	"sync"

	"tdx-agent/measure"
)

// lastLog keeps the text of the last event log that was handed out: quotes come by the
// thousand, events seldom, and writing the text takes longer than comparing events.
type lastLog struct {
	mu     sync.Mutex // guards what follows
	events []measure.Event
	json   string
}

// text is dstack's JSON of these events, with boot payloads stripped.
func (l *lastLog) text(events []measure.Event) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.json != "" && slices.EqualFunc(l.events, events, sameEvent) {
		return l.json, nil
	}
	b, err := measure.FormatEventLog(events, true)
	if err != nil {
		return "", err
	}
	l.events, l.json = events, string(b)
	return l.json, nil
}

func sameEvent(a, b measure.Event) bool {
	return a.IMR == b.IMR && a.Type == b.Type && a.Digest == b.Digest && a.Name == b.Name && a.Version == b.Version && bytes.Equal(a.Payload, b.Payload)
}
