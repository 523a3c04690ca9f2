package remote

import (
	"errors"
	"slices"

	"tdx-agent/measure"
	"tdx-agent/remote/dcap"
)

// Identity returns who the peer has proven to be: what its event log says, if the policy
// accepts the evidence, the log replays to the quote, and nothing that an application
// could have added counts. The error says what is missing. An entry that pins no
// application accepts evidence without any of that.
func (r *Result) Identity() (measure.Identity, error) {
	if !r.Accepted {
		return measure.Identity{}, errors.New("the evidence is not accepted")
	}
	era := ""
	if i := slices.IndexFunc(r.policy.Entries, func(e Entry) bool { return e.Name == r.Entry }); i >= 0 {
		era = r.policy.Entries[i].Era
	}
	if err := r.Claims.proven(era); err != nil {
		return measure.Identity{}, err
	}
	return r.Claims.Identity, nil
}

// IsSimulated reports whether the quote ends in another root than Intel's.
func (r *Result) IsSimulated() bool {
	return r.Claims.Report != nil && r.Claims.Report.Root != dcap.IntelRoot()
}
