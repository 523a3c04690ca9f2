// Simhost makes a test machine look like one that has booted as a TD:
//
//	simhost state FILE   writes the boot event log (CCEL) of a fresh simulated TD and
//	                     prints its registers as the module takes them (init_mr=)
//	simhost quotes       answers the module's quote requests, in the machine
//
// The quotes have the form of real ones and the body that the module asks for. Their
// signature is another quote's: they do for an agent, which judges no signature.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
	"tdx-agent/measure/tsm"
)

const (
	requests = "/dev/ktdx_qgs"
	// While this file holds a duration, quotes take as long.
	delayFile = "/run/simhost.delay"
)

func main() {
	err := errors.New("usage: simhost state FILE | simhost quotes")
	switch {
	case len(os.Args) == 3 && os.Args[1] == "state":
		err = withTD(func(td *tdxsim.TD) error { return state(td, os.Args[2]) })
	case len(os.Args) == 2 && os.Args[1] == "quotes":
		err = withTD(quotes)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "simhost:", err)
		os.Exit(1)
	}
}

func withTD(f func(*tdxsim.TD) error) error {
	dir, err := os.MkdirTemp("", "simhost")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	td, err := tdxsim.New(dir, tdxsim.Config{})
	if err != nil {
		return err
	}
	defer td.Close()
	return f(td)
}

func state(td *tdxsim.TD, file string) error {
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

func quotes(td *tdxsim.TD) error {
	sample, err := sampleQuote(td)
	if err != nil {
		return err
	}
	host, err := os.OpenFile(requests, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer host.Close()
	request := make([]byte, 8+1024) // id, TDREPORT
	for {
		if _, err := host.Read(request); err != nil {
			return err
		}
		if b, err := os.ReadFile(delayFile); err == nil {
			d, err := time.ParseDuration(strings.TrimSpace(string(b)))
			if err != nil {
				return err
			}
			time.Sleep(d)
		}
		quote := fill(sample, request[8:])
		answer := binary.LittleEndian.AppendUint32(request[:8:8], 0) // no error
		answer = binary.LittleEndian.AppendUint32(answer, uint32(len(quote)))
		if _, err := host.Write(append(answer, quote...)); err != nil {
			return err
		}
	}
}

// fill puts what a TDREPORT says into a version 4 quote: attributes, XFAM and the
// eight measurements, which both have in the same order, and the report data.
func fill(sample, report []byte) []byte {
	q := append([]byte(nil), sample...)
	copy(q[48+120:568], report[512:])
	copy(q[568:632], report[128:192])
	return q
}

func sampleQuote(td *tdxsim.TD) ([]byte, error) {
	reports, err := tsm.OpenReports(tsm.ReportsConfig{Client: td.Client()})
	if err != nil {
		return nil, err
	}
	defer reports.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return reports.Quote(ctx, measure.ReportData{})
}
