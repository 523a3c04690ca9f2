package forward

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"tdx-agent/measure"
	"tdx-agent/remote/atls"
)

// Identity is what a back end is told of the peer of a channel: only what the channel's
// evidence has proven, and nothing else that the peer has said. What is empty is not
// proven, or is not there.
type Identity struct {
	// Assurance is how the peer has proven itself: "quote", "key" for its measured agent
	// key, or "certificate", which is RA-TLS and weaker. With "simulated-" before it the
	// quote is one of a simulated TD, which proves nothing. "none": the peer has proven
	// nothing.
	Assurance   string             `json:"assurance"`
	Ref         string             `json:"ref"` // of the handshake, the same in both ends' logs
	Service     string             `json:"service"`
	PolicyEntry string             `json:"policy_entry,omitempty"` // that accepts the peer
	AppID       string             `json:"app_id,omitempty"`       // hexadecimal, as the hashes below
	InstanceID  string             `json:"instance_id,omitempty"`
	ComposeHash string             `json:"compose_hash,omitempty"`
	Image       string             `json:"image,omitempty"` // of the policy, that the boot was compared with
	MRTD        *measure.Digest    `json:"mrtd,omitempty"`
	RTMR        *[4]measure.Digest `json:"rtmr,omitempty"`
}

// IdentityOf says who the peer of a channel is.
func IdentityOf(p *atls.Peer) Identity {
	id := Identity{Assurance: p.Assurance(), Ref: p.Ref, Service: p.Service}
	if !p.Attested() {
		return id
	}
	if p.Result.IsSimulated() {
		id.Assurance = "simulated-" + id.Assurance
	}
	id.PolicyEntry = p.Entry()
	if p.Result.Image != nil {
		id.Image = p.Result.Image.Name
	}
	body := p.Result.Claims.Quote.Body
	id.MRTD, id.RTMR = &body.MRTD, (*[4]measure.Digest)(body.RTMR[:])
	if app, err := p.Result.Identity(); err == nil {
		id.AppID, id.InstanceID, id.ComposeHash = hex.EncodeToString(app.AppID), hex.EncodeToString(app.InstanceID), hex.EncodeToString(app.ComposeHash)
	}
	return id
}

// maxHeaderValue bounds the value of a header. What is longer is left out: half a name
// could be another's.
const maxHeaderValue = 256

// headers are those that say who the peer is.
func (id *Identity) headers() map[string]string {
	return map[string]string{
		"X-Attested-Assurance": id.Assurance, "X-Attested-Ref": id.Ref, "X-Attested-Policy-Entry": id.PolicyEntry, "X-Attested-Image": id.Image,
		"X-Attested-App-Id": id.AppID, "X-Attested-Instance-Id": id.InstanceID, "X-Attested-Compose-Hash": id.ComposeHash,
	}
}

// flashbotsHeaders are those of cvm-reverse-proxy: MRTD and RTMR0 to RTMR3 as members "0"
// to "4". An unattested peer is of type "none".
func (id *Identity) flashbotsHeaders() map[string]string {
	if id.MRTD == nil {
		return map[string]string{headerFlashbotsType: "none"}
	}
	registers := map[string]string{"0": id.MRTD.String()}
	for i, d := range id.RTMR {
		registers[strconv.Itoa(i+1)] = d.String()
	}
	b, err := json.Marshal(registers)
	if err != nil {
		panic(err) // strings only
	}
	return map[string]string{headerFlashbotsType: "dcap-tdx", headerFlashbotsMeasurement: string(b)}
}

const (
	headerFlashbotsType        = "X-Flashbots-Attestation-Type"
	headerFlashbotsMeasurement = "X-Flashbots-Measurement"
)

// clear removes every header that a back end could take for one of ours.
func clearIdentity(h http.Header) {
	for name := range h {
		if isIdentityHeader(name) {
			delete(h, name)
		}
	}
}

// isIdentityHeader knows the names as back ends may see them: in any letter case, and
// with whatever stands for a hyphen where headers become variables, as the underscore of
// CGI (RFC 3875 4.1.18) does.
func isIdentityHeader(name string) bool {
	folded := strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
			return r
		}
		return '-'
	}, name)
	return folded == "x-attested" || strings.HasPrefix(folded, "x-attested-") ||
		folded == strings.ToLower(headerFlashbotsType) || folded == strings.ToLower(headerFlashbotsMeasurement)
}

// setIdentity replaces what the peer may have said by what it has proven.
func setIdentity(h http.Header, id *Identity, flashbots bool) {
	clearIdentity(h)
	all := id.headers()
	for name, value := range all {
		// Names of entries and images are the operator's, of any characters.
		if escaped := url.PathEscape(value); value != "" && len(escaped) <= maxHeaderValue {
			h.Set(name, escaped)
		}
	}
	if flashbots {
		for name, value := range id.flashbotsHeaders() {
			h.Set(name, value)
		}
	}
}
