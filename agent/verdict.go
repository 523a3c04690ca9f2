package main

import (
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

const verdictSchema = "tdx-agent/verdict/v1"

// verdict is verify's JSON form. Its members include those of dstack-verifier's answer
// (is_valid, details, reason) and, as qvl, those of dcap-qvl's report.
type verdict struct {
	Schema     string         `json:"schema"`
	IsValid    bool           `json:"is_valid"`
	Simulated  bool           `json:"simulated"` // the PCK chain does not end in Intel's root
	Reason     *string        `json:"reason"`
	ReasonCode *string        `json:"reason_code"`
	Details    verdictDetails `json:"details"`
	QVL        *qvlReport     `json:"qvl"`
	TCB        *tcbVerdict    `json:"tcb"`
	Collateral *collateralUse `json:"collateral"`
	CheckedAt  time.Time      `json:"checked_at"`
	Policy     policyVerdict  `json:"policy"`
	Checks     []remote.Check `json:"checks"`
	Unchecked  []string       `json:"unchecked"`
	QuoteHash  string         `json:"quote_sha256,omitempty"` // without trailing bytes; no replay key
	Trailing   int            `json:"trailing_bytes"`
}

type verdictDetails struct {
	QuoteVerified       bool            `json:"quote_verified"`
	EventLogVerified    bool            `json:"event_log_verified"`
	OSImageHashVerified bool            `json:"os_image_hash_verified"`
	ACPITablesVerified  bool            `json:"acpi_tables_verified"`
	OSImageIsDev        *bool           `json:"os_image_is_dev"`
	OSImageVersion      *string         `json:"os_image_version"`
	TEEVariant          string          `json:"tee_variant"`
	ReportData          string          `json:"report_data,omitempty"`
	TCBStatus           string          `json:"tcb_status,omitempty"`
	AdvisoryIDs         []string        `json:"advisory_ids"`
	KeyProvider         json.RawMessage `json:"key_provider,omitempty"`
	AppInfo             *appInfo        `json:"app_info,omitempty"`
	BootInfo            *bootInfo       `json:"boot_info,omitempty"`
}

// appInfo is there if the event log proves which application it is. OSImageHash is
// what the host claims: os_image_hash_verified says whether that holds.
type appInfo struct {
	AppID           string `json:"app_id"`
	ComposeHash     string `json:"compose_hash"`
	InstanceID      string `json:"instance_id"`
	DeviceID        string `json:"device_id"`
	MRSystem        string `json:"mr_system"`
	MRAggregated    string `json:"mr_aggregated"`
	OSImageHash     string `json:"os_image_hash"`
	KeyProviderInfo string `json:"key_provider_info"`
}

// bootInfo is the payload that a dstack KMS asks its authorisation service with. It is
// there only in a verdict that is valid, of an application that is proven;
// OSImageHash is empty unless a policy's image proves it.
type bootInfo struct {
	TEEVariant      string   `json:"teeVariant"`
	MRAggregated    string   `json:"mrAggregated"`
	OSImageHash     string   `json:"osImageHash"`
	MRSystem        string   `json:"mrSystem"`
	AppID           string   `json:"appId"`
	ComposeHash     string   `json:"composeHash"`
	InstanceID      string   `json:"instanceId"`
	DeviceID        string   `json:"deviceId"`
	KeyProviderInfo string   `json:"keyProviderInfo"`
	TCBStatus       string   `json:"tcbStatus"`
	AdvisoryIDs     []string `json:"advisoryIds"`
}

type tcbVerdict struct {
	Platform tcbPart    `json:"platform"`
	Module   tcbPart    `json:"module"`
	QE       tcbPart    `json:"qe"`
	Merged   tcbPart    `json:"merged"`
	Date     *time.Time `json:"tcb_date"`
	Eval     struct {
		TCBInfo    int `json:"tcb_info"`
		QEIdentity int `json:"qe_identity"`
	} `json:"eval"`
	ShortSVNs     []shortSVN `json:"short_svns"`
	FMSPC         string     `json:"fmspc"`
	SecondOpinion string     `json:"second_opinion"`
}

type tcbPart struct {
	Status      string     `json:"status"`
	AdvisoryIDs []string   `json:"advisory_ids"`
	Date        *time.Time `json:"tcb_date,omitempty"`
}

type shortSVN struct {
	Component string `json:"component"`
	Got       int    `json:"got"`
	Want      int    `json:"want"`
}

type collateralUse struct {
	Source     string     `json:"source"`
	NotBefore  time.Time  `json:"not_before"`
	NotAfter   time.Time  `json:"not_after"`
	Stale      bool       `json:"stale"`
	StaleSince *time.Time `json:"stale_since,omitempty"`
	SHA256     string     `json:"sha256"`
}

type policyVerdict struct {
	ID     string   `json:"id"`
	Entry  string   `json:"entry"`
	Failed []string `json:"failed"`
}

// qvlReport is dcap-qvl's VerifiedReport.
type qvlReport struct {
	Status      string         `json:"status"`
	AdvisoryIDs []string       `json:"advisory_ids"`
	Report      map[string]any `json:"report"` // TD10 or TD15
	PPID        string         `json:"ppid"`
	QE          tcbPart        `json:"qe_status"`
	Platform    tcbPart        `json:"platform_status"` // with the TDX module
}

// makeVerdict describes an appraisal. The Result is that of the *Rejection if there
// was one.
func makeVerdict(r *remote.Result) *verdict {
	c := r.Claims
	v := &verdict{Schema: verdictSchema, IsValid: r.Accepted, CheckedAt: r.At.UTC(), Checks: r.Checks, Unchecked: []string{},
		Policy: policyVerdict{ID: r.Policy, Entry: r.Entry, Failed: []string{}}}
	for _, check := range r.Failed() {
		v.Policy.Failed = append(v.Policy.Failed, check.Name)
	}
	for _, check := range r.Unchecked() {
		v.Unchecked = append(v.Unchecked, check.Name)
	}
	if !r.Accepted {
		rejection := &remote.Rejection{Result: r}
		code, reason := rejection.Code(), rejection.Error()
		v.ReasonCode, v.Reason = &code, &reason
	}
	if report := c.Report; report != nil {
		v.Simulated = report.Root != dcap.IntelRoot()
		v.QVL, v.TCB, v.Collateral = makeQVL(report), makeTCB(report), makeCollateral(c)
		v.QuoteHash, v.Trailing = hex.EncodeToString(report.QuoteSHA256[:]), report.TrailingBytes
	}
	v.Details = makeDetails(r)
	return v
}

func makeDetails(r *remote.Result) verdictDetails {
	c := r.Claims
	d := verdictDetails{TEEVariant: "dstack-tdx", AdvisoryIDs: []string{},
		QuoteVerified:       c.Report != nil && passed(r, "signature", "root"),
		EventLogVerified:    passed(r, "event_log") && c.IdentityErr == nil,
		OSImageHashVerified: passed(r, "mrtd", "rtmr1", "rtmr2", "os_image_hash"),
		ACPITablesVerified:  passed(r, "rtmr0") && r.Image.Calculated(),
	}
	if r.Image != nil && r.Image.Version() != "" {
		version := r.Image.Version()
		d.OSImageVersion = &version
	}
	if c.Quote != nil {
		d.ReportData = c.Quote.Body.ReportData.String()
	}
	if c.Report != nil {
		d.TCBStatus, d.AdvisoryIDs = string(c.Report.Merged.Status), listed(c.Report.Merged.Advisories)
	}
	if !d.EventLogVerified || !passed(r, "identity") {
		return d
	}
	if json.Valid([]byte(c.Identity.KeyProvider)) {
		d.KeyProvider = json.RawMessage(c.Identity.KeyProvider)
	}
	d.AppInfo = makeAppInfo(c)
	if r.Accepted && c.Report != nil {
		a := *d.AppInfo
		if !d.OSImageHashVerified {
			a.OSImageHash = "" // the host's claim, on which nobody is to be authorised
		}
		d.BootInfo = &bootInfo{TEEVariant: d.TEEVariant, MRAggregated: a.MRAggregated, OSImageHash: a.OSImageHash, MRSystem: a.MRSystem, AppID: a.AppID,
			ComposeHash: a.ComposeHash, InstanceID: a.InstanceID, DeviceID: a.DeviceID, KeyProviderInfo: a.KeyProviderInfo, TCBStatus: d.TCBStatus, AdvisoryIDs: d.AdvisoryIDs}
	}
	return d
}

func makeAppInfo(c *remote.Claims) *appInfo {
	registers := c.Quote.Body.Registers
	system := measure.MRSystem(registers, []byte(c.Identity.KeyProvider))
	registers.RTMR[measure.RTMR3] = c.Replayed[measure.RTMR3]
	aggregated := measure.MRAggregated(registers)
	a := &appInfo{AppID: hex.EncodeToString(c.Identity.AppID), ComposeHash: hex.EncodeToString(c.Identity.ComposeHash), InstanceID: hex.EncodeToString(c.Identity.InstanceID),
		MRSystem: hex.EncodeToString(system[:]), MRAggregated: hex.EncodeToString(aggregated[:]), OSImageHash: hex.EncodeToString(c.OSImageHash()), KeyProviderInfo: c.Identity.KeyProvider}
	if c.Report != nil {
		id := measure.DeviceID(c.Report.PCK.PPID[:])
		a.DeviceID = hex.EncodeToString(id[:])
	}
	return a
}

// passed reports whether all of these checks were made and passed.
func passed(r *remote.Result, names ...string) bool {
	for _, name := range names {
		if !slices.ContainsFunc(r.Checks, func(c remote.Check) bool { return c.Name == name && c.Outcome == remote.Passed }) {
			return false
		}
	}
	return true
}

func makeTCB(r *dcap.Report) *tcbVerdict {
	t := &tcbVerdict{Platform: makePart(r.Platform), Module: makePart(r.Module), QE: makePart(r.QEStatus), Merged: makePart(r.Merged),
		Date: date(r.Merged.Date), ShortSVNs: []shortSVN{}, FMSPC: hex.EncodeToString(r.PCK.FMSPC[:]), SecondOpinion: r.SecondOpinion}
	t.Eval.TCBInfo, t.Eval.QEIdentity = r.EvaluationTCB, r.EvaluationQE
	for _, s := range r.ShortSVNs {
		t.ShortSVNs = append(t.ShortSVNs, shortSVN(s))
	}
	return t
}

func makePart(t dcap.TCB) tcbPart {
	return tcbPart{Status: string(t.Status), AdvisoryIDs: listed(t.Advisories), Date: date(t.Date)}
}

// listed makes no list an empty one, which JSON shows as such.
func listed(ids []string) []string {
	if ids == nil {
		return []string{}
	}
	return ids
}

func date(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func makeCollateral(c *remote.Claims) *collateralUse {
	r := c.Report
	return &collateralUse{Source: c.Source, NotBefore: r.CollateralFrom.UTC(), NotAfter: r.CollateralUntil.UTC(), Stale: !r.StaleSince.IsZero(),
		StaleSince: date(r.StaleSince), SHA256: hex.EncodeToString(r.CollateralSHA256[:])}
}

func makeQVL(r *dcap.Report) *qvlReport {
	b := &r.Quote.Body
	base := map[string]any{
		"tee_tcb_svn": hex.EncodeToString(b.TEETCBSVN[:]), "mr_seam": b.MRSEAM, "mr_signer_seam": b.MRSignerSEAM,
		"seam_attributes": hex.EncodeToString(b.SEAMAttributes[:]), "td_attributes": hex.EncodeToString(b.TDAttributes[:]), "xfam": hex.EncodeToString(b.XFAM[:]),
		"mr_td": b.MRTD, "mr_config_id": b.MRConfigID, "mr_owner": b.MROwner, "mr_owner_config": b.MROwnerConfig,
		"rt_mr0": b.RTMR[0], "rt_mr1": b.RTMR[1], "rt_mr2": b.RTMR[2], "rt_mr3": b.RTMR[3], "report_data": b.ReportData.String(),
	}
	body := map[string]any{"TD10": base}
	if r.Quote.BodyType == measure.BodyTD15 {
		body = map[string]any{"TD15": map[string]any{"base": base, "tee_tcb_svn2": hex.EncodeToString(b.TEETCBSVN2[:]), "mr_service_td": b.MRServiceTD}}
	}
	platform, qe := makePart(r.PlatformAndModule()), makePart(r.QEStatus)
	platform.Date, qe.Date = nil, nil
	return &qvlReport{Status: string(r.Merged.Status), AdvisoryIDs: listed(r.Merged.Advisories), Report: body, PPID: hex.EncodeToString(r.PCK.PPID[:]), QE: qe, Platform: platform}
}

// dstackVerdict is dstack-verifier's answer.
type dstackVerdict struct {
	IsValid bool           `json:"is_valid"`
	Details verdictDetails `json:"details"`
	Reason  *string        `json:"reason"`
}

// dstackReasons are how dstack-verifier's reasons begin, by what failed first.
var dstackReasons = map[remote.Question]string{
	remote.Boot:        "OS image hash verification failed: ",
	remote.Application: "Event log verification failed: ",
}

func (v *verdict) dstack() *dstackVerdict {
	d := &dstackVerdict{IsValid: v.IsValid, Details: v.Details}
	if v.Reason == nil {
		return d
	}
	start := "Quote verification failed: "
	if i := slices.IndexFunc(v.Checks, func(c remote.Check) bool { return c.Outcome == remote.Failed }); i >= 0 {
		if other, ok := dstackReasons[v.Checks[i].Question]; ok {
			start = other
		}
	}
	reason := start + strings.TrimSpace(*v.Reason)
	d.Reason = &reason
	return d
}
