package keys

import (
	"fmt"
	"math/big"
	"slices"
)

// Edwards25519 (RFC 8032, section 5.1).
var (
	edwardsP = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))
	// edwardsD is -121665/121666.
	edwardsD = func() *big.Int {
		d := new(big.Int).ModInverse(big.NewInt(121666), edwardsP)
		return d.Mod(d.Mul(d, big.NewInt(-121665)), edwardsP)
	}()
)

// checkEd25519 refuses what is not the encoding of a point. crypto/ed25519 would take
// such a key for one whose signatures are all wrong; dstack tells the two apart.
func checkEd25519(key []byte) error {
	if len(key) != 32 {
		return &RequestError{fmt.Sprintf("invalid ed25519 public key: %d bytes, want 32", len(key))}
	}
	be := slices.Clone(key)
	slices.Reverse(be)
	be[0] &= 0x7f // the sign of x
	y := new(big.Int).SetBytes(be)
	// The curve is x^2 = (y^2-1) / (d*y^2+1), and d*y^2+1 is never 0: only whether
	// the quotient is a square says whether there is a point.
	y2 := y.Mod(y.Mul(y, y), edwardsP)
	num := new(big.Int).Sub(y2, big.NewInt(1))
	den := new(big.Int).Mul(y2, edwardsD)
	den.Add(den, big.NewInt(1))
	x2 := num.Mul(num, den.ModInverse(den, edwardsP))
	if big.Jacobi(x2.Mod(x2, edwardsP), edwardsP) == -1 {
		return &RequestError{"invalid ed25519 public key: not a point of the curve"}
	}
	return nil
}
