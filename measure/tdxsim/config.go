package tdxsim

import (
	"fmt"
	"time"

	"tdx-agent/measure"
)

// Config says which TD [New] makes. The zero value is the TD that [Open] makes: an
// up-to-date TDX 1.5 platform with version 4 quotes. What describes the machine is
// kept in the folder, so that a later Open meets the same TD.
type Config struct {
	// Seed fixes the keys, serial numbers and platform values: two TDs of equal
	// seed and Now have the same certificates, so the collateral of one, with other
	// statuses, judges the quotes of the other. Empty: random. Never for anything
	// but tests, since whoever knows the seed signs as this TD.
	Seed []byte `json:"-"`
	// Now is the clock of certificates and collateral. Nil: time.Now.
	Now func() time.Time `json:"-"`

	QuoteVersion int  // 4 or 5. Zero: 4
	BodyType     int  // version 5: 2 (TD 1.0, 584 bytes) or 3 (TD 1.5, 648 bytes). Zero: 3
	Debug        bool // set the DEBUG attribute
	// Attributes are the TD attributes without DEBUG. Zero: SEPT_VE_DISABLE alone.
	Attributes uint64

	SEAMAttributes uint64 // of the TDX module
	QEDebug        bool   // the quoting enclave is a debug enclave

	// Measurements of the TD. Zero: values of the simulated image for MRTD and
	// MRSEAM, zeros for the rest.
	MRTD, MRConfigID, MROwner, MROwnerConfig measure.Digest
	MRSEAM, MRSignerSEAM, MRServiceTD        measure.Digest

	TEETCBSVN  [16]byte // TDX SVNs of the launch. Zero: module TDX_01 with SVN 7, and microcode 4
	TEETCBSVN2 [16]byte // body type 3: TDX SVNs of today. Zero: as TEETCBSVN
	FMSPC      [6]byte  // zero: from the seed

	// Status of the TCB level that this platform, its TDX module and its quoting
	// enclave reach, as the collateral says it: "UpToDate" (also if empty),
	// "OutOfDate", "SWHardeningNeeded", ... If it is OutOfDate, or Revoked, there
	// is a newer level that is UpToDate.
	TCBStatus, ModuleStatus, QEStatus string
	// Advisories of those levels ("INTEL-SA-00000").
	Advisories, ModuleAdvisories, QEAdvisories []string
	// EvaluationNumber is tcbEvaluationDataNumber, QEEvaluationNumber that of the
	// QE identity. Zero: 20, and as EvaluationNumber.
	EvaluationNumber, QEEvaluationNumber int

	// CRLNumber is the number of both CRLs. Zero: 1.
	CRLNumber int64

	// EditTCBInfo and EditQEIdentity change the text of a document before it is
	// signed, for documents that no honest issuer would sign. They hold for the TD
	// that New returns, not for a later Open.
	EditTCBInfo, EditQEIdentity func(string) string `json:"-"`

	Revoked       bool // the PCK certificate is in the PCK CRL
	RevokedCA     bool // the platform CA is in the root CRL
	RevokedSigner bool // the TCB signing certificate is in the root CRL

	// Validity of the documents. Zero fields: certificates from a day before the
	// TD was made to 20 years after; the rest from the start of the current day
	// (UTC) for 30 days, the root CRL for 365.
	Certificates, RootCRL, PCKCRL, TCBInfo, QEIdentity Window
}

// Window is a time of validity. Seconds count; fractions are cut off.
type Window struct{ From, Until time.Time }

// or returns w with its zero fields replaced.
func (w Window) or(from time.Time, days int) Window {
	if w.From.IsZero() {
		w.From = from
	}
	if w.Until.IsZero() {
		w.Until = w.From.AddDate(0, 0, days)
	}
	return Window{w.From.UTC().Truncate(time.Second), w.Until.UTC().Truncate(time.Second)}
}

// TD attributes (TDX Module ABI, ATTRIBUTES).
const (
	attributeDebug         uint64 = 1 << 0
	attributeSEPTVEDisable uint64 = 1 << 28
)

// complete checks c and fills in the defaults that do not depend on the seed.
func (c *Config) complete() error {
	if c.QuoteVersion == 0 {
		c.QuoteVersion = 4
	}
	if c.BodyType == 0 {
		c.BodyType = 2
		if c.QuoteVersion == 5 {
			c.BodyType = 3
		}
	}
	switch {
	case c.QuoteVersion != 4 && c.QuoteVersion != 5:
		return fmt.Errorf("tdxsim: quote version %d, want 4 or 5", c.QuoteVersion)
	case c.BodyType != 2 && c.BodyType != 3:
		return fmt.Errorf("tdxsim: body type %d, want 2 or 3", c.BodyType)
	case c.BodyType == 3 && c.QuoteVersion == 4:
		return fmt.Errorf("tdxsim: a version 4 quote has no body type 3; set QuoteVersion to 5")
	}
	if c.Attributes == 0 {
		c.Attributes = attributeSEPTVEDisable
	}
	if c.Debug {
		c.Attributes |= attributeDebug
	}
	if c.MRTD.IsZero() {
		c.MRTD = synthetic("MRTD")
	}
	if c.MRSEAM.IsZero() {
		c.MRSEAM = synthetic("TDX module")
	}
	if c.TEETCBSVN == [16]byte{} {
		c.TEETCBSVN = [16]byte{7, 1, 4}
	}
	if c.TEETCBSVN2 == [16]byte{} {
		c.TEETCBSVN2 = c.TEETCBSVN
	}
	if c.EvaluationNumber == 0 {
		c.EvaluationNumber = 20
	}
	if c.QEEvaluationNumber == 0 {
		c.QEEvaluationNumber = c.EvaluationNumber
	}
	for _, status := range []*string{&c.TCBStatus, &c.ModuleStatus, &c.QEStatus} {
		if *status == "" {
			*status = "UpToDate"
		}
	}
	return nil
}
