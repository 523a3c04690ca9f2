package forward_test

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
)

func tlsServer(t *testing.T) (*httptest.Server, *http.Client) {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "collateral") }))
	t.Cleanup(srv.Close)
	return srv, srv.Client()
}

// resolver answers look-ups of IPv4 addresses from a table, over a DNS server of its own.
func resolver(t *testing.T, table map[string]string) *net.Resolver {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(dnsAnswer(buf[:n], table), from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
}

// dnsAnswer is RFC 1035 4.1 for one question: its header and question, and an A record if
// the table has one.
func dnsAnswer(query []byte, table map[string]string) []byte {
	name, end := "", 12
	for query[end] != 0 {
		n := int(query[end])
		name += string(query[end+1:end+1+n]) + "."
		end += 1 + n
	}
	end++
	isA := binary.BigEndian.Uint16(query[end:]) == 1
	answer := append([]byte(nil), query[:end+4]...)
	answer[2], answer[3] = 0x84, 0x00 // response, authoritative
	copy(answer[6:12], []byte{0, 0, 0, 0, 0, 0})
	if ip := net.ParseIP(table[name]).To4(); ip != nil && isA {
		answer[7] = 1
		answer = append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4) // the question's name, A, IN, 60 s
		answer = append(answer, ip...)
	}
	return answer
}
