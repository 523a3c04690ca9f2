package guestapi_test

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"testing"

	"tdx-agent/agent/guestapi"
)

// TestNoHostHeader has requests as dstack's Rust SDK sends them to tappd.sock, in one
// piece and byte by byte.
func TestNoHostHeader(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	const body = `{"report_data":"74657374","hash_algorithm":"sha512"}`
	request := fmt.Sprintf("POST /prpc/Tappd.TdxQuote HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s", len(body), body)
	for name, request := range map[string]string{
		"none":               request,
		"a long head":        strings.Replace(request, "\r\n", "\r\nx-padding: "+strings.Repeat("host: a", 1000)+"\r\n", 1),
		"another header":     strings.Replace(request, "\r\n", "\r\nx-host: host:\r\n", 1),
		"in the path":        strings.Replace(request, "TdxQuote ", "TdxQuote?host:a ", 1),
		"bare line feeds":    strings.Replace(request, "\r\n", "\n", -1),
		"there, upper case":  strings.Replace(request, "\r\n", "\r\nHOST: dstack\r\n", 1),
		"there, at the end":  strings.Replace(request, "\r\n\r\n", "\r\nHost: a\r\n\r\n", 1),
		"there, and is void": strings.Replace(request, "\r\n", "\r\nHost:\r\n", 1),
	} {
		t.Run(name, func(t *testing.T) {
			decodeQuote(t, exchange(t, path, request))
			conn := dial(t, path)
			for i := range len(request) {
				if _, err := conn.Write([]byte(request[i : i+1])); err != nil {
					t.Fatal(err)
				}
			}
			raw, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			decodeQuote(t, parse(t, string(raw)))
		})
	}
}

// TestNoHeadAtAll has connections that end, or go on, without a head.
func TestNoHeadAtAll(t *testing.T) {
	path := serve(t, config(guestapi.Tappd, newTestGuest()))
	for name, request := range map[string]string{"nothing": "", "half a line": "POST /prpc", "no end": "POST / HTTP/1.1\r\nA: b\r\n", "empty lines": "\r\n\r\n\r\n"} {
		conn := dial(t, path)
		io.WriteString(conn, request)
		conn.(interface{ CloseWrite() error }).CloseWrite()
		if raw, err := io.ReadAll(conn); err != nil || len(raw) > 0 && !strings.HasPrefix(string(raw), "HTTP/1.1 400") {
			t.Errorf("%s: %q (%v)", name, raw, err)
		}
	}
	conn := dial(t, path)
	go io.WriteString(conn, "GET /prpc/Version HTTP/1.1\r\n"+strings.Repeat("A: b\r\n", 20000)+"\r\n")
	if status, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(status, "431") {
		t.Errorf("a head without end: %q (%v)", status, err)
	}
}
