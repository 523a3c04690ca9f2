package forward_test

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tdx-agent/remote/forward"
)

// readProxy reads a PROXY header by the layout of section 2.2: signature, version and
// command, family, length, addresses, then fields.
func readProxy(t *testing.T, r io.Reader) (family byte, addresses []byte, fields map[byte][]byte) {
	t.Helper()
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(head[:13]); got != "0d0a0d0a000d0a515549540a21" {
		t.Fatalf("signature, version and command are %s", got)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, body); err != nil {
		t.Fatal(err)
	}
	n := map[byte]int{0x00: 0, 0x11: 12, 0x21: 36}[head[13]]
	addresses, fields = body[:n], map[byte][]byte{}
	for rest := body[n:]; len(rest) > 0; {
		size := int(binary.BigEndian.Uint16(rest[1:]))
		fields[rest[0]] = rest[3 : 3+size]
		rest = rest[3+size:]
	}
	return head[13], addresses, fields
}

func TestProxyHeader(t *testing.T) {
	type seen struct {
		family    byte
		addresses []byte
		fields    map[byte][]byte
		rest      string
	}
	got := make(chan seen, 1)
	address := backEnd(t, func(c net.Conn) {
		var s seen
		s.family, s.addresses, s.fields = readProxy(t, c)
		b, _ := io.ReadAll(c)
		s.rest = string(b)
		got <- s
	})
	client := newMachine(t, "client", true)
	p := newPair(t, map[string]forward.Service{"raw": {Dial: to(address), ProxyProtocol: true}, "open": {Dial: to(address), ProxyProtocol: true}}, client, "worker", "")
	c := p.dial(t, p.dialer, "raw")
	io.WriteString(c, "bytes of the application")
	c.CloseWrite()
	s := <-got
	from, to := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
	want := append(append([]byte{}, from.IP.To4()...), to.IP.To4()...)
	want = binary.BigEndian.AppendUint16(want, uint16(from.Port))
	want = binary.BigEndian.AppendUint16(want, uint16(to.Port))
	if s.family != 0x11 || string(s.addresses) != string(want) {
		t.Errorf("family %#x, addresses %x, want 0x11 and %x", s.family, s.addresses, want)
	}
	if s.rest != "bytes of the application" || string(s.fields[0x05]) != c.Peer().Ref {
		t.Errorf("unique id %q, then %q", s.fields[0x05], s.rest)
	}
	regs, err := client.td.Registers()
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256([]byte("client"))
	var id forward.Identity
	if err := json.Unmarshal(s.fields[forward.TLVIdentity], &id); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(forward.Identity{Assurance: "simulated-quote", Ref: c.Peer().Ref, Service: "raw", PolicyEntry: "worker",
		AppID: fmt.Sprintf("%x", hash[:20]), InstanceID: fmt.Sprintf("%x", hash[12:]), ComposeHash: fmt.Sprintf("%x", hash), MRTD: &regs.MRTD, RTMR: &regs.RTMR}, id); diff != "" {
		t.Error(diff)
	}

	bare := p.dial(t, p.bare, "open")
	bare.CloseWrite()
	s = <-got
	if string(s.fields[forward.TLVIdentity]) != fmt.Sprintf(`{"assurance":"none","ref":%q,"service":"open"}`, bare.Peer().Ref) {
		t.Errorf("of an unattested peer: %s", s.fields[forward.TLVIdentity])
	}
}
