// Package collateral is where a Verifier gets collateral from: bundle files, a cache
// on disk, PCCS servers, Intel's PCS.
//
// [Store.Known] answers from memory, for every quote. When it knows nothing, and the
// caller has verified the platform's PCK chain, [Store.Fetch] asks the network; a
// stranger's quote never makes this package send anything. [Store.Offered] judges the
// bundle that a peer sent along. [Store.Run] renews sets before they end.
//
// A source is believed nothing: [dcap.ParseCollateral] checks every signature, and a
// set must be about the platform that was asked for. What signatures cannot tell is
// that a source serves an older set that is still genuine, in which a TCB recovery or
// a revocation is missing. So the store remembers, per platform and update channel,
// how far the number and the date of each document came, on disk and across restarts,
// and refuses what is behind: the rollback floor. A platform that was never met has no
// floor, and whoever can put back the state folder puts back the floor.
//
// The floor is also a clock: time cannot be before a document was issued that was
// accepted already. Then everything is refused until the clock is set.
//
// # Sources
//
// Intel PCS API version 4 and Intel's PCCS, which has the same paths; the bundle is
// dcap-qvl's QuoteCollateralV3.
package collateral
