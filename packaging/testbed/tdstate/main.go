// Tdstate writes the boot event log (CCEL) of a fresh simulated TD to a file and prints
// its registers as the test bed's module takes them (init_mr=), so that a machine with
// that module and that file looks like one that has booted.
package main

import (
	"fmt"
	"os"
	"strings"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: tdstate FILE")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "tdstate:", err)
		os.Exit(1)
	}
}

func write(file string) error {
	dir, err := os.MkdirTemp("", "tdstate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	td, err := tdxsim.New(dir, tdxsim.Config{})
	if err != nil {
		return err
	}
	defer td.Close()
	r, err := td.Registers()
	if err != nil {
		return err
	}
	all := append([]measure.Digest{r.MRTD, r.MRConfigID, r.MROwner, r.MROwnerConfig}, r.RTMR[:]...)
	hex := make([]string, len(all))
	for i, d := range all {
		hex[i] = d.String()
	}
	fmt.Println(strings.Join(hex, ","))
	return os.WriteFile(file, td.CCEL(), 0o400)
}
