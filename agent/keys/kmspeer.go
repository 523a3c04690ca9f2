package keys

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/ratls"
)

// kmsPeer is one server that has yet to show that it is the KMS.
type kmsPeer struct {
	kms    *KMS
	base   *url.URL
	target *kmsTarget
}

func (p *kmsPeer) fault(reason string, err error) error {
	return &KMSError{URL: p.base.String(), Reason: reason, Err: err}
}

func (p *kmsPeer) faultf(reason, format string, a ...any) error {
	return p.fault(reason, fmt.Errorf(format, a...))
}

// call sends one request on a connection of its own, with the certificate if there is
// one, and returns the body of the answer, which is the caller's to clear.
func (p *kmsPeer) call(ctx context.Context, method string, request any, cert *tls.Certificate) ([]byte, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, p.kms.cfg.Timeout)
	defer cancel()
	conn, err := p.connect(ctx, cert)
	if err != nil {
		return nil, p.named(ctx, method, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.NetConn().Close() })
	defer stop()
	answer, err := p.exchange(conn, method, body)
	return answer, p.named(ctx, method, err)
}

// named makes a KMSError of an error of the connection.
func (p *kmsPeer) named(ctx context.Context, method string, err error) error {
	var known *KMSError
	var alert *net.OpError
	switch {
	case err == nil || errors.As(err, &known):
		return err
	case errors.As(err, &alert) && alert.Op == "remote error":
		return p.faultf(KMSDenied, "%s: it ends the connection, as servers do that refuse our certificate: %v", method, err)
	case ctx.Err() != nil:
		return p.fault(KMSUnreachable, fmt.Errorf("%s: no answer within %s: %w", method, p.kms.cfg.Timeout, ctx.Err()))
	}
	return p.faultf(KMSUnreachable, "%s: %w", method, err)
}

// connect returns a connection to a server that was appraised.
func (p *kmsPeer) connect(ctx context.Context, cert *tls.Certificate) (*tls.Conn, error) {
	port := p.base.Port()
	if port == "" {
		port = "443"
	}
	raw, err := p.kms.cfg.Dial(ctx, "tcp", net.JoinHostPort(p.base.Hostname(), port))
	if err != nil {
		return nil, err
	}
	appraised := false
	conn := tls.Client(raw, &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: p.base.Hostname(), NextProtos: []string{"http/1.1"}, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, // what follows verifies, and appraises
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return p.faultf(KMSCertificate, "it has no certificate")
			}
			err := p.appraise(ctx, s.PeerCertificates[0])
			appraised = err == nil
			return err
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if cert == nil {
				return &tls.Certificate{}, nil
			}
			return cert, nil // whatever authorities it names: only one signs such certificates
		},
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		if appraised && !errors.As(err, new(net.Error)) && !errors.Is(err, io.EOF) && ctx.Err() == nil {
			return nil, p.faultf(KMSCertificate, "it shows a certificate whose key it does not have: %w", err)
		}
		return nil, err
	}
	return conn, nil
}

// appraise decides whether the server is the KMS. The certificate's root signs the KMS
// itself and the authorities of all its applications, but directly only these, and what
// keeps them apart is the usage.
func (p *kmsPeer) appraise(ctx context.Context, cert *x509.Certificate) error {
	root := x509.Certificate{PublicKeyAlgorithm: x509.ECDSA, PublicKey: p.target.root}
	if err := root.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return p.faultf(KMSRootKey, "its certificate (issuer %q) is not signed by the root key that this boot has measured: %v", cert.Issuer.CommonName, err)
	}
	now := p.kms.cfg.Now()
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return p.faultf(KMSCertificate, "its certificate is good from %s to %s, it is %s", cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	if err := cert.VerifyHostname(p.base.Hostname()); err != nil {
		return p.fault(KMSCertificate, err)
	}
	claims, err := ratls.ParseIssuerClaims(cert)
	if err != nil {
		return p.fault(KMSCertificate, err)
	}
	if claims.Usage != ratls.UsageKMS || cert.IsCA {
		return p.faultf(KMSCertificate, "its certificate is for %q (authority: %v), want %q", claims.Usage, cert.IsCA, ratls.UsageKMS)
	}
	attested, err := ratls.Parse(cert)
	if err != nil {
		return p.fault(KMSAttestation, err)
	}
	return p.appraiseEvidence(ctx, attested)
}

func (p *kmsPeer) appraiseEvidence(ctx context.Context, a *ratls.Attested) error {
	_, err := p.kms.cfg.Verifier.Appraise(ctx, a.Evidence, remote.Expect{ReportData: a.ReportData})
	if err != nil {
		if !errors.As(err, new(*remote.Rejection)) {
			return p.faultf(KMSUnreachable, "it could not be appraised: %w", err)
		}
		return p.fault(KMSPolicy, err)
	}
	want := p.target.identity.MRKMS
	if want == nil {
		return nil
	}
	quote, err := measure.ParseQuote(a.Evidence.Quote)
	if err != nil {
		return p.fault(KMSAttestation, err)
	}
	// The registers are those of a log that replays, if the policy looks at the log.
	if got := measure.MRAggregated(quote.Body.Registers); !bytes.Equal(got[:], want) {
		return p.faultf(KMSMeasurement, "its mr_aggregated is %x, but this boot has measured mr-kms %x", got, want)
	}
	return nil
}

// exchange sends the request and reads the answer.
func (p *kmsPeer) exchange(conn *tls.Conn, method string, body []byte) ([]byte, error) {
	to := p.base.JoinPath("prpc", "KMS."+method)
	to.RawQuery = "json"
	status, answer, err := post(conn, to.String(), body)
	switch {
	case errors.As(err, &tooLargeError{}):
		return nil, p.faultf(KMSAnswer, "%s: %w", method, err)
	case err != nil:
		return nil, err
	case status != http.StatusOK:
		return nil, p.faultf(KMSDenied, "%s: status %d: %s", method, status, errorText(answer))
	}
	return answer, nil
}

// errorText is what an error of dstack's RPC says, for people: it comes from a stranger,
// or from a KMS that repeats what it was sent.
func errorText(answer []byte) string {
	var doc struct{ Error string }
	if json.Unmarshal(answer, &doc) != nil || doc.Error == "" {
		return fmt.Sprintf("%d bytes that are no error of dstack's", len(answer))
	}
	return fmt.Sprintf("%.300q", doc.Error)
}

// text returns a member that is a string without escapes but those of PEM, or "" if it
// is not there.
func text(doc map[string]json.RawMessage, name string) (string, error) {
	v, ok := doc[name]
	if !ok {
		return "", nil
	}
	b, err := secretText(v)
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}
