//go:build ignore

// Testjson reads what "go test -json" prints. It shows a line for each package and
// the whole output of what failed, and appends the result of each test to a file:
//
//	go test -json ./... | testjson add FILE
//	testjson sum FILE [FAILURES]
//
// sum names the tests that were skipped and prints "N passed, N failed, N skipped". A
// test that ran several times counts once: failed if it ever failed, skipped only if it
// never ran. FAILURES are failures of other kinds, added to the second number. sum's
// status is 1 if anything failed.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64
}

func main() {
	var err error
	failed := false
	switch {
	case len(os.Args) == 3 && os.Args[1] == "add":
		failed, err = add(os.Args[2])
	case len(os.Args) >= 3 && os.Args[1] == "sum":
		failed, err = sum(os.Args[2], os.Args[3:])
	default:
		err = fmt.Errorf("usage: testjson add FILE | testjson sum FILE [FAILURES]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testjson:", err)
		os.Exit(2)
	}
	if failed {
		os.Exit(1)
	}
}

// run is one stream of events.
type run struct {
	open    map[string]bool     // begun and not ended
	results []string            // "pass|fail|skip TAB package TAB test"
	output  map[string][]string // of each test that has not ended
	broken  map[string]bool     // packages with a failed test
	failed  bool
}

func add(file string) (failed bool, err error) {
	r := &run{open: map[string]bool{}, output: map[string][]string{}, broken: map[string]bool{}}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 64<<20)
	for in.Scan() {
		var e event
		if json.Unmarshal(in.Bytes(), &e) != nil {
			fmt.Println(in.Text())
			continue
		}
		r.event(e)
	}
	for key := range r.open { // the stream was cut off
		fmt.Println("--- no end:", key)
		r.result("fail", key)
	}
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return false, err
	}
	defer f.Close()
	for _, line := range r.results {
		fmt.Fprintln(f, line)
	}
	return r.failed, in.Err()
}

func (r *run) event(e event) {
	key := e.Package + "\t" + e.Test
	switch e.Action {
	case "run", "start":
		r.open[key] = true
	case "output":
		r.output[key] = append(r.output[key], e.Output)
	case "build-output":
		fmt.Print(e.Output)
	case "build-fail":
		r.failed = true
	case "pass", "fail", "skip":
		r.end(e, key)
	}
}

func (r *run) end(e event, key string) {
	delete(r.open, key)
	text := strings.Join(r.output[key], "")
	delete(r.output, key)
	if e.Action == "fail" && (e.Test != "" || !r.broken[e.Package]) {
		fmt.Print(text)
	}
	switch {
	case e.Test != "":
		r.broken[e.Package] = r.broken[e.Package] || e.Action == "fail"
		r.result(e.Action, key)
	case e.Action == "fail":
		if !r.broken[e.Package] { // it did not build, or died outside its tests
			r.result("fail", key+"(package)")
		}
		r.failed = true
		fmt.Printf("FAIL  %-32s %6.1f s\n", e.Package, e.Elapsed)
	case e.Action == "skip":
		fmt.Printf("      %-32s no tests\n", e.Package)
	default:
		fmt.Printf("ok    %-32s %6.1f s\n", e.Package, e.Elapsed)
	}
}

func (r *run) result(action, key string) {
	r.failed = r.failed || action == "fail"
	r.results = append(r.results, action+"\t"+key)
}

func sum(file string, more []string) (failed bool, err error) {
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		return false, err
	}
	rank := map[string]int{"skip": 0, "pass": 1, "fail": 2}
	best := map[string]int{}
	for line := range strings.Lines(string(b)) {
		action, key, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		if old, seen := best[key]; !seen || rank[action] > old {
			best[key] = rank[action]
		}
	}
	var n [3]int
	for _, key := range slices.Sorted(maps.Keys(best)) {
		n[best[key]]++
		if best[key] == rank["skip"] {
			fmt.Printf("skipped   %s\n", strings.ReplaceAll(key, "\t", " "))
		}
	}
	for _, s := range more {
		v, err := strconv.Atoi(s)
		if err != nil {
			return false, err
		}
		n[2] += v
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", n[1], n[2], n[0])
	return n[2] > 0, nil
}
