package tdxsim_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// TestConformance asks the questions of one table. Simulated, time is testing/synctest's:
// the delays cost nothing.
func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name string
		ask  func(*testing.T, *backend)
	}{
		{"new entry", newEntry},
		{"mkdir", mkdir},
		{"mkdir of a new name", mkdirTemp},
		{"rmdir", rmdir},
		{"wrong way", wrongWay},
		{"inblob lengths", inblobLengths},
		{"outblob before inblob", outblobFirst},
		{"quote", quote},
		{"outblob is cached until inblob is written", cachedOutblob},
		{"two writers", twoWriters},
		{"an entry each", entryEach},
		{"host fails", hostFails},
		{"empty quote", emptyQuote},
		{"quote lengths", quoteLengths},
		{"answers are seen at the next poll", polled},
		{"host is too slow", tooSlow},
		{"signal", signal},
		{"everything waits for a quote", serialised},
		{"ls does not wait", listWhileQuoting},
		{"rmdir of the entry that is read", rmdirWhileQuoting},
		{"extend", extend},
		{"many extends", manyExtends},
		{"extend fails", extendFails},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !*kernel {
				synctest.Test(t, func(t *testing.T) { c.ask(t, simulated(t)) })
				return
			}
			b := linux(t)
			b.set(t, tdxsim.HostBehaviour{Poll: fast})
			c.ask(t, b)
		})
	}
}

func newEntry(t *testing.T, b *backend) {
	d := b.entry(t, "new")
	for file, want := range map[string]string{"generation": "0\n", "provider": "tdx_guest\n"} {
		if got, err := b.client.ReadFile(d + "/" + file); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", file, got, err, want)
		}
	}
	list, err := b.client.ReadDir(d)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %v %d", e.Name(), info.Mode(), info.Size()))
	}
	want := []string{"generation -r--r--r-- 4096", "inblob --w------- 0", "outblob -r--r--r-- 0", "provider -r--r--r-- 4096"}
	if strings.Join(got, "; ") != strings.Join(want, "; ") {
		t.Errorf("files %q, want %q", got, want)
	}
	list, err = b.client.ReadDir(reports)
	if err != nil || len(list) != 1 || list[0].Name() != "new" || !list[0].IsDir() {
		t.Errorf("entries %v, %v", list, err)
	}
}

func mkdir(t *testing.T, b *backend) {
	d := b.entry(t, "mkdir")
	long := reports + "/" + strings.Repeat("n", 255)
	if err := b.client.Mkdir(long); err != nil {
		t.Error(err)
	}
	wantErrno(t, "again", b.client.Mkdir(long), syscall.EEXIST)
	if err := b.client.RemoveAll(long); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]syscall.Errno{
		d:                            syscall.EEXIST,
		reports:                      syscall.EEXIST,
		d + "/inside":                syscall.EPERM,
		d + "/inblob":                syscall.EEXIST,
		d + "/inblob/below":          syscall.ENOTDIR,
		reports + "/none/inside":     syscall.ENOENT,
		long + "n":                   syscall.ENAMETOOLONG,
		d + strings.Repeat("/a", 10): syscall.ENOENT,
	} {
		wantErrno(t, name, b.client.Mkdir(name), want)
	}
}

func mkdirTemp(t *testing.T, b *backend) {
	name, err := b.client.MkdirTemp(reports, "temp*x")
	if err != nil || !strings.HasPrefix(name, reports+"/temp") || !strings.HasSuffix(name, "x") || len(name) < len(reports)+8 {
		t.Fatalf("%q, %v", name, err)
	}
	if got := b.generation(t, name); got != "0\n" {
		t.Errorf("generation %q", got)
	}
	if err := b.client.RemoveAll(name); err != nil {
		t.Error(err)
	}
}

func rmdir(t *testing.T, b *backend) {
	d := b.entry(t, "rmdir")
	wantErrno(t, "report", b.client.RemoveAll(reports), syscall.EPERM)
	wantErrno(t, "inblob", b.client.RemoveAll(d+"/inblob"), syscall.ENOTDIR)
	wantErrno(t, "no file", b.client.RemoveAll(d+"/none"), syscall.ENOENT)
	b.write(t, d, 1)
	if err := b.client.RemoveAll(d); err != nil {
		t.Error(err)
	}
	wantErrno(t, "again", b.client.RemoveAll(d), syscall.ENOENT)
	_, err := b.client.ReadFile(d + "/outblob")
	wantErrno(t, "read", err, syscall.ENOENT)
	wantErrno(t, "write", b.client.WriteFile(d+"/inblob", make([]byte, 64)), syscall.ENOENT)
	_, err = b.client.ReadDir(d)
	wantErrno(t, "ls", err, syscall.ENOENT)
	b.entry(t, "rmdir") // of the same name, but new
	if got := b.generation(t, d); got != "0\n" {
		t.Errorf("generation %q", got)
	}
}

func wrongWay(t *testing.T, b *backend) {
	d := b.entry(t, "way")
	for name, want := range map[string]syscall.Errno{
		reports: syscall.EISDIR, d: syscall.EISDIR,
		d + "/inblob": syscall.EACCES, d + "/inblob/x": syscall.ENOTDIR, d + "/none/x": syscall.ENOENT,
		d + "/privlevel": syscall.ENOENT, d + "/privlevel_floor": syscall.ENOENT, d + "/service_provider": syscall.ENOENT,
		d + "/service_guid": syscall.ENOENT, d + "/auxblob": syscall.ENOENT, d + "/manifestblob": syscall.ENOENT,
		reports + "/none/outblob": syscall.ENOENT, reports + "/none": syscall.ENOENT,
	} {
		_, err := b.client.ReadFile(name)
		wantErrno(t, "read "+name, err, want)
	}
	for name, want := range map[string]syscall.Errno{
		reports: syscall.EISDIR, d: syscall.EISDIR,
		d + "/outblob": syscall.EACCES, d + "/generation": syscall.EACCES, d + "/provider": syscall.EACCES,
		d + "/privlevel": syscall.ENOENT, d + "/inblob/x": syscall.ENOTDIR, reports + "/none/inblob": syscall.ENOENT,
	} {
		wantErrno(t, "write "+name, b.client.WriteFile(name, make([]byte, 64)), want)
	}
	for name, want := range map[string]syscall.Errno{d + "/inblob": syscall.ENOTDIR, d + "/none": syscall.ENOENT} {
		_, err := b.client.ReadDir(name)
		wantErrno(t, "ls "+name, err, want)
	}
	if got := b.generation(t, d); got != "0\n" {
		t.Errorf("generation %q", got)
	}
}

func inblobLengths(t *testing.T, b *backend) {
	d := b.entry(t, "lengths")
	for i, c := range []struct {
		length         int
		write, outblob syscall.Errno
	}{
		{64, 0, 0},
		{0, syscall.EFAULT, syscall.EINVAL},
		{64, 0, 0},
		{1, 0, syscall.EINVAL},
		{32, 0, syscall.EINVAL},
		{63, 0, syscall.EINVAL},
		{64, 0, 0},
		{65, syscall.EFBIG, syscall.EINVAL},
		{128, syscall.EFBIG, syscall.EINVAL},
		{4096, syscall.EFBIG, syscall.EINVAL},
		{64, 0, 0},
	} {
		err := b.client.WriteFile(d+"/inblob", bytes.Repeat([]byte{0x5a}, c.length))
		if c.write != 0 {
			wantErrno(t, fmt.Sprintf("write %d", c.length), err, c.write)
		} else if err != nil {
			t.Errorf("write %d: %v", c.length, err)
		}
		if got, want := b.generation(t, d), fmt.Sprintf("%d\n", i+1); got != want {
			t.Errorf("write %d: generation %q, want %q", c.length, got, want)
		}
		b.outblob(t, d, c.outblob)
	}
}

func outblobFirst(t *testing.T, b *backend) {
	d := b.entry(t, "first")
	b.outblob(t, d, syscall.EINVAL)
	if got := b.generation(t, d); got != "0\n" {
		t.Errorf("generation %q", got)
	}
}

func quote(t *testing.T, b *backend) {
	d := b.entry(t, "quote")
	for i := range byte(5) {
		b.write(t, d, 0xa0+i)
		wantQuote(t, b.outblob(t, d, 0), 0xa0+i, b.registers(t))
	}
	if got := b.generation(t, d); got != "5\n" {
		t.Errorf("generation %q", got)
	}
}

func cachedOutblob(t *testing.T, b *backend) {
	d := b.entry(t, "cached")
	b.write(t, d, 1)
	first, before := b.outblob(t, d, 0), b.registers(t)
	if err := b.bank.Extend(3, measure.Digest{1}); err != nil {
		t.Fatal(err)
	}
	b.set(t, tdxsim.HostBehaviour{Errno: syscall.EIO}) // not asked, so it cannot fail
	if again := b.outblob(t, d, 0); !bytes.Equal(again, first) {
		t.Error("a second read gives another quote")
	}
	wantQuote(t, first, 1, before)
	b.set(t, tdxsim.HostBehaviour{Poll: fast})
	b.write(t, d, 1)
	wantQuote(t, b.outblob(t, d, 0), 1, b.registers(t))
}

func twoWriters(t *testing.T, b *backend) {
	d := b.entry(t, "writers")
	b.write(t, d, 0xaa)
	b.write(t, d, 0xbb)
	wantQuote(t, b.outblob(t, d, 0), 0xbb, b.registers(t))
	if got := b.generation(t, d); got != "2\n" {
		t.Errorf("generation %q, want 2", got)
	}
}

func entryEach(t *testing.T, b *backend) {
	var wg sync.WaitGroup
	want := b.registers(t)
	for i := range 50 {
		wg.Go(func() {
			d := fmt.Sprintf("%s/each%d", reports, i)
			fill := bytes.Repeat([]byte{byte(i)}, 64)
			if err := errors.Join(b.client.Mkdir(d), b.client.WriteFile(d+"/inblob", fill)); err != nil {
				t.Error(err)
				return
			}
			q, err := b.client.ReadFile(d + "/outblob")
			if err = errors.Join(err, b.client.RemoveAll(d)); err != nil {
				t.Error(err)
				return
			}
			wantQuote(t, q, byte(i), want)
		})
	}
	wg.Wait()
}
