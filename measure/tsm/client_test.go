package tsm

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestClient(t *testing.T) {
	root := t.TempDir()
	c := NewClient(root)
	entry := reportPath + "/e"
	if err := c.Mkdir(entry); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("mkdir without a report folder: %v", err)
	}
	if err := os.Mkdir(filepath.Join(root, "report"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.Mkdir(entry); err != nil {
		t.Fatal(err)
	}
	if err := c.Mkdir(entry); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("mkdir again: %v", err)
	}
	if _, err := c.ReadFile(entry + "/outblob"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("read a missing file: %v", err)
	}
	if err := c.WriteFile(entry+"/inblob", []byte("x")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a write must not create files: %v", err)
	}
	for _, size := range []int{0, 1, 16 << 10, maxQuote + 1, maxRead} {
		want := bytes.Repeat([]byte{7}, size)
		if err := os.WriteFile(filepath.Join(root, "report/e/outblob"), want, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := c.ReadFile(entry + "/outblob"); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
	}
	if err := c.WriteFile(entry+"/outblob", []byte("abc")); err != nil {
		t.Error(err)
	}
	if b, err := c.ReadFile(entry + "/outblob"); err != nil || !bytes.HasPrefix(b, []byte("abc")) || len(b) != maxRead {
		t.Errorf("a write must not truncate: %d bytes, %v", len(b), err)
	}
	if err := c.RemoveAll(entry); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Errorf("remove is rmdir, which configfs understands: %v", err)
	}
	if list, err := c.ReadDir(entry); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if name, err := c.MkdirTemp(reportPath, "x"); err != nil || !strings.HasPrefix(name, reportPath+"/x") || c.RemoveAll(name) != nil {
		t.Errorf("temporary entry %q: %v", name, err)
	}
}

func TestClientReadCap(t *testing.T) {
	c := &dirClient{reports: "/dev"}
	if b, err := c.ReadFile(reportPath + "/zero"); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("an endless file gave %d bytes, %v", len(b), err)
	}
}

func TestClientStaysInReports(t *testing.T) {
	c := NewClient(t.TempDir())
	for _, name := range []string{"", "/etc/passwd", reportPath + "/../../x", reportPath + "x/y", "report/e"} {
		_, err := c.ReadFile(name)
		var p *fs.PathError
		if !errors.As(err, &p) || !errors.Is(err, syscall.EINVAL) {
			t.Errorf("read %q: %v", name, err)
		}
	}
}

// The lock is the one tdx-attest takes, and it does not wait.
func TestClientLock(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "inblob"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := &dirClient{reports: dir}
	unlock, err := c.lock(reportPath + "/inblob")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.lock(reportPath + "/inblob"); !errors.Is(err, syscall.EAGAIN) || !isBusy(err) {
		t.Errorf("a second lock: %v", err)
	}
	unlock()
	if unlock, err = c.lock(reportPath + "/inblob"); err != nil {
		t.Fatal(err)
	}
	unlock()
}
