package tdxsim_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-configfs-tsm/configfs/configfsi"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

var _ configfsi.Client = (*tdxsim.Client)(nil)

const entryPath = "/sys/kernel/config/tsm/report/test"

func openTD(t testing.TB, dir string) *tdxsim.TD {
	t.Helper()
	td, err := tdxsim.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	return td
}

func newTD(t testing.TB, cfg tdxsim.Config) *tdxsim.TD {
	t.Helper()
	td, err := tdxsim.New(filepath.Join(t.TempDir(), "td"), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { td.Close() })
	return td
}

func registers(t testing.TB, td *tdxsim.TD) measure.Registers {
	t.Helper()
	r, err := td.Registers()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// makeQuote goes the way of an agent: an entry, inblob, outblob.
func makeQuote(t testing.TB, td *tdxsim.TD, rd measure.ReportData) []byte {
	t.Helper()
	c := td.Client()
	if err := c.Mkdir(entryPath); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	if err := c.WriteFile(entryPath+"/inblob", rd[:]); err != nil {
		t.Fatal(err)
	}
	q, err := c.ReadFile(entryPath + "/outblob")
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func readGeneration(t testing.TB, td *tdxsim.TD) int {
	t.Helper()
	b, err := td.Client().ReadFile(entryPath + "/generation")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(string(bytes.TrimSuffix(b, []byte("\n"))))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEveryOpenMeetsTheSameTD(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "td")
	a := openTD(t, dir)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("folder: %v, %v, want mode 0700", info, err)
	}
	makeQuote(t, a, measure.ReportData{1})
	if err := a.Extend(3, measure.Digest{7}); err != nil {
		t.Fatal(err)
	}
	b := openTD(t, dir)
	if got, want := registers(t, b), registers(t, a); got != want {
		t.Errorf("registers differ: %v, %v", got, want)
	}
	if got, want := registers(t, b).RTMR[3], (measure.Digest{}).Extend(measure.Digest{7}); got != want {
		t.Errorf("RTMR3 is %s, want %s", got, want)
	}
	if a.BootID() != b.BootID() || !bytes.Equal(a.RootPEM(), b.RootPEM()) || !bytes.Equal(a.CCEL(), b.CCEL()) {
		t.Error("boot id, root or CCEL differ")
	}
	if n := readGeneration(t, b); n != 1 {
		t.Errorf("generation is %d in the second process, want 1", n)
	}
	// b reads what a made, stale as it is.
	q, err := b.Client().ReadFile(entryPath + "/outblob")
	if err != nil {
		t.Fatal(err)
	}
	if rtmr3 := q[48+472 : 48+520]; !bytes.Equal(rtmr3, make([]byte, 48)) {
		t.Errorf("RTMR3 in the cached quote is %x, want zeros", rtmr3)
	}
}

func TestTDsDiffer(t *testing.T) {
	a, b := openTD(t, t.TempDir()), openTD(t, t.TempDir())
	if bytes.Equal(a.RootPEM(), b.RootPEM()) || a.BootID() == b.BootID() {
		t.Error("two TDs share a root or a boot id")
	}
	if registers(t, a) != registers(t, b) {
		t.Error("two TDs of the same image differ in their registers")
	}
}

func TestReboot(t *testing.T) {
	dir := t.TempDir()
	td := openTD(t, dir)
	after, boot, root := registers(t, td), td.BootID(), td.RootPEM()
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(boot) {
		t.Errorf("boot id %q is not a version 4 UUID", boot)
	}
	makeQuote(t, td, measure.ReportData{1})
	for i := range 4 {
		if err := td.Extend(i, measure.Digest{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := td.Reboot(); err != nil {
		t.Fatal(err)
	}
	if got := registers(t, td); got != after || !got.RTMR[3].IsZero() {
		t.Errorf("registers after reboot: %v, want %v", got, after)
	}
	if td.BootID() == boot {
		t.Error("the boot id has not changed")
	}
	if !bytes.Equal(td.RootPEM(), root) {
		t.Error("the root certificate has changed")
	}
	if entries, err := td.Client().ReadDir("/sys/kernel/config/tsm/report"); err != nil || len(entries) != 0 {
		t.Errorf("entries after reboot: %v, %v", entries, err)
	}
	if n, _ := filepath.Glob(filepath.Join(dir, "report-*")); len(n) != 0 {
		t.Errorf("left behind: %v", n)
	}
}

func TestCCELReplay(t *testing.T) {
	td := openTD(t, t.TempDir())
	log := td.CCEL()
	if len(log) != 64<<10 {
		t.Fatalf("CCEL has %d bytes", len(log))
	}
	var rtmr [4]measure.Digest
	var count, acpi [4]int
	b := log[32+binary.LittleEndian.Uint32(log[28:]):]
	for binary.LittleEndian.Uint32(b) != 0xffffffff {
		mr := binary.LittleEndian.Uint32(b) - 1
		if n, alg := binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint16(b[12:]); n != 1 || alg != 12 {
			t.Fatalf("record has %d digests, algorithm %d", n, alg)
		}
		rtmr[mr] = rtmr[mr].Extend(measure.Digest(b[14:62]))
		count[mr]++
		size := binary.LittleEndian.Uint32(b[62:])
		if payload := b[66 : 66+size]; binary.LittleEndian.Uint32(b[4:]) == 0x0a && string(payload) == "ACPI DATA" {
			acpi[mr]++
		}
		b = b[66+size:]
	}
	if got := registers(t, td).RTMR; rtmr != got {
		t.Errorf("replay %v, registers %v", rtmr, got)
	}
	if count != [4]int{13, 5, 2, 0} || acpi != [4]int{3, 0, 0, 0} {
		t.Errorf("events %v, ACPI events %v", count, acpi)
	}
}

// TestConstantBootEvents compares with digests that do not depend on the machine
// and are the same in every published log of OVMF without Secure Boot.
func TestConstantBootEvents(t *testing.T) {
	log := openTD(t, t.TempDir()).CCEL()
	for what, digest := range map[string]string{
		"SecureBoot": "9dc3a1f80bcec915391dcda5ffbb15e7419f77eab462bbf72b42166fb70d50325e37b36f93537a863769bcf9bedae6fb",
		"PK":         "6f2e3cbc14f9def86980f5f66fd85e99d63e69a73014ed8a5633ce56eca5b64b692108c56110e22acadcef58c3250f1b",
		"KEK":        "d607c0efb41c0d757d69bca0615c3a9ac0b1db06c557d992e906c6b7dee40e0e031640c7bfd7bcd35844ef9edeadc6f9",
		"db":         "08a74f8963b337acb6c93682f934496373679dd26af1089cb4eaf0c30cf260a12e814856385ab8843e56a9acea19e127",
		"dbx":        "18cc6e01f0c6ea99aa23f8a280423e94ad81d96d0aeb5180504fc0f7a40cb3619dd39bd6a95ec1680a86ed6ab0f9828d",
		"separator":  "394341b7182cd227c5c6b07ef8000cdfd86136c4292b8e576573ad7ed9ae41019f5818b4b971c9effc60e1ad9f1289f0",
		"BootOrder":  "1dd6f7b457ad880d840d41c961283bab688e94e4b59359ea45686581e90feccea3c624b1226113f824f315eb60ae0a7c",
		"Boot0000":   "23ada07f5261f12f34a0bd8e46760962d6b4d576a416f1fea1c64bc656b1d28eacf7047ae6e967c58fd2a98bfa74c298",
	} {
		var d measure.Digest
		if err := d.UnmarshalText([]byte(digest)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(log, d[:]) {
			t.Errorf("no event with the digest of %s", what)
		}
	}
}

// TestConcurrentExtends extends from goroutines of two TD values and from another
// process: every extend counts.
func TestConcurrentExtends(t *testing.T) {
	const each = 50
	dir := t.TempDir()
	a, b := openTD(t, dir), openTD(t, dir)
	child := exec.Command(os.Args[0], "-test.run=^TestExtendFromAnotherProcess$")
	child.Env = append(os.Environ(), extendDir+"="+dir, extendCount+"="+strconv.Itoa(each))
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, td := range []*tdxsim.TD{a, a, b} {
		wg.Go(func() {
			for range each {
				if err := td.Extend(3, measure.Digest{1}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	var want measure.Digest
	for range 4 * each {
		want = want.Extend(measure.Digest{1})
	}
	if got := registers(t, a).RTMR[3]; got != want {
		t.Errorf("RTMR3 is not that of %d extends", 4*each)
	}
}

const extendDir, extendCount = "TDXSIM_TEST_DIR", "TDXSIM_TEST_COUNT"

func TestExtendFromAnotherProcess(t *testing.T) {
	dir := os.Getenv(extendDir)
	if dir == "" {
		t.Skip("runs in the child process of TestConcurrentExtends")
	}
	n, err := strconv.Atoi(os.Getenv(extendCount))
	if err != nil {
		t.Fatal(err)
	}
	td := openTD(t, dir)
	for range n {
		if err := td.Extend(3, measure.Digest{1}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConcurrentFirstOpen(t *testing.T) {
	dir := t.TempDir()
	roots := make([][]byte, 4)
	var wg sync.WaitGroup
	for i := range roots {
		wg.Go(func() {
			if td, err := tdxsim.Open(dir); err != nil {
				t.Error(err)
			} else {
				roots[i] = td.RootPEM()
				td.Close()
			}
		})
	}
	wg.Wait()
	for _, r := range roots {
		if !bytes.Equal(r, roots[0]) {
			t.Fatal("two machines were made")
		}
	}
}

func TestDamagedFolder(t *testing.T) {
	for name, content := range map[string]string{"machine.json": "{", "state": "short"} {
		dir := t.TempDir()
		openTD(t, dir)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		td, err := tdxsim.Open(dir)
		if err == nil {
			_, err = td.Registers()
		}
		if err == nil {
			t.Errorf("%s damaged: no error", name)
		}
	}
}

func TestClosed(t *testing.T) {
	td := openTD(t, t.TempDir())
	td.Close()
	if err := td.Extend(3, measure.Digest{}); err == nil {
		t.Error("Extend after Close succeeds")
	}
	if err := td.Client().Mkdir(entryPath); err == nil {
		t.Error("Mkdir after Close succeeds")
	}
	if td.BootID() != "" {
		t.Error("BootID after Close")
	}
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	openTD(t, dir)
	if _, err := tdxsim.New(dir, tdxsim.Config{}); err == nil {
		t.Error("New on a folder that has a TD succeeds")
	}
	for _, cfg := range []tdxsim.Config{{QuoteVersion: 3}, {BodyType: 3}, {QuoteVersion: 5, BodyType: 1}} {
		if _, err := tdxsim.New(t.TempDir(), cfg); err == nil {
			t.Errorf("New takes %+v", cfg)
		}
	}
}

func TestExtendErrors(t *testing.T) {
	td := openTD(t, t.TempDir())
	before := registers(t, td)
	if err := td.Extend(4, measure.Digest{}); !os.IsNotExist(err) {
		t.Errorf("RTMR4: %v", err)
	}
	td.SetHost(tdxsim.HostBehaviour{ExtendErrno: syscall.EBUSY})
	checkErrno(t, td.Extend(3, measure.Digest{1}), syscall.EBUSY)
	if registers(t, td) != before {
		t.Error("a failed extend moved the register")
	}
	td.SetHost(tdxsim.HostBehaviour{ExtendErrno: syscall.EIO, ExtendMoves: true})
	checkErrno(t, td.Extend(3, measure.Digest{1}), syscall.EIO)
	if registers(t, td) == before {
		t.Error("the register has not moved")
	}
}

func checkErrno(t testing.TB, err error, want syscall.Errno) {
	t.Helper()
	if got := errnoOf(err); got != want {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
}
