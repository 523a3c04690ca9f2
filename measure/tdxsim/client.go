package tdxsim

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
)

// reportDir is the one folder that the client knows.
const reportDir = "/sys/kernel/config/tsm/report"

// Client answers as the kernel does below /sys/kernel/config/tsm/report. It has the
// methods of go-configfs-tsm's configfsi.Client, and Mkdir. ReadFile stands for
// open(O_RDONLY), read to the end and close; WriteFile for open(O_WRONLY), one write
// and close; RemoveAll for rmdir. Errors are [*fs.PathError] around the kernel's
// errno; EINTR is not retried.
//
// As in the kernel, every call but ReadDir waits while a quote is made, whichever
// process asked for it.
type Client struct{ td *TD }

// Client returns the TD's configfs.
func (td *TD) Client() *Client { return &Client{td} }

// place is where a path leads.
type place struct {
	level       int // one of the constants
	entry, file string
}

const (
	elsewhere = iota // outside of report
	report           // the report folder
	anEntry
	anAttribute // a file of an entry
	beyond      // below a file of an entry
)

// attributes are the files of an entry and their modes. Sizes are as stat shows
// them, not as read returns them.
var attributes = []fileInfo{
	{name: "generation", mode: 0o444, size: 4096},
	{name: "inblob", mode: 0o200},
	{name: "outblob", mode: 0o444},
	{name: "provider", mode: 0o444, size: 4096},
}

func isAttribute(name string) bool {
	return slices.ContainsFunc(attributes, func(a fileInfo) bool { return a.name == name })
}

// locate resolves a path without looking whether an entry exists.
func locate(name string) (place, error) {
	if name == "" {
		return place{}, errNoFile
	}
	if strings.IndexByte(name, 0) >= 0 {
		return place{}, syscall.EINVAL
	}
	rest, ok := strings.CutPrefix(path.Clean(name), reportDir)
	if !ok || rest != "" && rest[0] != '/' {
		return place{}, nil
	}
	if rest == "" {
		return place{level: report}, nil
	}
	parts := strings.Split(rest[1:], "/")
	for _, part := range parts {
		if len(part) > 255 {
			return place{}, syscall.ENAMETOOLONG
		}
	}
	p := place{level: report + min(len(parts), 3), entry: parts[0]}
	if len(parts) > 1 {
		p.file = parts[1]
	}
	return p, nil
}

// do runs f under the configfs lock and makes a PathError of its error.
func (c *Client) do(op, name string, f func(place) error) error {
	p, err := locate(name)
	if err == nil {
		var release func()
		if release, err = c.td.configfs.acquire(); err == nil {
			defer release()
			err = f(p)
		}
	}
	var already *fs.PathError
	if err == nil || errors.As(err, &already) {
		return err
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Mkdir makes an entry: EEXIST if there is one, EPERM inside an entry and beside
// report, ENAMETOOLONG beyond 255 bytes, ENXIO without a provider.
func (c *Client) Mkdir(name string) error {
	return c.do("mkdir", name, func(p place) error {
		switch p.level {
		case anEntry:
			return c.td.createEntry(p.entry)
		case report:
			return syscall.EEXIST
		case elsewhere:
			if path.Dir(path.Clean(name)) == path.Dir(reportDir) {
				return syscall.EPERM
			}
			return errNoFile
		}
		if err := c.td.findEntry(p.entry); err != nil {
			return err
		}
		switch {
		case p.level == anAttribute && isAttribute(p.file):
			return syscall.EEXIST
		case p.level == anAttribute:
			return syscall.EPERM
		case isAttribute(p.file):
			return syscall.ENOTDIR
		}
		return errNoFile
	})
}

// MkdirTemp makes an entry of a new name: pattern with its last "*" replaced by
// random characters. It returns the name also with an error.
func (c *Client) MkdirTemp(dir, pattern string) (string, error) {
	name := path.Join(dir, configfsi.TempName(rand.Reader, pattern))
	return name, c.Mkdir(name)
}

// ReadFile opens the file and reads it to its end. Reading outblob makes a quote if
// inblob was written since the last.
func (c *Client) ReadFile(name string) (b []byte, err error) {
	op := "open"
	err = c.do(op, name, func(p place) error {
		if p.level == elsewhere {
			return errNoFile
		}
		if p.level == report {
			return &fs.PathError{Op: "read", Path: name, Err: syscall.EISDIR}
		}
		if err := c.td.findEntry(p.entry); err != nil {
			return err
		}
		if p.level == anEntry {
			return &fs.PathError{Op: "read", Path: name, Err: syscall.EISDIR}
		}
		if err := openable(p, "inblob"); err != nil {
			return err
		}
		if b, err = c.td.readAttribute(p); err != nil {
			return &fs.PathError{Op: "read", Path: name, Err: err}
		}
		return nil
	})
	return b, err
}

// openable says how opening an attribute fails: ENOENT, ENOTDIR, or EACCES for the
// files whose mode forbids it, even to root.
func openable(p place, forbidden ...string) error {
	switch {
	case !isAttribute(p.file):
		return errNoFile
	case p.level == beyond:
		return syscall.ENOTDIR
	case slices.Contains(forbidden, p.file):
		return syscall.EACCES
	}
	return nil
}

func (td *TD) readAttribute(p place) ([]byte, error) {
	f, e, err := td.openEntry(p.entry)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if td.behaviour().NoProvider {
		return nil, syscall.ENXIO
	}
	switch p.file {
	case "generation":
		return append(strconv.AppendUint(nil, e.generation, 10), '\n'), nil
	case "provider":
		return []byte("tdx_guest\n"), nil
	}
	return td.outblob(f, e)
}

// WriteFile opens the file, which must exist, writes contents, and closes it. What the
// kernel commits at close shows in generation alone: close never fails.
func (c *Client) WriteFile(name string, contents []byte) error {
	return c.do("open", name, func(p place) error {
		if p.level == elsewhere {
			return errNoFile
		}
		if p.level == report {
			return syscall.EISDIR
		}
		if err := c.td.findEntry(p.entry); err != nil {
			return err
		}
		if p.level == anEntry {
			return syscall.EISDIR
		}
		if err := openable(p, "outblob", "generation", "provider"); err != nil {
			return err
		}
		if err := c.td.commit(p.entry, contents); err != nil {
			return &fs.PathError{Op: "write", Path: name, Err: err}
		}
		return nil
	})
}

// RemoveAll is rmdir: it removes an entry. ENOENT if there is none, EPERM for report
// itself, ENOTDIR for an entry's file.
func (c *Client) RemoveAll(name string) error {
	return c.do("rmdir", name, func(p place) error {
		switch p.level {
		case elsewhere:
			return errNoFile
		case report:
			return syscall.EPERM
		case anEntry:
			return c.td.deleteEntry(p.entry)
		}
		if err := c.td.findEntry(p.entry); err != nil {
			return err
		}
		if isAttribute(p.file) {
			return syscall.ENOTDIR
		}
		return errNoFile
	})
}

// ReadDir lists report, or an entry.
func (c *Client) ReadDir(name string) ([]os.DirEntry, error) {
	infos, err := c.list(name)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	list := make([]os.DirEntry, len(infos))
	for i := range infos {
		list[i] = fs.FileInfoToDirEntry(infos[i])
	}
	return list, nil
}

func (c *Client) list(name string) ([]fileInfo, error) {
	p, err := locate(name)
	if err != nil {
		return nil, err
	}
	dir, err := c.td.entryDir()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make([]fileInfo, len(entries))
	for i, e := range entries {
		names[i] = fileInfo{name: e.Name(), mode: fs.ModeDir | 0o755}
	}
	switch {
	case p.level == report:
		return names, nil
	case p.level == elsewhere, !slices.ContainsFunc(names, func(f fileInfo) bool { return f.name == p.entry }):
		return nil, errNoFile
	case p.level == anEntry:
		return attributes, nil
	case isAttribute(p.file):
		return nil, syscall.ENOTDIR
	}
	return nil, errNoFile
}

// fileInfo describes a file of configfs.
type fileInfo struct {
	name string
	mode fs.FileMode
	size int64
}

func (f fileInfo) Name() string       { return f.name }
func (f fileInfo) Size() int64        { return f.size }
func (f fileInfo) Mode() fs.FileMode  { return f.mode }
func (f fileInfo) ModTime() time.Time { return time.Time{} }
func (f fileInfo) IsDir() bool        { return f.mode.IsDir() }
func (f fileInfo) Sys() any           { return nil }
