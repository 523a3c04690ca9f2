// Package tdxsim is a simulated TD: the hardware below a TDX guest's kernel, and
// the kernel's answers, in a folder. It protects nothing. Everything it signs
// chains to a root certificate of its own, which says SIMULATED.
//
// [Open] returns the TD that lives in a folder and makes it on first use. Every
// process that opens the folder meets the same TD: its registers, its configfs-tsm
// entries and its keys. The agent above it runs the same code as on hardware,
// because the TD is reached through the two seams that the agent has anyway:
//
//   - [TD.Client] answers as /sys/kernel/config/tsm/report does: commit at close,
//     generation, cached outblob, and the kernel's errno in an [os.PathError];
//   - [TD.Registers] and [TD.Extend] are the measurement registers. All four RTMRs
//     may be extended, as at the kernel's sysfs files.
//
// One table of cases (conformance_test.go) is run against this package and, in a
// virtual machine, against Linux. Where they differ, Linux is right.
//
// Quotes are real ones, signed by a quoting enclave key that the simulated PCK
// certifies; [TD.Collateral] gives what a verifier needs to judge them. The layouts
// are those of Intel's "TDX DCAP Quoting Library API" (quote versions 4 and 5) and
// "SGX PCK Certificate and CRL Specification".
//
// [New], [Config] and [TD.SetHost] are for tests: other platforms, other TCB
// statuses, and a host that is slow, fails or lies.
package tdxsim
