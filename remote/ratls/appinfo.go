package ratls

import (
	"crypto/x509/pkix"
	"errors"
	"fmt"

	"tdx-agent/measure"
)

// AppInfo is dstack's application info, an issuer's summary of the attestation it
// has seen. Like all of [IssuerClaims] it proves nothing by itself. Members may be
// empty.
type AppInfo struct {
	AppID            []byte
	ComposeHash      []byte
	InstanceID       []byte
	DeviceID         []byte
	MRSystem         [32]byte
	MRAggregated     [32]byte
	OSImageHash      []byte
	KeyProviderInfo  []byte   // payload of the key-provider event
	InitScriptHashes [][]byte // nil: not stated
}

// The bounds of AppInfo's members, in bytes and in elements.
const (
	maxInfoHash       = 64
	maxInfoProvider   = 2048
	maxInfoScripts    = 16
	appInfoMembers    = 9
	appInfoMinMembers = 8 // dstack before init scripts
)

// AppInfoOf returns the AppInfo of evidence: identity from its log, registers from
// its quote, with the replayed RTMR3 in MRAggregated. osImageHash is the vm_config's
// claim. Whoever issues a certificate with it vouches for the evidence.
func AppInfoOf(ev *measure.Evidence, osImageHash []byte) (*AppInfo, error) {
	quote, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		return nil, err
	}
	id, err := measure.IdentityOf(ev.Events)
	if err != nil {
		return nil, err
	}
	replayed, err := measure.Replay(ev.Events)
	if err != nil {
		return nil, err
	}
	regs := quote.Body.Registers
	regs.RTMR[measure.RTMR3] = replayed[measure.RTMR3]
	device := measure.DeviceID(nil)
	return &AppInfo{AppID: id.AppID, ComposeHash: id.ComposeHash, InstanceID: id.InstanceID, DeviceID: device[:],
		MRSystem: measure.MRSystem(regs, []byte(id.KeyProvider)), MRAggregated: measure.MRAggregated(regs),
		OSImageHash: osImageHash, KeyProviderInfo: []byte(id.KeyProvider), InitScriptHashes: id.InitScriptHashes}, nil
}

// Extension returns the extension that carries i.
func (i *AppInfo) Extension() pkix.Extension { return wrap(OIDAppInfo, i.Marshal()) }

// Marshal encodes i as dstack does: a MessagePack array of its members in order, with
// byte strings as bin.
func (i *AppInfo) Marshal() []byte {
	b := []byte{0x90 | appInfoMembers}
	for _, member := range [][]byte{i.AppID, i.ComposeHash, i.InstanceID, i.DeviceID, i.MRSystem[:], i.MRAggregated[:], i.OSImageHash, i.KeyProviderInfo} {
		b = appendBin(b, member)
	}
	if i.InitScriptHashes == nil {
		return append(b, packNil)
	}
	b = append(b, packArray16, byte(len(i.InitScriptHashes)>>8), byte(len(i.InitScriptHashes)))
	if n := len(i.InitScriptHashes); n < 16 {
		b = append(b[:len(b)-3], 0x90|byte(n))
	}
	for _, h := range i.InitScriptHashes {
		b = appendBin(b, h)
	}
	return b
}

// The MessagePack formats that AppInfo consists of.
const (
	packNil     = 0xc0
	packBin8    = 0xc4
	packBin16   = 0xc5
	packUint8   = 0xcc
	packArray16 = 0xdc
)

func appendBin(b, v []byte) []byte {
	if len(v) < 1<<8 {
		b = append(b, packBin8, byte(len(v)))
	} else {
		b = append(b, packBin16, byte(len(v)>>8), byte(len(v)))
	}
	return append(b, v...)
}

// ParseAppInfo decodes at most 4 KiB, every byte of which must belong to it: an array, or
// the map that dstack writes since 0.6. Byte strings may be bin or arrays of integers.
func ParseAppInfo(b []byte) (*AppInfo, error) {
	if len(b) > maxAppInfo {
		return nil, fmt.Errorf("application info has %d bytes, want at most %d", len(b), maxAppInfo)
	}
	r := &infoReader{b: b}
	var i AppInfo
	if isMap(b) {
		r.named(&i)
	} else {
		r.positional(&i)
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail(fmt.Errorf("%d bytes follow it", len(r.b)))
	}
	if r.err != nil {
		return nil, fmt.Errorf("application info: %w", r.err)
	}
	return &i, nil
}

// positional reads an array.
func (r *infoReader) positional(i *AppInfo) {
	n := r.array()
	if r.err == nil && n != appInfoMembers && n != appInfoMinMembers {
		r.fail(fmt.Errorf("%d members, want %d", n, appInfoMembers))
	}
	i.AppID, i.ComposeHash = r.bytes(maxInfoHash), r.bytes(maxInfoHash)
	i.InstanceID, i.DeviceID = r.bytes(maxInfoHash), r.bytes(maxInfoHash)
	i.MRSystem, i.MRAggregated = r.hash(), r.hash()
	i.OSImageHash, i.KeyProviderInfo = r.bytes(maxInfoHash), r.bytes(maxInfoProvider)
	if n == appInfoMembers {
		i.InitScriptHashes = r.list()
	}
}

var errInfoShort = errors.New("it ends in the middle of a value")

// infoReader reads MessagePack. After an error it reads zero values and keeps the
// error.
type infoReader struct {
	b   []byte
	err error
}

func (r *infoReader) fail(err error) {
	if r.err == nil {
		r.err, r.b = err, nil
	}
}

func (r *infoReader) take(n int) []byte {
	if n > len(r.b) {
		r.fail(errInfoShort)
		return nil
	}
	part := r.b[:n:n]
	r.b = r.b[n:]
	return part
}

func (r *infoReader) byte() byte {
	if part := r.take(1); part != nil {
		return part[0]
	}
	return 0
}

// uint reads a big-endian number of n bytes.
func (r *infoReader) uint(n int) (v int) {
	for _, c := range r.take(n) {
		v = v<<8 | int(c)
	}
	return v
}

func (r *infoReader) array() int { return r.arrayOf(r.byte()) }

// arrayOf reads the rest of an array's head that begins with c.
func (r *infoReader) arrayOf(c byte) int {
	switch {
	case r.err != nil:
		return 0
	case c&0xf0 == 0x90:
		return int(c & 15)
	case c == packArray16:
		return r.uint(2)
	}
	r.fail(fmt.Errorf("format %#x, want bytes or an array", c))
	return 0
}

// bytes reads at most limit bytes.
func (r *infoReader) bytes(limit int) []byte {
	c := r.byte()
	n := 0
	switch c {
	case packBin8:
		n = r.uint(1)
	case packBin16:
		n = r.uint(2)
	default:
		n = r.arrayOf(c)
	}
	if n > limit {
		r.fail(fmt.Errorf("%d bytes, want at most %d", n, limit))
	}
	if c == packBin8 || c == packBin16 {
		return r.take(n)
	}
	var b []byte
	for range n {
		v := r.byte()
		if v == packUint8 {
			v = r.byte()
		} else if v >= 0x80 {
			r.fail(fmt.Errorf("format %#x, want a byte", v))
		}
		if r.err != nil {
			return nil
		}
		b = append(b, v)
	}
	return b
}

func (r *infoReader) hash() (h [32]byte) {
	b := r.bytes(len(h))
	if r.err == nil && len(b) != len(h) {
		r.fail(fmt.Errorf("%d bytes, want %d", len(b), len(h)))
	}
	copy(h[:], b)
	return h
}

func (r *infoReader) list() [][]byte {
	if len(r.b) > 0 && r.b[0] == packNil {
		r.take(1)
		return nil
	}
	n := r.array()
	if n > maxInfoScripts {
		r.fail(fmt.Errorf("%d init scripts, want at most %d", n, maxInfoScripts))
	}
	list := [][]byte{}
	for range n {
		if h := r.bytes(maxInfoHash); r.err == nil {
			list = append(list, h)
		}
	}
	return list
}
