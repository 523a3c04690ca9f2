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
	d.out = make([]byte, 0, min(size, 8<<20)) // OVMF's drivers up to UiApp have 2 to 4 MiB
	return &lzmaStream{decoder: d, size: int(size)}, nil
}

// at returns n bytes at an offset, which are valid until the next call.
func (s *lzmaStream) at(offset, n int) ([]byte, error) {
	if offset < 0 || n < 0 || offset > s.size-n {
		return nil, fmt.Errorf("LZMA: %d bytes at %d are beyond the %d that come out", n, offset, s.size)
	}
	if s.err == nil && len(s.decoder.out) < offset+n {
		s.err = s.decoder.run(offset+n, s.size)
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
)

// lzmaDecoder is the range decoder and the model. Names follow the specification.
type lzmaDecoder struct {
	in          []byte
	pos         int
	width, code uint32
	out         []byte

	lc, lp, pb int
	rep        [4]uint32
	state      int

	literal                          []uint16
	isMatch, isRep0Long              [lzmaStates * lzmaPositions]uint16
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
	d := &lzmaDecoder{in: in, width: 1<<32 - 1, lc: properties % 9, lp: properties / 9 % 5, pb: properties / 45}
	if d.pb > 4 || d.lc+d.lp > 4 || in[0] != 0 {
		return nil
	}
	d.code, d.pos = binary.BigEndian.Uint32(in[1:]), 5
	d.literal = make([]uint16, lzmaLiteral<<(d.lc+d.lp))
	tables := [][]uint16{d.literal, d.isMatch[:], d.isRep0Long[:], d.isRep[:], d.isRepG0[:], d.isRepG1[:], d.isRepG2[:], d.near[:], d.align[:]}
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

func (d *lzmaDecoder) normalize() {
	if d.width < 1<<24 {
		d.width <<= 8
		d.code <<= 8
		if d.pos < len(d.in) {
			d.code |= uint32(d.in[d.pos])
		}
		d.pos++
	}
}

func (d *lzmaDecoder) bit(p *uint16) uint32 {
	bound := (d.width >> 11) * uint32(*p)
	if d.code < bound {
		d.width = bound
		*p += (1<<11 - *p) >> 5
		d.normalize()
		return 0
	}
	d.width -= bound
	d.code -= bound
	*p -= *p >> 5
	d.normalize()
	return 1
}

// tree decodes bits from the highest, reverse from the lowest.
func (d *lzmaDecoder) tree(t []uint16, bits int) uint32 {
	m := uint32(1)
	for range bits {
		m = m<<1 | d.bit(&t[m])
	}
	return m - 1<<bits
}

func (d *lzmaDecoder) reverse(t []uint16, bits int) (v uint32) {
	m := uint32(1)
	for i := range bits {
		b := d.bit(&t[m])
		m = m<<1 | b
		v |= b << i
	}
	return v
}

func (d *lzmaDecoder) direct(bits int) (v uint32) {
	for range bits {
		d.width >>= 1
		v <<= 1
		if d.code >= d.width {
			d.code -= d.width
			v |= 1
		}
		d.normalize()
	}
	return v
}

func (d *lzmaDecoder) length(l *lzmaLength, position int) int {
	switch {
	case d.bit(&l.choice) == 0:
		return int(d.tree(l.low[position][:], 3))
	case d.bit(&l.choice2) == 0:
		return 8 + int(d.tree(l.mid[position][:], 3))
	}
	return 16 + int(d.tree(l.high[:], 8))
}

func (d *lzmaDecoder) distance(length int) uint32 {
	slot := d.tree(d.slots[min(length, 3)][:], 6)
	if slot < 4 {
		return slot
	}
	bits := int(slot>>1) - 1
	v := (2 | slot&1) << bits
	if slot < 14 {
		return v + d.reverse(d.near[v-slot:], bits)
	}
	return v + d.direct(bits-4)<<4 + d.reverse(d.align[:], 4)
}

func (d *lzmaDecoder) literalByte(state int, rep uint32) {
	previous := byte(0)
	n := len(d.out)
	if n > 0 {
		previous = d.out[n-1]
	}
	context := (n&(1<<d.lp-1))<<d.lc + int(previous>>(8-d.lc))
	t := d.literal[lzmaLiteral*context:][:lzmaLiteral]
	symbol := uint32(1)
	if state >= 7 {
		match := uint32(d.out[n-int(rep)-1])
		for symbol < 0x100 {
			expected := match >> 7 & 1
			match <<= 1
			b := d.bit(&t[(1+expected)<<8+symbol])
			symbol = symbol<<1 | b
			if b != expected {
				break
			}
		}
	}
	for symbol < 0x100 {
		symbol = symbol<<1 | d.bit(&t[symbol])
	}
	d.out = append(d.out, byte(symbol))
}

var errLZMA = errors.New("LZMA: the data is damaged")

// run decodes symbols until at least want of size bytes are out. A state tells the kinds
// of the last symbols apart; below 7 the last one was a literal.
func (d *lzmaDecoder) run(want, size int) error {
	rep, state := d.rep, d.state
	defer func() { d.rep, d.state = rep, state }()
	for len(d.out) < want {
		if d.pos > len(d.in) {
			return errors.New("LZMA: the data is cut off")
		}
		position := len(d.out) & (1<<d.pb - 1)
		if d.bit(&d.isMatch[state*lzmaPositions+position]) == 0 {
			d.literalByte(state, rep[0])
			switch {
			case state < 4:
				state = 0
			case state < 10:
				state -= 3
			default:
				state -= 6
			}
			continue
		}
		var n int
		if n, state = d.match(&rep, state, position); int64(rep[0]) >= int64(len(d.out)) {
			return errLZMA // also the marker of an end, which a stream of known size lacks
		}
		d.copy(int(rep[0])+1, min(n, size-len(d.out)))
	}
	return nil
}

// match decodes a match: its length, its distance less one into rep[0], the next state.
func (d *lzmaDecoder) match(rep *[4]uint32, state, position int) (n, next int) {
	late := func(early, late int) int {
		if state < 7 {
			return early
		}
		return late
	}
	if d.bit(&d.isRep[state]) == 0 {
		n := d.length(&d.matchLength, position)
		*rep = [4]uint32{d.distance(n), rep[0], rep[1], rep[2]}
		return n + 2, late(7, 10)
	}
	switch {
	case d.bit(&d.isRepG0[state]) == 0:
		if d.bit(&d.isRep0Long[state*lzmaPositions+position]) == 0 {
			return 1, late(9, 11)
		}
	case d.bit(&d.isRepG1[state]) == 0:
		*rep = [4]uint32{rep[1], rep[0], rep[2], rep[3]}
	case d.bit(&d.isRepG2[state]) == 0:
		*rep = [4]uint32{rep[2], rep[0], rep[1], rep[3]}
	default:
		*rep = [4]uint32{rep[3], rep[0], rep[1], rep[2]}
	}
	return d.length(&d.repLength, position) + 2, late(8, 11)
}

// copy repeats n bytes from distance back, which may overlap what it makes.
func (d *lzmaDecoder) copy(distance, n int) {
	if distance >= n {
		at := len(d.out) - distance
		d.out = append(d.out, d.out[at:at+n]...)
		return
	}
	for range n {
		d.out = append(d.out, d.out[len(d.out)-distance])
	}
}
