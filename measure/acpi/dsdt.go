package acpi

// dsdt writes the definition block of m, in QEMU's order.
func (a *aml) dsdt(m *Machine, d dialect) {
	a.debugPort()
	a.hostBridge(m, d)
	if !m.HotplugOff {
		a.slotHotplug(d)
	}
	a.pciRouting(d)
	if m.HPET {
		a.hpetDevice()
	}
	a.block(scopeOp, "_GPE", func() {
		a.put(nameOp + "_HID")
		a.text("ACPI0006")
	})
	a.cpuHotplug(m, d)
	if m.Expander {
		a.expander(d)
	}
	a.hostBridgeResources(m)
	a.sleepStates()
	a.firmwareConfig()
	a.rootBus(m, d)
	if !m.HotplugOff {
		a.slotEvents(m, d)
	}
}

// debugPort writes DBUG, which prints its argument to QEMU's debug console.
func (a *aml) debugPort() {
	a.block(scopeOp, root+zeroOp, func() {
		a.region("DBG_", systemIO, 0x402, 1)
		a.short(fieldOp, "DBG_"+byteAccess+"DBGB"+bits8)
		a.method("DBUG", 1, func() {
			a.put(toHexStringOp + arg0 + local0 + toBufferOp + local0 + local0)
			a.put(subtractOp + sizeOfOp + local0 + oneOp + local1 + storeOp + zeroOp + local2)
			a.short(whileOp, lessOp+local2+local1+
				storeOp+derefOp+indexOp+local0+local2+noTarget+"DBGB"+incrementOp+local2)
			a.put(storeOp + bytePrefix + "\x0a" + "DBGB")
		})
	})
}

// hostBridge writes the root bus and the window of its configuration space.
func (a *aml) hostBridge(m *Machine, d dialect) {
	a.block(scopeOp, "_SB_", func() {
		a.block(deviceOp, "PCI0", func() {
			a.hid("PNP0A08")
			a.put(nameOp + "_CID")
			a.eisaID("PNP0A03")
			if d.before8 {
				a.put(nameOp + "_ADR" + zeroOp)
			}
			a.put(nameOp + "_UID" + zeroOp)
			a.operatingSystemControl(m.HotplugOff)
			if !d.before8 {
				a.deviceLabel()
			}
		})
		a.block(deviceOp, "DRAC", func() {
			a.put(nameOp + "_HID")
			a.text("PNP0C01")
			a.resources("_CRS", func() { a.dword(readWrite, configBase, configBase+configSize-1) })
		})
	})
}

// operatingSystemControl writes _OSC (PCI Firmware Specification 3.3, section 4.5): the
// operating system gets all it asks for but native hotplug, unless ACPI does none.
func (a *aml) operatingSystemControl(nativeHotplug bool) {
	// 33db4d5b-1ff7-401c-9657-7441c03dd766
	const hostBridgeUUID = "\x5b\x4d\xdb\x33\xf7\x1f\x1c\x40\x96\x57\x74\x41\xc0\x3d\xd7\x66"
	control := byte(0x1e)
	if nativeHotplug {
		control |= 1
	}
	a.method("_OSC", 4, func() {
		a.put(createDWordFieldOp + arg3 + zeroOp + "CDW1")
		a.block(ifOp, equalOp+arg0, func() {
			a.short(bufferOp, bytePrefix+"\x10"+hostBridgeUUID)
			a.put(createDWordFieldOp + arg3 + bytePrefix + "\x04" + "CDW2")
			a.put(createDWordFieldOp + arg3 + bytePrefix + "\x08" + "CDW3")
			a.put(storeOp + "CDW3" + local0 + andOp + local0 + bytePrefix)
			a.b = append(a.b, control)
			a.put(local0)
			const unknownRevision, masked = bytePrefix + "\x08", bytePrefix + "\x10"
			a.short(ifOp, logicalNotOp+equalOp+arg1+oneOp+orOp+"CDW1"+unknownRevision+"CDW1")
			a.short(ifOp, logicalNotOp+equalOp+"CDW3"+local0+orOp+"CDW1"+masked+"CDW1")
			a.put(storeOp + local0 + "CDW3")
		})
		const unknownUUID = bytePrefix + "\x04"
		a.short(elseOp, orOp+"CDW1"+unknownUUID+"CDW1")
		a.put(returnOp + arg3)
	})
}

// hostBridgeResources writes what the root bus decodes, and the I/O ports of general
// purpose events and PCI hotplug.
func (a *aml) hostBridgeResources(m *Machine) {
	a.block(scopeOp, root+dualName+"_SB_"+"PCI0", func() {
		a.resources("_CRS", func() {
			a.word(busRange, 0, 0, m.lastBus())
			a.ports(0xcf8, 1, 8)
			a.word(ioRange, entireIORange, 0, 0xcf7)
			a.word(ioRange, entireIORange, 0xd00, 0xffff)
			a.dword(readWrite|cacheable, 0xa0000, 0xbffff)
			a.dword(readWrite, m.lowMemory(), configBase-1)
			a.dword(readWrite, configBase+configSize, 0xfebfffff)
			a.qword(readWrite|cacheable, hole64Base, hole64Base+m.hole64()-1)
		})
		a.systemPorts("GPE0", "GPE0 resources", 0x620, 0x10)
		if !m.HotplugOff {
			a.systemPorts("PHPR", "PCI Hotplug resources", hotplugBase, 0x18)
		}
	})
}

// systemPorts is a device that only keeps others off its ports.
func (a *aml) systemPorts(name, uid string, base uint16, length byte) {
	a.block(deviceOp, name, func() {
		a.put(nameOp + "_HID")
		a.text("PNP0A06")
		a.put(nameOp + "_UID")
		a.text(uid)
		a.put(nameOp + "_STA" + bytePrefix + "\x0b")
		a.resources("_CRS", func() { a.ports(base, 1, length) })
	})
}

// sleepStates names the values of the sleep type fields (ACPI 6.5, section 7.4.2).
func (a *aml) sleepStates() {
	a.block(scopeOp, root+zeroOp, func() {
		a.put(nameOp + "_S3_")
		a.short(packageOp, "\x04"+oneOp+oneOp+zeroOp+zeroOp)
		a.put(nameOp + "_S4_")
		a.short(packageOp, "\x04"+bytePrefix+"\x02"+bytePrefix+"\x02"+zeroOp+zeroOp)
		a.put(nameOp + "_S5_")
		a.short(packageOp, "\x04"+zeroOp+zeroOp+zeroOp+zeroOp)
	})
}

// firmwareConfig is the fw_cfg device, through which these tables come.
func (a *aml) firmwareConfig() {
	a.block(scopeOp, root+dualName+"_SB_"+"PCI0", func() {
		a.block(deviceOp, "FWCF", func() {
			a.put(nameOp + "_HID")
			a.text("QEMU0002")
			a.put(nameOp + "_STA" + bytePrefix + "\x0b")
			a.resources("_CRS", func() { a.ports(0x510, 1, 0xc) })
		})
	})
}
