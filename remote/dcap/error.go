package dcap

import "strings"

// Stages of a verification, in their order.
const (
	stageSetup         = "setup"
	stageQuote         = "quote"
	stagePCK           = "pck"
	stageCollateral    = "collateral"
	stageTCB           = "tcb"
	stageSecondOpinion = "second opinion"
)

// Error says which check refused a quote or a collateral bundle. The codes are, by
// stage:
//
//   - setup: no_roots, no_collateral, no_time, canceled
//   - quote: quote_size, quote_format, not_tdx, quote_key_type, qe_vendor,
//     certification_format, attestation_key, qe_report_signature, qe_binding,
//     quote_signature
//   - pck: pck_chain_format, root_not_trusted, pck_chain, pck_extension,
//     pck_not_yet_valid, pck_expired, pck_ca_not_yet_valid, pck_ca_expired,
//     root_not_yet_valid, root_expired, pck_revoked, pck_ca_revoked
//   - collateral: collateral_size, collateral_format, collateral_root,
//     X_chain for X of pck_crl, tcb_info, qe_identity; X_signature and X_format for
//     these and root_crl; X_not_yet_valid and X_expired for these, tcb_signer,
//     qe_signer and pck_crl_issuer; tcb_signer_revoked, qe_signer_revoked,
//     pck_crl_issuer (the CRL is of the other CA), fmspc_mismatch, pceid_mismatch
//   - tcb: tdx_module_mismatch, seam_signer, seam_attributes, qe_signer, qe_product,
//     qe_miscselect, qe_attributes
//   - second opinion: second_opinion
type Error struct {
	Code  string // the check that failed
	Stage string
	Got   string // may be empty, as may Want and Hint
	Want  string
	Hint  string // what to do
	Err   error  // the cause, or nil
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("dcap: ")
	b.WriteString(strings.ReplaceAll(e.Code, "_", " "))
	if e.Got != "" {
		b.WriteString(": got " + e.Got)
	}
	if e.Want != "" {
		b.WriteString(": want " + e.Want)
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }
