package ratls

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// ErrNoIssuer says that nobody can tell whether a certificate's signature holds: it is
// not of its own key, and its issuer is not shown.
var ErrNoIssuer = errors.New("RA-TLS: the certificate's signature is not of its own key, and its issuer is not shown")

// CheckLeaf checks what X.509 says of the first certificate that a peer shows: that it
// is of this time, and signed by its own key or by that of the next certificate. Neither
// gives trust: the holder of the key chooses both, and only evidence says who that is.
func CheckLeaf(chain []*x509.Certificate, at time.Time) error {
	if len(chain) == 0 {
		return errors.New("RA-TLS: there is no certificate")
	}
	leaf := chain[0]
	if err := checkDates(leaf, at); err != nil {
		return err
	}
	isOwn := bytes.Equal(leaf.RawIssuer, leaf.RawSubject)
	if isOwn && leaf.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
		return nil
	}
	if len(chain) == 1 && !isOwn {
		return ErrNoIssuer
	}
	if len(chain) == 1 {
		return errors.New("RA-TLS: the certificate's signature is not of its own key")
	}
	if err := leaf.CheckSignatureFrom(chain[1]); err != nil {
		return fmt.Errorf("RA-TLS: the certificate's signature is not of its own key, nor of the next one's: %v", err)
	}
	return checkDates(chain[1], at)
}

func checkDates(cert *x509.Certificate, at time.Time) error {
	if at.Before(cert.NotBefore) || at.After(cert.NotAfter) {
		return fmt.Errorf("RA-TLS: the certificate %q is valid from %s until %s, and it is %s", cert.Subject.String(),
			cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339), at.UTC().Format(time.RFC3339))
	}
	return nil
}
