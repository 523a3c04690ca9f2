package acpi

// hotplugBase is the first I/O port of QEMU's PCI hotplug interface.
const hotplugBase = 0xcc0

// e5c937d0-3553-4d7a-9117-ea4d19c3434d, the device label interface (PCI Firmware
// Specification 3.3, section 4.6).
const labelUUID = "\xd0\x37\xc9\xe5\x53\x35\x7a\x4d\x91\x17\xea\x4d\x19\xc3\x43\x4d"

// labelFunctions opens the answer to a _DSM: function 0, a bit map of the functions there are,
// which is empty for another interface or an old revision.
func (a *aml) labelFunctions(bitmap string, d dialect) {
	a.block(ifOp, equalOp+arg2+zeroOp, func() {
		a.put(storeOp)
		a.short(bufferOp, oneOp+"\x00")
		a.put(local0)
		if d.before8 {
			a.put(storeOp + zeroOp + local1)
		}
		a.block(ifOp, logicalNotOp+equalOp+arg0, func() {
			a.short(bufferOp, bytePrefix+"\x10"+labelUUID)
			a.put(returnOp + local0)
		})
		a.short(ifOp, lessOp+arg1+bytePrefix+"\x02"+returnOp+local0)
		if bitmap != "" {
			a.put(bitmap)
		} else {
			a.askIndexBitmap(d)
		}
		a.put(returnOp + local0)
	})
}

const (
	labelFunction = equalOp + arg2 + bytePrefix + "\x07"
	firstOfLocal0 = indexOp + local0 + zeroOp + noTarget
	// askIndex reads a device's index through its bus (first of arg4) and slot.
	askIndex = storeOp + "AIDX" + derefOp + indexOp + arg4 + zeroOp + noTarget +
		derefOp + indexOp + arg4 + oneOp + noTarget + local2
	noIndex = equalOp + local2 + dwordPrefix + "\xff\xff\xff\xff"
)

// askIndexBitmap fills the bit map of a device that may have an index: functions 0 and 7.
func (a *aml) askIndexBitmap(d dialect) {
	if !d.before8 {
		a.put(storeOp + zeroOp + local1)
	}
	a.put(askIndex)
	a.short(ifOp, logicalNotOp+orOp+equalOp+local2+zeroOp+noIndex+noTarget+
		orOp+local1+oneOp+local1+orOp+local1+shiftLeftOp+oneOp+bytePrefix+"\x07"+noTarget+local1)
	a.put(storeOp + local1 + firstOfLocal0)
}

// deviceLabel writes EDSM, the label of a device whose index is fixed (first of arg4).
func (a *aml) deviceLabel() {
	a.method("EDSM", 5|serialized, func() {
		a.labelFunctions(storeOp+bytePrefix+"\x81"+firstOfLocal0, dialect{})
		a.block(ifOp, labelFunction, func() {
			a.put(storeOp)
			a.short(packageOp, "\x02"+zeroOp+emptyText)
			a.put(local0 + storeOp + derefOp + indexOp + arg4 + zeroOp + noTarget + local1)
			a.put(storeOp + local1 + firstOfLocal0 + returnOp + local0)
		})
	})
}

// slotHotplug writes the hotplug registers and what devices use them by.
func (a *aml) slotHotplug(d dialect) {
	a.block(scopeOp, dualName+"_SB_"+"PCI0", func() {
		a.region("PCST", systemIO, hotplugBase, 8)
		a.short(fieldOp, "PCST"+dwordAccessWriteZeros+"PCIU"+bits32+"PCID"+bits32)
		a.region("SEJ_", systemIO, hotplugBase+8, 4)
		a.short(fieldOp, "SEJ_"+dwordAccessWriteZeros+"B0EJ"+bits32)
		a.region("BNMR", systemIO, hotplugBase+16, 8)
		a.short(fieldOp, "BNMR"+dwordAccessWriteZeros+"BNUM"+bits32+"PIDX"+bits32)
		a.put(mutexOp + "BLCK" + "\x00")
		const lock, unlock = acquireOp + "BLCK" + noTimeout, releaseOp + "BLCK"
		const selectBus = storeOp + arg0 + "BNUM"
		const slotBit = storeOp + shiftLeftOp + oneOp + arg1 + noTarget
		a.method("PCEJ", 2, func() { // eject slot arg1 of bus arg0
			a.put(lock + selectBus + slotBit + "B0EJ" + unlock + returnOp + zeroOp)
		})
		a.method("AIDX", 2, func() { // index of the device there
			a.put(lock + selectBus + slotBit + "PIDX" + storeOp + "PIDX" + local0 + unlock + returnOp + local0)
		})
		a.method("PDSM", 5|serialized, func() {
			a.labelFunctions("", d)
			a.block(ifOp, labelFunction, func() { a.askLabel(d) })
		})
	})
}

// askLabel answers function 7: the device's index and an empty name. Windows believes an
// index of 0, so newer QEMUs leave the package empty where there is none.
func (a *aml) askLabel(d dialect) {
	if d.labelAlways {
		a.put(storeOp)
		a.short(packageOp, "\x02"+zeroOp+emptyText)
		a.put(local0 + askIndex + storeOp + local2 + firstOfLocal0)
	} else {
		a.put(askIndex + storeOp)
		a.short(packageOp, "\x02")
		a.put(local0)
		a.short(ifOp, logicalNotOp+logicalOrOp+equalOp+local2+zeroOp+noIndex+
			storeOp+local2+firstOfLocal0+storeOp+emptyText+indexOp+local0+oneOp+noTarget)
	}
	a.put(returnOp + local0)
}

// rootPort is a PCIe root port with a device in its only slot. bus is its number in the
// hotplug interface.
func (a *aml) rootPort(m *Machine, d dialect, slot, bus int) {
	if d.before8 {
		a.olderPort(m, slot, bus)
		return
	}
	a.pciDevice(slot, 0, func() {
		a.pciDevice(0, 0, func() {})
		if m.HotplugOff {
			return
		}
		a.put(nameOp + "BSEL")
		a.integer(uint32(bus))
		a.block(scopeOp, "S00_", func() {
			a.put(nameOp + "ASUN" + zeroOp)
			a.method("_DSM", 4|serialized, func() {
				a.put(storeOp)
				a.short(packageOp, "\x02"+zeroOp+zeroOp)
				a.put(local0 + storeOp + "BSEL" + firstOfLocal0 + storeOp + "ASUN" + indexOp + local0 + oneOp + noTarget)
				a.put(returnOp + "PDSM" + arg0 + arg1 + arg2 + arg3 + local0)
			})
			a.slotEjection()
		})
		a.slotNotification()
	})
}

// slotEjection ends a slot, whose number is 0.
func (a *aml) slotEjection() {
	a.put(nameOp + "_SUN" + zeroOp)
	a.method("_EJ0", 1, func() { a.put("PCEJ" + "BSEL" + "_SUN") })
}

// slotNotification passes event arg1 on to the slots in arg0.
func (a *aml) slotNotification() {
	a.method("DVNT", 2, func() { a.short(ifOp, andOp+arg0+oneOp+noTarget+notifyOp+"S00_"+arg1) })
}

// slotEvents writes the handler of the hotplug event, which asks each port.
func (a *aml) slotEvents(m *Machine, d dialect) {
	_, ports := m.slots()
	if ports > 0 && !d.before8 {
		a.block(scopeOp, root+dualName+"_SB_"+"PCI0", func() {
			for bus := range ports {
				name := slotName(m.portSlot(ports-1-bus) << 3)
				a.block(scopeOp, string(name[:]), func() { a.askSlots(bus) })
			}
			a.askPorts(m)
		})
	}
	a.block(scopeOp, "_GPE", func() {
		a.method("_E01", 0, func() {
			if ports == 0 && !d.before8 {
				return
			}
			const pci = root + multiName + "\x03" + "_SB_" + "PCI0"
			a.put(acquireOp + pci + "BLCK" + noTimeout + pci + "PCNT" + releaseOp + pci + "BLCK")
		})
	})
}

// askSlots asks one port which slots a device came to and which one wants to leave.
func (a *aml) askSlots(bus int) {
	a.method("PCNT", 0, func() {
		a.put(storeOp)
		a.integer(uint32(bus))
		a.put("BNUM" + "DVNT" + "PCIU" + deviceCheck + "DVNT" + "PCID" + ejectRequest)
	})
}

// askPorts asks all ports.
func (a *aml) askPorts(m *Machine) {
	_, ports := m.slots()
	a.method("PCNT", 0, func() {
		for bus := range ports {
			a.put(parent + dualName)
			name := slotName(m.portSlot(ports-1-bus) << 3)
			a.b = append(a.b, name[:]...)
			a.put("PCNT")
		}
	})
}
