package acpi

// expanderBus is the bus that dstack gives the host bridge of its only NUMA node.
const expanderBus = 5

// lastBus is the last bus below the main host bridge.
func (m *Machine) lastBus() uint16 {
	if m.Expander {
		return expanderBus - 1
	}
	return 0xff
}

// expander writes the host bridge of a NUMA node (pxb-pcie) that has nothing behind it. With
// devices there, its resources would be what the firmware made of them.
func (a *aml) expander(d dialect) {
	a.block(scopeOp, root+"_SB_", func() {
		a.block(deviceOp, "PC05", func() {
			const bus = bytePrefix + "\x05"
			a.put(nameOp + "_UID" + bus + nameOp + "_BBN" + bus)
			a.hid("PNP0A08")
			a.put(nameOp + "_CID")
			a.eisaID("PNP0A03")
			a.operatingSystemControl(true)
			a.put(nameOp + "_PXM" + zeroOp)
			a.method("_PRT", 0, func() {
				if d.before8 {
					a.computedRoutes()
					return
				}
				a.put(returnOp)
				a.block(packageOp, "\x80", a.expanderRoutes)
			})
			a.resources("_CRS", func() { a.word(busRange, 0, expanderBus, expanderBus) })
		})
	})
}

// expanderRoutes has the slots take turns over links A to D.
func (a *aml) expanderRoutes() {
	for slot := range 32 {
		for pin := range 4 {
			a.route(slot, pin, "LNK", 'A'+byte((slot+pin+3)&3))
		}
	}
}
