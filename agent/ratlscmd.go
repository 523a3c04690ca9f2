package main

import (
	"context"
	"log/slog"
	"net/url"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
	"tdx-agent/remote/ratls"
)

const ratlsUsage = "speak dstack's RA-TLS instead of tdx-atls/1, with peers that know nothing else. Weaker: certificates can be relayed and do not age. Our own agent needs ratls.endpoint = true, the policy require = \"certificate\""

// ratlsEnd is an end's part of RA-TLS. Without an attester it shows no certificate, and
// the Renewer is nil.
func ratlsEnd(g *globals, log *slog.Logger, attester *certificateAttester) (*atls.RATLS, *ratls.Renewer, error) {
	log.Warn("RA-TLS is weaker than channels (tdx-atls/1): a certificate can be relayed and does not age", "assurance", "certificate")
	if attester == nil {
		return &atls.RATLS{}, nil, nil
	}
	cfg, err := loadConfig(g.config)
	if err != nil {
		return nil, nil, err
	}
	r, err := ratls.NewRenewer(ratls.RenewerConfig{Attester: attester, OmitLegacyOIDs: !cfg.RATLS.LegacyOIDs, Server: true, Client: true, Logger: log})
	if err != nil {
		return nil, nil, err
	}
	return &atls.RATLS{Certificate: r.Certificate}, r, nil
}

// certificateAttester finds the agent of this TD and asks it for what costs nothing, so
// that one which is not there or gives no such evidence is found out at once.
func (f *channelFlags) certificateAttester(ctx context.Context, g *globals) (*certificateAttester, error) {
	dir, err := clientRuntimeDir(g.runtimeDir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	a := &certificateAttester{dir.channelSocket()}
	var answer changedReply
	if err := callJSON(ctx, a.socket, "/v1/changed?"+url.Values{"rtmr3": {measure.Digest{}.String()}}.Encode(), &answer); err != nil {
		return nil, err
	}
	f.isReal = !answer.Simulated
	return a, nil
}
