package image

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// lzmaStream decompresses an .lzma stream of known size as far as it is asked for (LZMA
// specification 9.20, the format of edk2's LzmaCompress).
type lzmaStream struct {
	decoder *lzmaDecoder
	size    int
	err     error
}

// openLZMA reads the header of a stream that gives at most limit bytes.
func openLZMA(in []byte, limit uint64) (*lzmaStream, error) {
	const header = 13
	if len(in) < header+5 {
		return nil, errors.New("LZMA: the header is cut off")
	}
	size := binary.LittleEndian.Uint64(in[5:])
	if size > limit {
		return nil, fmt.Errorf("LZMA: %d bytes come out, want at most %d", size, limit)
	}
	d := newLZMADecoder(int(in[0]), in[header:])
	if d == nil {
		return nil, fmt.Errorf("LZMA: properties are %#x", in[0])
	}
	d.out = make([]byte, min(size, 4<<20)+lzmaLongest) // OVMF's drivers up to UiApp have 2 to 3 MiB
	return &lzmaStream{decoder: d, size: int(size)}, nil
}

// at returns n bytes at an offset, which are valid until the next call.
func (s *lzmaStream) at(offset, n int) ([]byte, error) {
	if offset < 0 || n < 0 || offset > s.size-n {
		return nil, fmt.Errorf("LZMA: %d bytes at %d are beyond the %d that come out", n, offset, s.size)
	}
	if s.err == nil && s.decoder.n < offset+n {
		s.err = s.decoder.run(offset + n)
	}
	if s.err != nil {
		return nil, s.err
	}
	return s.decoder.out[offset:][:n], nil
}

// The sizes of the tables of probabilities.
const (
	lzmaStates    = 12
	lzmaPositions = 16 // the most that 4 position bits distinguish
	lzmaLiteral   = 0x300
	lzmaEvens     = 1 << 10 // a probability of one half, in 11 bits
	lzmaSlots     = 64
	lzmaNear      = 115 // distances with trees of their own
	lzmaLongest   = 273 // bytes that one symbol makes
)

// lzmaDecoder is the model and its state between calls. Names follow the specification.
type lzmaDecoder struct {
	in    []byte
	coder lzmaCoder
	out   []byte // of which the first n bytes are made
	n     int

	lc, lp, pb int
	rep        [4]uint32
	state      int

	literal                          [][lzmaLiteral]uint16
	isMatch, isRep0Long              [lzmaStates][lzmaPositions]uint16
	isRep, isRepG0, isRepG1, isRepG2 [lzmaStates]uint16
	slots                            [4][lzmaSlots]uint16
	near                             [lzmaNear]uint16
	align                            [16]uint16
	matchLength, repLength           lzmaLength
}

// lzmaLength decodes the length of a match.
type lzmaLength struct {
	choice, choice2 uint16
	low, mid        [lzmaPositions][8]uint16
	high            [256]uint16
}

func newLZMADecoder(properties int, in []byte) *lzmaDecoder {
	d := &lzmaDecoder{in: in, lc: properties % 9, lp: properties / 9 % 5, pb: properties / 45}
	if d.pb > 4 || d.lc+d.lp > 4 || in[0] != 0 {
		return nil
	}
	d.coder = lzmaCoder{width: 1<<32 - 1, code: binary.BigEndian.Uint32(in[1:]), pos: 5}
	d.literal = make([][lzmaLiteral]uint16, 1<<(d.lc+d.lp))
	tables := [][]uint16{d.isRep[:], d.isRepG0[:], d.isRepG1[:], d.isRepG2[:], d.near[:], d.align[:]}
	for i := range d.literal {
		tables = append(tables, d.literal[i][:])
	}
	for i := range d.isMatch {
		tables = append(tables, d.isMatch[i][:], d.isRep0Long[i][:])
	}
	for i := range d.slots {
		tables = append(tables, d.slots[i][:])
	}
	for _, l := range []*lzmaLength{&d.matchLength, &d.repLength} {
		l.choice, l.choice2 = lzmaEvens, lzmaEvens
		tables = append(tables, l.high[:])
		for i := range l.low {
			tables = append(tables, l.low[i][:], l.mid[i][:])
		}
	}
	for _, t := range tables {
		for i := range t {
			t[i] = lzmaEvens
		}
	}
	return d
}

// lzmaCoder is the state of the range decoder. It is passed by value, so that it stays in
// registers: this is where the time goes.
type lzmaCoder struct {
	width, code uint32
	pos         uint // of the next byte of input
}

// normalize reads a byte where the width has become small; behind the end they are 0.
func (c lzmaCoder) normalize(in []byte) lzmaCoder {
	if c.width < 1<<24 {
		c.width <<= 8
		c.code <<= 8
		if c.pos < uint(len(in)) {
			c.code |= uint32(in[c.pos])
		}
		c.pos++
	}
	return c
}

// flag decodes a bit that is mostly foreseen.
func (c lzmaCoder) flag(p *uint16) (lzmaCoder, bool) {
	v := uint32(*p)
	bound := c.width >> 11 * v
	if c.code < bound {
		c.width = bound
		*p = uint16(v + (1<<11-v)>>5)
		return c, false
	}
	c.width -= bound
	c.code -= bound
	*p = uint16(v - v>>5)
	return c, true
}

// bit appends a bit to m. It does not branch on the bit, which a processor would often
// guess wrong in literals, lengths and distances.
func (c lzmaCoder) bit(p *uint16, m uint32) (lzmaCoder, uint32) {
	v := uint32(*p)
	bound := c.width >> 11 * v
	rest := int64(c.code) - int64(bound)
	zero := uint32(rest >> 32) // all ones if the bit is 0
	c.code = uint32(rest) + bound&zero
	c.width += zero&(2*bound-c.width) - bound
	*p = uint16(v - uint32(int32(v-zero&(1<<11-31))>>5))
	return c, 2*m - ^zero
}

// tree decodes a tree's bits from the highest; t has 1<<bits probabilities.
func (c lzmaCoder) tree(in []byte, t []uint16) (lzmaCoder, uint32) {
	m := uint32(1)
	for m < uint32(len(t)) {
		c, m = c.normalize(in).bit(&t[m], m)
	}
	return c, m - uint32(len(t))
}

// reverse decodes a number's bits from the lowest.
func (c lzmaCoder) reverse(in []byte, t []uint16, bits int) (_ lzmaCoder, v uint32) {
	m := uint32(1)
	for i := range bits {
		c, m = c.normalize(in).bit(&t[m], m)
		v |= m & 1 << i
	}
	return c, v
}

// direct decodes bits that are as often 0 as 1.
func (c lzmaCoder) direct(in []byte, bits int) (_ lzmaCoder, v uint32) {
	for range bits {
		c = c.normalize(in)
		c.width >>= 1
		rest := int64(c.code) - int64(c.width)
		zero := uint32(rest >> 32)
		c.code = uint32(rest) + c.width&zero
		v = v + v + 1 + zero
	}
	return c, v
}

// byte decodes a literal.
func (c lzmaCoder) byte(in []byte, t *[lzmaLiteral]uint16) (lzmaCoder, byte) {
	m := uint32(1)
	for m < 0x100 {
		c, m = c.normalize(in).bit(&t[m], m)
	}
	return c, byte(m)
}

// unlike decodes a literal behind a match, by the byte that would have continued it.
func (c lzmaCoder) unlike(in []byte, t *[lzmaLiteral]uint16, match byte) (lzmaCoder, byte) {
	m, expected, same := uint32(1), uint32(match), uint32(0x100)
	for m < 0x100 {
		expected <<= 1
		c, m = c.normalize(in).bit(&t[same+expected&same+m], m)
		same &= expected ^ (m&1 - 1)
	}
	return c, byte(m)
}

func (c lzmaCoder) length(in []byte, l *lzmaLength, position int) (lzmaCoder, int) {
	c, more := c.normalize(in).flag(&l.choice)
	if !more {
		c, n := c.tree(in, l.low[position][:])
		return c, 2 + int(n)
	}
	if c, more = c.normalize(in).flag(&l.choice2); !more {
		c, n := c.tree(in, l.mid[position][:])
		return c, 10 + int(n)
	}
	c, n := c.tree(in, l.high[:])
	return c, 18 + int(n)
}

// distance returns a match's distance less one.
func (d *lzmaDecoder) distance(c lzmaCoder, length int) (lzmaCoder, uint32) {
	c, slot := c.tree(d.in, d.slots[min(length-2, 3)][:])
	if slot < 4 {
		return c, slot
	}
	bits := int(slot>>1) - 1
	v := (2 | slot&1) << bits
	if slot < 14 {
		c, low := c.reverse(d.in, d.near[v-slot:], bits)
		return c, v + low
	}
	c, high := c.direct(d.in, bits-4)
	c, low := c.reverse(d.in, d.align[:], 4)
	return c, v + high<<4 + low
}

var errLZMA = errors.New("LZMA: the data is damaged")

// run decodes symbols until at least want bytes are out. A state tells the kinds of the
// last symbols apart; below 7 the last one was a literal.
func (d *lzmaDecoder) run(want int) error {
	if more := want + lzmaLongest - len(d.out); more > 0 {
		d.out = append(d.out, make([]byte, max(more, len(d.out)))...)
	}
	c, in, out, n, state := d.coder, d.in, d.out, d.n, d.state
	defer func() { d.coder, d.n, d.state = c, n, state }()
	for n < want {
		if c.pos > uint(len(in)) {
			return errors.New("LZMA: the data is cut off")
		}
		position := n & (1<<d.pb - 1)
		var match bool
		if c, match = c.normalize(in).flag(&d.isMatch[state][position]); !match {
			previous := byte(0)
			if n > 0 {
				previous = out[n-1]
			}
			t := &d.literal[n&(1<<d.lp-1)<<d.lc+int(previous)>>(8-d.lc)]
			if state < 7 {
				c, out[n] = c.byte(in, t)
			} else {
				c, out[n] = c.unlike(in, t, out[n-int(d.rep[0])-1])
			}
			n++
			state = int(lzmaAfterLiteral[state])
			continue
		}
		var length int
		if c, length, state = d.match(c, state, position); int64(d.rep[0]) >= int64(n) {
			return errLZMA // also the marker of an end, which a stream of known size lacks
		}
		repeat(out, n, int(d.rep[0])+1, length)
		n += length
	}
	return nil
}

var lzmaAfterLiteral = [lzmaStates]uint8{0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 4, 5}

// match decodes a match: its length, its distance less one into rep[0], the next state.
func (d *lzmaDecoder) match(c lzmaCoder, state, position int) (_ lzmaCoder, length, next int) {
	late := func(early, late int) int {
		if state < 7 {
			return early
		}
		return late
	}
	in, rep := d.in, &d.rep
	c, again := c.normalize(in).flag(&d.isRep[state])
	if !again {
		c, length = c.length(in, &d.matchLength, position)
		rep[3], rep[2], rep[1] = rep[2], rep[1], rep[0]
		c, rep[0] = d.distance(c, length)
		return c, length, late(7, 10)
	}
	c, other := c.normalize(in).flag(&d.isRepG0[state])
	if !other {
		if c, again = c.normalize(in).flag(&d.isRep0Long[state][position]); !again {
			return c, 1, late(9, 11)
		}
	} else if c, other = c.normalize(in).flag(&d.isRepG1[state]); !other {
		rep[0], rep[1] = rep[1], rep[0]
	} else if c, other = c.normalize(in).flag(&d.isRepG2[state]); !other {
		rep[0], rep[1], rep[2] = rep[2], rep[0], rep[1]
	} else {
		rep[0], rep[1], rep[2], rep[3] = rep[3], rep[0], rep[1], rep[2]
	}
	c, length = c.length(in, &d.repLength, position)
	return c, length, late(8, 11)
}

// repeat makes n bytes at an offset from those a distance back, which may overlap.
func repeat(out []byte, at, distance, n int) {
	to, from := out[at:][:n], out[at-distance:][:n]
	if distance >= n {
		copy(to, from)
		return
	}
	for i := range to {
		to[i] = from[i]
	}
}
