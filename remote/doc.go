// Package remote is the Verifier of RFC 9334: it appraises the Evidence of other TDs
// under an Appraisal Policy and gives an Attestation Result.
//
// [NewVerifier] makes a [Verifier] of a [Policy] ([ParsePolicy], or [BuiltinPolicy]
// for what anybody would demand) and a source of collateral (package collateral).
// [Verifier.Appraise] answers with a [Result], or with a [*Rejection] that lists every
// failed check: what was there, what was wanted, what to do.
//
// # Design
//
// Nothing is accepted by leaving something out. A policy without entries accepts
// nobody; an entry has to name an image and an application, or to spell out that any
// will do; a missing event is a failure; report data are compared unless the caller
// asks for the opposite by name. What nobody asked for is not called passed: it is
// listed as not checked.
//
// What evidence proves ([Claims]) is kept apart from what a policy makes of it, so
// that every entry of a policy can be explained. Signatures that hold, PCK
// chains and event logs are remembered; validity, revocation and policy are looked at
// each time.
package remote
