package tdxsim

import (
	"crypto/ecdsa"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"time"
)

// bundle is dcap-qvl's QuoteCollateralV3: chains are PEM text, CRLs and signatures
// hexadecimal, the two documents the exact text that was signed.
type bundle struct {
	PCKCRLIssuerChain     string `json:"pck_crl_issuer_chain"`
	RootCACRL             string `json:"root_ca_crl"`
	PCKCRL                string `json:"pck_crl"`
	TCBInfoIssuerChain    string `json:"tcb_info_issuer_chain"`
	TCBInfo               string `json:"tcb_info"`
	TCBInfoSignature      string `json:"tcb_info_signature"`
	QEIdentityIssuerChain string `json:"qe_identity_issuer_chain"`
	QEIdentity            string `json:"qe_identity"`
	QEIdentitySignature   string `json:"qe_identity_signature"`
	PCKCertificateChain   string `json:"pck_certificate_chain"`
}

// Collateral returns what a verifier needs to judge this TD's quotes today, as the
// JSON of dcap-qvl's QuoteCollateralV3. It is the same all day (UTC), and the same
// in every process. Whoever relies on it has to be told to trust [TD.RootPEM].
func (td *TD) Collateral() ([]byte, error) {
	p, today := td.platform, day(td.now())
	c := &p.cfg
	root, ca, signer := p.pki.root, p.pki.ca, p.pki.signer
	var revokedByRoot, revokedByCA []*big.Int
	if c.RevokedCA {
		revokedByRoot = append(revokedByRoot, ca.SerialNumber)
	}
	if c.RevokedSigner {
		revokedByRoot = append(revokedByRoot, signer.SerialNumber)
	}
	if c.Revoked {
		revokedByCA = append(revokedByCA, p.pki.pck.SerialNumber)
	}
	rootCRL, err := revocationList(root, p.pki.rootKey, c.RootCRL.or(today, 365), c.CRLNumber, revokedByRoot...)
	if err != nil {
		return nil, err
	}
	pckCRL, err := revocationList(ca, p.pki.caKey, c.PCKCRL.or(today, 30), c.CRLNumber, revokedByCA...)
	if err != nil {
		return nil, err
	}
	tcbInfo, tcbInfoSignature, err := signDocument(p.pki.signerKey, p.tcbInfo(c.TCBInfo.or(today, 30)), c.EditTCBInfo)
	if err != nil {
		return nil, err
	}
	identity, identitySignature, err := signDocument(p.pki.signerKey, p.qeIdentity(c.QEIdentity.or(today, 30)), c.EditQEIdentity)
	if err != nil {
		return nil, err
	}
	signers := string(pemChain(signer, root))
	return json.Marshal(bundle{
		PCKCRLIssuerChain:     string(pemChain(ca, root)),
		RootCACRL:             hex.EncodeToString(rootCRL),
		PCKCRL:                hex.EncodeToString(pckCRL),
		TCBInfoIssuerChain:    signers,
		TCBInfo:               tcbInfo,
		TCBInfoSignature:      tcbInfoSignature,
		QEIdentityIssuerChain: signers,
		QEIdentity:            identity,
		QEIdentitySignature:   identitySignature,
		PCKCertificateChain:   string(pemChain(p.pki.pck, ca, root)),
	})
}

// signDocument returns the JSON of a document, changed by edit unless that is nil,
// and its signature in hexadecimal.
func signDocument(key *ecdsa.PrivateKey, document any, edit func(string) string) (text, signature string, err error) {
	b, err := json.Marshal(document)
	if err != nil {
		return "", "", fmt.Errorf("tdxsim: %v", err)
	}
	if edit != nil {
		b = []byte(edit(string(b)))
	}
	s, err := signRaw(key, b, true)
	if err != nil {
		return "", "", fmt.Errorf("tdxsim: sign collateral: %v", err)
	}
	return string(b), hex.EncodeToString(s), nil
}

// The documents of Intel's PCS API, version 4. Members are in the order in which
// Intel has them.
type tcbInfo struct {
	ID                  string           `json:"id"`
	Version             int              `json:"version"`
	IssueDate           string           `json:"issueDate"`
	NextUpdate          string           `json:"nextUpdate"`
	FMSPC               string           `json:"fmspc"`
	PCEID               string           `json:"pceId"`
	TCBType             int              `json:"tcbType"`
	EvaluationNumber    int              `json:"tcbEvaluationDataNumber"`
	TDXModule           moduleIdentity   `json:"tdxModule"`
	TDXModuleIdentities []moduleIdentity `json:"tdxModuleIdentities,omitempty"`
	TCBLevels           []tcbLevel       `json:"tcbLevels"`
}

type moduleIdentity struct {
	ID             string     `json:"id,omitempty"`
	MRSigner       string     `json:"mrsigner"`
	Attributes     string     `json:"attributes"`
	AttributesMask string     `json:"attributesMask"`
	TCBLevels      []tcbLevel `json:"tcbLevels,omitempty"`
}

type qeIdentity struct {
	ID               string     `json:"id"`
	Version          int        `json:"version"`
	IssueDate        string     `json:"issueDate"`
	NextUpdate       string     `json:"nextUpdate"`
	EvaluationNumber int        `json:"tcbEvaluationDataNumber"`
	MiscSelect       string     `json:"miscselect"`
	MiscSelectMask   string     `json:"miscselectMask"`
	Attributes       string     `json:"attributes"`
	AttributesMask   string     `json:"attributesMask"`
	MRSigner         string     `json:"mrsigner"`
	ISVProdID        int        `json:"isvprodid"`
	TCBLevels        []tcbLevel `json:"tcbLevels"`
}

type tcbLevel struct {
	TCB        any      `json:"tcb"` // isvSVN or platformTCB
	Date       string   `json:"tcbDate"`
	Status     string   `json:"tcbStatus"`
	Advisories []string `json:"advisoryIDs,omitempty"`
}

type isvSVN struct {
	SVN int `json:"isvsvn"`
}

type platformTCB struct {
	SGX    [16]component `json:"sgxtcbcomponents"`
	PCESVN int           `json:"pcesvn"`
	TDX    [16]component `json:"tdxtcbcomponents"`
}

type component struct {
	SVN      int    `json:"svn"`
	Category string `json:"category,omitempty"`
	Type     string `json:"type,omitempty"`
}

// Dates of the levels: the newest, and the one that Intel released before it.
const (
	newestDate = "2026-05-13T00:00:00Z"
	olderDate  = "2025-11-12T00:00:00Z"
	oldestDate = "2024-03-13T00:00:00Z"
)

// levels lists the TCB levels around the one that is reached. If that one's status
// means that something newer is out, there is a newer level; an older one there is
// always. tcb makes the TCB of a level that is this many steps ahead.
func levels(status string, advisories []string, tcb func(ahead int) any) []tcbLevel {
	var list []tcbLevel
	date := newestDate
	if strings.HasPrefix(status, "OutOfDate") || status == "Revoked" {
		list = append(list, tcbLevel{TCB: tcb(1), Date: newestDate, Status: "UpToDate"})
		date = olderDate
	}
	list = append(list, tcbLevel{TCB: tcb(0), Date: date, Status: status, Advisories: advisories})
	return append(list, tcbLevel{TCB: tcb(-1), Date: oldestDate, Status: "OutOfDate", Advisories: []string{"INTEL-SA-00000"}})
}

func upperHex(b []byte) string { return strings.ToUpper(hex.EncodeToString(b)) }

func stamp(t time.Time) string { return t.Format("2006-01-02T15:04:05Z") }

// tcbInfo judges this platform. Its TDX module has an identity of its own if its
// version (byte 1 of TEE_TCB_SVN) is not 0.
func (p *platform) tcbInfo(valid Window) *tcbInfo {
	c := &p.cfg
	base := moduleIdentity{
		MRSigner:       upperHex(c.MRSignerSEAM[:]),
		Attributes:     "0000000000000000",
		AttributesMask: "FFFFFFFFFFFFFFFF",
	}
	info := &tcbInfo{
		ID: "TDX", Version: 3, IssueDate: stamp(valid.From), NextUpdate: stamp(valid.Until),
		FMSPC: upperHex(p.fmspc[:]), PCEID: "0000", EvaluationNumber: c.EvaluationNumber,
		TDXModule: base,
		TCBLevels: levels(c.TCBStatus, c.Advisories, p.platformTCB),
	}
	if version := c.TEETCBSVN[1]; version != 0 {
		module := base
		module.ID = fmt.Sprintf("TDX_%02X", version)
		module.TCBLevels = levels(c.ModuleStatus, c.ModuleAdvisories, func(ahead int) any {
			return isvSVN{max(int(c.TEETCBSVN[0])+ahead, 0)}
		})
		info.TDXModuleIdentities = []moduleIdentity{module}
	}
	return info
}

// platformTCB is the platform's TCB, with the microcode (TDX component 2) ahead or
// behind. Components 0 and 1 are the TDX module's: Intel leaves them at the last
// module of version 0, since others are judged by their identities.
func (p *platform) platformTCB(ahead int) any {
	t := platformTCB{PCESVN: int(pceSVN)}
	for i := range t.SGX {
		t.SGX[i] = component{SVN: int(sgxSVN[i])}
		t.TDX[i] = component{SVN: int(p.cfg.TEETCBSVN[i])}
	}
	if p.cfg.TEETCBSVN[1] != 0 {
		t.TDX[0].SVN, t.TDX[1].SVN = min(t.TDX[0].SVN, 5), 0
	}
	t.TDX[2].SVN = max(t.TDX[2].SVN+ahead, 0)
	for i, what := range [8][2]string{
		{"BIOS", "Early Microcode Update"}, {"OS/VMM", "SGX Late Microcode Update"}, {"OS/VMM", "TXT SINIT"},
		{"BIOS"}, {"BIOS"}, {"BIOS"}, {}, {"OS/VMM", "SEAMLDR ACM"},
	} {
		t.SGX[i].Category, t.SGX[i].Type = what[0], what[1]
	}
	for i, what := range [3]string{"TDX Module", "TDX Module", "TDX Late Microcode Update"} {
		t.TDX[i].Category, t.TDX[i].Type = "OS/VMM", what
	}
	return t
}

// qeIdentity judges the quoting enclave.
func (p *platform) qeIdentity(valid Window) *qeIdentity {
	c := &p.cfg
	return &qeIdentity{
		ID: "TD_QE", Version: 2, IssueDate: stamp(valid.From), NextUpdate: stamp(valid.Until),
		EvaluationNumber: c.QEEvaluationNumber,
		MiscSelect:       "00000000",
		MiscSelectMask:   "FFFFFFFF",
		Attributes:       "11000000000000000000000000000000",
		AttributesMask:   "FBFFFFFFFFFFFFFF0000000000000000",
		MRSigner:         upperHex(qeSigner[:]),
		ISVProdID:        qeProductID,
		TCBLevels: levels(c.QEStatus, c.QEAdvisories, func(ahead int) any {
			return isvSVN{qeSVN + ahead}
		}),
	}
}
