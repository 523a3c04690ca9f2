package ratls

import (
	"crypto/x509"
	"fmt"
	"unicode/utf8"
)

// IssuerClaims is what the issuer of a certificate says of its holder. It is never
// attestation: whoever signs the certificate can write anything here, also a holder
// who signs his own. It is worth what a chain to a pinned root is worth, no more, and
// no less than all of that chain: every application of a root has a certificate below
// it, so a chain without the right Usage proves nothing.
type IssuerClaims struct {
	AppID   []byte   // 20 bytes; nil: none
	Usage   string   // such as [UsageKMS]; "": none
	AppInfo *AppInfo // nil: none
}

// ParseIssuerClaims reads the extensions .3, .4 and .9. All may be missing; one that
// is there must be well-formed and unique.
func ParseIssuerClaims(cert *x509.Certificate) (*IssuerClaims, error) {
	var c IssuerClaims
	id, found, err := content(cert.Extensions, OIDAppID, appIDSize)
	if err == nil && found && len(id) != appIDSize {
		err = fmt.Errorf("application id has %d bytes, want %d", len(id), appIDSize)
	}
	if err != nil {
		return nil, fmt.Errorf("issuer's claims: %w", err)
	}
	c.AppID = id
	usage, found, err := content(cert.Extensions, OIDUsage, maxUsage)
	if err == nil && found && (len(usage) == 0 || !utf8.Valid(usage)) {
		err = fmt.Errorf("usage %q: want text", usage)
	}
	if err != nil {
		return nil, fmt.Errorf("issuer's claims: %w", err)
	}
	c.Usage = string(usage)
	info, found, err := content(cert.Extensions, OIDAppInfo, maxAppInfo)
	if err == nil && found {
		c.AppInfo, err = ParseAppInfo(info)
	}
	if err != nil {
		return nil, fmt.Errorf("issuer's claims: %w", err)
	}
	return &c, nil
}
