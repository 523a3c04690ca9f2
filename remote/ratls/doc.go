// Package ratls writes and reads the RA-TLS extensions of dstack's certificates: the
// evidence that a private key lives in a TD, inside the certificate of that key.
//
// [Extensions] makes what a certificate's issuer puts in; [Parse] takes it out of a
// peer's certificate. The quote's report data is bound to the certificate's key by
// [ReportData], and both directions refuse a quote that is not. Nothing that Parse
// returns is trusted: the quote's signature, its TCB, the log's replay and the
// identity in it are for the verifier to appraise, with [Attested.ReportData] as the
// report data to want. So are the certificate's signature and its dates.
//
// What the issuer itself says of the holder (application id, usage, application
// info) is not evidence, however it looks: [ParseIssuerClaims] keeps it apart.
//
// Such a certificate is not fresh. It proves that the key was made in a TD once, as
// long as the certificate lives, and not that this connection ends in one.
//
// # Sources
//
// The extensions are those of dstack's ra-tls (v0.5.11), below the arc
// 1.3.6.1.4.1.62397.1. dstack up to 0.5.8 writes .1 and .2 and reads nothing else;
// later ones write .8 alone. [Extensions] writes all three. A [Renewer] keeps a
// certificate of this TD itself current.
package ratls
