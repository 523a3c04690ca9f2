package keys

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
)

// maxAnswer bounds all that a provider sends in one exchange, in bytes.
const maxAnswer = 256 << 10

// tooLargeError says that a provider sends more than that.
type tooLargeError struct{}

func (tooLargeError) Error() string { return fmt.Sprintf("it sends more than %d bytes", maxAnswer) }

// post makes the only request on a connection. The answer is the caller's to clear.
func post(conn net.Conn, url string, body []byte) (status int, answer []byte, err error) {
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "")
	req.Close = true
	if err := req.Write(conn); err != nil {
		return 0, nil, err
	}
	limited := &io.LimitedReader{R: conn, N: maxAnswer}
	defer func() {
		if err != nil && limited.N <= 0 {
			err = tooLargeError{}
		}
	}()
	resp, err := http.ReadResponse(bufio.NewReader(limited), req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	// Room for all of it at once: what grew would leave parts of a key behind.
	answer = make([]byte, 0, min(max(resp.ContentLength, 16<<10), maxAnswer))
	if answer, err = readInto(answer, resp.Body); err != nil {
		clear(answer)
		return 0, nil, err
	}
	return resp.StatusCode, answer, nil
}

// readInto reads r to its end. It clears every buffer that it leaves.
func readInto(b []byte, r io.Reader) ([]byte, error) {
	for {
		if len(b) == cap(b) {
			larger := append(make([]byte, 0, 2*cap(b)+512), b...)
			clear(b)
			b = larger
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return b, err
		}
	}
}
