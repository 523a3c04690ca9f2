// Package image calculates Reference Values: what MRTD and RTMR0 to RTMR2 must be
// for an OS image that runs on a given virtual machine.
//
// [OpenImage] opens an image's folder and [Image.Static] measures its files once.
// The [Measurement] it returns, or one that was carried as measurement.tdx.cbor and
// read by [ParseMaterial], gives the [Result] for any [Machine]; [ParseVMConfig]
// reads the machine from the vm_config that comes with Evidence. [Explain] goes the
// other way: it judges every event of a real log and names the input that would
// have to differ.
//
// Every value is computed from its inputs, none is copied from the log that it is
// compared with. Where an input is not modelled, an error that is an
// [*UnmodelledError] says which, and there is no value at all. Files, firmware,
// kernels, configurations and logs may be hostile: they are bounded, and what is
// wrong with them is an error.
//
// The sources are: Intel TDX Virtual Firmware Design Guide (metadata, MRTD), Intel
// TDX Module ABI (TDH.MEM.PAGE.ADD, TDH.MR.EXTEND), UEFI PI (HOBs), UEFI 2.10
// (variables, load options, device paths), TCG PC Client Platform Firmware Profile
// (events), the Authenticode PE format, the Linux x86 boot protocol, and the
// observed behaviour of QEMU and edk2.
package image
