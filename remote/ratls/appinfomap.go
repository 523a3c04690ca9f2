package ratls

import "fmt"

// dstack since 0.6 writes application info as a map from the members' names, in which what
// a reader does not know is to be skipped.

// More formats of MessagePack.
const (
	packMap16   = 0xde
	packStr8    = 0xd9
	packFalse   = 0xc2
	packTrue    = 0xc3
	packUint64  = 0xcf // packUint8 to this one: 1, 2, 4 and 8 bytes
	packArrays  = 0x90 // with the length, as the two below, in the low bits
	packStrings = 0xa0

	maxInfoNames = 32
	maxInfoDepth = 4
)

func isMap(b []byte) bool { return len(b) > 0 && (b[0]&0xf0 == 0x80 || b[0] == packMap16) }

// named reads a map.
func (r *infoReader) named(i *AppInfo) {
	c := r.byte()
	n := int(c & 15)
	if c == packMap16 {
		n = r.uint(2)
	}
	if n > maxInfoNames {
		r.fail(fmt.Errorf("%d members, want at most %d", n, maxInfoNames))
	}
	hash := func(into *[]byte) func() { return func() { *into = r.bytes(maxInfoHash) } }
	members := map[string]func(){
		"app_id": hash(&i.AppID), "compose_hash": hash(&i.ComposeHash), "instance_id": hash(&i.InstanceID), "device_id": hash(&i.DeviceID), "os_image_hash": hash(&i.OSImageHash),
		"mr_system": func() { i.MRSystem = r.hash() }, "mr_aggregated": func() { i.MRAggregated = r.hash() },
		"key_provider_info": func() { i.KeyProviderInfo = r.bytes(maxInfoProvider) },
	}
	required := len(members)
	members["init_script_hashes"] = func() { i.InitScriptHashes = r.list() }
	seen := map[string]bool{}
	for range n {
		name := r.text()
		read, known := members[name]
		switch {
		case r.err != nil:
			return
		case seen[name]:
			r.fail(fmt.Errorf("member %.40q is there twice", name))
		case known:
			read()
		default:
			r.skip(maxInfoDepth)
		}
		seen[name] = true
		if known && name != "init_script_hashes" {
			required--
		}
	}
	if r.err == nil && required > 0 {
		r.fail(fmt.Errorf("%d members are missing", required))
	}
}

// text reads a string of at most 255 bytes.
func (r *infoReader) text() string {
	switch c := r.byte(); {
	case c&0xe0 == packStrings:
		return string(r.take(int(c & 31)))
	case c == packStr8:
		return string(r.take(r.uint(1)))
	default:
		r.fail(fmt.Errorf("format %#x, want a member's name", c))
		return ""
	}
}

// skip passes over a value of no more than this depth.
func (r *infoReader) skip(depth int) {
	c := r.byte()
	switch {
	case r.err != nil:
	case c < 0x80 || c >= 0xe0 || c == packNil || c == packFalse || c == packTrue: // with the small numbers
	case c >= packUint8 && c <= packUint64:
		r.take(1 << (c - packUint8))
	case c&0xe0 == packStrings:
		r.take(int(c & 31))
	case c == packStr8 || c == packBin8:
		r.take(r.uint(1))
	case c == packBin16:
		r.take(r.uint(2))
	case (c&0xf0 == packArrays || c == packArray16) && depth > 0:
		for range r.arrayOf(c) {
			if r.err != nil {
				return
			}
			r.skip(depth - 1)
		}
	default:
		r.fail(fmt.Errorf("format %#x in a member that is not known", c))
	}
}
