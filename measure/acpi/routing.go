package acpi

import "encoding/binary"

// Where the four pins of a slot of the root bus go: on machines with PIC mode to links A to
// H, which the operating system sets; else to global system interrupts 16 to 23.

// pciRouting writes PICF, _PIC and the routing tables of the root bus (ACPI 6.5, section
// 5.8.1 and 6.2.13).
func (a *aml) pciRouting(d dialect) {
	a.put(nameOp + "PICF" + zeroOp)
	a.method("_PIC", 1, func() { a.put(storeOp + arg0 + "PICF") })
	a.block(scopeOp, "_SB_", func() {
		a.block(scopeOp, "PCI0", func() {
			a.routes("PRTP", "LNK")
			a.routes("PRTA", "GSI")
			a.method("_PRT", 0, func() {
				a.short(ifOp, equalOp+"PICF"+zeroOp+returnOp+"PRTP")
				a.short(elseOp, returnOp+"PRTA")
			})
		})
		a.linkMethods(d)
		for i := range 8 {
			a.link(i, d)
		}
		for i := range 8 {
			a.globalInterrupt(i, d)
		}
	})
}

// routes writes a table of four pins for each of 32 slots. Slots up to 0x18 take turns over
// E to H; 0x1e, where PCI bridges were, has them in order; those of the chipset have A to D.
func (a *aml) routes(name, target string) {
	a.put(nameOp)
	a.put(name)
	a.block(packageOp, "\x80", func() {
		for slot := range 32 {
			first, turn := 'A', 0
			switch {
			case slot <= 0x18:
				first, turn = 'E', slot
			case slot == 0x1e:
				first = 'E'
			}
			for pin := range 4 {
				a.route(slot, pin, target, byte(first)+byte((turn+pin)&3))
			}
		}
	})
}

// route is one entry: all functions of a slot, the pin, the link's name, and no index.
func (a *aml) route(slot, pin int, target string, letter byte) {
	a.block(packageOp, "\x04", func() {
		a.integer(uint32(slot)<<16 | 0xffff)
		a.integer(uint32(pin))
		a.put(target)
		a.b = append(a.b, letter, 0)
	})
}

// linkMethods writes what the links share: status and current setting from a PIRQ register
// of the chipset, whose bit 7 says that the link is off.
func (a *aml) linkMethods(d dialect) {
	a.method("IQST", 1, func() {
		a.short(ifOp, andOp+bytePrefix+"\x80"+arg0+noTarget+returnOp+bytePrefix+"\x09")
		a.put(returnOp + bytePrefix + "\x0b")
	})
	a.method("IQCR", 1|serialized, func() {
		a.resources("PRR0", func() { a.interrupts(d.interruptFlags, 0) })
		const firstNumber = bytePrefix + "\x05" // offset of the interrupt in PRR0
		a.put(createDWordFieldOp + "PRR0" + firstNumber + "PRRI")
		a.put(storeOp + andOp + arg0 + bytePrefix + "\x0f" + noTarget + "PRRI" + returnOp + "PRR0")
	})
}

// link is an interrupt link device (PNP0C0F) over PIRQ register number i.
func (a *aml) link(i int, d dialect) {
	letter := string(rune('A' + i))
	a.block(deviceOp, "LNK"+letter, func() {
		a.hid("PNP0C0F")
		a.put(nameOp + "_UID")
		a.integer(uint32(i))
		a.resources("_PRS", func() { a.interrupts(d.interruptFlags, 5, 10, 11) })
		register := "PRQ" + letter
		a.method("_STA", 0, func() { a.put(returnOp + "IQST" + register) })
		a.method("_DIS", 0, func() { a.put(orOp + register + bytePrefix + "\x80" + register) })
		a.method("_CRS", 0, func() { a.put(returnOp + "IQCR" + register) })
		a.method("_SRS", 1, func() {
			a.put(createDWordFieldOp + arg0 + bytePrefix + "\x05" + "PRRI" + storeOp + "PRRI" + register)
		})
	})
}

// globalInterrupt is a link device that cannot be set: interrupt 16 + i of the I/O APIC.
func (a *aml) globalInterrupt(i int, d dialect) {
	number := uint32(16 + i)
	setting := func() { a.interrupts(d.interruptFlags, number) }
	a.block(deviceOp, "GSI"+string(rune('A'+i)), func() {
		a.hid("PNP0C0F")
		a.put(nameOp + "_UID")
		a.integer(uint32(number))
		a.resources("_PRS", setting)
		a.resources("_CRS", setting)
		a.method("_DIS", 0, func() {})
		a.method("_SRS", 1, func() {})
	})
}

// hpetDevice is the timer as a device that looks at its own registers.
func (a *aml) hpetDevice() {
	a.block(scopeOp, "_SB_", func() {
		a.block(deviceOp, "HPET", func() {
			a.hid("PNP0103")
			a.put(nameOp + "_UID" + zeroOp)
			a.region("HPTM", systemMemory, hpetBase, hpetSize)
			a.short(fieldOp, "HPTM"+dwordAccessLocked+"VEND"+bits32+"PRD_"+bits32)
			a.method("_STA", 0, func() {
				a.put(storeOp + "VEND" + local0 + storeOp + "PRD_" + local1)
				a.put(shiftRightOp + local0 + bytePrefix + "\x10" + local0)
				const none = returnOp + zeroOp
				a.short(ifOp, logicalOrOp+equalOp+local0+zeroOp+equalOp+local0+wordPrefix+"\xff\xff"+none)
				const slowest = dwordPrefix + "\x00\xe1\xf5\x05" // 100 ns in femtoseconds
				a.short(ifOp, logicalOrOp+equalOp+local1+zeroOp+greaterOp+local1+slowest+none)
				a.put(returnOp + bytePrefix + "\x0f")
			})
			a.resources("_CRS", func() {
				a.put(readOnlyMemory32)
				a.b = binary.LittleEndian.AppendUint32(a.b, hpetBase)
				a.b = binary.LittleEndian.AppendUint32(a.b, hpetSize)
			})
		})
	})
}
