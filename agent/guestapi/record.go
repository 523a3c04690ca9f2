package guestapi

import (
	"net/http"
	"time"
)

// Record is one call of a class other than [ClassRead], with its result.
type Record struct {
	Method string
	Class  Class
	Name   string // the path of a key or the name of an event; "" if there is none
	Caller Caller
	// Arguments are the request as it was received, and not to be kept: they hold
	// report data and data to sign. nil if they were not read.
	Arguments []byte
	Exit      int // exit status of the answer, see [ExitHeader]; 0 is success
	Took      time.Duration
}

// record writes the record of a call, and returns the answer that may be given.
func (s *Server) record(c *call, answer response, took time.Duration) response {
	class := s.methods[c.method].class
	if s.cfg.Audit == nil || class <= ClassRead {
		return answer
	}
	r := Record{Method: c.method, Class: class, Name: c.name, Caller: c.caller, Arguments: c.arguments.payload, Exit: answer.exit, Took: took}
	if err := s.cfg.Audit(r); err == nil || answer.status != http.StatusOK || !class.secret() {
		return answer
	}
	clear(answer.body)
	o := outcome{status: http.StatusBadRequest, exit: exitFailure, text: c.method + " is not answered: its audit record could not be written; the agent's status says why"}
	return o.answer(c.arguments.encoding)
}

// secret tells whether calls of the class give something of a key.
func (c Class) secret() bool { return c == ClassCert || c == ClassKey || c == ClassSign }
