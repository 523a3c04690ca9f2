package tsm

import (
	"crypto/rand"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"golang.org/x/sys/unix"
)

// reportPath is the folder of report entries as go-configfs-tsm spells it. Names
// given to a [Client] begin with it, wherever the files are.
const reportPath = configfsi.TsmPrefix + "/report"

// maxRead is how much of a file a Client reads: the buffer of the kernel's driver,
// 128 KiB. The longest quote fits ([checkQuote] has the exact cap).
const maxRead = 128 << 10

// Client is the way to configfs: go-configfs-tsm's five calls, and Mkdir to make an
// entry of a given name. Names are full paths under /sys/kernel/config/tsm/report,
// also when the files are somewhere else. Errors keep the errno, so that
// errors.Is(err, syscall.EBUSY) works. ReadFile and WriteFile report EINTR and do
// not try again. RemoveAll removes one entry, as rmdir does.
type Client interface {
	configfsi.Client
	// Mkdir makes the folder of this path, which is how configfs makes an entry.
	Mkdir(name string) error
}

// NewClient returns the Client of the real configfs. root stands for
// /sys/kernel/config/tsm, and is that path when it is "".
func NewClient(root string) Client {
	if root == "" {
		root = configfsi.TsmPrefix
	}
	return &dirClient{reports: filepath.Join(root, "report")}
}

// dirClient uses raw system calls, because the os package would repeat a read after
// EINTR (and so hide it), split a long write in two (and so write twice), and trust
// st_size, which is 0 or 4096 here whatever a file holds.
type dirClient struct {
	reports string // stands for reportPath
}

func (c *dirClient) path(op, name string) (string, error) {
	rest, ok := strings.CutPrefix(filepath.Clean(name), reportPath)
	if !ok || rest != "" && rest[0] != '/' {
		return "", &fs.PathError{Op: op, Path: name, Err: fmt.Errorf("%w: want a path under %s", syscall.EINVAL, reportPath)}
	}
	return c.reports + rest, nil
}

func (c *dirClient) Mkdir(name string) error {
	path, err := c.path("mkdir", name)
	if err != nil {
		return err
	}
	return pathError("mkdir", path, unix.Mkdir(path, 0o755))
}

func (c *dirClient) MkdirTemp(dir, pattern string) (string, error) {
	name := filepath.Join(dir, configfsi.TempName(rand.Reader, pattern))
	return name, c.Mkdir(name)
}

func (c *dirClient) ReadDir(name string) ([]os.DirEntry, error) {
	path, err := c.path("open", name)
	if err != nil {
		return nil, err
	}
	return os.ReadDir(path)
}

func (c *dirClient) RemoveAll(name string) error {
	path, err := c.path("rmdir", name)
	if err != nil {
		return err
	}
	return pathError("rmdir", path, unix.Rmdir(path))
}

func (c *dirClient) ReadFile(name string) ([]byte, error) {
	path, err := c.path("open", name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathError("open", path, err)
	}
	defer unix.Close(fd)
	b, err := readAll(fd)
	return b, pathError("read", path, err)
}

// readAll reads to the end of the file, EFBIG beyond maxRead.
func readAll(fd int) ([]byte, error) {
	b := make([]byte, 0, 16<<10) // a whole quote, as a rule
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return b, nil
		}
		if b = b[:len(b)+n]; len(b) > maxRead {
			return nil, syscall.EFBIG
		}
	}
}

func (c *dirClient) WriteFile(name string, contents []byte) error {
	path, err := c.path("open", name)
	if err != nil {
		return err
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return pathError("open", path, err)
	}
	n, err := unix.Write(fd, contents)
	if err == nil && n != len(contents) {
		err = io.ErrShortWrite
	}
	// The kernel acts on what was written at close, and reports nothing then; other
	// file systems do.
	if closeErr := unix.Close(fd); err == nil {
		err = closeErr
	}
	return pathError("write", path, err)
}

// lock takes the lock that dstack's tdx-attest takes on an entry it shares. It does
// not wait: EAGAIN means that somebody has it.
func (c *dirClient) lock(name string) (unlock func(), err error) {
	path, err := c.path("open", name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathError("open", path, err)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unix.Close(fd)
		return nil, pathError("flock", path, err)
	}
	return func() { unix.Close(fd) }, nil
}

func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}
