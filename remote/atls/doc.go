// Package atls is tdx-atls/1: TLS 1.3 between two TDs of which each appraises the
// other's evidence before a byte of an application flows.
//
// A [Listener] returns only connections whose peer was appraised; a [Dialer] opens
// them; [NewTransport] makes an http.RoundTripper of one. [PeerFromConn] and
// [PeerFromContext] say who the peer is.
//
// # The protocol
//
// Both ends show a self-made P-256 certificate in a TLS 1.3 handshake without
// resumption. Then frames are exchanged:
//
//	client                                   server
//	HELLO_C    nonce, service, agent key  →
//	                                      ←  HELLO_S    nonce, what it wants
//	EVIDENCE   quote, log, signature      →
//	                                         appraises; only then makes a quote of its own
//	                                      ←  EVIDENCE, RESULT ok
//	appraises
//	RESULT ok, application bytes          →
//	                                      ←  application bytes
//
// Each end's report data, and its agent key's signature, cover its role, the TLS
// exporter over the hash of both hellos, both certificates' keys, its agent key and
// its RTMR3 ([Session], [Body]). Each end computes all of these from its own side of
// the connection, so evidence that belongs to another channel, another role or another
// negotiation does not fit: a relay, a reflection or a downgrade fails as
// binding_mismatch.
//
// The client pays first: a server makes no quote for somebody it has not appraised,
// but for the clients of services that are opened to unattested ones: one a second for
// all of them, and eight at once.
//
// # Key mode
//
// Where both policies allow it (require = "key"), a peer that was appraised lately may
// sign with its agent key instead of making a quote. The evidence kept from then is
// appraised again by today's policy, collateral and time, and the signature covers the
// live RTMR3, which must still be the evidence's.
//
// # dstack's RA-TLS
//
// With [RATLS] a Listener or a Dialer speaks to peers that know dstack's certificates
// only: weaker, and only where a policy entry asks for it in so many words.
//
// # What a stranger costs
//
// In this order: a place among the handshakes under way, of which an address has few and
// which silent clients lose to newcomers; a TLS handshake; the frames' form; report data
// and RTMR3 in the quote, by comparison; the agent key's signature; the signatures of the
// quote; its event log and the policy. Only then a place among the open channels, and a
// quote of our own, of which the peers of all channels together get half that the host
// can make. Who finds no room is told busy, and when to come again.
//
// # The life of a channel
//
// A session lasts an hour at most ([Config].MaxSession), and may finish what it has begun
// in another ten minutes. Where a new policy denies the peer, that is ten seconds.
// [Transport] begins no request on a channel whose session has ended.
//
// # What is not covered
//
// Evidence is that of the moment of the handshake. A session ends after an hour at
// most; there is no attestation within it.
package atls
