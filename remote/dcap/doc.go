// Package dcap verifies Intel TDX quotes: signatures, PCK certificates, collateral
// and the TCB status by Intel's rule.
//
// [ParseCollateral] makes a [Collateral] of a bundle in dcap-qvl's QuoteCollateralV3
// JSON; [Verifier.Verify] judges a quote by it at one explicit time. A nil error says
// that the quote is genuine and that the collateral could judge it; whether the
// statuses in the [Report] are good enough is for the caller's policy. An error is an
// [*Error].
//
// Everything here reads bytes of strangers. Every length is checked before it is
// used, documents are decoded from exactly the bytes that were signed, with exact
// keys and no duplicates, and nothing is fetched: there is no network in this package.
//
// [Verifier.VerifyEnclave] does the same for the quote of an SGX enclave, as dstack's local
// key provider is one, with the SGX side's own collateral.
//
// # Replay
//
// A quote's signature does not bind its bytes: s can be replaced by n-s, and bytes
// behind the quote are not signed. So the hash of a quote is no replay key; freshness
// is the nonce in its report data.
//
// # Sources
//
// Intel SGX and TDX DCAP Quoting Library API (quote formats 3, 4 and 5), Intel SGX PCK
// Certificate and CRL Profile Specification, Intel PCS API version 4, and the rules
// of Intel's SGX-TDX-DCAP-QuoteVerificationLibrary.
package dcap
