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
	name      string // the path of a key or the name of an event, once it is known
}

// method is one method of a surface.
type method struct {
	class Class
	// run answers a call. It checks grants before it looks at the arguments.
	run func(s *Server, ctx context.Context, c *call) (message, error)
	// large allows a body of 1 MiB to who has the grant to sign.
	large bool
	// secret says that the answer holds key material.
	secret bool
}

// methodsOf returns what a surface knows, by name. Names are case-sensitive.
func methodsOf(surface Surface) map[string]method {
	switch surface {
	case Dstack:
		return map[string]method{
			"GetQuote": {class: ClassQuote, run: (*Server).getQuote},
			"Attest":   {class: ClassQuote, run: (*Server).attest},
			// Not dstack's: without it, the grant to quote would give nothing here that
			// does not take RawReportData as well.
			"TdxQuote":  {class: ClassQuote, run: (*Server).tdxQuote},
			"Info":      {class: ClassRead, run: (*Server).info},
			"EmitEvent": {class: ClassMeasure, run: (*Server).emitEvent},
			"Version":   {class: ClassRead, run: (*Server).version},
			"GpuInfo":   {class: ClassRead, run: (*Server).gpuInfo},
			"GetTlsKey": {class: ClassCert, run: (*Server).getTLSKey, secret: true},
			"GetKey":    {class: ClassKey, run: (*Server).getKey, secret: true},
			"Sign":      {class: ClassSign, run: (*Server).sign, large: true},
			"Verify":    {class: ClassSign, run: (*Server).verify, large: true},
		}
	case Tappd:
		return map[string]method{
			"TdxQuote":      {class: ClassQuote, run: (*Server).tdxQuote},
			"RawQuote":      {class: ClassQuote, run: (*Server).rawQuote},
			"Info":          {class: ClassRead, run: (*Server).info},
			"Version":       {class: ClassRead, run: (*Server).version},
			"DeriveKey":     {class: ClassKey, run: (*Server).deriveKey, secret: true},
			"DeriveK256Key": {class: ClassKey, run: (*Server).deriveK256Key, secret: true},
		}
	case Worker:
		return map[string]method{
			"Info":                    {class: ClassRead, run: (*Server).info},
			"Version":                 {class: ClassRead, run: (*Server).version},
			"GetAttestationForAppKey": {class: ClassQuote, run: (*Server).appKeyAttestation},
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
	log, err := s.logs.Of(ev.Events, writeLog)
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
	log, err := s.logs.Of(ev.Events, writeLog)
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
	if err := s.mayMeasure(c); err != nil {
		return nil, err
	}
	var name string
	var payload []byte
	if err := c.arguments.decode(message{{"event", 1, &name}, {"payload", 2, &payload}}); err != nil {
		return nil, err
	}
	c.name = name
	if err := CheckEvent(name, payload); err != nil {
		return nil, err
	}
	if err := s.mayRecord(c, name); err != nil {
		return nil, err
	}
	return nil, s.cfg.Guest.Emit(ctx, name, payload, c.caller)
}
