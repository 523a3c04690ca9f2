package acpi

// Slots of the root bus.
const (
	expanderSlot = 0x10 // as dstack asks for
	chipsetSlot  = 0x1f // ISA bridge, and functions 2 and 3: AHCI and SMBus
)

// rootBus writes a device for each function of the root bus.
func (a *aml) rootBus(m *Machine, d dialect) {
	devices, ports := m.slots()
	a.block(scopeOp, root+"_SB_", func() {
		a.block(scopeOp, "PCI0", func() {
			for slot := range 1 + devices {
				a.pciDevice(slot, 0, func() {})
			}
			expander := m.Expander
			for i := range ports {
				slot := m.portSlot(i)
				if expander && slot > expanderSlot {
					a.pciDevice(expanderSlot, 0, func() {})
					expander = false
				}
				a.rootPort(m, d, slot, ports-1-i)
			}
			if expander {
				a.pciDevice(expanderSlot, 0, func() {})
			}
			a.pciDevice(chipsetSlot, 0, func() { a.isaBridge(d) })
			if !d.before8 {
				a.pciDevice(chipsetSlot, 2, func() {})
			}
			a.pciDevice(chipsetSlot, 3, func() {})
			if d.before8 && !m.HotplugOff {
				a.askPorts(m)
			}
		})
	})
}

// pciDevice is a function of a bus, named S and its number in two hexadecimal digits.
func (a *aml) pciDevice(slot, function int, body func()) {
	name := slotName(slot<<3 | function)
	a.block(deviceOp, string(name[:]), func() {
		a.put(nameOp + "_ADR")
		a.integer(uint32(slot)<<16 | uint32(function))
		body()
	})
}

func slotName(devfn int) [4]byte {
	const digits = "0123456789ABCDEF"
	return [4]byte{'S', digits[devfn>>4], digits[devfn&0xf], '_'}
}

// isaBridge writes the interrupt router and the legacy devices.
func (a *aml) isaBridge(d dialect) {
	a.region("PIRQ", pciConfig, 0x60, 0xc)
	a.block(scopeOp, root+"_SB_", func() {
		a.short(fieldOp, multiName+"\x03"+"PCI0"+"SF8_"+"PIRQ"+byteAccess+
			"PRQA"+bits8+"PRQB"+bits8+"PRQC"+bits8+"PRQD"+bits8+reserved+reservedWidth+
			"PRQE"+bits8+"PRQF"+bits8+"PRQG"+bits8+"PRQH"+bits8)
	})
	const present = nameOp + "_STA" + bytePrefix + "\x0f"
	a.block(deviceOp, "KBD_", func() {
		a.hid("PNP0303")
		a.put(present)
		a.resources("_CRS", func() {
			a.ports(0x60, 1, 1)
			a.ports(0x64, 1, 1)
			a.irq(1)
		})
	})
	a.block(deviceOp, "MOU_", func() {
		a.hid("PNP0F13")
		a.put(present)
		a.resources("_CRS", func() { a.irq(12) })
	})
	a.block(deviceOp, "COM1", func() {
		a.hid("PNP0501")
		a.put(nameOp + "_UID" + oneOp + present)
		a.resources("_CRS", func() {
			a.ports(0x3f8, 0, 8)
			a.serialIRQ(d)
		})
	})
	a.block(deviceOp, "RTC_", func() {
		a.hid("PNP0B00")
		a.resources("_CRS", func() {
			a.ports(0x70, 1, 8)
			a.irq(8)
		})
	})
}

// serialIRQ is interrupt 4 (ACPI 6.5, section 6.4.2.1). Since QEMU 11.1 it has the optional
// flags: level, active low, shared.
func (a *aml) serialIRQ(d dialect) {
	if d.sharedSerial {
		a.put("\x23\x10\x00\x18")
		return
	}
	a.irq(4)
}
