package guestapi

import (
	"fmt"
	"slices"
	"strings"

	"tdx-agent/agent/keys"
)

// Grants is what the callers of one socket may do. The zero value denies
// everything.
type Grants struct {
	Read  bool // Info, Version, GpuInfo
	Quote bool // TdxQuote with a hash, under a prefix that is not reserved
	// RawReportData, on top of Quote, allows report data of the caller's own
	// making: GetQuote, Attest, RawQuote and TdxQuote raw. Whoever has it can make
	// quotes for any purpose that report data marks, a KMS's key release included.
	RawReportData bool
	// Cert allows GetTlsKey, and DeriveKey with a random seed: a fresh key with a
	// certificate of the application's authority.
	Cert bool
	// Sign allows Sign and Verify. Sign's key is the whole application's, so it is no
	// part of Keys, whose prefixes keep callers apart.
	Sign bool
	// Keys allows GetKey and DeriveK256Key of these paths, and together with Cert
	// DeriveKey of them. With one path a caller has the same bytes from all three.
	Keys Names
	// ReservedKeys extends Keys to the paths of [keys.ReservedPath]. It is for sockets
	// that give everything, as dstack does. A purpose of [keys.ReservedPurpose] takes
	// this, or Sign.
	ReservedKeys bool
	Measure      Names // EmitEvent of these events
}

// Names is a set of names: those that begin with one of these prefixes. "" is the
// prefix of every name; no prefix is no name.
type Names []string

// AllNames is every name.
var AllNames = Names{""}

// Hold tells whether name is one of n.
func (n Names) Hold(name string) bool {
	for _, prefix := range n {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// String lists the prefixes for people.
func (n Names) String() string {
	quoted := make([]string, len(n))
	for i, prefix := range n {
		if prefix == "" {
			return "any name"
		}
		quoted[i] = fmt.Sprintf("%q", prefix)
	}
	return "names that begin with " + strings.Join(quoted, " or ")
}

// Class is a kind of method, by what it takes to be allowed one.
type Class int

// The classes. The zero Class is of no method.
const (
	ClassRead Class = iota + 1
	ClassQuote
	ClassCert
	ClassKey
	ClassSign
	ClassMeasure
	classes
)

// String returns the class as agent.toml writes it.
func (c Class) String() string {
	switch c {
	case ClassRead:
		return "read"
	case ClassQuote:
		return "quote"
	case ClassCert:
		return "cert"
	case ClassKey:
		return "key"
	case ClassSign:
		return "sign"
	case ClassMeasure:
		return "measure"
	}
	return "none"
}

// admits decides on the caller, before anything of the call is read.
func (s *Server) admits(c *call) error {
	if len(s.cfg.OnlyUIDs) == 0 || c.caller.Known && slices.Contains(s.cfg.OnlyUIDs, c.caller.UID) {
		return nil
	}
	return denied("%s is not allowed here: this socket is for other users than yours (%s); agent.toml says for which (uids)", clip(c.method), c.caller)
}

func (s *Server) mayRead(c *call) error {
	if s.cfg.Grants.Read {
		return nil
	}
	return denied("%s is not allowed here: this socket has no grant to read; agent.toml says which socket has which grants", c.method)
}

func (s *Server) mayQuote(c *call, raw bool) error {
	switch {
	case !s.cfg.Grants.Quote:
		return denied("%s is not allowed here: this socket has no grant for quotes; agent.toml says which socket has which grants", c.method)
	case raw && !s.cfg.Grants.RawReportData:
		return denied("%s with report data of your own is not allowed here: this socket has no grant for raw report data; TdxQuote with a hash and a prefix needs none, and agent.toml says which socket has which grants", c.method)
	}
	return nil
}

// lacks is the refusal of a call that only some socket's callers may make.
func lacks(c *call, grant Class, instead string) error {
	return denied("%s is not allowed here: this socket has no grant %q; declare the application under [[application]] in agent.toml with it, or set full_access = true under [compat] to allow it to every application%s", c.method, grant, instead)
}

func (s *Server) mayCertify(c *call) error {
	if s.cfg.Grants.Cert {
		return nil
	}
	return lacks(c, ClassCert, "")
}

func (s *Server) maySign(c *call) error {
	if s.cfg.Grants.Sign {
		return nil
	}
	return lacks(c, ClassSign, "")
}

func (s *Server) mayDerive(c *call) error {
	if len(s.cfg.Grants.Keys) > 0 {
		return nil
	}
	return lacks(c, ClassKey, "")
}

// mayDerivePath decides on the path, which [Server.mayDerive] does not know.
func (s *Server) mayDerivePath(c *call, path string) error {
	c.name = path
	g := &s.cfg.Grants
	switch {
	case len(g.Keys) == 0:
		return lacks(c, ClassKey, "")
	case !g.Keys.Hold(path):
		return denied("%s of path %q is not allowed here: this socket's keys are those of %s", c.method, clip(path), g.Keys)
	case keys.ReservedPath(path) && !g.ReservedKeys:
		return denied("%s of path %q is not allowed here: the path is reserved, its key signs for the whole application; Sign uses it, with the grant %q", c.method, path, ClassSign)
	}
	return nil
}

// mayChain decides on the purpose of a signature chain.
func (s *Server) mayChain(c *call, purpose string) error {
	if g := &s.cfg.Grants; g.Sign || g.ReservedKeys || !keys.ReservedPurpose(purpose) {
		return nil
	}
	return denied("%s for the purpose %q is not allowed here: its chain would say that the key signs for the whole application, which takes the grant %q; choose another purpose", c.method, purpose, ClassSign)
}

func (s *Server) mayMeasure(c *call) error {
	if len(s.cfg.Grants.Measure) > 0 {
		return nil
	}
	return lacks(c, ClassMeasure, ", or use the admin socket")
}

// mayRecord decides on the event's name, which [Server.mayMeasure] does not know.
func (s *Server) mayRecord(c *call, name string) error {
	if s.cfg.Grants.Measure.Hold(name) {
		return nil
	}
	return denied("%s of event %q is not allowed here: this socket's events are those of %s", c.method, name, s.cfg.Grants.Measure)
}
