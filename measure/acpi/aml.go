package acpi

import "encoding/binary"

// AML is a prefix notation (ACPI 6.5, section 20.2): an operator, its operands, its
// target. Terms of fixed bytes are therefore Go constants, put together with +, and only
// what has a length or a number that varies is written by a method of aml.

// Operators and prefixes of section 20.2 and its table 20.2 (AML byte stream).
const (
	zeroOp       = "\x00"
	oneOp        = "\x01"
	nameOp       = "\x08"
	bytePrefix   = "\x0a" // one byte follows
	wordPrefix   = "\x0b"
	dwordPrefix  = "\x0c"
	stringPrefix = "\x0d" // characters and NUL follow
	scopeOp      = "\x10"
	bufferOp     = "\x11"
	packageOp    = "\x12"
	methodOp     = "\x14"
	dualName     = "\x2e" // two segments follow
	multiName    = "\x2f" // their number and the segments follow
	root         = "\x5c"
	parent       = "\x5e"

	storeOp            = "\x70"
	addOp              = "\x72"
	subtractOp         = "\x74"
	incrementOp        = "\x75"
	shiftLeftOp        = "\x79"
	shiftRightOp       = "\x7a"
	andOp              = "\x7b"
	orOp               = "\x7d"
	derefOp            = "\x83"
	notifyOp           = "\x86"
	sizeOfOp           = "\x87"
	indexOp            = "\x88"
	createDWordFieldOp = "\x8a"
	logicalAndOp       = "\x90"
	logicalOrOp        = "\x91"
	logicalNotOp       = "\x92"
	equalOp            = "\x93"
	greaterOp          = "\x94"
	lessOp             = "\x95"
	toBufferOp         = "\x96"
	toHexStringOp      = "\x98"
	ifOp               = "\xa0"
	elseOp             = "\xa1"
	whileOp            = "\xa2"
	returnOp           = "\xa4"
	breakOp            = "\xa5"

	mutexOp     = "\x5b\x01"
	acquireOp   = "\x5b\x23"
	releaseOp   = "\x5b\x27"
	debugOp     = "\x5b\x31"
	regionOp    = "\x5b\x80"
	fieldOp     = "\x5b\x81"
	deviceOp    = "\x5b\x82"
	processorOp = "\x5b\x83"

	local0, local1, local2, local3, local4, local5 = "\x60", "\x61", "\x62", "\x63", "\x64", "\x65"
	arg0, arg1, arg2, arg3, arg4                   = "\x68", "\x69", "\x6a", "\x6b", "\x6c"

	noTarget   = zeroOp     // a null name: the result is only the value of the term
	emptyText  = "\x0d\x00" // ""
	noTimeout  = "\xff\xff" // of Acquire
	serialized = 8          // method flag, beside the number of arguments

	systemMemory, systemIO, pciConfig = "\x00", "\x01", "\x02" // address spaces of a region
)

// Flags of a field: access width, lock rule in bit 4, update rule in bits 5 and 6.
const (
	byteAccess              = "\x01"
	byteAccessWriteZeros    = "\x41"
	dwordAccess             = "\x03"
	dwordAccessLocked       = "\x13"
	dwordAccessWriteZeros   = "\x43"
	bits1, bits8, bits32    = "\x01", "\x08", "\x20"
	reserved, reservedWidth = "\x00", "\x20" // 32 bits without a name
)

// aml collects a definition block.
type aml struct{ b []byte }

func (a *aml) put(s string) { a.b = append(a.b, s...) }

// integer writes n as QEMU does, in the shortest form (section 20.2.3).
func (a *aml) integer(n uint32) {
	switch {
	case n <= 1:
		a.b = append(a.b, byte(n))
	case n <= 0xff:
		a.b = append(a.b, bytePrefix[0], byte(n))
	case n <= 0xffff:
		a.b = binary.LittleEndian.AppendUint16(append(a.b, wordPrefix[0]), uint16(n))
	default:
		a.b = binary.LittleEndian.AppendUint32(append(a.b, dwordPrefix[0]), n)
	}
}

// text writes a string.
func (a *aml) text(s string) {
	a.put(stringPrefix)
	a.put(s)
	a.put(zeroOp)
}

// block writes a term with a PkgLength: op, the length, head, and what body writes.
func (a *aml) block(op, head string, body func()) {
	a.put(op)
	start := len(a.b)
	a.put(head)
	body()
	size := len(a.b) - start
	var length [4]byte
	n := packageLength(&length, size)
	a.b = append(a.b, length[:n]...) // room for the length, then everything moves up by it
	copy(a.b[start+n:], a.b[start:start+size])
	copy(a.b[start:], length[:n])
}

// short is block for a term without anything variable inside.
func (a *aml) short(op, content string) { a.block(op, content, func() {}) }

// packageLength encodes the length of a block of size bytes, itself included (section
// 20.2.4), and returns how many bytes it takes.
func packageLength(to *[4]byte, size int) int {
	if size+1 < 1<<6 {
		to[0] = byte(size + 1)
		return 1
	}
	n := 2
	for size+n >= 1<<(4+8*(n-1)) {
		n++
	}
	size += n
	to[0] = byte((n-1)<<6 | size&0xf)
	for i := 1; i < n; i++ {
		to[i] = byte(size >> (4 + 8*(i-1)))
	}
	return n
}

// method writes a method; flags is its number of arguments, or'ed with serialized.
func (a *aml) method(name string, flags byte, body func()) {
	a.block(methodOp, name, func() {
		a.b = append(a.b, flags)
		body()
	})
}

// region declares I/O ports or memory and the fields in them.
func (a *aml) region(name, space string, offset, length uint32) {
	a.put(regionOp)
	a.put(name)
	a.put(space)
	a.integer(offset)
	a.integer(length)
}

// eisaID compresses an identifier such as PNP0A08 (section 6.1.5): three letters of five
// bits, four hexadecimal digits, the bytes in big-endian order.
func (a *aml) eisaID(id string) {
	v := uint32(id[0]-0x40)<<26 | uint32(id[1]-0x40)<<21 | uint32(id[2]-0x40)<<16
	for i, shift := 3, 12; i < 7; i, shift = i+1, shift-4 {
		digit := uint32(id[i] - '0')
		if id[i] >= 'A' {
			digit = uint32(id[i] - 'A' + 10)
		}
		v |= digit << shift
	}
	a.put(dwordPrefix)
	a.b = binary.BigEndian.AppendUint32(a.b, v)
}

// hid names a device's compressed identifier.
func (a *aml) hid(id string) {
	a.put(nameOp + "_HID")
	a.eisaID(id)
}
