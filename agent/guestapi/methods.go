package guestapi

import (
	"context"
	"strings"

	"tdx-agent/measure"
)

// call is one request to a method.
type call struct {
	method    string
	arguments arguments
	caller    Caller
}

// method is one method of a surface.
type method struct {
	// run answers a call. It checks grants before it looks at the arguments.
	run func(s *Server, ctx context.Context, c *call) (message, error)
	// large allows a body of 1 MiB to who has the grant for keys.
	large bool
	// secret says that the answer holds key material.
	secret bool
}

// methodsOf returns what a surface knows, by name. Names are case-sensitive.
func methodsOf(surface Surface) map[string]method {
	switch surface {
	case Dstack:
		return map[string]method{
			"GetQuote":  {run: (*Server).getQuote},
			"Attest":    {run: (*Server).attest},
			"Info":      {run: (*Server).info},
			"EmitEvent": {run: (*Server).emitEvent},
			"Version":   {run: (*Server).version},
			"GpuInfo":   {run: (*Server).gpuInfo},
			"GetTlsKey": {run: (*Server).getTLSKey, secret: true},
			"GetKey":    {run: (*Server).getKey, secret: true},
			"Sign":      {run: (*Server).sign, large: true},
			"Verify":    {run: (*Server).verify, large: true},
		}
	case Tappd:
		return map[string]method{
			"TdxQuote":      {run: (*Server).tdxQuote},
			"RawQuote":      {run: (*Server).rawQuote},
			"Info":          {run: (*Server).info},
			"Version":       {run: (*Server).version},
			"DeriveKey":     {run: (*Server).deriveKey, secret: true},
			"DeriveK256Key": {run: (*Server).deriveK256Key, secret: true},
		}
	case Worker:
		return map[string]method{
			"Info":                    {run: (*Server).info},
			"Version":                 {run: (*Server).version},
			"GetAttestationForAppKey": {run: (*Server).appKeyAttestation},
		}
	}
	return nil
}

func (s *Server) getQuote(ctx context.Context, c *call) (message, error) {
	ev, rd, err := s.rawEvidence(ctx, c)
	if err != nil {
		return nil, err
	}
	return s.quoteMessage(ev, rd)
}

func (s *Server) quoteMessage(ev *measure.Evidence, rd measure.ReportData) (message, error) {
	log, err := s.logs.text(ev.Events)
	if err != nil {
		return nil, err
	}
	data := rd[:]
	return message{
		{"quote", 1, &ev.Quote},
		{"event_log", 2, &log},
		{"report_data", 3, &data},
		{"vm_config", 4, &ev.VMConfig},
	}, nil
}

func (s *Server) attest(ctx context.Context, c *call) (message, error) {
	ev, rd, err := s.rawEvidence(ctx, c)
	if err != nil {
		return nil, err
	}
	attestation, err := measure.EncodeAttestation(ev, rd)
	if err != nil {
		return nil, err
	}
	return message{{"attestation", 1, &attestation}}, nil
}

// rawEvidence serves GetQuote and Attest, whose report data is the caller's own.
func (s *Server) rawEvidence(ctx context.Context, c *call) (*measure.Evidence, measure.ReportData, error) {
	var data []byte
	var rd measure.ReportData
	if err := s.mayQuote(c, true); err != nil {
		return nil, rd, err
	}
	if err := c.arguments.decode(message{{"report_data", 1, &data}}); err != nil {
		return nil, rd, err
	}
	if len(data) > len(rd) {
		return nil, rd, badRequest("Report data is too long")
	}
	copy(rd[:], data)
	ev, err := s.cfg.Guest.Evidence(ctx, rd, c.caller)
	return ev, rd, err
}

func (s *Server) mayQuote(c *call, raw bool) error {
	switch {
	case !s.cfg.Grants.Quote:
		return denied("%s is not allowed here: this socket has no grant for quotes; agent.toml says which socket has which grants", c.method)
	case raw && !s.cfg.Grants.RawReportData:
		return denied("%s with report data of your own is not allowed here: this socket has no grant for raw report data; TdxQuote with a hash and a prefix needs none, and agent.toml says which socket has which grants", c.method)
	}
	return nil
}

func (s *Server) mayRead(c *call) error {
	if !s.cfg.Grants.Read {
		return denied("%s is not allowed here: this socket has no grant to read; agent.toml says which socket has which grants", c.method)
	}
	return nil
}

func (s *Server) tdxQuote(ctx context.Context, c *call) (message, error) {
	var data []byte
	var algorithm, prefix string
	if err := s.mayQuote(c, false); err != nil {
		return nil, err
	}
	err := c.arguments.decode(message{
		{"report_data", 1, &data}, {"hash_algorithm", 2, &algorithm}, {"prefix", 3, &prefix},
	})
	if err != nil {
		return nil, err
	}
	return s.tappdQuote(ctx, c, data, algorithm, prefix)
}

func (s *Server) rawQuote(ctx context.Context, c *call) (message, error) {
	var data []byte
	if err := s.mayQuote(c, true); err != nil {
		return nil, err
	}
	if err := c.arguments.decode(message{{"report_data", 1, &data}}); err != nil {
		return nil, err
	}
	return s.tappdQuote(ctx, c, data, hashRaw, "")
}

func (s *Server) tappdQuote(ctx context.Context, c *call, data []byte, algorithm, prefix string) (message, error) {
	if algorithm == hashRaw {
		if err := s.mayQuote(c, true); err != nil {
			return nil, err
		}
	}
	bound, err := bindReportData(data, algorithm, prefix)
	if err != nil {
		return nil, err
	}
	ev, err := s.cfg.Guest.Evidence(ctx, bound.data, c.caller)
	if err != nil {
		return nil, err
	}
	log, err := s.logs.text(ev.Events)
	if err != nil {
		return nil, err
	}
	return message{
		{"quote", 1, &ev.Quote},
		{"event_log", 2, &log},
		{"hash_algorithm", 3, &bound.algorithm},
		{"prefix", 4, &bound.tag},
	}, nil
}

func (s *Server) info(ctx context.Context, c *call) (message, error) {
	if err := s.mayRead(c); err != nil {
		return nil, err
	}
	if err := c.arguments.decode(nil); err != nil {
		return nil, err
	}
	info, err := s.cfg.Guest.Info(ctx)
	if err != nil {
		return nil, err
	}
	if s.cfg.Surface == Worker && !s.cfg.PublicTCBInfo {
		info.TCBInfo, info.VMConfig = "", ""
	}
	return info.fields(), nil
}

func (s *Server) version(_ context.Context, c *call) (message, error) {
	if err := s.mayRead(c); err != nil {
		return nil, err
	}
	if err := c.arguments.decode(nil); err != nil {
		return nil, err
	}
	return message{{"version", 1, &s.cfg.Version}, {"rev", 2, &s.cfg.Revision}}, nil
}

func (s *Server) gpuInfo(_ context.Context, c *call) (message, error) {
	if err := s.mayRead(c); err != nil {
		return nil, err
	}
	if err := c.arguments.decode(nil); err != nil {
		return nil, err
	}
	attestation := strings.ToValidUTF8(s.cfg.Guest.GPU(), "\ufffd")
	return message{{"attestation", 1, &attestation}}, nil
}

func (s *Server) emitEvent(ctx context.Context, c *call) (message, error) {
	if !s.cfg.Grants.Measure {
		return nil, denied("EmitEvent is not allowed here: set full_access = true under [compat] in agent.toml to allow it to every application, or use the admin socket")
	}
	var name string
	var payload []byte
	if err := c.arguments.decode(message{{"event", 1, &name}, {"payload", 2, &payload}}); err != nil {
		return nil, err
	}
	if err := CheckEvent(name, payload); err != nil {
		return nil, err
	}
	return nil, s.cfg.Guest.Emit(ctx, name, payload, c.caller)
}
