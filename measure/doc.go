// Package measure is what this TD is: digests, events, the RTMR3 ledger, and
// Evidence with its encodings.
//
// The package is used from two sides. An Attester opens the [Ledger], records what
// it measures, and makes [Evidence]. A Verifier parses what it was sent
// ([ParseQuote], [ParseEventLog], [ParseCCEL], [ParseAttestation]), all of it
// bounded and none of it trusted, and calls [Replay]; the judgement itself is in
// package remote.
//
// The kernel is reached through two interfaces only, [Quoter] and [RegisterBank];
// package tsm implements them on Linux and package tdxsim stands in for the
// hardware below tsm.
package measure
