package dcap

import (
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"tdx-agent/measure"
)

// Status is a TCB status.
type Status string

// TCB statuses. The first seven are what Intel's documents say of a TCB level.
const (
	UpToDate                          Status = "UpToDate"
	SWHardeningNeeded                 Status = "SWHardeningNeeded"
	ConfigurationNeeded               Status = "ConfigurationNeeded"
	ConfigurationAndSWHardeningNeeded Status = "ConfigurationAndSWHardeningNeeded"
	OutOfDate                         Status = "OutOfDate"
	OutOfDateConfigurationNeeded      Status = "OutOfDateConfigurationNeeded"
	Revoked                           Status = "Revoked"

	// The platform was brought up to date under a running TD: launching the TD anew
	// would make it up to date, in the second case once the platform is configured.
	TDRelaunchAdvised                    Status = "TDRelaunchAdvised"
	TDRelaunchAdvisedConfigurationNeeded Status = "TDRelaunchAdvisedConfigurationNeeded"

	// No TCB level matches. Never to be accepted.
	NotSupported Status = "NotSupported"
	// The documents use a status that this package does not know. Never to be accepted.
	Unrecognized Status = "Unrecognized"
)

// documentStatus is the status of a level in a signed document.
func documentStatus(s string) Status {
	switch status := Status(s); status {
	case UpToDate, SWHardeningNeeded, ConfigurationNeeded, ConfigurationAndSWHardeningNeeded,
		OutOfDate, OutOfDateConfigurationNeeded, Revoked:
		return status
	}
	return Unrecognized
}

// TCB is the level that something reaches.
type TCB struct {
	// Status is "" for the TDX module if its version is 0: then the platform's
	// level judges it.
	Status     Status
	Date       time.Time // tcbDate of the level, zero if none matches
	Advisories []string  // "INTEL-SA-00000"; what that level is still open to
}

// ShortSVN is a security version number below that of the newest level.
type ShortSVN struct {
	Component string // as "TDX component 2 (TDX Late Microcode Update)"
	Got, Want int
}

// verdict is what a collateral says of one platform, TDX module and quoting enclave.
type verdict struct {
	platform, module, qe, merged TCB
	newest                       time.Time // see Report.NewestTCBDate
	short                        []ShortSVN
}

// judge applies Intel's rule to a quote whose signatures hold. The error says that
// the TDX module or the quoting enclave is none of Intel's.
func (c *Collateral) judge(pck *PCK, body *measure.TDBody, bodyType uint16, qe *QEReport) (*verdict, *Error) {
	v := new(verdict)
	module, err := c.moduleOf(body)
	if err != nil {
		return nil, err
	}
	if module.id != "" {
		v.module = levelOf(module.levels, int(body.TEETCBSVN[0]))
	}
	if err := c.checkQE(qe); err != nil {
		return nil, err
	}
	v.qe = levelOf(c.qe.levels, int(qe.ISVSVN))
	sgx, tdx := c.platformLevels(pck, body)
	v.platform = TCB{Status: NotSupported}
	if tdx != nil {
		v.platform = tdx.tcb
	}
	status := converge(v.platform.Status, v.module.Status)
	if bodyType == measure.BodyTD15 && c.relaunch(sgx, status, v, body) {
		status = TDRelaunchAdvised
		if converge(v.platform.Status, v.module.Status) == OutOfDateConfigurationNeeded {
			status = TDRelaunchAdvisedConfigurationNeeded
		}
	}
	v.merged = merge(converge(status, v.qe.Status), &v.platform, &v.module, &v.qe)
	v.newest = c.newestOf(v, module)
	v.short = c.shortSVNs(pck, body, module, qe)
	return v, nil
}

// newestOf is Report.NewestTCBDate.
func (c *Collateral) newestOf(v *verdict, module *moduleIdentity) (date time.Time) {
	platform := c.tcb.levels[0].tcb.Date
	consider := func(status Status, newest time.Time) {
		isOld := status == OutOfDate || status == OutOfDateConfigurationNeeded
		if isOld && (date.IsZero() || newest.Before(date)) {
			date = newest
		}
	}
	consider(v.platform.Status, platform)
	if module.id != "" {
		consider(v.module.Status, module.levels[0].tcb.Date)
	}
	consider(v.qe.Status, c.qe.levels[0].tcb.Date)
	if date.IsZero() {
		date = platform
	}
	return date
}

// moduleOf returns the identity of the TDX module, whose version is byte 1 of
// TEE_TCB_SVN, after checking the module against it.
func (c *Collateral) moduleOf(body *measure.TDBody) (*moduleIdentity, *Error) {
	module := &c.tcb.module
	if version := body.TEETCBSVN[1]; version > 0 {
		id := moduleID(version)
		if module = c.tcb.identity(id); module == nil {
			return nil, &Error{Code: "tdx_module_mismatch", Stage: stageTCB, Got: "TDX module " + id, Want: "a module that the TCB info has an identity of",
				Hint: "fetch newer collateral, or update the TDX module"}
		}
	}
	if module.signer != body.MRSignerSEAM {
		return nil, &Error{Code: "seam_signer", Stage: stageTCB, Got: body.MRSignerSEAM.String(), Want: hex.EncodeToString(module.signer[:]),
			Hint: "the TDX module is not signed by Intel"}
	}
	for i, got := range body.SEAMAttributes {
		if got != 0 || got&module.mask[i] != module.attributes[i] {
			return nil, &Error{Code: "seam_attributes", Stage: stageTCB, Got: hex.EncodeToString(body.SEAMAttributes[:]), Want: "0000000000000000",
				Hint: "the TDX module is no production module"}
		}
	}
	return module, nil
}

func moduleID(version byte) string { return fmt.Sprintf("TDX_%02X", version) }

// checkQE compares the quoting enclave with its identity.
func (c *Collateral) checkQE(qe *QEReport) *Error {
	id := c.qe
	fail := func(code string, got, want []byte) *Error {
		return &Error{Code: code, Stage: stageTCB, Got: hex.EncodeToString(got), Want: hex.EncodeToString(want), Hint: "the quoting enclave is not Intel's production TD quoting enclave"}
	}
	if qe.MRSigner != id.signer {
		return fail("qe_signer", qe.MRSigner[:], id.signer[:])
	}
	if qe.ISVProdID != id.product {
		return fail("qe_product", []byte{byte(qe.ISVProdID >> 8), byte(qe.ISVProdID)}, []byte{byte(id.product >> 8), byte(id.product)})
	}
	if !masked(qe.MiscSelect[:], id.miscMask[:], id.miscSelect[:]) {
		return fail("qe_miscselect", qe.MiscSelect[:], id.miscSelect[:])
	}
	if !masked(qe.Attributes[:], id.attributesMask[:], id.attributes[:]) {
		return fail("qe_attributes", qe.Attributes[:], id.attributes[:])
	}
	return nil
}

func masked(got, mask, want []byte) bool {
	for i := range got {
		if got[i]&mask[i] != want[i] {
			return false
		}
	}
	return true
}

// levelOf is the first level that svn reaches.
func levelOf(levels []svnLevel, svn int) TCB {
	for i := range levels {
		if levels[i].svn <= svn {
			return levels[i].tcb
		}
	}
	return TCB{Status: NotSupported}
}

// platformLevels returns the first level that the SGX side reaches, and the first
// that the TDX side reaches as well; nil where there is none.
func (c *Collateral) platformLevels(pck *PCK, body *measure.TDBody) (sgx, tdx *platformLevel) {
	from := firstTDXComponent(body)
	for i := range c.tcb.levels {
		l := &c.tcb.levels[i]
		if l.pceSVN > pck.PCESVN || !reaches(pck.Components[:], l.sgx[:]) {
			continue
		}
		if sgx == nil {
			sgx = l
		}
		if reaches(body.TEETCBSVN[from:], l.tdx[from:]) {
			return sgx, l
		}
	}
	return sgx, nil
}

// firstTDXComponent skips the components of the TDX module if the module has an
// identity of its own.
func firstTDXComponent(body *measure.TDBody) int {
	if body.TEETCBSVN[1] > 0 {
		return 2
	}
	return 0
}

func reaches(got, want []byte) bool {
	for i := range got {
		if got[i] < want[i] {
			return false
		}
	}
	return true
}

// converge merges the status of the TDX module or of the QE into the platform's.
// NotSupported and Unrecognized, which Intel's table lacks, always win, but for
// Revoked, which is worse.
func converge(platform, component Status) Status {
	for _, s := range [...]Status{Revoked, NotSupported, Unrecognized} {
		if platform == s || component == s {
			return s
		}
	}
	if component != OutOfDate {
		return platform
	}
	switch platform {
	case UpToDate, SWHardeningNeeded:
		return OutOfDate
	case ConfigurationNeeded, ConfigurationAndSWHardeningNeeded:
		return OutOfDateConfigurationNeeded
	}
	return platform
}

// relaunch reports whether only the TD's launch is out of date: the module that runs
// now, by TEE_TCB_SVN_2, is the newest. status is that of platform and module.
func (c *Collateral) relaunch(sgx *platformLevel, status Status, v *verdict, body *measure.TDBody) bool {
	switch v.qe.Status {
	case OutOfDate, Revoked, NotSupported, Unrecognized:
		return false
	}
	if sgx == nil || v.module.Status != OutOfDate || status != OutOfDate && status != OutOfDateConfigurationNeeded {
		return false
	}
	switch sgx.tcb.Status {
	case UpToDate, SWHardeningNeeded, ConfigurationNeeded, ConfigurationAndSWHardeningNeeded:
	default:
		return false
	}
	now, newest := &body.TEETCBSVN2, &c.tcb.levels[0]
	if now[2] < newest.tdx[2] {
		return false
	}
	if now[1] == 0 {
		return now[0] >= newest.tdx[0]
	}
	module := c.tcb.identity(moduleID(now[1]))
	return module != nil && int(now[0]) >= module.levels[0].svn
}

// merge gives the merged TCB the earliest date and every advisory once. Without a
// level that matches there is neither.
func merge(status Status, parts ...*TCB) TCB {
	t := TCB{Status: status}
	if status == NotSupported {
		return t
	}
	for _, p := range parts {
		if !p.Date.IsZero() && (t.Date.IsZero() || p.Date.Before(t.Date)) {
			t.Date = p.Date
		}
		for _, id := range p.Advisories {
			if !slices.Contains(t.Advisories, id) {
				t.Advisories = append(t.Advisories, id)
			}
		}
	}
	return t
}

// shortSVNs lists what is below the newest levels.
func (c *Collateral) shortSVNs(pck *PCK, body *measure.TDBody, module *moduleIdentity, qe *QEReport) (short []ShortSVN) {
	compare := func(name string, got, want int) {
		if got < want {
			short = append(short, ShortSVN{name, got, want})
		}
	}
	newest := &c.tcb.levels[0]
	for i, want := range newest.sgx {
		if got := pck.Components[i]; got < want {
			compare(componentName("SGX", i, newest.sgxNames[i]), int(got), int(want))
		}
	}
	compare("PCESVN", int(pck.PCESVN), int(newest.pceSVN))
	for i := firstTDXComponent(body); i < 16; i++ {
		if got, want := body.TEETCBSVN[i], newest.tdx[i]; got < want {
			compare(componentName("TDX", i, newest.tdxNames[i]), int(got), int(want))
		}
	}
	if module.id != "" {
		compare("TDX module "+module.id, int(body.TEETCBSVN[0]), module.levels[0].svn)
	}
	compare("quoting enclave", int(qe.ISVSVN), c.qe.levels[0].svn)
	return short
}

func componentName(side string, i int, name string) string {
	text := fmt.Sprintf("%s component %d", side, i)
	if name != "" {
		text += " (" + name + ")"
	}
	return text
}
