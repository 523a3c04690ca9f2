package guestapi

import (
	"unicode"
	"unicode/utf8"

	"tdx-agent/measure"
)

// The limits of one application event. The log travels with every quote, so events
// are names and hashes, not documents.
const (
	MaxEventName    = 64      // bytes
	MaxEventPayload = 4 << 10 // bytes
)

// CheckEvent reports whether an application may record such an event, whoever asks:
// the name is 1 to 64 bytes of printable UTF-8 and not one that verifiers take
// identity from ([measure.ReservedEvent]), nor one that can be made such a one
// ([measure.PassesForReserved]); the payload has at most 4 KiB. The error has
// a method ExitCode() int.
func CheckEvent(name string, payload []byte) error {
	switch {
	case name == "":
		return badRequest("the event has no name")
	case len(name) > MaxEventName:
		return badRequest("the event name has %d bytes, want at most %d", len(name), MaxEventName)
	case !printable(name):
		return badRequest("event name %q: want printable UTF-8", name)
	case measure.ReservedEvent(name):
		return denied("event name %q is reserved: verifiers read the identity of this VM from it; choose another", name)
	case measure.PassesForReserved(name):
		return denied("event name %q is reserved: whoever shows the log could move the colon, and make another event of it; choose another", name)
	case len(payload) > MaxEventPayload:
		return badRequest("the event payload has %d bytes, want at most %d; record its hash instead", len(payload), MaxEventPayload)
	}
	return nil
}

func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return false
		}
	}
	return utf8.ValidString(s)
}
