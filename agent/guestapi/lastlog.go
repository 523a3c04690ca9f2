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
	last   logText
}

// logText is the text of an event log, and that text once more as a JSON string.
type logText struct{ plain, quoted string }

// text is dstack's JSON of these events, with boot payloads stripped.
func (l *lastLog) text(events []measure.Event) (logText, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last.plain != "" && slices.EqualFunc(l.events, events, sameEvent) {
		return l.last, nil
	}
	b, err := measure.FormatEventLog(events, true)
	if err != nil {
		return logText{}, err
	}
	l.events, l.last = events, logText{plain: string(b), quoted: string(appendQuoted(nil, string(b)))}
	return l.last, nil
}

func sameEvent(a, b measure.Event) bool {
	return a.IMR == b.IMR && a.Type == b.Type && a.Digest == b.Digest && a.Name == b.Name && a.Version == b.Version && bytes.Equal(a.Payload, b.Payload)
}
