// Package guestapi serves the guest API of dstack on Unix sockets: DstackGuest on
// dstack.sock and the older Tappd on tappd.sock, byte for byte as dstack 0.5.11
// answers, plus GpuInfo, and Tappd's TdxQuote on dstack.sock too. Worker is what strangers may ask.
//
// Applications reach it with dstack's own SDKs, some of which read HTTP by hand, so
// three habits of the wire are part of the contract: every answer carries
// Content-Length and is never chunked, every JSON body is pure ASCII with its keys
// in the order of the protobuf fields, and every error is a status 400 with a JSON
// object (or protobuf message) that has one member, error.
//
// Where dstack and this package differ, this one is stricter or says more: digests
// are never blank, bodies are capped at 64 KiB (Sign and Verify 1 MiB), duplicate JSON keys and reserved
// report data are refused, an error carries the header Tdx-Agent-Exit with the exit
// status that the program's own client uses, and what a socket may do is a set of
// [Grants] whose zero value denies everything.
//
// A call goes through these in order: who calls, which the kernel tells when the
// connection is made ([Caller]); how often ([Limiter]); whether this user may
// ([Config].OnlyUIDs); whether this socket may ([Grants], first the class, then the name);
// the call itself; and its [Record], without which nothing of a key is answered.
//
// The agent itself is behind the [Guest] interface, its keys behind [Config]. An
// answer that holds key material is overwritten once it is written.
package guestapi
