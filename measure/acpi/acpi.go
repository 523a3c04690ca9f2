// Package acpi builds the ACPI tables that QEMU gives the firmware of a q35 machine, byte
// for byte: the fw_cfg files etc/acpi/tables, etc/acpi/rsdp and etc/table-loader.
package acpi

import "errors"

// Build returns the tables of m. A machine whose tables are not known is an error.
func Build(m Machine) (*Tables, error) {
	return nil, errors.New("acpi: not built yet")
}
