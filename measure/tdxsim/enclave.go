package tdxsim

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
)

// Enclave is a simulated SGX enclave on the TD's machine, as dstack's local key provider
// is one.
type Enclave struct {
	MREnclave, MRSigner [32]byte
	Debug               bool
}

// EnclaveQuote makes a quote of the enclave (SGX quote, version 3).
func (td *TD) EnclaveQuote(e Enclave, reportData [64]byte) ([]byte, error) {
	p := td.platform
	b := make([]byte, 0, 8192)
	b = binary.LittleEndian.AppendUint16(b, 3)
	b = binary.LittleEndian.AppendUint16(b, keyTypeP256)
	b = append(b, 0, 0, 0, 0) // an SGX enclave
	b = binary.LittleEndian.AppendUint16(b, qeSVN)
	b = binary.LittleEndian.AppendUint16(b, pceSVN)
	b = append(b, qeVendor...)
	b = append(b, make([]byte, 20)...)
	report := make([]byte, 384)
	copy(report, sgxSVN[:])
	report[48] = 5 // INIT, 64 bit
	if e.Debug {
		report[48] |= 2
	}
	copy(report[64:], e.MREnclave[:])
	copy(report[128:], e.MRSigner[:])
	copy(report[320:], reportData[:])
	b = append(b, report...)
	signature, err := signRaw(p.pki.attestationKey, b, false)
	if err != nil {
		return nil, fmt.Errorf("tdxsim: sign quote: %v", err)
	}
	key, inner, err := p.vouched()
	if err != nil {
		return nil, err
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(signature)+len(key)+len(inner)))
	return append(append(append(b, signature...), key...), inner...), nil
}

// EnclaveCollateral is Collateral for EnclaveQuote.
func (td *TD) EnclaveCollateral() ([]byte, error) {
	text, err := td.Collateral()
	if err != nil {
		return nil, err
	}
	var b bundle
	if err := json.Unmarshal(text, &b); err != nil {
		return nil, fmt.Errorf("tdxsim: %v", err)
	}
	p, today := td.platform, day(td.now())
	info := p.tcbInfo(p.cfg.TCBInfo.or(today, 30))
	document := enclaveTCBInfo{ID: "SGX", Version: info.Version, IssueDate: info.IssueDate, NextUpdate: info.NextUpdate, FMSPC: info.FMSPC, PCEID: info.PCEID, EvaluationNumber: info.EvaluationNumber}
	document.TCBLevels = levels(p.cfg.TCBStatus, p.cfg.Advisories, func(ahead int) any {
		t := enclaveTCB{PCESVN: int(pceSVN)}
		for i := range t.SGX {
			t.SGX[i] = component{SVN: int(sgxSVN[i])}
		}
		t.SGX[0].SVN = max(t.SGX[0].SVN+ahead, 0)
		return t
	})
	identity := p.qeIdentity(p.cfg.QEIdentity.or(today, 30))
	identity.ID = "QE"
	if b.TCBInfo, b.TCBInfoSignature, err = signDocument(p.pki.signerKey, document, p.cfg.EditTCBInfo); err != nil {
		return nil, err
	}
	if b.QEIdentity, b.QEIdentitySignature, err = signDocument(p.pki.signerKey, identity, p.cfg.EditQEIdentity); err != nil {
		return nil, err
	}
	return json.Marshal(b)
}

// enclaveTCBInfo is the TCB info of a platform's SGX side.
type enclaveTCBInfo struct {
	ID               string     `json:"id"`
	Version          int        `json:"version"`
	IssueDate        string     `json:"issueDate"`
	NextUpdate       string     `json:"nextUpdate"`
	FMSPC            string     `json:"fmspc"`
	PCEID            string     `json:"pceId"`
	TCBType          int        `json:"tcbType"`
	EvaluationNumber int        `json:"tcbEvaluationDataNumber"`
	TCBLevels        []tcbLevel `json:"tcbLevels"`
}

type enclaveTCB struct {
	SGX    [16]component `json:"sgxtcbcomponents"`
	PCESVN int           `json:"pcesvn"`
}
