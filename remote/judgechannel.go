package remote

import (
	"crypto/subtle"
	"encoding/hex"
	"slices"
)

// Channel is what an attested channel knows of the peer beside its evidence. The
// channel has checked its signature: AgentKey is the key that signed this channel.
type Channel struct {
	AgentKey [32]byte // SHA-256 of the DER SubjectPublicKeyInfo. Zero for a certificate
	// Service is the local service that the peer asks for. An entry must list it. Empty
	// for peers that we have dialled.
	Service string
	// KeyMode says that the peer signed with its agent key instead of making a quote:
	// the evidence is of an earlier channel, and fresh by the signature alone.
	KeyMode bool
	// Certificate says that the evidence is in the peer's TLS certificate (dstack
	// RA-TLS): bound to the key of the connection, not to the connection, and as old as
	// its holder likes.
	Certificate bool
}

// The values of an entry's require, each of which includes those above it, and what a
// peer can reach: its assurance.
const (
	requireQuote       = "quote"
	requireKey         = "key"
	requireCertificate = "certificate"
)

var assurances = []string{requireQuote, requireKey, requireCertificate}

// Assurance is how the peer's evidence belongs to this connection: "quote", "key" or
// "certificate".
func (c *Channel) Assurance() string {
	switch {
	case c.Certificate:
		return requireCertificate
	case c.KeyMode:
		return requireKey
	}
	return requireQuote
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
	var noKey [32]byte
	// In key mode nothing else says that the key is in the TD, and not somewhere by now.
	e.optional(s, Application, "agent_key", "require_measured_agent_key", e.RequireMeasuredAgentKey || ch.KeyMode, func() bool {
		return proof == nil && ch.AgentKey != noKey && subtle.ConstantTimeCompare(c.Identity.AgentKey, ch.AgentKey[:]) == 1
	}, func() (string, string, string) {
		if ch.Certificate {
			return "a certificate, which no agent key has signed", "the signature of a measured agent key", "for dstack's RA-TLS an entry says require_measured_agent_key = false"
		}
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
	got := ch.Assurance()
	s.check(Application, "assurance", slices.Index(assurances, got) <= slices.Index(assurances, e.Require), func() (string, string, string) {
		hint := "ask the peer for a quote"
		if ch.Certificate {
			hint = `dial it by tdx-atls/1; require = "certificate" accepts evidence that can be relayed and may be old`
		}
		return got, e.Require, hint
	})
}

// judgeLifetime checks how long the certificate is valid that the evidence came in.
func (e *Entry) judgeLifetime(s *sheet, x *Expect) {
	const name = "certificate_lifetime"
	switch {
	case e.MaxCertLifetime == 0:
	case x.CertificateLife == 0:
		s.skip(Freshness, name, "the evidence came in no certificate")
	default:
		s.check(Freshness, name, x.CertificateLife <= e.MaxCertLifetime, func() (string, string, string) {
			return x.CertificateLife.String(), "at most " + e.MaxCertLifetime.String(), "the peer must use shorter ones"
		})
	}
}
