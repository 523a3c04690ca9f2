package dcap

import (
	"cmp"
	"slices"
	"time"
)

// Caps of a signed document.
const (
	maxDocument   = 256 << 10
	maxLevels     = 64
	maxModules    = 32
	maxAdvisories = 256
)

// tcbInfo is Intel PCS's TCB info, version 3, of a TDX platform, or of its SGX side, which
// has no module and no TDX components.
type tcbInfo struct {
	issued, next time.Time
	fmspc        [6]byte
	pceID        [2]byte
	evaluation   int
	module       moduleIdentity // of version 0
	modules      []moduleIdentity
	levels       []platformLevel // newest first
}

// moduleIdentity is what a TDX module must look like.
type moduleIdentity struct {
	id               string
	signer           [48]byte
	attributes, mask [8]byte
	levels           []svnLevel // newest first
}

// platformLevel is a TCB level of the platform.
type platformLevel struct {
	sgx, tdx           [16]byte
	pceSVN             uint16
	sgxNames, tdxNames [16]string // what a component is, or ""
	tcb                TCB
}

// svnLevel is a TCB level of the TDX module or of the quoting enclave.
type svnLevel struct {
	svn int
	tcb TCB
}

// qeIdentity is Intel PCS's identity of the TD quoting enclave, version 2.
type qeIdentity struct {
	issued, next               time.Time
	evaluation                 int
	miscSelect, miscMask       [4]byte
	attributes, attributesMask [16]byte
	signer                     [32]byte
	product                    uint16
	levels                     []svnLevel // newest first
}

var (
	tcbInfoMembers = &members{what: "TCB info", required: []string{"id", "version", "issueDate", "nextUpdate", "fmspc", "pceId",
		"tcbType", "tcbEvaluationDataNumber", "tdxModule", "tcbLevels"}, optional: []string{"tdxModuleIdentities"}}
	enclaveTCBInfoMembers = &members{what: "TCB info", required: []string{"id", "version", "issueDate", "nextUpdate", "fmspc", "pceId",
		"tcbType", "tcbEvaluationDataNumber", "tcbLevels"}}
	moduleMembers      = &members{what: "TDX module", required: []string{"mrsigner", "attributes", "attributesMask"}}
	namedModuleMembers = &members{what: "TDX module identity", required: []string{"id", "mrsigner", "attributes", "attributesMask", "tcbLevels"}}
	levelMembers       = &members{what: "TCB level", required: []string{"tcb", "tcbDate", "tcbStatus"}, optional: []string{"advisoryIDs"}}
	platformTCBMembers = &members{what: "TCB", required: []string{"sgxtcbcomponents", "pcesvn", "tdxtcbcomponents"}}
	enclaveTCBMembers  = &members{what: "TCB", required: []string{"sgxtcbcomponents", "pcesvn"}}
	svnMembers         = &members{what: "TCB", required: []string{"isvsvn"}}
	componentMembers   = &members{what: "TCB component", required: []string{"svn"}, optional: []string{"category", "type"}}
	qeIdentityMembers  = &members{what: "QE identity", required: []string{"id", "version", "issueDate", "nextUpdate", "tcbEvaluationDataNumber",
		"miscselect", "miscselectMask", "attributes", "attributesMask", "mrsigner", "isvprodid", "tcbLevels"}}
)

// technology is what a quote is of: a TD, or an SGX enclave.
type technology struct {
	id, qe       string   // of TCB info and QE identity
	tcbInfo, tcb *members // of TCB info and its levels
}

var (
	ofTD      = technology{"TDX", "TD_QE", tcbInfoMembers, platformTCBMembers}
	ofEnclave = technology{"SGX", "QE", enclaveTCBInfoMembers, enclaveTCBMembers}
)

// parseTCBInfo decodes exactly the bytes whose signature was checked.
func parseTCBInfo(text []byte, of technology) (*tcbInfo, error) {
	t, s := new(tcbInfo), newScanner(text)
	s.object(of.tcbInfo, func(key string) {
		switch key {
		case "id":
			s.literally("id", of.id)
		case "version":
			s.exactly("version", 3)
		case "issueDate":
			t.issued = s.date(key)
		case "nextUpdate":
			t.next = s.date(key)
		case "fmspc":
			s.hex(key, t.fmspc[:])
		case "pceId":
			s.hex(key, t.pceID[:])
		case "tcbType":
			s.exactly("tcbType", 0) // another type would mean another comparison
		case "tcbEvaluationDataNumber":
			t.evaluation = s.number(key, 1<<30)
		case "tdxModule":
			t.module = s.module(moduleMembers)
		case "tdxModuleIdentities":
			s.modules(t)
		case "tcbLevels":
			s.platformLevels(t, of.tcb)
		}
	})
	if err := s.end(); err != nil {
		return nil, err
	}
	return t, nil
}

// literally wants this string, exactly this number.
func (s *scanner) literally(what, want string) {
	if got := s.string(); s.err == nil && got != want {
		s.fail("%s is %.40q, want %q", what, got, want)
	}
}

func (s *scanner) exactly(what string, want int) {
	if got := s.number(what, 1<<30); s.err == nil && got != want {
		s.fail("%s is %d, want %d", what, got, want)
	}
}

// module reads the base module, or with namedModuleMembers an identity.
func (s *scanner) module(m *members) (id moduleIdentity) {
	s.object(m, func(key string) {
		switch key {
		case "id":
			id.id = s.string()
		case "mrsigner":
			s.hex(key, id.signer[:])
		case "attributes":
			s.hex(key, id.attributes[:])
		case "attributesMask":
			s.hex(key, id.mask[:])
		case "tcbLevels":
			id.levels = s.svnLevels()
		}
	})
	return id
}

func (s *scanner) modules(t *tcbInfo) {
	s.array("tdxModuleIdentities", maxModules, func(int) {
		id := s.module(namedModuleMembers)
		if t.identity(id.id) != nil {
			s.fail("the TDX module identity %.40q is there twice", id.id)
			return
		}
		t.modules = append(t.modules, id)
	})
}

// identity returns the module identity of this id, or nil.
func (t *tcbInfo) identity(id string) *moduleIdentity {
	for i := range t.modules {
		if t.modules[i].id == id {
			return &t.modules[i]
		}
	}
	return nil
}

// platformLevels reads the levels and sorts them: their order in the document is not
// to be relied on.
func (s *scanner) platformLevels(t *tcbInfo, tcb *members) {
	n := s.array("tcbLevels", maxLevels, func(int) {
		var l platformLevel
		l.tcb = s.level(func() { s.platformTCB(&l, tcb) })
		t.levels = append(t.levels, l)
	})
	if s.err == nil && n == 0 {
		s.fail("no TCB levels")
	}
	slices.SortStableFunc(t.levels, func(a, b platformLevel) int {
		return cmp.Or(slices.Compare(b.sgx[:], a.sgx[:]), cmp.Compare(b.pceSVN, a.pceSVN), slices.Compare(b.tdx[:], a.tdx[:]))
	})
}

// level reads a TCB level, with its TCB by readTCB.
func (s *scanner) level(readTCB func()) (t TCB) {
	s.object(levelMembers, func(key string) {
		switch key {
		case "tcb":
			readTCB()
		case "tcbDate":
			t.Date = s.date(key)
		case "tcbStatus":
			t.Status = documentStatus(s.string())
		case "advisoryIDs":
			s.array(key, maxAdvisories, func(int) { t.Advisories = append(t.Advisories, s.string()) })
		}
	})
	return t
}

func (s *scanner) platformTCB(l *platformLevel, tcb *members) {
	s.object(tcb, func(key string) {
		switch key {
		case "sgxtcbcomponents":
			s.components(key, &l.sgx, &l.sgxNames)
		case "tdxtcbcomponents":
			s.components(key, &l.tdx, &l.tdxNames)
		case "pcesvn":
			l.pceSVN = uint16(s.number(key, 1<<16-1))
		}
	})
}

// components reads exactly 16.
func (s *scanner) components(what string, svn *[16]byte, names *[16]string) {
	n := s.array(what, 16, func(i int) {
		s.object(componentMembers, func(key string) {
			switch key {
			case "svn":
				svn[i] = byte(s.number(key, 255))
			case "category":
				s.string()
			case "type":
				names[i] = s.string()
			}
		})
	})
	if s.err == nil && n != 16 {
		s.fail("%s has %d elements, want 16", what, n)
	}
}

// svnLevels reads the levels of a module or an enclave and sorts them.
func (s *scanner) svnLevels() (levels []svnLevel) {
	n := s.array("tcbLevels", maxLevels, func(int) {
		var l svnLevel
		l.tcb = s.level(func() {
			s.object(svnMembers, func(key string) { l.svn = s.number(key, 1<<16-1) })
		})
		levels = append(levels, l)
	})
	if s.err == nil && n == 0 {
		s.fail("no TCB levels")
	}
	slices.SortStableFunc(levels, func(a, b svnLevel) int { return cmp.Compare(b.svn, a.svn) })
	return levels
}

// parseQEIdentity decodes exactly the bytes whose signature was checked.
func parseQEIdentity(text []byte, of technology) (*qeIdentity, error) {
	q, s := new(qeIdentity), newScanner(text)
	s.object(qeIdentityMembers, func(key string) {
		switch key {
		case "id":
			s.literally("id", of.qe)
		case "version":
			s.exactly("version", 2)
		case "issueDate":
			q.issued = s.date(key)
		case "nextUpdate":
			q.next = s.date(key)
		case "tcbEvaluationDataNumber":
			q.evaluation = s.number(key, 1<<30)
		case "miscselect":
			s.hex(key, q.miscSelect[:])
		case "miscselectMask":
			s.hex(key, q.miscMask[:])
		case "attributes":
			s.hex(key, q.attributes[:])
		case "attributesMask":
			s.hex(key, q.attributesMask[:])
		case "mrsigner":
			s.hex(key, q.signer[:])
		case "isvprodid":
			q.product = uint16(s.number(key, 1<<16-1))
		case "tcbLevels":
			q.levels = s.svnLevels()
		}
	})
	if err := s.end(); err != nil {
		return nil, err
	}
	return q, nil
}
