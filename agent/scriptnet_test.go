package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// scriptFreeAddress puts a loopback address that nobody listens on into a variable:
// free-address NAME.
func scriptFreeAddress(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: free-address NAME")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], l.Addr().String())
	ts.Check(l.Close())
}

// scriptWebServer serves HTTP until the script ends, and puts its address into a variable:
// webserver NAME. It answers with the request as it came: its line, then the headers that
// start with X-, sorted.
func scriptWebServer(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: webserver NAME")
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var lines []string
		for name, values := range r.Header {
			if strings.HasPrefix(name, "X-") {
				lines = append(lines, fmt.Sprintf("%s: %s", name, strings.Join(values, " | ")))
			}
		}
		slices.Sort(lines)
		fmt.Fprintf(w, "%s %s\n%s\n", r.Method, r.URL, strings.Join(lines, "\n"))
	}))
	ts.Defer(srv.Close)
	ts.Setenv(args[0], srv.Listener.Addr().String())
}

// scriptExpand replaces $NAME in files by the script's variables: expand FILE....
func scriptExpand(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		b, err := os.ReadFile(ts.MkAbs(name))
		ts.Check(err)
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(os.Expand(string(b), ts.Getenv)), 0o600))
	}
}
