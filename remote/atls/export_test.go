package atls

import "crypto/tls"

// KeyExchanges are those that channels take.
var KeyExchanges = keyExchanges

// UseKeyExchanges has channels take others until restore is called.
func UseKeyExchanges(list []tls.CurveID) (restore func()) {
	keyExchanges = list
	return func() { keyExchanges = KeyExchanges }
}

// Transcript is the hash of both hello frames.
var Transcript = transcript

// Members splits a JSON object into names and values.
func Members(body []byte) (names []string, values [][]byte, err error) {
	all, err := members(body)
	for _, m := range all {
		names, values = append(names, m.name), append(values, m.value)
	}
	return names, values, err
}

// DecodeEvidence reads a body of an EVIDENCE frame in quote mode.
func DecodeEvidence(body []byte) (*Statement, error) {
	e, err := decodeEvidence(append(make([]byte, 4, 4+len(body)), body...))
	if err != nil {
		return nil, err
	}
	st, err := e.statement(false)
	if err == nil {
		_, err = st.readLog(nil)
	}
	return st, err
}

// EncodeStatement returns the body of an EVIDENCE frame.
func EncodeStatement(st *Statement, serverEvidence string) ([]byte, error) {
	frame, err := encodeStatement(st, serverEvidence, maxEvidence)
	return frame[min(4, len(frame)):], err
}

// ClientOf is what the limits per address count by.
var ClientOf = clientOf
