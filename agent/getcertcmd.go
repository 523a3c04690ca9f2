package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/remote"
	"tdx-agent/remote/ratls"
)

const (
	certificateSchema = "tdx-agent/certificate/v1"
	dialLimit         = 10 * time.Second
)

// certificateAnswer is get-cert's JSON form.
type certificateAnswer struct {
	Schema      string   `json:"schema"`
	Address     string   `json:"address"`
	Certificate string   `json:"certificate"` // PEM, the leaf; "" unless the verdict is valid
	Assurance   string   `json:"assurance"`   // "certificate"
	Verdict     *verdict `json:"verdict"`
}

func newGetCert(g *globals) *cobra.Command {
	var f verifierFlags
	cmd := &cobra.Command{
		Use:   "get-cert ADDRESS",
		Short: "Judge the RA-TLS certificate of a server, and print it",
		Long: `Connect to the TLS server at ADDRESS (HOST:PORT or unix:PATH), judge the evidence in its
dstack RA-TLS certificate as verify does, and print the certificate in PEM if it is
valid. The verdict is on standard error. The certificate is bound to the key that the
connection has proven, not to the connection: it can be relayed, and it does not age.
Exit status as verify: 0 valid, 5 refused by the policy, 6 not genuine, not bound to the
key, or no evidence.`,
		Example: `  tdx-agent get-cert --policy policy.toml 10.0.0.2:8443 > peer.pem
  tdx-agent get-cert --root root.pem --collateral bundle.json unix:/run/ratls.sock`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), verifyTimeout)
			defer cancel()
			v, _, err := f.verifier(ctx, warnings(cmd.ErrOrStderr()))
			if err != nil {
				return err
			}
			leaf, r, err := f.judgeServer(ctx, v, args[0])
			if err != nil {
				return err
			}
			text := ""
			if r.Accepted {
				text = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}))
			}
			if wantJSON(cmd) {
				err = printJSON(cmd, &certificateAnswer{Schema: certificateSchema, Address: args[0], Certificate: text, Assurance: "certificate", Verdict: makeVerdict(r)})
			} else {
				writeVerdict(cmd.ErrOrStderr(), r)
				fmt.Fprintf(cmd.ErrOrStderr(), "assurance: certificate: bound to the key that the connection has proven; it can be relayed, and it does not age\n%s", issuerLine(leaf))
				_, err = fmt.Fprint(cmd.OutOrStdout(), text)
			}
			if exit := verdictExit(r); exit != nil {
				return exit
			}
			return err
		},
	}
	f.add(cmd)
	jsonFlag(cmd)
	return cmd
}

// issuerLine says what the issuer claims, and that it was not believed.
func issuerLine(leaf *x509.Certificate) string {
	claims, err := ratls.ParseIssuerClaims(leaf)
	switch {
	case err != nil:
		return fmt.Sprintf("issuer's claims: %.200q\n", err.Error())
	case claims.AppID == nil && claims.Usage == "" && claims.AppInfo == nil:
		return ""
	}
	return fmt.Sprintf("issuer's claims, which prove nothing and were not used: app-id %q usage %.64q\n", hex.EncodeToString(claims.AppID), claims.Usage)
}

// judgeServer returns a server's certificate with the verdict on it, once the server has
// shown that it holds the key.
func (f *verifierFlags) judgeServer(ctx context.Context, v *remote.Verifier, address string) (leaf *x509.Certificate, r *remote.Result, err error) {
	dialCtx, cancel := context.WithTimeout(ctx, dialLimit)
	raw, err := dialAddress(dialCtx, f.dial, address)
	cancel()
	if err != nil {
		return nil, nil, err
	}
	defer raw.Close()
	host, _, _ := net.SplitHostPort(address)
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: host, InsecureSkipVerify: true, // who the server is follows from its evidence alone
		VerifyConnection: func(state tls.ConnectionState) error {
			r, _, err = v.AppraiseCertificate(ctx, state.PeerCertificates, remote.Expect{AnyReportData: true})
			if rejection, ok := errors.AsType[*remote.Rejection](err); ok {
				r = rejection.Result
				return nil
			}
			return err
		}}
	conn := tls.Client(raw, cfg)
	switch err := conn.HandshakeContext(ctx); {
	case errors.As(err, new(*remote.CertificateError)):
		return nil, nil, withExit(exitEvidence, fmt.Errorf("%s: %w", address, err))
	case err != nil:
		return nil, nil, fmt.Errorf("%s: %w", address, err)
	}
	return conn.ConnectionState().PeerCertificates[0], r, nil
}
