package dcap_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/big"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"tdx-agent/measure/tdxsim"
	"tdx-agent/remote/dcap"
)

// attempt is a verifier that knows a quote, which makes it a harder target.
type attempt struct {
	v  *dcap.Verifier
	c  *dcap.Collateral
	at time.Time
}

func (a *attempt) accepts(quote []byte) bool {
	_, err := a.v.Verify(context.Background(), quote, a.c, a.at)
	return err == nil
}

// targets are quotes of each form, with what accepts them.
func targets(t *testing.T) map[string]struct {
	quote []byte
	by    *attempt
} {
	t.Helper()
	all := make(map[string]struct {
		quote []byte
		by    *attempt
	})
	for name, cfg := range map[string]tdxsim.Config{"version 4": {}, "version 5": {QuoteVersion: 5}} {
		s := simulate(t, cfg)
		by := &attempt{s.verifier(), s.collateral(t), testTime}
		if !by.accepts(s.quote) {
			t.Fatalf("%s is refused as it is", name)
		}
		all[name] = struct {
			quote []byte
			by    *attempt
		}{s.quote, by}
	}
	return all
}

// parallel calls f for 0 to n-1 in as many goroutines as there are processors.
func parallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	workers := runtime.GOMAXPROCS(0)
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				f(i)
			}
		})
	}
	wg.Wait()
}

// TestBitFlips flips every bit of a quote. There is no exception: base64 that is not
// canonical, which go-tdx-guest lets through, is refused.
func TestBitFlips(t *testing.T) {
	step := 1
	if testing.Short() || raceDetector {
		step = 61
	}
	for name, c := range targets(t) {
		bits := 8 * len(c.quote)
		parallel(bits/step, func(i int) {
			quote := bytes.Clone(c.quote)
			bit := i * step
			quote[bit/8] ^= 1 << (bit % 8)
			if c.by.accepts(quote) {
				t.Errorf("%s: bit %d of byte %d can be flipped", name, bit%8, bit/8)
			}
		})
	}
}

func TestTruncations(t *testing.T) {
	for name, c := range targets(t) {
		parallel(len(c.quote), func(n int) {
			if c.by.accepts(c.quote[:n:n]) {
				t.Errorf("%s: %d bytes of %d are enough", name, n, len(c.quote))
			}
		})
	}
}

// layout finds the length fields of a quote: signature data, certification data, PCK
// chain, and where the chain begins.
func layout(quote []byte) (signature, certification, auth, chain int) {
	signature = 632
	if quote[0] == 5 {
		signature = 54 + 648
	}
	certification = signature + 4 + 130
	auth = certification + 4 + 384 + 64
	return signature, certification, auth, auth + 2 + int(binary.LittleEndian.Uint16(quote[auth:])) + 2
}

// resize removes bytes from the end of a quote's PCK chain, or adds some, so that all
// lengths agree.
func resize(quote []byte, chain []byte) []byte {
	signature, certification, _, at := layout(quote)
	out := append(bytes.Clone(quote[:at+4]), chain...)
	for _, field := range []int{signature, certification, at} {
		binary.LittleEndian.PutUint32(out[field:], uint32(len(out)-field-4))
	}
	return out
}

func chainOf(quote []byte) []byte {
	_, _, _, at := layout(quote)
	return quote[at+4:]
}

// TestConsistentTruncations cuts the quote and makes the lengths around the cut agree.
func TestConsistentTruncations(t *testing.T) {
	for name, c := range targets(t) {
		chain := chainOf(c.quote)
		if !bytes.Equal(resize(c.quote, chain), c.quote) || chain[len(chain)-1] != 0 {
			t.Fatalf("%s: the layout is another", name)
		}
		// The NUL and the last line end may go; the certificates stay the same.
		parallel(len(chain)-2, func(n int) {
			if c.by.accepts(resize(c.quote, chain[:n])) {
				t.Errorf("%s: %d bytes of a chain of %d are enough", name, n, len(chain))
			}
		})
		signature, certification, auth, at := layout(c.quote)
		for end := signature + 4; end < len(c.quote); end++ {
			quote := bytes.Clone(c.quote[:end])
			for _, field := range []int{signature, certification, at} {
				if field+4 <= end {
					binary.LittleEndian.PutUint32(quote[field:], uint32(end-field-4))
				}
			}
			if auth+2 <= end && end < at {
				binary.LittleEndian.PutUint16(quote[auth:], uint16(end-auth-2))
			}
			if end < len(c.quote)-2 && c.by.accepts(quote) {
				t.Errorf("%s: a cut at %d is accepted", name, end)
			}
		}
	}
}

// TestLengths puts lies into every length field.
func TestLengths(t *testing.T) {
	for name, c := range targets(t) {
		signature, certification, auth, chain := layout(c.quote)
		fields := map[string][2]int{"signature": {signature, 4}, "certification": {certification, 4}, "auth": {auth, 2}, "chain": {chain, 4},
			"type": {certification - 2, 2}, "nested type": {chain - 2, 2}}
		if c.quote[0] == 5 {
			fields["body size"], fields["body type"] = [2]int{50, 4}, [2]int{48, 2}
		}
		for field, f := range fields {
			at, size := f[0], f[1]
			was := append(bytes.Clone(c.quote[at:at+size]), 0, 0, 0, 0)
			value := binary.LittleEndian.Uint32(was)
			for _, lie := range []uint32{0, 1, value - 1, value + 1, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff} {
				quote := bytes.Clone(c.quote)
				var b [4]byte
				binary.LittleEndian.PutUint32(b[:], lie)
				copy(quote[at:at+size], b[:size])
				if !bytes.Equal(quote, c.quote) && c.by.accepts(quote) {
					t.Errorf("%s: %s of %#x is accepted", name, field, lie)
				}
			}
		}
	}
}

// TestQuoteCodes names the check that must fire.
func TestQuoteCodes(t *testing.T) {
	s := simulate(t, tdxsim.Config{})
	_, certification, auth, chain := layout(s.quote)
	pem := string(chainOf(s.quote))
	parts := strings.SplitAfter(strings.TrimSuffix(pem, "\x00"), endPEM)
	other := simulate(t, tdxsim.Config{Seed: []byte("other")})
	set := func(at int, b ...byte) func([]byte) []byte {
		return func(q []byte) []byte { copy(q[at:], b); return q }
	}
	withChain := func(text string) func([]byte) []byte {
		return func(q []byte) []byte { return resize(q, []byte(text)) }
	}
	flip := func(at int) func([]byte) []byte {
		return func(q []byte) []byte { q[at] ^= 1; return q }
	}
	for name, c := range map[string]struct {
		code string
		edit func([]byte) []byte
	}{
		"SGX":                     {"not_tdx", set(4, 0)},
		"version 3":               {"not_tdx", set(0, 3)},
		"empty":                   {"quote_format", func([]byte) []byte { return nil }},
		"key type":                {"quote_key_type", set(2, 3)},
		"vendor":                  {"qe_vendor", set(12, 0)},
		"certification type 5":    {"certification_format", set(certification-2, 5)},
		"certification type 1":    {"certification_format", set(certification-2, 1)},
		"nested type 3":           {"certification_format", set(chain-2, 3)},
		"auth of 65,535 bytes":    {"certification_format", set(auth, 0xff, 0xff)},
		"debug bit":               {"quote_signature", flip(48 + 120)},
		"report data":             {"quote_signature", flip(48 + 520)},
		"signature":               {"quote_signature", flip(636 + 10)},
		"zero signature":          {"quote_signature", set(636, make([]byte, 64)...)},
		"key not on the curve":    {"attestation_key", flip(636 + 64)},
		"key of another platform": {"qe_binding", set(636+64, other.quote[636+64:636+128]...)},
		"auth":                    {"qe_binding", flip(auth + 2)},
		"QE report":               {"qe_report_signature", flip(certification + 4 + 64)},
		"QE report data":          {"qe_binding", flip(certification + 4 + 320)},
		"QE report data's zeros":  {"qe_binding", flip(certification + 4 + 383)},
		"QE signature":            {"qe_report_signature", flip(certification + 4 + 384 + 5)},
		"no chain":                {"pck_chain_format", withChain("")},
		"two certificates":        {"pck_chain_format", withChain(parts[0] + parts[1])},
		"four certificates":       {"pck_chain_format", withChain(pem + parts[2])},
		"root first":              {"root_not_trusted", withChain(parts[2] + parts[1] + parts[0])},
		"CA first":                {"pck_chain", withChain(parts[1] + parts[0] + parts[2])},
		"CA as leaf":              {"pck_chain", withChain(parts[1] + parts[1] + parts[2])},
		"leaf as CA":              {"pck_chain", withChain(parts[0] + parts[0] + parts[2])},
		"another platform's leaf": {"pck_chain", withChain(firstPEM(string(chainOf(other.quote))) + parts[1] + parts[2])},
		"another platform":        {"root_not_trusted", withChain(string(chainOf(other.quote)))},
		"leaf changed":            {"pck_chain", withChain(changeDER(parts[0]) + parts[1] + parts[2])},
		"CA changed":              {"pck_chain", withChain(parts[0] + changeDER(parts[1]) + parts[2])},
		"two NULs":                {"pck_chain_format", withChain(pem + "\x00")},
		"no base64":               {"pck_chain_format", withChain(strings.Replace(pem, "\nMII", "\n*II", 1))},
		"20 KiB":                  {"quote_size", withChain(strings.Repeat(pem, 5))},
		"9 KiB chain":             {"pck_chain_format", withChain(strings.Repeat(pem, 3))},
	} {
		t.Run(name, func(t *testing.T) {
			quote := c.edit(bytes.Clone(s.quote))
			for _, v := range []*dcap.Verifier{s.verifier(), s.verifier()} {
				_, err := v.Verify(context.Background(), quote, s.collateral(t), testTime)
				wantCode(t, err, c.code)
			}
		})
	}
}

// TestChainForms shows which texts of a PCK chain are the same chain.
func TestChainForms(t *testing.T) {
	s := simulate(t, tdxsim.Config{})
	v, c := s.verifier(), s.collateral(t)
	pem := strings.TrimSuffix(string(chainOf(s.quote)), "\x00")
	for _, text := range []string{pem, pem + "\x00", strings.ReplaceAll(pem, "\n", "\r\n"), strings.TrimSuffix(pem, "\n")} {
		if _, err := v.Verify(context.Background(), resize(s.quote, []byte(text)), c, testTime); err != nil {
			t.Error(err)
		}
	}
	if sizes := v.CacheSizes(); sizes[1] != 1 {
		t.Errorf("%d chains are known, want one", sizes[1])
	}
}

// TestMalleable states what cannot be avoided: a signature has a second form. So no
// hash of a quote tells a replay.
func TestMalleable(t *testing.T) {
	s := simulate(t, tdxsim.Config{})
	order, _ := new(big.Int).SetString("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
	half := s.quote[636+32 : 636+64]
	new(big.Int).Sub(order, new(big.Int).SetBytes(half)).FillBytes(half)
	s.mustVerify(t)
}
