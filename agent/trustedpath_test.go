package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRuntimeDirThatOthersCanChange: whoever could put another folder in the place of the
// runtime directory could pose as the agent.
func TestRuntimeDirThatOthersCanChange(t *testing.T) {
	for name, c := range map[string]struct {
		make func(base string) string // of the runtime directory
		want string                   // in the error; %s is base
	}{
		"private":                       {func(base string) string { return base + "/r" }, ""},
		"open to readers":               {mode("a/r", 0o755, 0o755), ""},
		"below a sticky one, as /tmp":   {mode("a/r", 0o755, 0o1777), ""},
		"open to everybody":             {mode("r", 0o777, 0o755), "%s/r has mode 0777"},
		"sticky itself":                 {mode("r", 0o1777, 0o755), "%s/r has mode 1777"},
		"parent open to everybody":      {mode("a/r", 0o700, 0o777), "%s/a has mode 0777"},
		"further up, by a link":         {link, "%s/a has mode 0777"},
		"link in an open folder":        {linkInOpen, "%s/open has mode 0777"},
		"link to a link in an open one": {linkToLinkInOpen, "%s/open has mode 0777"},
		"link of somebody else in /tmp": {linkOfOther, "%s/a/link belongs to uid 12345"},
		"link to a link":                {linkToLink, ""},
		"somebody else's":               {owned("r"), "%s/r belongs to uid 12345"},
		"parent is somebody else's":     {owned("a"), "%s/a belongs to uid 12345"},
		"a group of several can write":  {group, "%s/a has mode 0775"},
	} {
		t.Run(name, func(t *testing.T) {
			base := string(shortDir(t))
			check(t, os.MkdirAll(base+"/a/r", 0o755))
			check(t, os.Mkdir(base+"/r", 0o755))
			dir := c.make(base)
			if dir == "" {
				t.Skip("wants root")
			}
			for _, simulate := range []bool{false, true} {
				_, err := serverRuntimeDir(dir, simulate)
				if c.want == "" {
					check(t, err)
					continue
				}
				if want := fmt.Sprintf(c.want, base); err == nil || !strings.Contains(err.Error(), want) || exitCode(err) != exitConfig || !strings.Contains(err.Error(), "--runtime-dir") {
					t.Errorf("got %v, want %q and exit status %d", err, want, exitConfig)
				}
			}
			if _, err := listenEgress(dir); (err == nil) != (c.want == "") {
				t.Errorf("egress: %v", err)
			}
		})
	}
}

// mode makes a folder with this mode, in one with that.
func mode(path string, of, parent os.FileMode) func(string) string {
	return func(base string) string {
		dir := filepath.Join(base, path)
		for _, f := range []struct {
			path string
			mode os.FileMode
		}{{dir, of}, {filepath.Dir(dir), parent}} {
			if err := os.Chmod(f.path, f.mode.Perm()|map[bool]os.FileMode{true: os.ModeSticky}[f.mode&0o1000 != 0]); err != nil {
				panic(err)
			}
		}
		return dir
	}
}

func link(base string) string {
	mode("a/r", 0o755, 0o777)(base)
	os.Symlink("a/r", base+"/link")
	return base + "/link"
}

func linkInOpen(base string) string {
	os.Mkdir(base+"/open", 0o755)
	os.Symlink("../r", base+"/open/link")
	os.Chmod(base+"/open", 0o777)
	return base + "/open/link"
}

func linkToLinkInOpen(base string) string {
	os.Symlink("open/link", base+"/link")
	linkInOpen(base)
	return base + "/link"
}

func linkToLink(base string) string {
	os.Symlink(base+"/a", base+"/absolute")
	os.Symlink("a/../absolute", base+"/link")
	return base + "/link/r"
}

// linkOfOther is one that he can make another at any time.
func linkOfOther(base string) string {
	mode("a/r", 0o755, 0o1777)(base)
	os.Symlink("../r", base+"/a/link")
	if os.Geteuid() != 0 || os.Lchown(base+"/a/link", 12345, 0) != nil {
		return ""
	}
	return base + "/a/link"
}

func owned(path string) func(string) string {
	return func(base string) string {
		if os.Geteuid() != 0 || os.Chown(filepath.Join(base, path), 12345, 0) != nil {
			return ""
		}
		return filepath.Join(base, map[string]string{"a": "a/r", "r": "r"}[path])
	}
}

func group(base string) string {
	if os.Geteuid() != 0 || os.Chown(base+"/a", 0, 12345) != nil {
		return ""
	}
	return mode("a/r", 0o755, 0o775)(base)
}
