package forward

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"

	"tdx-agent/remote/atls"
)

// TLVIdentity is the type of the PROXY header's field with an [Identity] as JSON. It is
// one of those for private use (0xE0 to 0xEF), away from the ones that clouds have taken.
const TLVIdentity = 0xE7

const tlvUniqueID = 0x05 // PP2_TYPE_UNIQUE_ID: has the handshake's reference number

// proxySignature starts a header, see section 2.2 of haproxy's "The PROXY protocol".
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// proxyHeader is a header of version 2, command PROXY, with the addresses of the channel,
// its reference number, and who the peer is.
func proxyHeader(c *atls.Conn) ([]byte, error) {
	id := IdentityOf(c.Peer())
	claims, err := json.Marshal(&id)
	if err != nil {
		return nil, err
	}
	return encodeProxy(c.RemoteAddr(), c.LocalAddr(), []tlv{{tlvUniqueID, []byte(id.Ref)}, {TLVIdentity, claims}})
}

type tlv struct {
	kind  byte
	value []byte
}

func encodeProxy(from, to net.Addr, fields []tlv) ([]byte, error) {
	family, addresses := proxyAddresses(from, to)
	body := addresses
	for _, f := range fields {
		if len(f.value) > 1<<16-1 {
			return nil, fmt.Errorf("PROXY header: field %#x has %d bytes, which 16 bits cannot say", f.kind, len(f.value))
		}
		body = append(body, f.kind)
		body = binary.BigEndian.AppendUint16(body, uint16(len(f.value)))
		body = append(body, f.value...)
	}
	if len(body) > 1<<16-1 {
		return nil, fmt.Errorf("PROXY header has %d bytes, which 16 bits cannot say", len(body))
	}
	header := append([]byte(proxySignature), 0x21, family) // version 2, command PROXY
	header = binary.BigEndian.AppendUint16(header, uint16(len(body)))
	return append(header, body...), nil
}

// proxyAddresses are source and destination, and the code of their family and transport:
// UNSPEC where they are not two TCP addresses of one family.
func proxyAddresses(from, to net.Addr) (family byte, b []byte) {
	src, dst := addrPortOf(from), addrPortOf(to)
	switch {
	case !src.IsValid() || !dst.IsValid():
		return 0x00, nil
	case src.Addr().Is4() && dst.Addr().Is4():
		family = 0x11
	case src.Addr().Is6() && dst.Addr().Is6():
		family = 0x21
	default:
		return 0x00, nil
	}
	b = append(b, src.Addr().AsSlice()...)
	b = append(b, dst.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	return family, binary.BigEndian.AppendUint16(b, dst.Port())
}

func addrPortOf(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
