package remote

import (
	"crypto/subtle"
	"encoding/hex"
	"slices"
)

// Channel is what an attested channel knows of the peer beside its evidence. The
// channel has checked its signature: AgentKey is the key that signed this channel.
type Channel struct {
	AgentKey [32]byte // SHA-256 of the DER SubjectPublicKeyInfo
	// Service is the local service that the peer asks for. An entry must list it. Empty
	// for peers that we have dialled.
	Service string
	// KeyMode says that the peer signed with its agent key instead of making a quote:
	// the evidence is of an earlier channel, and fresh by the signature alone.
	KeyMode bool
}

// judgeChannel checks what a policy demands of a peer on a channel.
func (e *Entry) judgeChannel(s *sheet, c *Claims, x *Expect) {
	ch := x.Channel
	if ch == nil {
		for _, name := range []string{"agent_key", "service", "assurance"} {
			s.skip(Application, name, "only an attested channel can check it")
		}
		return
	}
	proof := c.proven(e.Era)
	e.optional(s, Application, "agent_key", "require_measured_agent_key", e.RequireMeasuredAgentKey, func() bool {
		return proof == nil && subtle.ConstantTimeCompare(c.Identity.AgentKey, ch.AgentKey[:]) == 1
	}, func() (string, string, string) {
		got := "no agent-key event"
		if proof != nil {
			got = proofText(proof, "")
		} else if c.Identity.AgentKey != nil {
			got = hex.EncodeToString(c.Identity.AgentKey)
		}
		return got, hex.EncodeToString(ch.AgentKey[:]) + ", the key that signed this channel", "the peer's boot step must measure its agent key (boot.agent_key), from the initrd where dstack measures itself"
	})
	e.optional(s, Application, "service", "service", ch.Service != "", func() bool { return slices.Contains(e.Service, ch.Service) }, func() (string, string, string) {
		return ch.Service, tomlList(e.Service), "the entry does not let its peers reach this service"
	})
	s.check(Application, "assurance", !ch.KeyMode || e.Require == "key", func() (string, string, string) {
		if ch.KeyMode {
			return "key", e.Require, "ask the peer for a quote"
		}
		return "quote", e.Require, ""
	})
}
