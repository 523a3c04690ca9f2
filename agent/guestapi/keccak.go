package guestapi

import (
	"encoding/binary"
	"math/bits"
)

// keccak is a Keccak hash as it was before FIPS 202 (padding 0x01), here for its
// 384-bit form, which golang.org/x/crypto/sha3 does not have. It is a hash.Hash.
type keccak struct {
	lanes [25]uint64
	buf   []byte // less than one block
	size  int
}

func newKeccak(size int) *keccak { return &keccak{size: size} }

func (k *keccak) Size() int      { return k.size }
func (k *keccak) BlockSize() int { return 200 - 2*k.size }
func (k *keccak) Reset()         { *k = keccak{size: k.size} }

func (k *keccak) Write(p []byte) (int, error) {
	k.buf = append(k.buf, p...)
	for len(k.buf) >= k.BlockSize() {
		k.absorb(k.buf[:k.BlockSize()])
		k.buf = k.buf[k.BlockSize():]
	}
	return len(p), nil
}

func (k *keccak) Sum(b []byte) []byte {
	last := *k // the caller may go on writing
	block := make([]byte, k.BlockSize())
	copy(block, k.buf)
	block[len(k.buf)] ^= 0x01
	block[len(block)-1] ^= 0x80
	last.absorb(block)
	var out [200]byte
	for i, lane := range last.lanes {
		binary.LittleEndian.PutUint64(out[8*i:], lane)
	}
	return append(b, out[:k.size]...)
}

func (k *keccak) absorb(block []byte) {
	for i := range len(block) / 8 {
		k.lanes[i] ^= binary.LittleEndian.Uint64(block[8*i:])
	}
	k.permute()
}

// permute is Keccak-f[1600], FIPS 202 section 3.3, with lane (x, y) at x + 5y.
func (k *keccak) permute() {
	a := &k.lanes
	lfsr := byte(1)
	for range 24 {
		var c, d [5]uint64
		for x := range 5 { // theta
			c[x] = a[x] ^ a[x+5] ^ a[x+10] ^ a[x+15] ^ a[x+20]
		}
		for x := range 5 {
			d[x] = c[(x+4)%5] ^ bits.RotateLeft64(c[(x+1)%5], 1)
		}
		for i := range a {
			a[i] ^= d[i%5]
		}
		x, y, moved := 1, 0, a[1] // rho and pi
		for t := range 24 {
			x, y = y, (2*x+3*y)%5
			rotated := bits.RotateLeft64(moved, (t+1)*(t+2)/2)
			moved, a[x+5*y] = a[x+5*y], rotated
		}
		for row := 0; row < 25; row += 5 { // chi
			b := [5]uint64(a[row : row+5])
			for x := range 5 {
				a[row+x] = b[x] ^ ^b[(x+1)%5]&b[(x+2)%5]
			}
		}
		for j := range 7 { // iota: round constants from the LFSR of section 3.2.5
			if lfsr&1 != 0 {
				a[0] ^= 1 << (1<<j - 1)
			}
			lfsr = lfsr<<1 ^ lfsr>>7*0x71
		}
	}
}
