package image_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"strings"
	"testing"

	"tdx-agent/measure"
	"tdx-agent/measure/image"
)

// TestTDHOB compares with digests from real guests, and with those of two programs
// that agree.
func TestTDHOB(t *testing.T) {
	for _, v := range []struct {
		layout image.Layout
		mib    uint64
		want   string
	}{
		{image.DstackLayout03(), 512, "3653127c9758814e38202c1cfa16085121f615842cf5bb2f707fefd5005c42d613f4aecd3ba05837cefce44e0a83ccf3"},
		{image.DstackLayout03(), 1024, "2b630fa1d8fa9b6e8c6507d2256803ed227888f7d1f62ca5cfbddfe495338b1c6a0fc339ea64700f0835c0897a662789"},
		{image.DstackLayout03(), 2048, "0e35f1b315ba6c912cf791e5c79dd9d3a2b8704516aa27d4e5aa78fb09ede04aef2bbd02ac7a8734c48562b9c26ba35d"},
		{image.DstackLayout03(), 2816, "3d4bd514230f69783c7318328fb67e634a5e765235761ca199ff128ef1431b7d0140b08a659f8234e26ccf804bf22538"},
		{image.DstackLayout03(), 4096, "02a008e63d55a77823c04a5513a5810d4e592dc41bf2596267c09eae5d4b4e3b329ae614973fb192297d8833d37a08fd"},
		{image.DstackLayout05(), 2048, "0b8772e5b0b41b83e6044a68397e02f49fb47066b4fbe4917ea2c45c64f323fdacbb37948f821ebaf8bc9c938ba8a749"},
		{image.DstackLayout05(), 2816, "8eb1a02074362aa0761541cdb4dc3f1788dfeb4538803b241477848e26de294dbe917ab56c5628732679b3abc168c2de"},
		{image.DstackLayout05(), 4096, "5b684faf8d02a733945f821d9cdd170802e72103977acf66949c9382500283adc90cbec57f8e7653f8bee1cab83689de"},
	} {
		hob, err := v.layout.TDHOB(v.mib << 20)
		if err != nil {
			t.Fatal(err)
		}
		if got := measure.Digest(sha512.Sum384(hob)); got != digest(t, v.want) {
			t.Errorf("%d MiB: got %v, want %s", v.mib, got, v.want)
		}
	}
}

func TestTDHOBRefused(t *testing.T) {
	l := image.DstackLayout05()
	for name, memory := range map[string]uint64{"within the layout": 8 << 20, "none": 0, "parts of a MiB": 1<<30 + 4096, "too much": 1<<46 + 1<<20} {
		if _, err := l.TDHOB(memory); err == nil {
			t.Errorf("%s: a TD HOB for %d bytes", name, memory)
		}
	}
	if _, err := (image.Layout{}).TDHOB(1 << 30); err == nil {
		t.Error("a TD HOB for no layout")
	}
	high := image.Layout{HOB: 0x90000000, Ranges: []image.MemoryRange{{Start: 0x90000000, Size: 0x1000}}}
	if _, err := high.TDHOB(4 << 30); err == nil {
		t.Error("a TD HOB in the hole below 4 GiB")
	}
}

func TestWitness(t *testing.T) {
	const want = "80100904000609020b021010"
	if got := hex.EncodeToString(image.DstackLayout05().Witness()); got != want {
		t.Errorf("witness is %s, want %s", got, want)
	}
	for _, v := range []struct{ name, hex, want string }{
		{"empty", "", "cut off"},
		{"cut", want[:22], "cut off"},
		{"longer", want + "00", "follow"},
		{"not shortest", "80900009" + want[6:], "shortest"},
		{"no ranges", "801009" + "00", "0 ranges"},
		{"too many ranges", "801009" + "41", "65 ranges"},
		{"empty range", "80100904000009020b021010", "empty or out of order"},
		{"out of order", "80100904000609020a021010", "empty or out of order"},
		{"base is no range", "80100904010609020b021010", "empty or out of order"},
		{"HOB elsewhere", "80100a04000609020b021010", "not in it"},
		{"huge", "ffffffffffffffffff01" + "0904", "too large"},
	} {
		b, err := hex.DecodeString(v.hex)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := image.ParseWitness(b); err == nil || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: got %v, want an error with %q", v.name, err, v.want)
		}
	}
}

func FuzzWitness(f *testing.F) {
	f.Add(image.DstackLayout03().Witness())
	f.Add(image.DstackLayout05().Witness())
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := image.ParseWitness(b)
		if err != nil {
			return
		}
		if again := l.Witness(); !bytes.Equal(again, b) {
			t.Errorf("%x is written as %x", b, again)
		}
		l.TDHOB(1 << 32)
	})
}
