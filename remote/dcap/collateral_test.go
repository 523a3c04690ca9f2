package dcap_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

// replacer replaces a part of a document, keeping the length of the hexadecimal
// string that the replacement is in: digits that were added are cut from its end.
func replacer(t testing.TB, old, with string) func(string) string {
	return func(text string) string {
		before, after, found := strings.Cut(text, old)
		if !found {
			t.Errorf("no %s in %s", old, text)
		}
		if n := len(with) - len(old); n > 0 && !strings.HasSuffix(with, `"`) {
			end := strings.IndexByte(after, '"')
			after = after[:end-n] + after[end:]
		}
		return before + with + after
	}
}

func TestRevoked(t *testing.T) {
	_, err := simulate(t, tdxsim.Config{Revoked: true}).verify(t)
	wantCode(t, err, "pck_revoked")
	_, err = simulate(t, tdxsim.Config{RevokedCA: true}).verify(t)
	wantCode(t, err, "pck_ca_revoked")
	s := simulate(t, tdxsim.Config{RevokedSigner: true})
	_, err = dcap.ParseCollateral(s.bundle, s.roots)
	wantCode(t, err, "tcb_signer_revoked")
}

// TestSignedDocuments changes what is in signed documents.
func TestSignedDocuments(t *testing.T) {
	add := func(member string) func(string) string {
		return func(text string) string { return strings.TrimSuffix(text, "}") + "," + member + "}" }
	}
	replace := func(old, with string) func(string) string {
		return func(text string) string {
			if !strings.Contains(text, old) {
				t.Errorf("no %s in %s", old, text)
			}
			return strings.Replace(text, old, with, 1)
		}
	}
	count := func(n int) func(string) string {
		return editLevels(t, func(levels []any) []any {
			list := components(levels[0], "sgxtcbcomponents")
			list = append(list, list[0])[:n]
			levels[0].(map[string]any)["tcb"].(map[string]any)["sgxtcbcomponents"] = list
			return levels
		})
	}
	for name, edit := range map[string]func(string) string{
		"duplicate key":             add(`"fmspc":"000000000000"`),
		"case-variant key":          add(`"FMSPC":"000000000000"`),
		"case-variant levels":       add(`"TCBLEVELS":[]`),
		"escaped duplicate key":     add(`"fm\u0073pc":"000000000000"`),
		"key in another case only":  replace(`"tcbLevels":[{"tcb":{"sgx`, `"TcbLevels":[{"tcb":{"sgx`),
		"nested duplicate":          replace(`"pcesvn":13`, `"pcesvn":13,"pcesvn":0`),
		"nested case variant":       replace(`"pcesvn":13`, `"pcesvn":13,"PceSvn":0`),
		"15 components":             count(15),
		"17 components":             count(17),
		"no levels":                 editLevels(t, func([]any) []any { return []any{} }),
		"65 levels":                 editLevels(t, func(l []any) []any { return append(l, make([]any, 63)...) }),
		"SVN of 256":                replace(`"svn":4`, `"svn":256`),
		"negative SVN":              replace(`"svn":4`, `"svn":-4`),
		"fraction":                  replace(`"svn":4`, `"svn":4.0`),
		"exponent":                  replace(`"svn":4`, `"svn":4e0`),
		"leading zero":              replace(`"svn":4`, `"svn":04`),
		"SVN as text":               replace(`"svn":4`, `"svn":"4"`),
		"another id":                replace(`"id":"TDX"`, `"id":"SGX"`),
		"another version":           replace(`"version":3`, `"version":4`),
		"another type":              replace(`"tcbType":0`, `"tcbType":1`),
		"short FMSPC":               replace(`"fmspc":"`, `"fmspc":"0`),
		"a date that is none":       replace(`"issueDate":"`, `"issueDate":"x`),
		"text after it":             func(text string) string { return text + "{}" },
		"half of it":                func(text string) string { return text[:len(text)/2] },
		"nothing":                   func(string) string { return "" },
		"null":                      func(string) string { return "null" },
		"control character":         replace(`"OS/VMM"`, "\"\n\""),
		"a module identity twice":   moduleTwice(t),
		"deep unknown member":       add(`"new":` + strings.Repeat("[", 100) + strings.Repeat("]", 100)),
		"malformed unknown member":  add(`"new":{"a" 1}`),
		"malformed unknown literal": add(`"new":1.e5`),
	} {
		t.Run(name, func(t *testing.T) {
			s := simulate(t, tdxsim.Config{EditTCBInfo: edit})
			_, err := dcap.ParseCollateral(s.bundle, s.roots)
			wantCode(t, err, "tcb_info_format")
		})
	}
	for name, edit := range map[string]func(string) string{
		"duplicate key": add(`"mrsigner":"00"`), "case-variant key": add(`"MrSigner":"00"`),
		"another id": replace(`"id":"TD_QE"`, `"id":"QE"`), "another version": replace(`"version":2`, `"version":3`),
	} {
		t.Run("QE identity: "+name, func(t *testing.T) {
			s := simulate(t, tdxsim.Config{EditQEIdentity: edit})
			_, err := dcap.ParseCollateral(s.bundle, s.roots)
			wantCode(t, err, "qe_identity_format")
		})
	}
	// What a later version may add does no harm.
	simulate(t, tdxsim.Config{EditTCBInfo: add(`"new":{"a":[1,-2.5e+3,true,null,"\u00e9"],"a":0}`)}).mustVerify(t)
}

func moduleTwice(t *testing.T) func(string) string {
	return func(text string) string {
		var doc map[string]any
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			t.Fatal(err)
		}
		list := doc["tdxModuleIdentities"].([]any)
		doc["tdxModuleIdentities"] = append(list, list[0])
		b, _ := json.Marshal(doc) // it was JSON
		return string(b)
	}
}

// TestBundle changes what surrounds signed documents.
func TestBundle(t *testing.T) {
	s, other := simulate(t, tdxsim.Config{}), simulate(t, tdxsim.Config{Seed: []byte("other")})
	var theirs dcap.Bundle
	if err := json.Unmarshal(other.bundle, &theirs); err != nil {
		t.Fatal(err)
	}
	flip := func(digits *string) {
		b, _ := hex.DecodeString(*digits) // it is from a bundle
		b[len(b)-9] ^= 1
		*digits = hex.EncodeToString(b)
	}
	swap := func(chain string) string {
		const end = "-----END CERTIFICATE-----\n"
		a, b, _ := strings.Cut(chain, end)
		return b + a + end
	}
	for name, c := range map[string]struct {
		code string
		edit func(*dcap.Bundle)
	}{
		"changed TCB info":           {"tcb_info_signature", func(b *dcap.Bundle) { b.TCBInfo = strings.Replace(b.TCBInfo, "OutOfDate", "UpToDate", 1) }},
		"space in TCB info":          {"tcb_info_signature", func(b *dcap.Bundle) { b.TCBInfo += " " }},
		"changed QE identity":        {"qe_identity_signature", func(b *dcap.Bundle) { b.QEIdentity = strings.Replace(b.QEIdentity, "OutOfDate", "UpToDate", 1) }},
		"TCB info signature":         {"tcb_info_signature", func(b *dcap.Bundle) { flip(&b.TCBInfoSignature) }},
		"zero signature":             {"tcb_info_signature", func(b *dcap.Bundle) { b.TCBInfoSignature = strings.Repeat("0", 128) }},
		"short signature":            {"tcb_info_signature", func(b *dcap.Bundle) { b.TCBInfoSignature = b.TCBInfoSignature[2:] }},
		"QE identity signature":      {"qe_identity_signature", func(b *dcap.Bundle) { flip(&b.QEIdentitySignature) }},
		"documents swapped":          {"tcb_info_format", func(b *dcap.Bundle) { b.TCBInfo, b.TCBInfoSignature = b.QEIdentity, b.QEIdentitySignature }},
		"root CRL signature":         {"root_crl_signature", func(b *dcap.Bundle) { flip(&b.RootCACRL) }},
		"PCK CRL signature":          {"pck_crl_signature", func(b *dcap.Bundle) { flip(&b.PCKCRL) }},
		"PCK CRL by the root":        {"pck_crl_signature", func(b *dcap.Bundle) { b.PCKCRL = b.RootCACRL }},
		"root CRL by the CA":         {"root_crl_signature", func(b *dcap.Bundle) { b.RootCACRL = b.PCKCRL }},
		"another PCK CRL":            {"pck_crl_signature", func(b *dcap.Bundle) { b.PCKCRL = theirs.PCKCRL }},
		"no PCK CRL":                 {"pck_crl_format", func(b *dcap.Bundle) { b.PCKCRL = "" }},
		"PCK CRL cut":                {"pck_crl_format", func(b *dcap.Bundle) { b.PCKCRL = b.PCKCRL[:100] }},
		"PCK CRL with more":          {"pck_crl_format", func(b *dcap.Bundle) { b.PCKCRL += "00" }},
		"PCK CRL of text":            {"pck_crl_format", func(b *dcap.Bundle) { b.PCKCRL = "hello" }},
		"another root":               {"root_not_trusted", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = theirs.TCBInfoIssuerChain }},
		"no chain":                   {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = "" }},
		"chain in the wrong order":   {"root_not_trusted", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = swap(b.TCBInfoIssuerChain) }},
		"signer alone":               {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = firstPEM(b.TCBInfoIssuerChain) }},
		"signer's chain cut":         {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = b.TCBInfoIssuerChain[:500] }},
		"PCK CA as signer":           {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = b.PCKCRLIssuerChain }},
		"PCK CA as QE signer":        {"qe_identity_chain", func(b *dcap.Bundle) { b.QEIdentityIssuerChain = b.PCKCRLIssuerChain }},
		"signer as PCK CA":           {"pck_crl_chain", func(b *dcap.Bundle) { b.PCKCRLIssuerChain = b.TCBInfoIssuerChain }},
		"PCK as signer":              {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = withoutCA(b.PCKCertificateChain) }},
		"TCB info of 300 KiB":        {"tcb_info_signature", func(b *dcap.Bundle) { b.TCBInfo += strings.Repeat(" ", 300<<10) }},
		"chain of many":              {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = strings.Repeat(firstPEM(b.TCBInfoIssuerChain), 4) }},
		"signer's signature changed": {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = changeDER(b.TCBInfoIssuerChain) }},
		"PCK CA's signature changed": {"pck_crl_chain", func(b *dcap.Bundle) { b.PCKCRLIssuerChain = changeDER(b.PCKCRLIssuerChain) }},
		"something before the chain": {"tcb_info_chain", func(b *dcap.Bundle) { b.TCBInfoIssuerChain = "x\n" + b.TCBInfoIssuerChain }},
		"something between the chain": {"tcb_info_chain", func(b *dcap.Bundle) {
			b.TCBInfoIssuerChain = firstPEM(b.TCBInfoIssuerChain) + "\n" + b.TCBInfoIssuerChain
		}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := dcap.ParseCollateral(s.edited(t, c.edit), s.roots)
			wantCode(t, err, c.code)
		})
	}
}

const endPEM = "-----END CERTIFICATE-----\n"

func firstPEM(chain string) string {
	first, _, _ := strings.Cut(chain, endPEM)
	return first + endPEM
}

func withoutCA(chain string) string {
	parts := strings.SplitAfter(chain, endPEM)
	return parts[0] + parts[2]
}

// changeDER changes the last full line of the first certificate: its signature.
func changeDER(chain string) string {
	lines := strings.SplitAfter(firstPEM(chain), "\n")
	last := []byte(lines[len(lines)-4])
	last[10] ^= 'A' ^ 'B'
	if last[10] < 'A' {
		last[10] = 'A'
	}
	lines[len(lines)-4] = string(last)
	return strings.Join(lines, "") + chain[len(firstPEM(chain)):]
}

// TestBundleText changes the JSON around everything.
func TestBundleText(t *testing.T) {
	s := simulate(t, tdxsim.Config{})
	text := string(s.bundle)
	for name, c := range map[string]struct{ code, text string }{
		"unknown key":       {"collateral_format", strings.Replace(text, "{", `{"more":"",`, 1)},
		"case-variant key":  {"collateral_format", strings.Replace(text, "{", `{"TCB_INFO":"",`, 1)},
		"case variant only": {"collateral_format", strings.Replace(text, `"tcb_info"`, `"TCB_info"`, 1)},
		"duplicate key":     {"collateral_format", strings.Replace(text, "{", `{"tcb_info":"",`, 1)},
		"missing key":       {"collateral_format", strings.Replace(text, `"pck_crl"`, `"x"`, 1)},
		"empty":             {"collateral_format", ""},
		"array":             {"collateral_format", "[" + text + "]"},
		"twice":             {"collateral_format", text + text},
		"cut":               {"collateral_format", text[:len(text)-1]},
		"number":            {"collateral_format", strings.Replace(text, `"pck_crl":"`, `"pck_crl":1,"y":"`, 1)},
		"half surrogate":    {"collateral_format", strings.Replace(text, `"tcb_info":"`, `"tcb_info":"\ud800`, 1)},
		"oversize":          {"collateral_size", text + strings.Repeat(" ", 6<<20)},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := dcap.ParseCollateral([]byte(c.text), s.roots)
			wantCode(t, err, c.code)
		})
	}
	for name, ok := range map[string]string{
		"no PCK chain":   string(s.edited(t, func(b *dcap.Bundle) { b.PCKCertificateChain = "" })),
		"null PCK chain": strings.Replace(string(s.edited(t, func(b *dcap.Bundle) { b.PCKCertificateChain = "" })), "{", `{"pck_certificate_chain":null,`, 1),
		"white space":    " \n" + text + "\t",
		"escapes":        strings.ReplaceAll(text, "BEGIN", `\u0042EGIN`),
		"CRL as digits of digits": string(s.edited(t, func(b *dcap.Bundle) {
			b.PCKCRL = hex.EncodeToString([]byte(strings.ToUpper(b.PCKCRL)))
		})),
		"upper case digits": string(s.edited(t, func(b *dcap.Bundle) {
			b.PCKCRL, b.TCBInfoSignature = strings.ToUpper(b.PCKCRL), strings.ToUpper(b.TCBInfoSignature)
		})),
		"CRLF": string(s.edited(t, func(b *dcap.Bundle) { b.TCBInfoIssuerChain = strings.ReplaceAll(b.TCBInfoIssuerChain, "\n", "\r\n") })),
	} {
		if _, err := dcap.ParseCollateral([]byte(ok), s.roots); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCRLBytes(t *testing.T) {
	der := []byte{0x30, 3, 1, 2, 3}
	for name, body := range map[string]string{"DER": string(der), "digits": "3003010203", "digits and a line end": "3003010203\n"} {
		if got, err := dcap.CRLBytes([]byte(body)); err != nil || !bytes.Equal(got, der) {
			t.Errorf("%s: %x, %v", name, got, err)
		}
	}
	for _, body := range []string{"", "30", "hello", "30xx", strings.Repeat("30", 2<<20)} {
		if got, err := dcap.CRLBytes([]byte(body)); err == nil && !strings.HasPrefix(body, "30") {
			t.Errorf("%.10q gives %x", body, got)
		}
	}
}

func TestSignedDocument(t *testing.T) {
	doc, signature, err := dcap.SignedDocument([]byte(`{"tcbInfo": {"a":[1, 2]} ,"signature":"00"}`), "tcbInfo")
	if string(doc) != `{"a":[1, 2]}` || signature != "00" || err != nil {
		t.Errorf("%s, %s, %v", doc, signature, err)
	}
	for _, body := range []string{
		`{"tcbInfo":{},"TCBINFO":{},"signature":"00"}`, `{"tcbInfo":{},"tcbInfo":{},"signature":"00"}`, `{"tcbinfo":{},"signature":"00"}`,
		`{"tcbInfo":{},"signature":"00","more":1}`, `{"signature":"00"}`, `{"tcbInfo":{}}`, `{}`, ``, `{"tcbInfo":{},"signature":"00"} x`,
	} {
		if doc, _, err := dcap.SignedDocument([]byte(body), "tcbInfo"); err == nil {
			t.Errorf("%s is accepted as %s", body, doc)
		}
	}
}

// TestTimes checks both ends of every window, on a verifier that knows the quote.
func TestTimes(t *testing.T) {
	wide := tdxsim.Window{From: testTime.AddDate(0, -6, 0), Until: testTime.AddDate(0, 6, 0)}
	narrow := tdxsim.Window{From: testTime.AddDate(0, 0, -1), Until: testTime.AddDate(0, 0, 1)}
	for name, c := range map[string]struct {
		set      func(*tdxsim.Config)
		document bool
	}{
		"tcb_info":    {func(c *tdxsim.Config) { c.TCBInfo = narrow }, true},
		"qe_identity": {func(c *tdxsim.Config) { c.QEIdentity = narrow }, true},
		"pck_crl":     {func(c *tdxsim.Config) { c.PCKCRL = narrow }, true},
		"root_crl":    {func(c *tdxsim.Config) { c.RootCRL = narrow }, true},
		"pck":         {func(c *tdxsim.Config) { c.Certificates = narrow }, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := tdxsim.Config{Certificates: wide, RootCRL: wide, PCKCRL: wide, TCBInfo: wide, QEIdentity: wide}
			c.set(&cfg)
			s := simulate(t, cfg)
			v, collateral := s.verifier(), s.collateral(t)
			at := func(when time.Time) (*dcap.Report, error) {
				return v.Verify(context.Background(), s.quote, collateral, when)
			}
			if !collateral.ValidFrom().Equal(narrow.From) || !collateral.ValidUntil().Equal(narrow.Until) {
				t.Errorf("valid from %v until %v", collateral.ValidFrom(), collateral.ValidUntil())
			}
			for _, when := range []time.Time{narrow.From, testTime, narrow.Until} {
				if _, err := at(when); err != nil {
					t.Errorf("at %v: %v", when, err)
				}
			}
			_, err := at(narrow.From.Add(-time.Second))
			wantCode(t, err, name+"_not_yet_valid")
			_, err = at(narrow.Until.Add(time.Second))
			wantCode(t, err, name+"_expired")

			usable := narrow.Until
			if c.document {
				usable = usable.Add(dcap.MaxStaleGrace)
			}
			if u := collateral.UsableUntil(1000 * time.Hour); !u.Equal(usable) || !collateral.UsableUntil(0).Equal(narrow.Until) {
				t.Errorf("usable until %v, want %v", u, usable)
			}
			lenient := dcap.NewVerifier(dcap.Config{Roots: s.roots, StaleGrace: 1000 * time.Hour})
			r, err := lenient.Verify(context.Background(), s.quote, collateral, narrow.Until.Add(dcap.MaxStaleGrace))
			if c.document && (err != nil || !r.StaleSince.Equal(narrow.Until)) {
				t.Errorf("with grace: %+v, %v", r, err)
			} else if !c.document {
				wantCode(t, err, name+"_expired")
			}
			_, err = lenient.Verify(context.Background(), s.quote, collateral, narrow.Until.Add(dcap.MaxStaleGrace+time.Second))
			wantCode(t, err, name+"_expired")
			_, err = lenient.Verify(context.Background(), s.quote, collateral, narrow.From.Add(-time.Second))
			wantCode(t, err, name+"_not_yet_valid")
		})
	}
}

func TestDocuments(t *testing.T) {
	c := simulate(t, tdxsim.Config{EvaluationNumber: 20, QEEvaluationNumber: 19}).collateral(t)
	tcb, qe := c.EvaluationNumbers()
	docs := c.Documents()
	if tcb != 20 || qe != 19 || docs[0].Number != 20 || docs[1].Number != 19 || docs[2].Number != 1 || docs[3].Name != "root_crl" {
		t.Errorf("%d, %d, %v", tcb, qe, docs)
	}
}
