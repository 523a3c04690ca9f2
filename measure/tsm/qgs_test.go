package tsm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tdx-agent/measure"
)

func fakeReport(rd measure.ReportData) ([TDReportSize]byte, error) {
	var r [TDReportSize]byte
	r[0] = 0x81
	copy(r[128:], rd[:])
	return r, nil
}

// qgsMessage is a response, with sizes that fit.
func qgsMessage(id, quote []byte) []byte {
	le := binary.LittleEndian
	b := le.AppendUint16(nil, 1)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint32(b, uint32(24+len(id)+len(quote)))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, uint32(len(id)))
	b = le.AppendUint32(b, uint32(len(quote)))
	return append(append(b, id...), quote...)
}

func frame(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...)
}

// put changes a number of a message.
func put(message []byte, offset int, v uint32) []byte {
	b := bytes.Clone(message)
	binary.LittleEndian.PutUint32(b[offset:], v)
	return b
}

// dialService connects to a service that reads one request and answers it.
func dialService(t *testing.T, answer func(request []byte, conn net.Conn)) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) {
		client, server := net.Pipe()
		go func() { // ends when either side closes
			defer server.Close()
			request := make([]byte, 4+1048)
			if _, err := io.ReadFull(server, request); err != nil {
				t.Errorf("request: %v", err)
				return
			}
			answer(request, server)
		}()
		return client, nil
	}
}

func openQGS(t *testing.T, dial func(context.Context) (net.Conn, error)) *QGS {
	t.Helper()
	q, err := OpenQGS(QGSConfig{Report: fakeReport, Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestQGSQuote(t *testing.T) {
	q := openQGS(t, dialService(t, func(request []byte, conn net.Conn) {
		le := binary.LittleEndian
		m := request[4:]
		if binary.BigEndian.Uint32(request) != 1048 || le.Uint16(m) != 1 || le.Uint16(m[2:]) != 0 || le.Uint32(m[4:]) != 0 ||
			le.Uint32(m[8:]) != 1048 || le.Uint32(m[12:]) != 0 || le.Uint32(m[16:]) != 1024 || le.Uint32(m[20:]) != 0 {
			t.Errorf("request header %x", request[:28])
		}
		tdr := m[24:]
		if tdr[0] != 0x81 {
			t.Errorf("the request's TD report begins with %#x", tdr[0])
		}
		for _, b := range frame(qgsMessage([]byte("an id"), goodQuote(tdr[128:192]))) {
			conn.Write([]byte{b}) // in the smallest pieces
		}
	}))
	quote, err := q.Quote(t.Context(), someData)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(quote, goodQuote(someData[:])) {
		t.Error("the quote was changed")
	}
}

func TestQGSBadResponses(t *testing.T) {
	good := qgsMessage([]byte("id"), goodQuote(someData[:]))
	for _, c := range []struct {
		name  string
		frame []byte
		want  string
	}{
		{"nothing", nil, "does not answer"},
		{"half a length", []byte{0, 0}, "does not answer"},
		{"length 4 GiB", []byte{0xff, 0xff, 0xff, 0xff}, "4294967295 bytes"},
		{"length 16 KiB + 1", []byte{0, 0, 0x40, 1}, "16385 bytes"},
		{"length 0", frame(nil), "0 bytes"},
		{"cut short", frame(good)[:2000], "does not answer"},
		{"header only, no error", frame(put(good, 8, 16)[:16]), "16 bytes"},
		{"major version", frame(append([]byte{2}, good[1:]...)), "version 2.0"},
		{"type request", frame(put(good, 4, 0)), "message type 0"},
		{"error code", frame(put(good, 12, 0x12001)), "0x12001"},
		{"error code without a body", frame(put(put(good, 8, 16), 12, 0x12002)[:16]), "0x12002"},
		{"size too small", frame(put(good, 8, 24)), "says it has 24"},
		{"trailing byte", frame(put(append(bytes.Clone(good), 0), 8, uint32(len(good)+1))), "do not make up"},
		{"trailing byte, size of the message right", frame(append(bytes.Clone(good), 0)), "says it has"},
		{"quote of 4 GiB", frame(put(good, 20, 0xffffffff)), "do not make up"},
		{"sizes that add up in 32 bits", frame(put(put(good, 16, 0xffffffff), 20, uint32(len(good)-24+1))), "do not make up"},
		{"empty quote", frame(qgsMessage(nil, nil)), "no bytes"},
		{"short quote", frame(qgsMessage(nil, goodQuote(someData[:])[:1019])), "1019 bytes"},
		{"foreign report data", frame(qgsMessage(nil, goodQuote([]byte{9}))), "other report data"},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := openQGS(t, dialService(t, func(_ []byte, conn net.Conn) { conn.Write(c.frame) }))
			quote, err := q.Quote(t.Context(), someData)
			var qe *QuoteError
			if quote != nil || !errors.As(err, &qe) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %d bytes, %v; want %q", len(quote), err, c.want)
			}
		})
	}
}

// A service that says nothing must not hold the agent for ever.
func TestQGSSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := openQGS(t, dialService(t, func(_ []byte, conn net.Conn) { io.Copy(io.Discard, conn) }))
		start := time.Now()
		_, err := q.Quote(t.Context(), someData)
		var qe *QuoteError
		if !errors.As(err, &qe) || time.Since(start) != 30*time.Second {
			t.Errorf("got %v after %s", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := q.Quote(ctx, someData); err != context.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
	})
}

func TestQGSUnreachable(t *testing.T) {
	refused := errors.New("refused")
	q := openQGS(t, func(context.Context) (net.Conn, error) { return nil, refused })
	if _, err := q.Quote(t.Context(), someData); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	q.cfg.Report = func(measure.ReportData) (r [TDReportSize]byte, err error) { return r, refused }
	if _, err := q.Quote(t.Context(), someData); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	if _, err := OpenQGS(QGSConfig{Report: fakeReport}); err == nil {
		t.Error("no port and no dialer were accepted")
	}
	if _, err := OpenQGS(QGSConfig{Port: 4050}); err == nil {
		t.Error("no source of TD reports was accepted")
	}
}

func FuzzQGSResponse(f *testing.F) {
	f.Add(qgsMessage([]byte("id"), []byte("quote")))
	f.Add(put(qgsMessage(nil, nil), 16, 0xffffffff))
	f.Add(qgsMessage(nil, nil)[:16])
	f.Fuzz(func(t *testing.T, b []byte) {
		quote, err := decodeQGSResponse(b)
		if err != nil {
			return
		}
		id := b[24 : len(b)-len(quote)]
		want := qgsMessage(id, quote)
		copy(want[2:4], b[2:4]) // the minor version is not looked at
		if !bytes.Equal(want, b) {
			t.Errorf("%x was read as id %x and quote %x", b, id, quote)
		}
	})
}
