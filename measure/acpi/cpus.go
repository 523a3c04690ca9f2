package acpi

// The registers of QEMU's CPU hotplug interface are fields of \_SB.PCI0.PRES.
const (
	pres     = root + multiName + "\x04" + "_SB_" + "PCI0" + "PRES"
	cpuLock  = pres + "CPLK"
	cpuIndex = pres + "CSEL" // selects the processor the others are about
	command  = pres + "CCMD"
	data     = pres + "CDAT"
	enabled  = pres + "CPEN"
	inserted = pres + "CINS"
	removing = pres + "CRMV"
	eject    = pres + "CEJ0"

	lockCPUs   = acquireOp + cpuLock + noTimeout
	unlockCPUs = releaseOp + cpuLock

	deviceCheck  = oneOp // values of Notify (ACPI 6.5, section 5.6.6)
	ejectRequest = bytePrefix + "\x03"
)

// cpuHotplug writes the processors and the interface they come and go by.
func (a *aml) cpuHotplug(m *Machine, d dialect) {
	a.block(scopeOp, "_SB_", func() {
		a.cpuRegisters(d)
		a.block(deviceOp, root+dualName+"_SB_"+"CPUS", func() {
			a.put(nameOp + "_HID")
			a.text("ACPI0010")
			a.put(nameOp + "_CID")
			a.eisaID("PNP0A05")
			a.cpuMethods(m.CPUs, d)
			for i := range m.CPUs {
				a.processor(i, m.Hugepages)
			}
		})
	})
	a.method(root+dualName+"_GPE"+"_E02", 0, func() {
		a.put(root + multiName + "\x03" + "_SB_" + "CPUS" + "CSCN")
	})
}

func (a *aml) cpuRegisters(d dialect) {
	const base, length = 0xcd8, 0xc
	a.block(deviceOp, root+multiName+"\x03"+"_SB_"+"PCI0"+"PRES", func() {
		a.hid("PNP0A06")
		a.put(nameOp + "_UID")
		a.text("CPU Hotplug resources")
		a.put(mutexOp + "CPLK" + "\x00")
		a.resources("_CRS", func() { a.ports(base, 1, length) })
		a.region("PRST", systemIO, base, length)
		const bits3 = "\x03"
		a.short(fieldOp, "PRST"+byteAccessWriteZeros+reserved+reservedWidth+
			"CPEN"+bits1+"CINS"+bits1+"CRMV"+bits1+"CEJ0"+bits1+"CEJF"+bits1+reserved+bits3+"CCMD"+bits8)
		a.short(fieldOp, "PRST"+dwordAccess+"CSEL"+bits32+reserved+reservedWidth+"CDAT"+bits32)
		if d.selectorReset {
			a.method("_INI", serialized, func() { a.put(storeOp + zeroOp + "CSEL") })
		}
	})
}

func (a *aml) cpuMethods(count int, d dialect) {
	a.method("CTFY", 2, func() { // tell processor arg0 of event arg1
		for i := range count {
			a.block(ifOp, equalOp+arg0, func() {
				a.integer(uint32(i))
				a.put(notifyOp)
				a.processorName(i)
				a.put(arg1)
			})
		}
	})
	a.method("CSTA", 1|serialized, func() { // _STA of processor arg0
		a.put(lockCPUs + storeOp + arg0 + cpuIndex + storeOp + zeroOp + local0)
		a.short(ifOp, equalOp+enabled+oneOp+storeOp+bytePrefix+"\x0f"+local0)
		a.put(unlockCPUs + returnOp + local0)
	})
	a.method("CEJ0", 1|serialized, func() { // eject processor arg0
		a.put(lockCPUs + storeOp + arg0 + cpuIndex + storeOp + oneOp + eject + unlockCPUs)
	})
	a.method("CSCN", serialized, func() { a.cpuScan(count, d) })
	a.method("COST", 4|serialized, func() { // _OST of processor arg0: event arg1, status arg2
		a.put(lockCPUs + storeOp + arg0 + cpuIndex)
		a.put(storeOp + oneOp + command + storeOp + arg1 + data)
		a.put(storeOp + bytePrefix + "\x02" + command + storeOp + arg2 + data)
		a.put(unlockCPUs)
	})
}

// cpuScan asks QEMU for processors with a pending event and passes it on. A list holds 255
// of them, so there are rounds: local4 asks for another. Within a round local0 says that
// the last question found something, local3 is the processor, local1 and local5 count the
// lists of new and leaving ones.
func (a *aml) cpuScan(count int, d dialect) {
	const list = packageOp + "\x02\xff" // an empty package for 255 elements
	a.put(lockCPUs + nameOp + "CNEW" + list)
	if d.deferredEject {
		a.put(nameOp + "CEJL" + list)
	}
	a.put(storeOp + zeroOp + local3 + storeOp + oneOp + local4)
	a.block(whileOp, equalOp+local4+oneOp, func() {
		a.put(storeOp + zeroOp + local4 + storeOp + oneOp + local0 + storeOp + zeroOp + local1)
		if d.deferredEject {
			a.put(storeOp + zeroOp + local5)
		}
		a.block(whileOp, logicalAndOp+equalOp+local0+oneOp+lessOp+local3, func() {
			a.integer(uint32(count))
			a.cpuScanStep(d)
		})
		a.cpuNotify("CNEW", local1, deviceCheck, storeOp+local3+debugOp, inserted)
		if d.deferredEject {
			a.cpuNotify("CEJL", local5, ejectRequest, "", removing)
		}
	})
	a.put(unlockCPUs)
}

// cpuScanStep looks at the next processor with an event.
func (a *aml) cpuScanStep(d dialect) {
	a.put(storeOp + zeroOp + local0 + storeOp + local3 + cpuIndex + storeOp + zeroOp + command)
	a.short(ifOp, lessOp+data+local3+breakOp) // wrapped round: all have been seen
	const again = storeOp + oneOp + local4 + breakOp
	const full = bytePrefix + "\xff"
	if d.deferredEject {
		a.short(ifOp, logicalOrOp+equalOp+local1+full+equalOp+local5+full+again)
	} else {
		a.short(ifOp, equalOp+local1+full+again)
	}
	a.put(storeOp + data + local3)
	const found = storeOp + oneOp + local0
	a.short(ifOp, equalOp+inserted+oneOp+storeOp+local3+indexOp+"CNEW"+local1+noTarget+incrementOp+local1+found)
	if d.deferredEject {
		a.short(ifOp, equalOp+removing+oneOp+storeOp+local3+indexOp+"CEJL"+local5+noTarget+incrementOp+local5+found)
	} else {
		a.block(elseOp, "", func() {
			a.short(ifOp, equalOp+removing+oneOp+"CTFY"+local3+ejectRequest+storeOp+oneOp+removing+found)
		})
	}
	a.put(incrementOp + local3)
}

// cpuNotify sends every processor of a list its event and clears the flag that told of it.
func (a *aml) cpuNotify(list, length, event, trace, flag string) {
	a.put(storeOp + zeroOp + local2)
	a.block(whileOp, lessOp+local2, func() {
		a.put(length)
		a.put(storeOp + derefOp + indexOp)
		a.put(list)
		a.put(local2 + noTarget + local3 + "CTFY" + local3)
		a.put(event)
		a.put(trace)
		a.put(storeOp + local3 + cpuIndex + storeOp + oneOp)
		a.put(flag)
		a.put(incrementOp + local2)
	})
}

// processorName is C and the number in three hexadecimal digits.
func (a *aml) processorName(i int) {
	const digits = "0123456789ABCDEF"
	a.b = append(a.b, 'C', digits[i>>8&0xf], digits[i>>4&0xf], digits[i&0xf])
}

// processor declares number i: as a Processor (ACPI 6.5, section 19.6.108) while its ID fits
// into a byte, else as a device.
func (a *aml) processor(i int, numa bool) {
	op := processorOp
	if i >= firstX2APIC {
		op = deviceOp
	}
	a.block(op, "", func() {
		a.processorName(i)
		if i >= firstX2APIC {
			a.put(nameOp + "_HID")
			a.text("ACPI0007")
			a.put(nameOp + "_UID")
			a.integer(uint32(i))
		} else {
			a.b = append(a.b, byte(i), 0, 0, 0, 0, 0) // its ID, and no register block
		}
		a.processorMethods(i)
		if numa {
			a.put(nameOp + "_PXM" + zeroOp)
		}
	})
}

// processorMethods are the same for both. The first processor cannot leave.
func (a *aml) processorMethods(i int) {
	a.method("_STA", serialized, func() {
		a.put(returnOp + "CSTA")
		a.integer(uint32(i))
	})
	a.put(nameOp + "_MAT")
	a.block(bufferOp, bytePrefix, func() {
		start := len(a.b)
		a.b = appendLocalAPIC(append(a.b, 0), i)
		a.b[start] = byte(len(a.b) - start - 1)
	})
	if i > 0 {
		a.method("_EJ0", 1, func() {
			a.put("CEJ0")
			a.integer(uint32(i))
		})
	}
	a.method("_OST", 3|serialized, func() {
		a.put("COST")
		a.integer(uint32(i))
		a.put(arg0 + arg1 + arg2)
	})
}
