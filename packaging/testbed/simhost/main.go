// Simhost makes a test machine look like one that has booted as a TD:
//
//	simhost state TD FILE   makes a simulated TD in the folder TD, writes its boot event
//	                        log (CCEL), and prints its registers as the module takes them
//	                        (init_mr=)
//	simhost collateral TD   prints the collateral that judges its platform
//	simhost roots TD FILE   prints remote/dcap/roots.go (FILE) with the root of its platform
//	                        in the place of Intel's: an agent that is built with it trusts
//	                        this platform, and no other
//	simhost quotes TD       answers the module's quote requests, in the machine
//
// Quotes have the body that the module asks for, and are signed by the platform of the
// simulated TD. It helps tests in machines that have few programs, too:
//
//	simhost ask ADDRESS TEXT   sends a text to HOST:PORT or a Unix socket, and prints the answer
//	simhost board ADDRESS DIR  takes notes from another machine: files in DIR
//	simhost tell ADDRESS NOTE  leaves a note there, within a minute
package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

const (
	requests = "/dev/ktdx_qgs"
	// While this file holds a duration, quotes take as long.
	delayFile = "/run/simhost.delay"
)

// commands take so many arguments.
var commands = map[string]struct {
	arguments int
	run       func(args []string) error
}{
	"state":      {2, func(a []string) error { return withTD(a[0], func(td *tdxsim.TD) error { return state(td, a[1]) }) }},
	"collateral": {1, func(a []string) error { return withTD(a[0], collateral) }},
	"roots":      {2, func(a []string) error { return withTD(a[0], func(td *tdxsim.TD) error { return roots(td, a[1]) }) }},
	"quotes":     {1, func(a []string) error { return withTD(a[0], quotes) }},
	"ask":        {2, func(a []string) error { return ask(a[0], a[1]) }},
	"board":      {2, func(a []string) error { return board(a[0], a[1]) }},
	"tell":       {2, func(a []string) error { return tell(a[0], a[1]) }},
}

func main() {
	err := errors.New("what to do? see the comment in main.go")
	if len(os.Args) > 1 {
		if c, ok := commands[os.Args[1]]; ok && len(os.Args) == 2+c.arguments {
			err = c.run(os.Args[2:])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "simhost:", err)
		os.Exit(1)
	}
}

func withTD(dir string, f func(*tdxsim.TD) error) error {
	td, err := tdxsim.Open(dir)
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
	var hex []string
	for _, d := range registers(&r) {
		hex = append(hex, d.String())
	}
	fmt.Println(strings.Join(hex, ","))
	return os.WriteFile(file, td.CCEL(), 0o400)
}

// registers are in the order of a TDREPORT and of init_mr.
func registers(r *measure.Registers) []*measure.Digest {
	return []*measure.Digest{&r.MRTD, &r.MRConfigID, &r.MROwner, &r.MROwnerConfig, &r.RTMR[0], &r.RTMR[1], &r.RTMR[2], &r.RTMR[3]}
}

func collateral(td *tdxsim.TD) error {
	b, err := td.Collateral()
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(b)
	return err
}

var intelRoot = regexp.MustCompile(`(?s)var intelRoot = \[32\]byte\{.*?\n\}`)

func roots(td *tdxsim.TD, file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if len(intelRoot.FindAll(b, -1)) != 1 {
		return fmt.Errorf("%s has no intelRoot to replace", file)
	}
	block, _ := pem.Decode(td.RootPEM())
	_, err = os.Stdout.Write(intelRoot.ReplaceAll(b, fmt.Appendf(nil, "var intelRoot = %#v", sha256.Sum256(block.Bytes))))
	return err
}

func quotes(td *tdxsim.TD) error {
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
		quote, err := quoteOf(td, request[8:])
		if err != nil {
			return err
		}
		answer := binary.LittleEndian.AppendUint32(request[:8:8], 0) // no error
		answer = binary.LittleEndian.AppendUint32(answer, uint32(len(quote)))
		if _, err := host.Write(append(answer, quote...)); err != nil {
			return err
		}
	}
}

// quoteOf makes a quote of what a TDREPORT says: the report data, and after attributes and
// XFAM the eight measurements.
func quoteOf(td *tdxsim.TD, report []byte) ([]byte, error) {
	var r measure.Registers
	for i, d := range registers(&r) {
		copy(d[:], report[528+48*i:])
	}
	return td.QuoteOf(&r, measure.ReportData(report[128:192]))
}

func ask(address, text string) error {
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	c, err := net.DialTimeout(network, address, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	c.(interface{ CloseWrite() error }).CloseWrite()
	_, err = io.Copy(os.Stdout, c)
	return err
}

func board(address, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return http.ListenAndServe(address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(r.URL.Path)), nil, 0o600); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}))
}

func tell(address, note string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+address+"/"+note, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}
