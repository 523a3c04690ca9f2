package remote

import (
	"bytes"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/collateral"
	"tdx-agent/remote/dcap"
)

// judge makes every check of one entry, in the order of the questions.
func (e *Entry) judge(s *sheet, c *Claims, x *Expect, at time.Time) {
	e.judgeHardware(s, c)
	e.judgeTCB(s, c, at)
	e.judgePlatform(s, c)
	e.judgeBoot(s, c)
	e.judgeApplication(s, c, x)
	e.judgeChannel(s, c, x)
	judgeFreshness(s, c, x)
	e.judgeLifetime(s, x)
}

func (e *Entry) judgeHardware(s *sheet, c *Claims) {
	if err := c.SignatureErr; err != nil {
		hint := err.Hint
		if err.Err != nil {
			hint = strings.TrimPrefix(err.Err.Error()+"; "+hint, "; ")
		}
		s.fail(Hardware, "signature", err.Code, err.Got, err.Want, strings.TrimSuffix(hint, "; "))
		s.skip(Hardware, "root", "the quote is not genuine")
		s.isForged = true
		return
	}
	s.check(Hardware, "signature", true, func() (string, string, string) {
		return fmt.Sprintf("a version %d quote, signed below a PCK certificate of its platform", c.Quote.Version), "", ""
	})
	if c.Report == nil {
		s.skip(Hardware, "root", "there is no collateral to judge the platform by")
		return
	}
	s.check(Hardware, "root", slices.Contains(e.roots, c.Report.Root), func() (string, string, string) {
		var want []string
		for _, pin := range e.roots {
			want = append(want, dcap.RootName(pin))
		}
		return dcap.RootName(c.Report.Root), strings.Join(want, " or "), "simulated evidence needs an entry of its own, with its root and allow_simulated"
	})
}

// tcbChecks are what needs a Report.
var tcbChecks = []string{"tcb_status", "advisories", "tcb_date", "tcb_evaluation", "collateral_age", "collateral_stale", "fmspc", "svn"}

func (e *Entry) judgeTCB(s *sheet, c *Claims, at time.Time) {
	r := c.Report
	switch {
	case r == nil && c.SignatureErr != nil:
		s.skip(TCB, "collateral", "the quote is not genuine")
	case r == nil:
		e.failCollateral(s, c.CollateralErr)
	default:
		s.check(TCB, "collateral", true, func() (string, string, string) {
			return fmt.Sprintf("%s, valid %s to %s", c.Source, stamp(r.CollateralFrom), stamp(r.CollateralUntil)), "", ""
		})
	}
	if r == nil {
		for _, name := range tcbChecks {
			s.skip(TCB, name, "there is no collateral to judge the platform by")
		}
		return
	}
	t := &e.Terms
	s.check(TCB, "tcb_status", t.acceptsStatus(r, at), func() (string, string, string) {
		got := string(r.Merged.Status)
		if len(r.ShortSVNs) > 0 {
			got += ", " + shortText(r.ShortSVNs)
		}
		return got, fmt.Sprint(t.TCBStatus), "update what is too low, or accept the status in tcb_status"
	})
	s.check(TCB, "advisories", t.acceptsAdvisories(r.Merged.Advisories), func() (string, string, string) {
		want := "none"
		switch {
		case t.AllowAnyAdvisory:
			want = fmt.Sprintf("none of %v", t.AdvisoriesDeny)
		case len(t.AdvisoriesAllow) > 0:
			want = fmt.Sprintf("none but %v, and none of %v", t.AdvisoriesAllow, t.AdvisoriesDeny)
		}
		return fmt.Sprint(r.Merged.Advisories), want, "update the platform, or accept them in advisories_allow"
	})
	e.optional(s, TCB, "tcb_date", "min_tcb_date", !t.MinTCBDate.IsZero(), func() bool { return !r.Merged.Date.Before(t.MinTCBDate) }, func() (string, string, string) {
		return stamp(r.Merged.Date), "not before " + stamp(t.MinTCBDate), "update the platform"
	})
	e.optional(s, TCB, "tcb_evaluation", "min_tcb_eval_number", t.MinTCBEvaluationNumber > 0, func() bool { return min(r.EvaluationTCB, r.EvaluationQE) >= t.MinTCBEvaluationNumber }, func() (string, string, string) {
		return fmt.Sprintf("TCB info %d, QE identity %d", r.EvaluationTCB, r.EvaluationQE), fmt.Sprintf("at least %d", t.MinTCBEvaluationNumber), "fetch newer collateral"
	})
	e.optional(s, TCB, "collateral_age", "max_collateral_age", !t.AllowAnyCollateralAge, func() bool { return at.Sub(r.CollateralIssued) <= t.MaxCollateralAge }, func() (string, string, string) {
		return "issued " + stamp(r.CollateralIssued), fmt.Sprintf("at most %v before %s", t.MaxCollateralAge, stamp(at)), "fetch newer collateral"
	})
	s.check(TCB, "collateral_stale", r.StaleSince.IsZero() || t.AllowStaleCollateral, func() (string, string, string) {
		return "ended " + stamp(r.CollateralUntil), "collateral within its time", "fetch newer collateral"
	})
	e.optional(s, TCB, "fmspc", "fmspc", len(t.FMSPC)+len(t.FMSPCDeny) > 0, func() bool {
		return (len(t.FMSPC) == 0 || oneOf(t.FMSPC, r.PCK.FMSPC[:])) && !oneOf(t.FMSPCDeny, r.PCK.FMSPC[:])
	}, func() (string, string, string) {
		return hex.EncodeToString(r.PCK.FMSPC[:]), fmt.Sprintf("one of %v, none of %v", t.FMSPC, t.FMSPCDeny), "another kind of platform"
	})
	e.optional(s, TCB, "svn", "min_tee_tcb_svn, min_qe_svn, min_pce_svn", len(t.MinTEETCBSVN) > 0 || t.MinQESVN > 0 || t.MinPCESVN > 0, func() bool {
		return atLeast(c.Quote.Body.TEETCBSVN[:], t.MinTEETCBSVN) && int(r.QE.ISVSVN) >= t.MinQESVN && int(r.PCK.PCESVN) >= t.MinPCESVN
	}, func() (string, string, string) {
		return fmt.Sprintf("TEE_TCB_SVN %x, QE %d, PCE %d", c.Quote.Body.TEETCBSVN, r.QE.ISVSVN, r.PCK.PCESVN),
			fmt.Sprintf("at least %s, %d, %d", t.MinTEETCBSVN, t.MinQESVN, t.MinPCESVN), "update the platform"
	})
}

func (e *Entry) failCollateral(s *sheet, err error) {
	code, hint := "collateral_unavailable", "give --collateral, or let a source be reached"
	if source, ok := errors.AsType[*collateral.Error](err); ok {
		code, hint = "collateral_"+source.Code, ""
	}
	if d, ok := asDCAP(err); ok {
		code, hint = d.Code, ""
	}
	s.fail(TCB, "collateral", code, fmt.Sprint(err), "complete and current collateral", hint)
}

func (t *Terms) acceptsStatus(r *dcap.Report, at time.Time) bool {
	if slices.Contains(t.TCBStatus, r.Merged.Status) {
		return true
	}
	// Not with a clock before the date: then the grace would not have begun.
	return r.Merged.Status == dcap.OutOfDate && t.TCBGrace > 0 && !at.Before(r.NewestTCBDate) && !at.After(r.NewestTCBDate.Add(t.TCBGrace))
}

func (t *Terms) acceptsAdvisories(ids []string) bool {
	for _, id := range ids {
		if slices.ContainsFunc(t.AdvisoriesDeny, func(denied string) bool { return strings.EqualFold(denied, id) }) || !t.AllowAnyAdvisory && !slices.Contains(t.AdvisoriesAllow, id) {
			return false
		}
	}
	return true
}

// TD attributes (Intel TDX Module ABI, ATTRIBUTES). Other bits than these are
// reserved, or belong to features that make a TD's secrets visible outside.
const (
	attributeDebug         = 1 << 0
	attributeSEPTVEDisable = 1 << 28
	attributePKS           = 1 << 30
	attributeKL            = 1 << 31
	attributePerfmon       = 1 << 63
	knownAttributes        = attributeDebug | attributeSEPTVEDisable | attributePKS | attributeKL | attributePerfmon
)

// judgePlatform checks how the TD was launched.
func (e *Entry) judgePlatform(s *sheet, c *Claims) {
	t := &e.Terms
	if c.Quote == nil {
		for _, name := range []string{"debug", "sept_ve_disable", "reserved_attributes", "service_td", "td_attributes", "xfam", "mr_seam"} {
			s.skip(TCB, name, "there is no quote")
		}
		return
	}
	b := &c.Quote.Body
	attributes := littleEndian(b.TDAttributes)
	gotAttributes := func(want, hint string) func() (string, string, string) {
		return func() (string, string, string) { return fmt.Sprintf("TD attributes %x", b.TDAttributes), want, hint }
	}
	s.check(TCB, "debug", attributes&attributeDebug == 0 || t.AllowDebug, gotAttributes("DEBUG clear", "the host can read this TD's memory: launch it without debug"))
	e.optional(s, TCB, "sept_ve_disable", "require_sept_ve_disable", t.RequireSEPTVEDisable, func() bool { return attributes&attributeSEPTVEDisable != 0 },
		gotAttributes("SEPT_VE_DISABLE set", "the host could inject #VE: launch the TD with SEPT_VE_DISABLE"))
	s.check(TCB, "reserved_attributes", attributes&^uint64(knownAttributes) == 0, gotAttributes(fmt.Sprintf("only bits of %016x", uint64(knownAttributes)), "an attribute that this version does not know"))
	s.check(TCB, "service_td", b.MRServiceTD.IsZero() || t.AllowServiceTD, func() (string, string, string) {
		return "MR_SERVICETD " + b.MRServiceTD.String(), "zeros", "a service TD is bound to this TD, and may migrate it: write allow_service_td = true to accept every one"
	})
	e.mask(s, TCB, "td_attributes", t.TDAttributes, b.TDAttributes[:])
	e.mask(s, TCB, "xfam", t.XFAM, b.XFAM[:])
	e.pinned(s, TCB, "mr_seam", t.MRSEAM, b.MRSEAM, "another TDX module")
}

// judgeBoot checks the image: all values must be those of one image.
func (e *Entry) judgeBoot(s *sheet, c *Claims) {
	if len(e.images) == 0 || c.Quote == nil {
		for _, name := range append(bootNames[:], "os_image_hash") {
			s.skip(Boot, name, "give a policy with an image, or --image")
		}
	} else if e.images[0].Calculated() && c.SignatureErr != nil {
		for _, name := range append(bootNames[:], "os_image_hash") {
			s.skip(Boot, name, "the quote is not genuine")
		}
	} else if m := e.closestImage(c); m.err != nil {
		s.fail(Boot, "mrtd", "image_not_calculated", m.err.Error(), "the registers of image "+m.image.Name+" on the machine of the vm_config", "give --vm-config, or pin the registers in the policy")
		for _, name := range append(bootNames[1:], "os_image_hash") {
			s.skip(Boot, name, "the image's registers could not be calculated")
		}
	} else {
		m.judge(s, e, c)
		m.image.judgeRest(s, e, c)
	}
	e.judgeBootLog(s, c)
}

var bootNames = [4]string{"mrtd", "rtmr0", "rtmr1", "rtmr2"}

// candidate is an image with the values that its registers may have here.
type candidate struct {
	image  *Image
	values [4][]measure.Digest
	err    error // they could not be calculated
}

func (m *candidate) judge(s *sheet, e *Entry, c *Claims) {
	hints := [4]string{"the firmware is another, or its pages were added in the other order", "firmware settings, ACPI tables or boot order are others: number of processors, memory, devices; tdx-agent image explain tells which event differs",
		"the kernel is another", "the command line or the initrd is another"}
	s.image = m.image
	for i, name := range bootNames {
		list, got := m.values[i], bootRegister(c.Quote, i)
		e.optional(s, Boot, name, name, len(list) > 0, func() bool { return slices.Contains(list, got) }, func() (string, string, string) {
			return got.String(), fmt.Sprintf("%s of image %q", digests(list), m.image.Name), hints[i]
		})
	}
}

// judgeRest checks what an image says beyond its registers.
func (image *Image) judgeRest(s *sheet, e *Entry, c *Claims) {
	b := &c.Quote.Body
	// A hash that the policy pins must be claimed; that of an image's files need not be,
	// since its registers prove it.
	hash := image.hash()
	isAsked := len(image.OSImageHash) > 0 || len(hash) > 0 && (c.OSImageHash() != nil || c.Identity.OSImageHash != nil)
	e.optional(s, Boot, "os_image_hash", "os_image_hash", isAsked, func() bool { return image.hasHash(c) }, func() (string, string, string) {
		return fmt.Sprintf("event %x, vm_config %x", c.Identity.OSImageHash, c.OSImageHash()), hash.String(), "another image, or a claim of another"
	})
	if len(image.MRSEAM) > 0 {
		e.pinned(s, Boot, "image_mr_seam", image.MRSEAM, b.MRSEAM, "another TDX module")
	}
	if len(image.MinTEETCBSVN) > 0 {
		s.check(Boot, "image_svn", atLeast(b.TEETCBSVN[:], image.MinTEETCBSVN), func() (string, string, string) {
			return fmt.Sprintf("TEE_TCB_SVN %x", b.TEETCBSVN), "at least " + image.MinTEETCBSVN.String(), "update the platform"
		})
	}
	if image.XFAM != nil {
		e.mask(s, Boot, "image_xfam", image.XFAM, b.XFAM[:])
	}
}

// hasHash compares every claim of an os_image_hash; there must be one.
func (image *Image) hasHash(c *Claims) bool {
	event, config, want := c.Identity.OSImageHash, c.OSImageHash(), image.hash()
	return (len(event) > 0 || len(config) > 0) && (len(event) == 0 || bytes.Equal(event, want)) && (len(config) == 0 || bytes.Equal(config, want))
}

func bootRegister(q *measure.Quote, i int) measure.Digest {
	if i == 0 {
		return q.Body.MRTD
	}
	return q.Body.RTMR[i-1]
}

// fitsPlatform reports whether all holds that an image says of the platform.
func (image *Image) fitsPlatform(b *measure.TDBody) bool {
	return (len(image.MRSEAM) == 0 || slices.Contains(image.MRSEAM, b.MRSEAM)) && atLeast(b.TEETCBSVN[:], image.MinTEETCBSVN) && (image.XFAM == nil || image.XFAM.matches(b.XFAM[:]))
}

// closestImage returns the image of which most registers match, and of those the one
// that else fits best; the first of equals.
func (e *Entry) closestImage(c *Claims) candidate {
	var best candidate
	most := -1
	for k := range e.images {
		m, n := candidate{image: &e.images[k]}, 0
		if m.values, m.err = m.image.registers(c); m.err == nil {
			for i, list := range m.values {
				if len(list) == 0 || slices.Contains(list, bootRegister(c.Quote, i)) {
					n += 2
				}
			}
			if len(m.image.OSImageHash) == 0 || m.image.hasHash(c) {
				n++
			}
			if m.image.fitsPlatform(&c.Quote.Body) {
				n++
			}
		}
		if n > most {
			best, most = m, n
		}
	}
	return best
}

func (e *Entry) judgeBootLog(s *sheet, c *Claims) {
	switch {
	case !c.HasLog:
		s.skip(Boot, "boot_log", "give the event log")
	case c.LogErr != nil || c.Quote == nil:
		s.skip(Boot, "boot_log", "see event_log")
	case c.Covered == [4]bool{measure.RTMR3: true}:
		s.skip(Boot, "boot_log", "the log was cut: it explains RTMR3 alone")
	default:
		if cut := c.cut(); cut != "" && c.replays() {
			s.skip(Boot, "boot_log", "the log was cut: it does not explain "+cut)
			return
		}
		judgeReplay(s, Boot, "boot_log", c, 0, 3)
	}
}

// judgeReplay compares registers from to, but not including, to.
func judgeReplay(s *sheet, q Question, name string, c *Claims, from, to int) {
	wrong := -1
	for i := from; i < to && wrong < 0; i++ {
		if c.Covered[i] && c.Replayed[i] != c.Quote.Body.RTMR[i] {
			wrong = i
		}
	}
	s.check(q, name, wrong < 0, func() (string, string, string) {
		if wrong < 0 {
			return "the log replays to the quote's registers", "", ""
		}
		hint := "quote and log are not of one moment of one machine, or the log was changed"
		if c.Replayed[wrong].IsZero() {
			hint = "the log has no event of that register: a CCEL has none of RTMR3, which dstack's log has"
		}
		return fmt.Sprintf("RTMR%d %s in the quote", wrong, c.Quote.Body.RTMR[wrong]), fmt.Sprintf("%s, what the log replays to", c.Replayed[wrong]), hint
	})
}

func judgeFreshness(s *sheet, c *Claims, x *Expect) {
	switch {
	case x.AnyReportData:
		s.skip(Freshness, "report_data", "give --report-data, what the quote was asked to bind")
	case c.Quote == nil:
		s.skip(Freshness, "report_data", "there is no quote")
	default:
		got := &c.Quote.Body.ReportData
		s.check(Freshness, "report_data", subtle.ConstantTimeCompare(got[:], x.ReportData[:]) == 1, func() (string, string, string) {
			return got.String(), x.ReportData.String(), "the quote was made for somebody else, or earlier"
		})
	}
}

// optional is a check that is only made where the policy asks for it.
func (e *Entry) optional(s *sheet, q Question, name, key string, isAsked bool, holds func() bool, detail func() (got, want, hint string)) {
	if !isAsked {
		hint, ok := notAsked[key]
		if !ok {
			hint = hintNotAsked(key)
		}
		s.skip(q, name, hint)
		return
	}
	s.check(q, name, holds(), detail)
}

func hintNotAsked(key string) string { return "not in the policy (" + key + ")" }

// notAsked has the hints ready, since most of a policy's keys are not set.
var notAsked = func() map[string]string {
	hints := map[string]string{}
	for _, key := range []string{"min_tcb_date", "min_tcb_eval_number", "max_collateral_age", "fmspc", "min_tee_tcb_svn, min_qe_svn, min_pce_svn", "require_sept_ve_disable",
		"td_attributes", "xfam", "mr_seam", "mrtd", "rtmr0", "rtmr1", "rtmr2", "os_image_hash", "require_events", "app_id", "compose_hash", "instance_id", "key_provider",
		"rtmr3", "device_id", "ppid", "require_measured_agent_key", "service"} {
		hints[key] = hintNotAsked(key)
	}
	return hints
}()

func (e *Entry) pinned(s *sheet, q Question, name string, list []measure.Digest, got measure.Digest, hint string) {
	e.optional(s, q, name, name, len(list) > 0, func() bool { return slices.Contains(list, got) }, func() (string, string, string) {
		return got.String(), digests(list), hint
	})
}

func (e *Entry) mask(s *sheet, q Question, name string, m *Mask, got []byte) {
	e.optional(s, q, name, name, m != nil, func() bool { return m.matches(got) }, func() (string, string, string) {
		return hex.EncodeToString(got), fmt.Sprintf("%s under the mask %s", m.Value, m.Mask), "launch the TD as the policy says"
	})
}

func oneOf(list []Hex, got []byte) bool {
	return slices.ContainsFunc(list, func(h Hex) bool { return bytes.Equal(h, got) })
}

func atLeast(got []byte, want Hex) bool {
	for i, n := range want {
		if got[i] < n {
			return false
		}
	}
	return true
}

func digests(list []measure.Digest) string {
	if len(list) == 1 {
		return list[0].String()
	}
	return fmt.Sprintf("one of %v", list)
}

func shortText(short []dcap.ShortSVN) string {
	var parts []string
	for _, v := range short {
		parts = append(parts, fmt.Sprintf("%s %d below %d", v.Component, v.Got, v.Want))
	}
	return strings.Join(parts, ", ")
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func littleEndian(b [8]byte) (n uint64) {
	for i, c := range b {
		n |= uint64(c) << (8 * i)
	}
	return n
}
