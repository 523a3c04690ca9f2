package guestapi

import (
	"context"
)

// appKeyAttestation answers anybody with evidence for the key that Sign uses. Its report
// data is the same every time, so the Guest of such a surface may keep the evidence; one
// that does not lets strangers spend the host's quotes.
func (s *Server) appKeyAttestation(ctx context.Context, c *call) (message, error) {
	if err := s.mayQuote(c, false); err != nil {
		return nil, err
	}
	var algorithm string
	if err := c.arguments.decode(message{{"algorithm", 1, &algorithm}}); err != nil {
		return nil, err
	}
	app, err := s.app(ctx)
	if err != nil {
		return nil, err
	}
	rd, err := app.AttestationReportData(algorithm)
	if err != nil {
		return nil, err
	}
	ev, err := s.cfg.Guest.Evidence(ctx, rd, c.caller)
	if err != nil {
		return nil, err
	}
	return s.quoteMessage(ev, rd)
}
