// Package keys holds an application's keys and makes everything of them that dstack's
// guest API hands out: derived keys with the signatures that trace them to the key
// management service, signatures, and TLS certificates of the application's own
// authority.
//
// A [Provider] yields the [App]: [Ephemeral] makes fresh keys for one boot (dstack's
// key provider "none"), [File] reads .appkeys.json, in which dstack's boot tools leave
// the keys of any provider, [KMS] asks a key management service and [Local] an enclave on
// the host. These two are believed as far as this boot has measured which KMS or enclave
// it is, and as its own evidence shows that it is that one.
//
// # Secrets
//
// Key bytes live in this package. They leave it as the return value of methods whose
// purpose that is (Bytes, KeyPEM), and never in an error, a log or any form of
// printing: every type that holds some prints, logs and marshals as "[redacted]", and
// keeps it behind pointers, so that even a structure around it prints an address.
// They are overwritten when they are dropped, as far as Go allows: what crypto/ecdsa
// keeps inside its keys, and copies that net/http and crypto/tls make of what is sent
// and received, are not.
//
// # What the scheme does not give
//
// It is dstack's, kept to the byte for its applications. A path's ed25519 and
// secp256k1 keys are made of the same 32 bytes. The purpose does not change the key,
// and since callers choose it, the application's key signs nearly arbitrary text
// "purpose:key". Whoever may ask for one path may ask for all. Scalar multiplication
// on secp256k1 does not take constant time.
//
// # Sources
//
// dstack v0.5.11: ra-tls (key derivation, certificates), guest-agent (methods and
// their error texts), dstack-types (.appkeys.json), kms and dstack-util (the services
// KMS and HostApi, which speak JSON over HTTP); RFC 5869, RFC 6979, RFC 8032.
package keys
