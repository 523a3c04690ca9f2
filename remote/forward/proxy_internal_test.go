package forward

import (
	"encoding/hex"
	"net"
	"testing"
)

// TestEncodeProxy has headers that were put together by hand from the specification.
func TestEncodeProxy(t *testing.T) {
	const start = "0d0a0d0a000d0a515549540a" + "21"
	v4 := &net.TCPAddr{IP: net.IP{192, 0, 2, 1}, Port: 0xabcd}
	mapped := &net.TCPAddr{IP: net.ParseIP("::ffff:198.51.100.7"), Port: 443}
	v6 := &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}
	for _, tc := range []struct {
		name     string
		from, to net.Addr
		fields   []tlv
		want     string
	}{
		{"TCP over IPv4", v4, mapped, nil, "11" + "000c" + "c0000201" + "c6336407" + "abcd" + "01bb"},
		{"TCP over IPv6", v6, v6, []tlv{{0xe7, []byte("{}")}}, "21" + "0029" + "20010db8000000000000000000000001" + "20010db8000000000000000000000001" + "0001" + "0001" + "e70002" + "7b7d"},
		{"two families", v4, v6, []tlv{{5, []byte("a")}}, "00" + "0004" + "05000161"},
		{"Unix socket", &net.UnixAddr{Name: "@", Net: "unix"}, &net.UnixAddr{}, nil, "00" + "0000"},
	} {
		b, err := encodeProxy(tc.from, tc.to, tc.fields)
		if got := hex.EncodeToString(b); err != nil || got != start+tc.want {
			t.Errorf("%s: got %s, %v, want %s", tc.name, got, err, start+tc.want)
		}
	}
	for _, fields := range [][]tlv{{{5, make([]byte, 1<<16)}}, {{5, make([]byte, 1<<15)}, {6, make([]byte, 1<<15)}}} {
		if _, err := encodeProxy(v4, v4, fields); err == nil {
			t.Error("a header that is too long: no error")
		}
	}
}
