package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checkTrustedPath refuses a folder for sockets and log in which, or above which, somebody
// else could put something in its place, as OpenSSH does with a user's keys. Every folder
// up to the root must be this user's or root's, and writable to nobody else; others may
// write above the folder where the sticky bit keeps them from what is not theirs (/tmp).
func checkTrustedPath(dir string) error {
	target, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	path := dir
	for range maxLinks { // they are in folders too
		if path, err = checkFoldersOf(path, dir); err != nil {
			return err
		}
		if path == "" {
			_, err = checkFoldersOf(target, dir)
			return err
		}
	}
	return exitf(exitConfig, "runtime directory %s: more than %d symbolic links lead to it; give the path %s (--runtime-dir)", dir, maxLinks, target)
}

const maxLinks = 40 // the kernel's bound

// checkFoldersOf returns the path without the first of its links; "" if it has none.
func checkFoldersOf(path, dir string) (followed string, err error) {
	for at := path; ; at = filepath.Dir(at) {
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			return "", &fs.PathError{Op: "stat", Path: at, Err: err}
		}
		isLink := st.Mode&unix.S_IFMT == unix.S_IFLNK // whose mode says nothing
		sticky := st.Mode&unix.S_ISVTX != 0 && at != path
		switch {
		case st.Uid != 0 && int(st.Uid) != os.Geteuid():
			return "", exitf(exitConfig, "runtime directory %s: %s belongs to uid %d, who could put another in its place; want uid %d or root: choose a folder of your own (--runtime-dir), or chown it", dir, at, st.Uid, os.Geteuid())
		case isLink:
			to, err := os.Readlink(at)
			if err != nil {
				return "", err
			}
			if !filepath.IsAbs(to) {
				to = filepath.Join(filepath.Dir(at), to)
			}
			followed = filepath.Join(to, path[len(at):])
		case st.Mode&0o002 != 0 && !sticky, st.Mode&0o020 != 0 && !sticky && !privateGroup(st.Gid):
			return "", exitf(exitConfig, "runtime directory %s: %s has mode %04o, so that others could put another in its place; run chmod go-w %s, or choose a folder that only you can write to (--runtime-dir)", dir, at, st.Mode&0o7777, at)
		}
		if at == filepath.Dir(at) {
			return followed, nil
		}
	}
}

// privateGroup tells whether a group is root's, or by its number this user's alone, as most
// distributions make them.
func privateGroup(gid uint32) bool {
	return gid == 0 || int(gid) == os.Getegid() && os.Getegid() == os.Geteuid()
}
