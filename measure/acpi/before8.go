package acpi

// What QEMU 7.2 writes in other forms than its successors. No TD has run on it: it is here
// because stock QEMU 7.2 is what the tables of QEMU 8 and 9, of which no stock release can be
// had, have to agree with in all that did not change until 10.

// computedRoutes has the slots take turns over links A to D, as [aml.expanderRoutes] does,
// in a loop over the 128 pins of all slots.
func (a *aml) computedRoutes() {
	const pins, route = packageOp + "\x02\x80", local4
	a.put(storeOp + pins + local0 + storeOp + zeroOp + local1)
	a.block(whileOp, lessOp+local1+bytePrefix+"\x80", func() {
		const slot, pin = local2, local1
		a.put(storeOp + shiftRightOp + pin + bytePrefix + "\x02" + noTarget + slot)
		a.put(storeOp + andOp + addOp + pin + slot + noTarget + bytePrefix + "\x03" + noTarget + local3)
		for i, link := range [...]string{"LNKD", "LNKA", "LNKB", "LNKC"} {
			a.block(ifOp, equalOp+local3, func() {
				a.integer(uint32(i))
				a.put(storeOp)
				a.short(packageOp, "\x04"+zeroOp+zeroOp+link+zeroOp)
				a.put(route)
			})
		}
		a.put(storeOp + orOp + shiftLeftOp + slot + bytePrefix + "\x10" + noTarget + wordPrefix + "\xff\xff" + noTarget +
			indexOp + route + zeroOp + noTarget)
		a.put(storeOp + andOp + pin + bytePrefix + "\x03" + noTarget + indexOp + route + oneOp + noTarget)
		a.put(storeOp + route + indexOp + local0 + pin + noTarget + incrementOp + pin)
	})
	a.put(returnOp + local0)
}

// olderPort is a root port with all that concerns hotplug inside, and nothing without.
func (a *aml) olderPort(m *Machine, slot, bus int) {
	a.pciDevice(slot, 0, func() {
		if m.HotplugOff {
			return
		}
		a.put(nameOp + "BSEL")
		a.integer(uint32(bus))
		a.pciDevice(0, 0, func() {
			a.put(nameOp + "ASUN" + zeroOp)
			a.method("_DSM", 4|serialized, func() {
				a.put(storeOp)
				a.short(packageOp, "\x02"+"BSEL"+"ASUN")
				a.put(local0 + returnOp + "PDSM" + arg0 + arg1 + arg2 + arg3 + local0)
			})
			a.slotEjection()
		})
		a.slotNotification()
		a.askSlots(bus)
	})
}
