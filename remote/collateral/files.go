package collateral

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	maxBundle     = 5 << 20  // bytes of a bundle file, as dcap has it
	maxFiles      = 256      // bundle files
	maxFilesTotal = 64 << 20 // bytes of them all
)

// jsonFiles returns the names of the files in dir that begin with prefix and end in
// .json, sorted.
func jsonFiles(dir, prefix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) && strings.HasSuffix(e.Name(), ".json") && !e.IsDir() {
			names = append(names, filepath.Join(dir, e.Name()))
		}
	}
	return names, nil
}

// bundleFiles replaces the folders among paths by the bundle files in them.
func bundleFiles(paths []string) ([]string, error) {
	var names []string
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, fileError(path, err)
		}
		found := []string{path}
		if info.IsDir() {
			if found, err = jsonFiles(path, ""); err != nil {
				return nil, fileError(path, err)
			}
		}
		if names = append(names, found...); len(names) > maxFiles {
			return nil, fileError(path, fmt.Errorf("%d bundle files, want at most %d", len(names), maxFiles))
		}
	}
	return names, nil
}

// readBundles reads every bundle file. The first that is broken is the error.
func readBundles(cfg *Config) ([]*Set, error) {
	names, err := bundleFiles(cfg.Files)
	if err != nil {
		return nil, err
	}
	var bundles [][]byte
	room := maxFilesTotal
	for _, name := range names {
		bundle, err := readFile(name, maxBundle)
		if room -= len(bundle); err == nil && room < 0 {
			err = fmt.Errorf("the bundle files have more than %d bytes", maxFilesTotal)
		}
		if err != nil {
			return nil, fileError(name, err)
		}
		bundles = append(bundles, bundle)
	}
	var sets []*Set
	for i, name := range names {
		set, err := parseSet(bundles[i], name, "file ", cfg)
		if err != nil {
			return nil, err
		}
		sets = append(sets, set)
	}
	return sets, nil
}

// parseSet checks a file's bundle. The set's source is named kind and the file's name.
func parseSet(bundle []byte, name, kind string, cfg *Config) (*Set, error) {
	c, err := cfg.parse(bundle)
	if err != nil {
		return nil, fileError(name, err)
	}
	return &Set{Collateral: c, Source: kind + name, Bundle: bundle}, nil
}

func fileError(name string, err error) *Error {
	return &Error{Code: "file", Source: "file " + name, Err: err, Hint: "replace or remove the file"}
}

// Reload reads Config.Files again. Bundles that are not older than what is known
// replace it; what was read from files that are gone stays until the Store ends. If a
// file is broken nothing changes, and the error, an [*Error], names it.
func (s *Store) Reload() error {
	sets, err := readBundles(&s.cfg)
	if err != nil {
		return err
	}
	for _, set := range sets {
		if err := s.admitFile(set); err != nil {
			return err
		}
	}
	return nil
}

// admitFile makes a file's set known. One that is behind the floor is no error,
// because the network outruns every file in time: it is remembered for the error that
// says that there is nothing else.
func (s *Store) admitFile(set *Set) error {
	err := s.admit(set, true, nil)
	behind, ok := errors.AsType[*Error](err)
	if !ok || behind.Code != "rolled_back" {
		return err
	}
	s.log.Warn("bundle file is older than what was seen before, and not used", "error", behind)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.behind[platformOf(set.Collateral)] = behind
	return nil
}

// loadCache makes known what was cached. What is damaged or behind is left out.
func (s *Store) loadCache() error {
	names, err := s.state.cached()
	if err != nil {
		return err
	}
	for i, name := range names {
		if i >= s.cfg.Limits.Sets {
			_ = os.Remove(name) // what stays is met again at the next start
			continue
		}
		set, err := s.readCached(name)
		if err == nil && name != s.state.bundle(platformOf(set.Collateral)) {
			err = fileError(name, errors.New("the name is not that of the platform"))
		}
		if err == nil {
			err = s.admit(set, false, nil)
		}
		if e, ok := errors.AsType[*Error](err); ok && e.Code != "file" && e.Code != "rolled_back" {
			return err
		}
		if err != nil {
			s.log.Warn("cached collateral is not used", "error", err)
		}
	}
	return nil
}

func (s *Store) readCached(name string) (*Set, error) {
	bundle, err := readFile(name, maxBundle)
	if err != nil {
		return nil, fileError(name, err)
	}
	return parseSet(bundle, name, "cache ", &s.cfg)
}
