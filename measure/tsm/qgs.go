package tsm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/mdlayher/vsock"

	"tdx-agent/measure"
)

// The protocol of Intel's quote generation service (qgs_msg_lib.h), as dstack 0.5
// uses it: a frame is a big-endian length and a message, whose numbers are
// little-endian.
const (
	qgsMajor    = 1
	qgsRequest  = 0 // GET_QUOTE_REQ
	qgsResponse = 1 // GET_QUOTE_RESP
	qgsHeader   = 16
	maxQGSFrame = 16 << 10
	qgsTimeout  = 30 * time.Second
)

// QGSConfig says how to reach the host's quote generation service.
type QGSConfig struct {
	// Report makes the TD report that is to be quoted: [Device.TDReport].
	Report func(measure.ReportData) ([TDReportSize]byte, error)
	// Port is the service's vsock port on the host (CID 2), by custom 4050.
	Port uint32
	// Dial connects to something else than that port. Port is then not used.
	Dial func(context.Context) (net.Conn, error)
}

// QGS makes quotes by asking the host's quote generation service directly. It
// implements [measure.Quoter]; each quote has a connection of its own.
type QGS struct{ cfg QGSConfig }

// OpenQGS connects to nothing yet.
func OpenQGS(cfg QGSConfig) (*QGS, error) {
	if cfg.Report == nil {
		return nil, errors.New("QGS: no source of TD reports")
	}
	if cfg.Dial == nil {
		if cfg.Port == 0 {
			return nil, errors.New("QGS: no port")
		}
		port := cfg.Port
		cfg.Dial = func(ctx context.Context) (net.Conn, error) {
			return vsock.DialContext(ctx, vsock.Host, port, nil)
		}
	}
	return &QGS{cfg: cfg}, nil
}

// Quote implements [measure.Quoter]. It gives up after 30 s.
func (q *QGS) Quote(ctx context.Context, rd measure.ReportData) ([]byte, error) {
	tdr, err := q.cfg.Report(rd)
	if err != nil {
		return nil, &QuoteError{Reason: "there is no TD report to quote", Err: err}
	}
	limited, cancel := context.WithTimeout(ctx, qgsTimeout)
	defer cancel()
	message, err := q.exchange(limited, qgsQuoteRequest(&tdr))
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		e := newQuoteError(err)
		e.Reason = "the host's quote generation service (QGS) cannot be reached, or does not answer; look at it, and at its port in /etc/tdx-attest.conf"
		return nil, e
	}
	quote, err := decodeQGSResponse(message)
	if err != nil {
		return nil, badQuote("the host's QGS sent a bad response: %v", err)
	}
	if err := checkQuote(quote, rd); err != nil {
		return nil, err
	}
	return quote, nil
}

// exchange sends a frame and returns the message of the frame that comes back.
func (q *QGS) exchange(ctx context.Context, request []byte) ([]byte, error) {
	conn, err := q.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// Ending the context ends the wait, by a deadline in the past.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.Write(request); err != nil {
		return nil, err
	}
	var length [4]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxQGSFrame {
		return nil, fmt.Errorf("it announces a message of %d bytes, want at most %d", n, maxQGSFrame)
	}
	message := make([]byte, n)
	_, err = io.ReadFull(conn, message)
	return message, err
}

func qgsQuoteRequest(tdr *[TDReportSize]byte) []byte {
	const size = qgsHeader + 8 + TDReportSize
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 4+size), size)
	b = binary.LittleEndian.AppendUint16(b, qgsMajor)
	b = binary.LittleEndian.AppendUint16(b, 0) // minor
	for _, v := range []uint32{qgsRequest, size, 0 /* error */, TDReportSize, 0 /* no list of quoting enclaves */} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return append(b, tdr[:]...)
}

// decodeQGSResponse returns the quote in a response, which is not checked yet.
// Sizes come from the host and are added in 64 bits.
func decodeQGSResponse(b []byte) ([]byte, error) {
	const fixed = qgsHeader + 8
	if len(b) < qgsHeader {
		return nil, fmt.Errorf("%d bytes, want at least %d", len(b), fixed)
	}
	le := binary.LittleEndian
	if major := le.Uint16(b); major != qgsMajor {
		return nil, fmt.Errorf("protocol version %d.%d, want %d", major, le.Uint16(b[2:]), qgsMajor)
	}
	if kind := le.Uint32(b[4:]); kind != qgsResponse {
		return nil, fmt.Errorf("message type %d, want %d", kind, qgsResponse)
	}
	if size := le.Uint32(b[8:]); uint64(size) != uint64(len(b)) {
		return nil, fmt.Errorf("it says it has %d bytes, but it has %d", size, len(b))
	}
	if code := le.Uint32(b[12:]); code != 0 {
		return nil, fmt.Errorf("error code %#x", code)
	}
	if len(b) < fixed {
		return nil, fmt.Errorf("%d bytes, want at least %d", len(b), fixed)
	}
	id, quote := uint64(le.Uint32(b[16:])), uint64(le.Uint32(b[20:]))
	if want := fixed + id + quote; want != uint64(len(b)) {
		return nil, fmt.Errorf("an id of %d and a quote of %d bytes do not make up its %d bytes", id, quote, len(b))
	}
	return b[fixed+id:], nil
}
