package keys

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/renameio/v2"

	"tdx-agent/measure"
)

// Provider is where an application's keys come from.
type Provider interface {
	// App returns the keys, which are the caller's to drop.
	App(ctx context.Context) (*App, error)
}

// Ephemeral is dstack's key provider "none": keys of a random seed that lives as long
// as the boot. Nobody else vouches for them, so what binds them to a measured
// application is evidence alone.
//
// The certificate of the authority is made when the first certificate is asked for,
// and anew when the agent starts again, with the same name and key.
type Ephemeral struct {
	// Path of the seed's file, which must be in memory and be removed at boot: what
	// is there is taken, so that the keys outlive a restart of the agent.
	Path string
}

// App implements [Provider].
func (p Ephemeral) App(context.Context) (*App, error) {
	seed, err := p.seed()
	if err != nil {
		return nil, fmt.Errorf("seed of the application's keys: %w", err)
	}
	defer clear(seed)
	return appOfSeed(seed, measure.KeyProvider{Kind: measure.KeyProviderNone})
}

func (p Ephemeral) seed() ([]byte, error) {
	const size = 32
	seed, err := measure.ReadGuestFile(p.Path, size)
	if err == nil && len(seed) != size {
		clear(seed)
		return nil, fmt.Errorf("%s: has %d bytes, want %d; remove it for new keys", p.Path, len(seed), size)
	}
	if err == nil {
		return seed, p.private()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	seed = make([]byte, size)
	rand.Read(seed)
	return seed, renameio.WriteFile(p.Path, seed, 0o400)
}

// private demands that nobody else could read or have written the seed.
func (p Ephemeral) private() error {
	st, err := os.Lstat(p.Path)
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s: has mode %o, want 400; remove it for new keys", p.Path, st.Mode().Perm())
	}
	return err
}

// appOfSeed derives from a provider's seed what dstack's boot tools do.
func appOfSeed(seed []byte, provider measure.KeyProvider) (*App, error) {
	s, err := derive(seed, "app-key")
	if err != nil {
		return nil, err
	}
	defer s.Zero()
	ca, err := s.p256()
	if err != nil {
		return nil, err
	}
	key, err := derive(seed, "app-k256-key")
	if err != nil {
		return nil, err
	}
	return newApp(provider, key, nil, newAuthority(ca, nil))
}
