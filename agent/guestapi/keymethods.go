package guestapi

import (
	"context"
	"errors"

	"tdx-agent/agent/keys"
	"tdx-agent/measure"
)

// app returns the keys, after grants and arguments have been checked.
func (s *Server) app(ctx context.Context) (*keys.App, error) {
	if s.cfg.Keys == nil {
		return nil, errors.New("this agent has no keys")
	}
	return s.cfg.Keys(ctx)
}

// attestFor makes evidence for a certificate, for the account of the caller.
func (s *Server) attestFor(c *call) keys.Attest {
	return func(ctx context.Context, rd measure.ReportData) (*measure.Evidence, error) {
		return s.cfg.Guest.Evidence(ctx, rd, c.caller)
	}
}

func (s *Server) getKey(ctx context.Context, c *call) (message, error) {
	key, err := s.derivedKey(ctx, c)
	if err != nil {
		return nil, err
	}
	return keyMessage(key, "key", "signature_chain"), nil
}

func (s *Server) deriveK256Key(ctx context.Context, c *call) (message, error) {
	key, err := s.derivedKey(ctx, c)
	if err != nil {
		return nil, err
	}
	return keyMessage(key, "k256_key", "k256_signature_chain"), nil
}

func keyMessage(key *keys.Derived, keyName, chainName string) message {
	defer key.Zero()
	secret, chain := key.Bytes(), key.Chain[:]
	return message{{keyName, 1, &secret}, {chainName, 2, &chain}}
}

// derivedKey serves GetKey and DeriveK256Key, which differ in the names of their
// answer's members.
func (s *Server) derivedKey(ctx context.Context, c *call) (*keys.Derived, error) {
	if err := s.mayDerive(c); err != nil {
		return nil, err
	}
	var path, purpose, algorithm string
	if err := c.arguments.decode(message{{"path", 1, &path}, {"purpose", 2, &purpose}, {"algorithm", 3, &algorithm}}); err != nil {
		return nil, err
	}
	if err := s.mayDerivePath(c, path); err != nil {
		return nil, err
	}
	if err := s.mayChain(c, purpose); err != nil {
		return nil, err
	}
	app, err := s.app(ctx)
	if err != nil {
		return nil, err
	}
	return app.Derive(path, purpose, algorithm)
}

func (s *Server) getTLSKey(ctx context.Context, c *call) (message, error) {
	if err := s.mayCertify(c); err != nil {
		return nil, err
	}
	var r keys.CertificateRequest
	err := c.arguments.decode(message{
		{"subject", 1, &r.Subject}, {"alt_names", 2, &r.AltNames}, {"usage_ra_tls", 3, &r.RATLS}, {"usage_server_auth", 4, &r.Server},
		{"usage_client_auth", 5, &r.Client}, {"not_before", 6, &r.NotBefore}, {"not_after", 7, &r.NotAfter}, {"with_app_info", 8, &r.AppInfo},
	})
	if err != nil {
		return nil, err
	}
	app, err := s.app(ctx)
	if err != nil {
		return nil, err
	}
	return tlsMessage(app.IssueRandom(ctx, r, s.attestFor(c)))
}

func (s *Server) deriveKey(ctx context.Context, c *call) (message, error) {
	if err := s.mayCertify(c); err != nil {
		return nil, err
	}
	var path string
	var random bool
	var r keys.CertificateRequest
	err := c.arguments.decode(message{
		{"path", 1, &path}, {"subject", 2, &r.Subject}, {"alt_names", 3, &r.AltNames}, {"usage_ra_tls", 4, &r.RATLS},
		{"usage_server_auth", 5, &r.Server}, {"usage_client_auth", 6, &r.Client}, {"random_seed", 7, &random},
	})
	if err != nil {
		return nil, err
	}
	if !random {
		if err := s.mayDerivePath(c, path); err != nil {
			return nil, err
		}
	}
	app, err := s.app(ctx)
	if err != nil {
		return nil, err
	}
	if random {
		return tlsMessage(app.IssueRandom(ctx, r, s.attestFor(c)))
	}
	return tlsMessage(app.IssueDerived(ctx, path, r, s.attestFor(c)))
}

func tlsMessage(key *keys.TLSKey, err error) (message, error) {
	if err != nil {
		return nil, err
	}
	text, chain := pemText(key.KeyPEM()), key.Chain
	return message{{"key", 1, &text}, {"certificate_chain", 2, &chain}}, nil
}

func (s *Server) sign(ctx context.Context, c *call) (message, error) {
	if err := s.maySign(c); err != nil {
		return nil, err
	}
	var algorithm string
	var data []byte
	if err := c.arguments.decode(message{{"algorithm", 1, &algorithm}, {"data", 2, &data}}); err != nil {
		return nil, err
	}
	app, err := s.app(ctx)
	if err != nil {
		return nil, err
	}
	signed, err := app.Sign(algorithm, data)
	if err != nil {
		return nil, err
	}
	chain := signed.Chain[:]
	return message{{"signature", 1, &signed.Signature}, {"signature_chain", 2, &chain}, {"public_key", 3, &signed.PublicKey}}, nil
}

func (s *Server) verify(_ context.Context, c *call) (message, error) {
	if err := s.maySign(c); err != nil {
		return nil, err
	}
	var algorithm string
	var data, signature, public []byte
	err := c.arguments.decode(message{{"algorithm", 1, &algorithm}, {"data", 2, &data}, {"signature", 3, &signature}, {"public_key", 4, &public}})
	if err != nil {
		return nil, err
	}
	valid, err := keys.Verify(algorithm, data, signature, public)
	if err != nil {
		return nil, err
	}
	return message{{"valid", 1, &valid}}, nil
}
