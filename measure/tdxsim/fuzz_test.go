package tdxsim_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"tdx-agent/measure/tdxsim"
)

// FuzzClient gives the client any path: it must answer, with a PathError at worst,
// and must not touch anything outside of the TD's folder.
func FuzzClient(f *testing.F) {
	for _, name := range []string{"", "/", reports, entryPath, entryPath + "/inblob", entryPath + "/outblob/x", reports + "/..", reports + "/../report/a", reports + "/a/../../b", "report-x", reports + "/a\x00"} {
		f.Add(name, []byte("0123456789"))
	}
	dir := f.TempDir()
	td := openTD(f, filepath.Join(dir, "td"))
	c := td.Client()
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		check := func(err error) {
			var p *fs.PathError
			if err != nil && !errors.As(err, &p) {
				t.Errorf("%q: %v is no PathError", name, err)
			}
		}
		check(c.Mkdir(name))
		check(c.WriteFile(name, content))
		check(c.WriteFile(name+"/inblob", content))
		_, err := c.ReadFile(name)
		check(err)
		_, err = c.ReadFile(name + "/outblob")
		check(err)
		_, err = c.ReadDir(name)
		check(err)
		check(c.RemoveAll(name))
		if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
			t.Fatalf("%q: beside the TD's folder: %v, %v", name, files, err)
		}
		if _, err := td.Registers(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzEntryFile damages the file of an entry.
func FuzzEntryFile(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 85))
	f.Add(make([]byte, 86))
	f.Add(append(append(make([]byte, 8), 64), make([]byte, 77)...))
	f.Add(append(append(make([]byte, 8), 255), make([]byte, 200)...))
	f.Add(append(append(make([]byte, 8), 1), append(make([]byte, 72), 1, 0xff, 0xff, 0xff, 0xff)...))
	td, file := damagedEntry(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		q, err := td.Client().ReadFile(entryPath + "/outblob")
		if err != nil && q != nil || len(q) > 131048 {
			t.Errorf("%d bytes, %v", len(q), err)
		}
		_ = td.Client().WriteFile(entryPath+"/inblob", b) // any answer will do
	})
}

func damagedEntry(t testing.TB) (*tdxsim.TD, string) {
	t.Helper()
	dir := t.TempDir()
	td := openTD(t, dir)
	if err := td.Client().Mkdir(entryPath); err != nil {
		t.Fatal(err)
	}
	return td, filepath.Join(dir, "report-"+td.BootID(), filepath.Base(entryPath))
}
