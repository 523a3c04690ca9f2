package acpi

// The table loader is a script of commands of 128 bytes each by which the firmware places,
// links and checksums the tables (QEMU's docs/specs and edk2's AcpiPlatformDxe know it).

const (
	rsdpFile   = "etc/acpi/rsdp"
	tablesFile = "etc/acpi/tables"

	fileNameSize = 56
	commandSize  = 128
	loaderSize   = 4096 // QEMU pads the file to this
	tablesUnit   = 0x20000

	highMemory = 1
	fSegment   = 2 // below 1 MiB, where the operating system looks for the RSDP
)

type script struct{ b []byte }

func (s *script) command(op uint32, names ...string) {
	s.b = u32(s.b, op)
	for _, n := range names {
		s.b = append(s.b, n...)
		s.b = append(s.b, make([]byte, fileNameSize-len(n))...)
	}
}

// end fills the command up.
func (s *script) end() {
	if rest := len(s.b) % commandSize; rest > 0 {
		s.b = append(s.b, make([]byte, commandSize-rest)...)
	}
}

func (s *script) allocate(file string, align uint32, zone byte) {
	s.command(1, file)
	s.b = append(u32(s.b, align), zone)
	s.end()
}

// pointer adds where tables file ended up to the offset at a place in file.
func (s *script) pointer(file string, at uint32, size byte) {
	s.command(2, file, tablesFile)
	s.b = append(u32(s.b, at), size)
	s.end()
}

func (s *script) checksum(file string, result, start, length uint32) {
	s.command(3, file)
	s.b = u32(s.b, result, start, length)
	s.end()
}
