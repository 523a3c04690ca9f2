package acpi_test

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/bits"
	"os/exec"
	"strings"
)

// A qtestMachine is a stock QEMU that runs no instruction: the test plays the firmware's
// part over the qtest protocol, so neither KVM nor a firmware is needed.
type qtestMachine struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	log strings.Builder
	err error // the first failure; later calls do nothing
}

func startQEMU(path string, args []string) (*qtestMachine, error) {
	m := &qtestMachine{cmd: exec.Command(path, append(args, "-accel", "tcg", "-S", "-display", "none", "-serial", "null", "-qtest", "stdio")...)}
	m.cmd.Stderr = &m.log
	var err error
	if m.in, err = m.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	m.out = bufio.NewReaderSize(out, 1<<20)
	return m, m.cmd.Start()
}

func (m *qtestMachine) close() {
	m.in.Close()
	m.cmd.Process.Kill()
	m.cmd.Wait()
}

// do sends one command and returns the words after OK.
func (m *qtestMachine) do(format string, args ...any) string {
	if m.err != nil {
		return ""
	}
	command := fmt.Sprintf(format, args...)
	if _, m.err = io.WriteString(m.in, command+"\n"); m.err != nil {
		return ""
	}
	for {
		line, err := m.out.ReadString('\n')
		if err != nil {
			m.err = fmt.Errorf("qtest %.40q: %v: %s", command, err, lastLine(m))
			return ""
		}
		switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "OK":
			return rest
		case "IRQ": // an interrupt line moved: not an answer
		default:
			m.err = fmt.Errorf("qtest %.40q: %q", command, line)
			return ""
		}
	}
}

// lastLine waits for QEMU, whose answers have ended, and says why it went.
func lastLine(m *qtestMachine) string {
	m.in.Close()
	m.cmd.Wait()
	lines := strings.Split(strings.TrimSpace(m.log.String()), "\n")
	return lines[len(lines)-1]
}

// pci writes a register of a function of bus 0 through the legacy configuration ports.
func (m *qtestMachine) pci(devfn, reg uint32, width string, value uint64) {
	m.do("outl 0xcf8 %#x", 1<<31|devfn<<8|reg&^3)
	m.do("out%s %#x %#x", width, 0xcfc+reg&3, value)
}

// file reads a fw_cfg file by DMA, which is also what makes QEMU write its tables.
func (m *qtestMachine) file(name string) []byte {
	const dir = 0x19
	head := m.dma(dir, 4)
	if m.err != nil {
		return nil
	}
	list := m.dma(dir, 4+64*int(binary.BigEndian.Uint32(head)))
	for e := list[min(4, len(list)):]; len(e) >= 64; e = e[64:] {
		if strings.TrimRight(string(e[8:64]), "\x00") == name {
			return m.dma(uint32(binary.BigEndian.Uint16(e[4:])), int(binary.BigEndian.Uint32(e)))
		}
	}
	if m.err == nil {
		m.err = fmt.Errorf("QEMU has no fw_cfg file %s", name)
	}
	return nil
}

// dma selects a fw_cfg item and reads its first n bytes into guest RAM, then from there.
func (m *qtestMachine) dma(selector uint32, n int) []byte {
	const control, buffer = 0x1000, 1 << 20 // free RAM: nothing runs in this machine
	var request [16]byte
	binary.BigEndian.PutUint32(request[0:], selector<<16|8|2) // select, read
	binary.BigEndian.PutUint32(request[4:], uint32(n))
	binary.BigEndian.PutUint64(request[8:], buffer)
	m.do("write %#x 16 0x%x", control, request)
	m.do("outl 0x514 0")
	m.do("outl 0x518 %#x", bits.ReverseBytes32(control))
	answer := m.do("read %#x %d", buffer, n)
	data, err := hex.DecodeString(strings.TrimPrefix(answer, "0x"))
	if err != nil && m.err == nil {
		m.err = err
	}
	return data
}
