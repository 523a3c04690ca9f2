package main

import (
	"fmt"

	"tdx-agent/agent/guestapi"
)

// LimitsConfig says how often one caller may call, by class.
type LimitsConfig struct {
	Read    guestapi.Rate `toml:"read,omitempty"`
	Quote   guestapi.Rate `toml:"quote,omitempty"`
	Cert    guestapi.Rate `toml:"cert,omitempty"`
	Key     guestapi.Rate `toml:"key,omitempty"`
	Sign    guestapi.Rate `toml:"sign,omitempty"`
	Measure guestapi.Rate `toml:"measure,omitempty"`
}

// defaultLimits stop a flood, and no application that does its work: what the agent can
// answer on a core or two is less. The host's quotes are shared by the queue, which knows
// how fast they are.
func defaultLimits() LimitsConfig {
	return LimitsConfig{
		Read:    guestapi.Rate{PerSecond: 100000, Burst: 100000},
		Quote:   guestapi.Rate{PerSecond: 5000, Burst: 10000},
		Cert:    guestapi.Rate{PerSecond: 5000, Burst: 10000},
		Key:     guestapi.Rate{PerSecond: 20000, Burst: 20000},
		Sign:    guestapi.Rate{PerSecond: 20000, Burst: 20000},
		Measure: guestapi.Rate{PerSecond: 50, Burst: 512}, // the log holds no more
	}
}

// byClass names the rates.
func (c *LimitsConfig) byClass() map[guestapi.Class]*guestapi.Rate {
	return map[guestapi.Class]*guestapi.Rate{guestapi.ClassRead: &c.Read, guestapi.ClassQuote: &c.Quote, guestapi.ClassCert: &c.Cert,
		guestapi.ClassKey: &c.Key, guestapi.ClassSign: &c.Sign, guestapi.ClassMeasure: &c.Measure}
}

func (c *LimitsConfig) check() error {
	for class, r := range c.byClass() {
		if err := r.Check(); err != nil {
			return fmt.Errorf("limits.%s: %w", class, err)
		}
	}
	return nil
}

// over returns c with what it leaves out taken from base.
func (c LimitsConfig) over(base LimitsConfig) LimitsConfig {
	defaults := base.byClass()
	for class, r := range c.byClass() {
		if *r == (guestapi.Rate{}) {
			*r = *defaults[class]
		}
	}
	return c
}

func (c *LimitsConfig) limiter() *guestapi.Limiter {
	var rates guestapi.Rates
	for class, r := range c.byClass() {
		rates[class] = *r
	}
	return guestapi.NewLimiter(rates)
}
