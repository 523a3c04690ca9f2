package remote

import (
	"encoding/hex"
	"fmt"
	"strings"

	"tdx-agent/measure"
	"tdx-agent/remote/dcap"
)

// Skeleton is a policy file that accepts just what these claims say, for a person to
// read and edit. It proves nothing about them: it writes down what was there.
func (c *Claims) Skeleton() (string, error) {
	if c.Quote == nil {
		return "", fmt.Errorf("remote: no quote to make a policy of")
	}
	b := &c.Quote.Body
	var w strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&w, format+"\n", a...) }
	line("# Made from one TD's evidence. Check every value against its source before you\n# rely on it: this file accepts what was there, whoever that was.")
	line("version = 1\n")
	line("[defaults]")
	if r := c.Report; r != nil {
		line("tcb_status = [%q]                # the status that was found", r.Merged.Status)
		line("advisories_allow = %s", tomlList(r.Merged.Advisories))
		line("min_tcb_eval_number = %d", min(r.EvaluationTCB, r.EvaluationQE))
	} else {
		line("tcb_status = [\"UpToDate\"]            # not judged: no collateral")
	}
	line("max_collateral_age = \"168h\"\n")
	line("[[peer]]")
	line("name = \"peer\"")
	line("# service = [\"...\"]  # our services that this peer may reach over attested channels")
	line("# require = \"certificate\"  # RA-TLS will do, with require_measured_agent_key = false: it can be relayed and does not age")
	if r := c.Report; r != nil && r.Root != dcap.IntelRoot() {
		line("root = \"sha256:%x\"  # SIMULATED: proves nothing about hardware\nallow_simulated = true", r.Root)
	}
	line("image = [\"image\"]")
	c.skeletonApplication(line)
	line("\n[image.\"image\"]")
	for i, name := range []string{"mrtd", "rtmr0", "rtmr1", "rtmr2"} {
		line("%s = [\"%s\"]", name, bootRegister(c.Quote, i))
	}
	if hash := c.OSImageHash(); hash != nil {
		line("# os_image_hash = \"%x\"  # the host's claim", hash)
	}
	line("# mr_seam = [\"%s\"]  # the TDX module: it is updated often", b.MRSEAM)
	line("# td_attributes %x, xfam %x", b.TDAttributes, b.XFAM)
	return w.String(), nil
}

func (c *Claims) skeletonApplication(line func(string, ...any)) {
	id := &c.Identity
	if id.AppID == nil && id.ComposeHash == nil || !c.HasLog || !c.Genuine() {
		line("allow_any_app = true  # the evidence proves no application: give its event log")
		line("require_events = []")
		return
	}
	if !id.Ready {
		line("era = \"0.3\"  # the log has no system-ready: the application itself could have added what follows")
	}
	if id.AppID != nil {
		line("app_id = [\"%x\"]", id.AppID)
	}
	if id.ComposeHash != nil {
		line("compose_hash = [\"%x\"]", id.ComposeHash)
	}
	if len(id.InstanceID) > 0 {
		line("# instance_id = [\"%x\"]  # this one instance", id.InstanceID)
	}
	if p, err := measure.ParseKeyProvider([]byte(id.KeyProvider)); err == nil {
		line("key_provider = {kind = %q, id = %s}", p.Kind, tomlHex(p.ID))
	}
	if id.AgentKey == nil {
		line("require_measured_agent_key = false  # there is no agent-key event")
	}
}

func tomlList(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = fmt.Sprintf("%q", s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func tomlHex(b []byte) string {
	if len(b) == 0 {
		return "[]"
	}
	return tomlList([]string{hex.EncodeToString(b)})
}
