package remote

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"tdx-agent/measure"
)

// judgeApplication checks RTMR3's log and what it says of the application.
func (e *Entry) judgeApplication(s *sheet, c *Claims, x *Expect) {
	judgeLog(s, c)
	proof := c.proven(e.Era)
	e.judgeIdentity(s, c, proof)
	e.judgeEvents(s, c, proof)
	id := &c.Identity
	e.value(s, "app_id", e.AppID, id.AppID, proof)
	e.value(s, "compose_hash", e.ComposeHash, id.ComposeHash, proof)
	e.value(s, "instance_id", e.InstanceID, id.InstanceID, proof)
	e.judgeKeyProvider(s, id, proof)
	e.judgeCompose(s, c, x, proof)
	e.judgeMRConfigID(s, c, x, proof)
	if c.Quote == nil {
		s.skip(Application, "rtmr3", "there is no quote")
	} else {
		e.pinned(s, Application, "rtmr3", e.RTMR3, c.Quote.Body.RTMR[measure.RTMR3], "another application, or another moment of it")
	}
	e.judgeDevice(s, c)
}

func judgeLog(s *sheet, c *Claims) {
	const name = "event_log"
	switch {
	case !c.HasLog:
		s.skip(Application, name, "give --event-log, or the whole answer of GetQuote")
	case c.LogErr != nil:
		s.fail(Application, name, "event_log_format", c.LogErr.Error(), "a log whose digests follow from its events", "the log was changed")
	case c.Quote == nil:
		s.skip(Application, name, "there is no quote")
	default:
		judgeReplay(s, Application, name, c, measure.RTMR3, measure.RTMR3+1)
	}
}

// judgeIdentity fails where the events contradict themselves. That there are none, or
// that they prove nothing, only matters to an entry that wants to know.
func (e *Entry) judgeIdentity(s *sheet, c *Claims, proof error) {
	const name = "identity"
	switch {
	case c.HasLog && c.LogErr == nil && c.IdentityErr != nil:
		s.fail(Application, name, "identity_events", c.IdentityErr.Error(), "each event of the boot once, before system-ready", "a boot that was not dstack's, or an application that emits reserved events")
	case proof != nil:
		s.skip(Application, name, proof.Error())
	case c.Identity.AppID == nil && c.Identity.ComposeHash == nil:
		s.skip(Application, name, "the event log names no application")
	default:
		s.check(Application, name, true, func() (string, string, string) {
			return fmt.Sprintf("app-id %x, compose-hash %x", c.Identity.AppID, c.Identity.ComposeHash), "", ""
		})
	}
}

func (e *Entry) judgeEvents(s *sheet, c *Claims, proof error) {
	var missing []string
	for _, name := range e.RequireEvents {
		if !c.Identity.Has(name) {
			missing = append(missing, name)
		}
	}
	e.optional(s, Application, "required_events", "require_events", len(e.RequireEvents) > 0, func() bool { return proof == nil && missing == nil }, func() (string, string, string) {
		switch {
		case proof != nil:
			return proof.Error(), strings.Join(e.RequireEvents, ", "), "give the event log of a dstack boot"
		case missing != nil:
			return "no " + strings.Join(missing, ", "), strings.Join(e.RequireEvents, ", "), "a boot of another dstack era, or of something else"
		}
		return "all there", strings.Join(e.RequireEvents, ", "), ""
	})
}

// value compares a part of the identity with the values that an entry lists.
func (e *Entry) value(s *sheet, name string, list []Hex, got []byte, proof error) {
	e.optional(s, Application, name, name, len(list) > 0, func() bool { return proof == nil && oneOf(list, got) }, func() (string, string, string) {
		return proofText(proof, hex.EncodeToString(got)), fmt.Sprint(list), "another application"
	})
}

func proofText(proof error, got string) string {
	if proof != nil {
		return "nothing proven: " + proof.Error()
	}
	if got == "" {
		return "none"
	}
	return got
}

func (e *Entry) judgeKeyProvider(s *sheet, id *measure.Identity, proof error) {
	k := e.KeyProvider
	e.optional(s, Application, "key_provider", "key_provider", k != nil, func() bool {
		p, err := measure.ParseKeyProvider([]byte(id.KeyProvider))
		return proof == nil && err == nil && p.Kind == k.Kind && (oneOf(k.ID, p.ID) || len(k.ID) == 0 && (k.AllowAnyID || k.Kind == measure.KeyProviderNone || k.Kind == measure.KeyProviderTPM))
	}, func() (string, string, string) {
		return proofText(proof, id.KeyProvider), fmt.Sprintf("%s %v", k.Kind, k.ID), "the application's keys come from somebody else"
	})
}

// judgeCompose compares a given app-compose.json with the event, byte for byte.
func (e *Entry) judgeCompose(s *sheet, c *Claims, x *Expect, proof error) {
	if x.Compose == nil {
		s.skip(Application, "compose", "give --compose app-compose.json")
		return
	}
	hash := measure.ComposeHash(x.Compose)
	want := hash[:]
	s.check(Application, "compose", proof == nil && bytes.Equal(c.Identity.ComposeHash, want), func() (string, string, string) {
		return proofText(proof, hex.EncodeToString(c.Identity.ComposeHash)), hex.EncodeToString(want) + ", SHA-256 of the file given", "another app-compose.json, or other white space in it"
	})
}

// judgeMRConfigID checks what the host committed to when it launched the TD against
// the identity that was measured.
func (e *Entry) judgeMRConfigID(s *sheet, c *Claims, x *Expect, proof error) {
	const name = "mr_config_id"
	if c.Quote == nil {
		s.skip(Application, name, "there is no quote")
		return
	}
	got := c.Quote.Body.MRConfigID
	if len(e.MRConfigID) > 0 {
		s.check(Application, name, slices.Contains(e.MRConfigID, got), func() (string, string, string) {
			return got.String(), digests(e.MRConfigID), "the TD was launched for another application"
		})
		return
	}
	if got.IsZero() && x.MRConfig == "" {
		s.skip(Application, name, "the host committed to nothing")
		return
	}
	claims, err := mrConfigClaims(&c.Identity, x.MRConfig)
	switch {
	case x.MRConfig != "" && (got[0] != 3 || proof != nil || err != nil):
		s.fail(Application, name, name, got.String(), measure.MRConfigIDV3(x.MRConfig).String()+", of the document given, and an identity that is proven to compare it with",
			"the TD was launched by no document or another one, or its event log is missing: see event_log and identity")
	case got[0] < 1 || got[0] > 3:
		s.skip(Application, name, "not one of dstack's forms: pin it in the policy (mr_config_id)")
	case proof != nil || err != nil:
		s.skip(Application, name, "no identity to compare it with")
	case got[0] == 3 && x.MRConfig == "":
		s.skip(Application, name, "version 3 is the hash of a document: give --mr-config")
	default:
		_, err := measure.CheckMRConfigID(got, claims)
		s.check(Application, name, err == nil, func() (string, string, string) {
			if err == nil {
				return got.String(), "", ""
			}
			return err.Error(), "what the events say", "the TD was launched for another application than it measured"
		})
	}
}

func mrConfigClaims(id *measure.Identity, document string) (c measure.MRConfigClaims, err error) {
	if len(id.ComposeHash) != 32 || len(id.AppID) != 20 {
		return c, fmt.Errorf("no application")
	}
	c = measure.MRConfigClaims{ComposeHash: [32]byte(id.ComposeHash), AppID: [20]byte(id.AppID), InstanceID: id.InstanceID,
		GPUPolicyHash: id.GPUPolicyHash, InitScriptHashes: id.InitScriptHashes, Document: document}
	if id.KeyProvider != "" {
		c.KeyProvider, err = measure.ParseKeyProvider([]byte(id.KeyProvider))
	}
	return c, err
}

// judgeDevice checks which machine it is.
func (e *Entry) judgeDevice(s *sheet, c *Claims) {
	var ppid, device []byte
	if c.Report != nil && len(e.DeviceID)+len(e.PPID) > 0 {
		id := measure.DeviceID(c.Report.PCK.PPID[:])
		ppid, device = c.Report.PCK.PPID[:], id[:]
	}
	for _, t := range []struct {
		name string
		list []Hex
		got  []byte
	}{{"device_id", e.DeviceID, device}, {"ppid", e.PPID, ppid}} {
		e.optional(s, Application, t.name, t.name, len(t.list) > 0, func() bool { return oneOf(t.list, t.got) }, func() (string, string, string) {
			return hex.EncodeToString(t.got), fmt.Sprint(t.list), "another machine"
		})
	}
}
