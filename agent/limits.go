package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

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
	named := map[string]guestapi.Rate{}
	for class, r := range c.byClass() {
		named[class.String()] = *r
	}
	return checkNamedLimits(named)
}

// checkNamedLimits checks limits that are named as the fields of [LimitsConfig] are.
func checkNamedLimits(named map[string]guestapi.Rate) error {
	var classes []string
	for class := range new(LimitsConfig).byClass() {
		classes = append(classes, class.String())
	}
	slices.Sort(classes)
	for _, name := range slices.Sorted(maps.Keys(named)) {
		if !slices.Contains(classes, name) {
			return fmt.Errorf("limits: %q is none of %s", name, strings.Join(classes, ", "))
		}
		if err := named[name].Check(); err != nil {
			return fmt.Errorf("limits.%s: %w", name, err)
		}
	}
	return nil
}

// with returns c with what is named in the place of its own.
func (c LimitsConfig) with(named map[string]guestapi.Rate) LimitsConfig {
	for class, r := range c.byClass() {
		if own, ok := named[class.String()]; ok {
			*r = own
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
