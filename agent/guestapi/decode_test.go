package guestapi

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/sha3"
)

// sample is a message with one field of each kind.
type sample struct {
	data []byte
	text string
	list []string
	flag bool
	num  *uint64
}

func (s *sample) fields() message {
	return message{{"report_data", 1, &s.data}, {"prefix", 3, &s.text}, {"alt_names", 4, &s.list}, {"random_seed", 7, &s.flag}, {"not_before", 6, &s.num}}
}

func (s *sample) equal(o *sample) bool {
	if s.num != nil && o.num != nil && *s.num != *o.num {
		return false
	}
	return bytes.Equal(s.data, o.data) && s.text == o.text && slices.Equal(s.list, o.list) && s.flag == o.flag && (s.num == nil) == (o.num == nil)
}

// fuzzDecoder checks that whatever decodes is the same after one more round through
// the encoder, and that every refusal is the caller's fault.
func fuzzDecoder(f *testing.F, enc encoding, encode func(message) []byte) {
	f.Fuzz(func(t *testing.T, payload []byte) {
		if len(payload) > maxBody {
			t.Skip("over the body cap")
		}
		var first, second sample
		a := arguments{encoding: enc, payload: payload}
		if err := a.decode(first.fields()); err != nil {
			var refused *requestError
			if !errors.As(err, &refused) || refused.exit != exitUsage || refused.text == "" {
				t.Fatalf("refused with %#v", err)
			}
			return
		}
		a.payload = encode(first.fields())
		if err := a.decode(second.fields()); err != nil {
			t.Fatalf("encoded as %q: %v", a.payload, err)
		}
		if !first.equal(&second) {
			t.Fatalf("%+v became %+v", first, second)
		}
	})
}

func FuzzDecodeJSON(f *testing.F) {
	f.Add([]byte(`{"report_data":"0x0A","prefix":"\ud83d\ude00\u00e4","x":[{}]}`))
	f.Add([]byte(`{"report_data":"","report_data":""}`))
	f.Add([]byte(`{"prefix":"\ud800"}`))
	f.Add([]byte(`{"alt_names":["a",""],"random_seed":true,"not_before":18446744073709551615}`))
	f.Add([]byte(`{"alt_names":[["a"]],"random_seed":null,"not_before":null}`))
	fuzzDecoder(f, encodingJSON, func(m message) []byte {
		b := m.appendJSON(nil)
		if !isASCII(b) || !json.Valid(b) {
			panic("not ASCII JSON: " + string(b))
		}
		return b
	})
}

func FuzzDecodeProto(f *testing.F) {
	f.Add([]byte("\x0a\x02\xab\xcd\x1a\x01a\xe8\x04\x05"))
	f.Add([]byte("\x9b\x06"))
	f.Add([]byte("\x22\x01a\x22\x00\x38\x01\x30\xff\xff\x03"))
	fuzzDecoder(f, encodingProtobuf, func(m message) []byte { return m.appendProto(nil) })
}

func FuzzDecodeQuery(f *testing.F) {
	f.Add([]byte("report_data=0x0A&prefix=a+b%20c&json"))
	f.Add([]byte("prefix[0]=%zz"))
	f.Add([]byte("alt_names[0]=a&alt_names%5B1%5D=b&random_seed=true&not_before=7"))
	f.Add([]byte("alt_names[]=a&alt_names[]=&random_seed=false"))
	fuzzDecoder(f, encodingQuery, func(m message) []byte {
		escaped := strings.NewReplacer("%", "%25", "+", "%2b", "&", "%26")
		q := "report_data=" + hex.EncodeToString(*m[0].value.(*[]byte)) + "&prefix=" + escaped.Replace(*m[1].value.(*string))
		for i, name := range *m[2].value.(*[]string) {
			q += fmt.Sprintf("&alt_names[%d]=%s", i, escaped.Replace(name))
		}
		q += fmt.Sprintf("&random_seed=%v", *m[3].value.(*bool))
		if n := *m[4].value.(**uint64); n != nil {
			q += fmt.Sprintf("&not_before=%d", *n)
		}
		return []byte(q)
	})
}

func TestKeccak384(t *testing.T) {
	for in, want := range map[string]string{
		"": "2c23146a63a29acf99e73b88f8c24eaa7dc60aa771780ccc006afbfa8fe2479b2dd2b21362337441ac12b515911957ff",
		"abc": "f7df1165f033337be098e7d288ad6a2f74409d7a60b49c36642218de161b1f99" +
			"f8c681e4afaf31a34db29fb763e3c28e",
	} {
		h := newHash("keccak384")
		io.WriteString(h, in)
		if got := hex.EncodeToString(h.Sum(nil)); got != want {
			t.Errorf("Keccak-384(%q) is %s, want %s", in, got, want)
		}
	}
}

// TestKeccakAgainstReference compares the sponge at the two sizes for which there is
// another implementation, around the ends of blocks and written in pieces.
func TestKeccakAgainstReference(t *testing.T) {
	in := bytes.Repeat([]byte("Keccak "), 60)
	for size, reference := range map[int]func() hash.Hash{32: sha3.NewLegacyKeccak256, 64: sha3.NewLegacyKeccak512} {
		for n := range len(in) {
			want := reference()
			want.Write(in[:n])
			h := newKeccak(size)
			h.Write(in[:n/3])
			h.Sum(nil)
			h.Write(in[n/3 : n])
			if got := h.Sum(nil); !bytes.Equal(got, want.Sum(nil)) {
				t.Fatalf("size %d, %d bytes: %x, want %x", size, n, got, want.Sum(nil))
			}
		}
	}
}
