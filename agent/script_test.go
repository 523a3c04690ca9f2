package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tdx-agent/agent/audit"
	"tdx-agent/measure/tsm"
	"tdx-agent/remote/ratls"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"tdx-agent": main})
}

// TestScripts runs user sessions against the real program.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			// A Unix socket's path is short, a test's folder is not.
			dir, err := os.MkdirTemp("", "tdx")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			env.Setenv("R", filepath.Join(dir, "r"))
			env.Setenv("TMPDIR", dir)
			env.Setenv("XDG_RUNTIME_DIR", "")
			env.Setenv("SIMDIR", filepath.Base(string(simulatedDir())))
			env.Setenv("FIXTURES", fixtures())
			env.Setenv("DEBIAN", os.Getenv("TDX_AGENT_DEBIAN"))
			env.Setenv("NL", "\n")
			return nil
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "tdx":
				return tsm.Present(tsm.Paths{}), nil
			case "debian":
				return os.Getenv("TDX_AGENT_DEBIAN") != "", nil
			case "fixtures":
				_, err := os.Stat(fixtures())
				return err == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"http":            scriptHTTP,
			"corrupt":         scriptCorrupt,
			"flip":            scriptFlip,
			"substitute":      scriptSubstitute,
			"kms":             scriptKMS,
			"kms-serve":       scriptKMSServe,
			"waitfor-refusal": scriptWaitForRefusal,
			"waitfor":         scriptWaitFor,
			"hold-http":       scriptHoldHTTP,
			"post-file":       scriptPostFile,
			"replace-value":   scriptReplaceValue,
			"appkeys":         scriptAppKeys,
			"appcert":         scriptAppCert,
			"exits":           scriptExits,
			"free-address":    scriptFreeAddress,
			"webserver":       scriptWebServer,
			"expand":          scriptExpand,
			"hangup":          scriptHangup,
			"waitline":        scriptWaitLine,
			"sink":            scriptSink,
			"hold":            scriptHold,
			"newcert":         scriptNewCert,
			"shorter":         scriptShorter,
			"append":          scriptAppend,
			"cut-lines":       scriptCutLines,
			"forge-line":      scriptForgeLine,
		},
	})
}

// fixtures is the folder of real evidence.
func fixtures() string {
	if dir := os.Getenv("TDX_AGENT_FIXTURES"); dir != "" {
		return dir
	}
	dir, err := filepath.Abs("../../shared/fixtures")
	if err != nil {
		return ""
	}
	return dir
}

// scriptHTTP is what curl --unix-socket does: http [!] METHOD SOCKET PATH [BODY]. The
// answer goes to the file "body"; with a leading !, the status must not be 200.
func scriptHTTP(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 3 {
		ts.Fatalf("usage: http METHOD SOCKET PATH [BODY]")
	}
	scriptRequest(ts, neg, args[0], args[1], args[2], strings.Join(args[3:], " "))
}

// scriptPostFile posts a file: post-file [!] SOCKET PATH FILE.
func scriptPostFile(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: post-file SOCKET PATH FILE")
	}
	b, err := os.ReadFile(ts.MkAbs(args[2]))
	ts.Check(err)
	scriptRequest(ts, neg, http.MethodPost, args[0], args[1], string(b))
}

// scriptExits runs a program that must end with this status: exits STATUS PROGRAM ARG....
func scriptExits(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exits STATUS PROGRAM ARG...")
	}
	got := 0
	err := ts.Exec(args[1], args[2:]...)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got, err = exit.ExitCode(), nil
	}
	ts.Check(err)
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit status is %d, want %s", got, args[0])
	}
}

// scriptHoldHTTP opens a connection to an HTTP server on a Unix socket, and keeps it until
// the session ends.
func scriptHoldHTTP(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.Dial("unix", args[0])
	ts.Check(err)
	ts.Defer(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = io.WriteString(c, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
	ts.Check(err)
	_, err = io.ReadFull(c, make([]byte, 1))
	ts.Check(err)
}

// scriptWaitFor waits until a Unix socket, or HOST:PORT, takes connections, at most 20 s.
func scriptWaitFor(ts *testscript.TestScript, _ bool, args []string) {
	network := "tcp"
	if strings.HasPrefix(args[0], "/") {
		network = "unix"
	}
	for range 2000 {
		if c, err := net.Dial(network, args[0]); err == nil {
			c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("nobody listens on %s", args[0])
}

func scriptRequest(ts *testscript.TestScript, neg bool, method, socket, path, content string) {
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequest(method, "http://localhost"+path, strings.NewReader(content))
	ts.Check(err)
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	ts.Check(err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("body"), b, 0o600))
	ts.Logf("%s %.2000s", resp.Status, b)
	if (resp.StatusCode == http.StatusOK) == neg {
		ts.Fatalf("status is %s", resp.Status)
	}
}

// scriptCorrupt replaces the first occurrence of a string in a file by another of
// the same length: corrupt FILE OLD NEW.
func scriptCorrupt(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 3 || len(args[1]) != len(args[2]) {
		ts.Fatalf("usage: corrupt FILE OLD NEW")
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	if !bytes.Contains(b, []byte(args[1])) {
		ts.Fatalf("%s does not hold %q", args[0], args[1])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), bytes.Replace(b, []byte(args[1]), []byte(args[2]), 1), 0o600))
}

// scriptSubstitute replaces the first occurrence of a string in a file: substitute FILE
// OLD NEW.
func scriptSubstitute(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: substitute FILE OLD NEW")
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	if !bytes.Contains(b, []byte(args[1])) {
		ts.Fatalf("%s does not hold %q", args[0], args[1])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), bytes.Replace(b, []byte(args[1]), []byte(args[2]), 1), 0o600))
}

// scriptAppend adds a string to a file: append FILE TEXT.
func scriptAppend(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: append FILE TEXT")
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), append(b, args[1]...), 0o600))
}

// scriptCutLines removes the last lines of a file: cut-lines FILE COUNT.
func scriptCutLines(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: cut-lines FILE COUNT")
	}
	count, err := strconv.Atoi(args[1])
	ts.Check(err)
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	lines := bytes.SplitAfter(b, []byte("\n")) // nothing follows the last line feed
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), bytes.Join(lines[:len(lines)-1-count], nil), 0o600))
}

// scriptForgeLine adds a line to an audit record that follows its last: forge-line FILE.
func scriptForgeLine(ts *testscript.TestScript, _ bool, args []string) {
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	lines := bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
	last := lines[len(lines)-1]
	var e audit.Entry
	ts.Check(json.Unmarshal(last, &e))
	e.Seq++
	e.Prev = fmt.Sprintf("%x", sha256.Sum256(last))
	line, err := json.Marshal(e)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), append(append(b, line...), '\n'), 0o600))
}

// scriptFlip changes one bit of a file: flip FILE OFFSET.
func scriptFlip(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	offset, err := strconv.Atoi(args[1])
	ts.Check(err)
	b[offset] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// scriptReplaceValue changes a digit of the hexadecimal value of a key in a TOML file:
// replace-value FILE KEY.
func scriptReplaceValue(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: replace-value FILE KEY")
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	at := bytes.Index(b, []byte("\n"+args[1]+" = [\""))
	if at < 0 {
		ts.Fatalf("%s has no %s", args[0], args[1])
	}
	digit := &b[at+len(args[1])+len("\n = [\"")]
	if *digit == '0' {
		*digit = '1'
	} else {
		*digit = '0'
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// scriptAppKeys writes a keys file with an authority of its own: appkeys FILE K256_KEY
// [PROVIDER].
func scriptAppKeys(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: appkeys FILE K256_KEY [PROVIDER]")
	}
	provider := "None"
	if len(args) == 3 {
		provider = args[2]
	}
	doc, err := appKeysDocument(args[1], provider)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), doc, 0o600))
}

// scriptAppCert waits until Info shows the application's certificate, which is made
// in the background, and reads the evidence in it: appcert SOCKET.
func scriptAppCert(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		scriptHTTP(ts, false, []string{"GET", args[0], "/Info"})
		var info struct {
			AppCert string `json:"app_cert"`
		}
		b, err := os.ReadFile(ts.MkAbs("body"))
		ts.Check(err)
		ts.Check(json.Unmarshal(b, &info))
		block, rest := pem.Decode([]byte(info.AppCert))
		if block == nil {
			if time.Now().After(deadline) {
				ts.Fatalf("app_cert is %q", info.AppCert)
			}
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		ts.Check(err)
		_, err = ratls.Parse(cert)
		ts.Check(err)
		if cert.Subject.CommonName != "demo-cert" || !bytes.HasPrefix(rest, []byte("\n-----BEGIN CERTIFICATE")) {
			ts.Fatalf("subject is %s, then comes %.40q", cert.Subject, rest)
		}
		return
	}
}

// scriptHangup sends SIGHUP to the background commands that have an argument: hangup
// ARGUMENT.
func scriptHangup(ts *testscript.TestScript, _ bool, args []string) {
	found := false
	for _, cmd := range ts.BackgroundCmds() {
		if slices.Contains(cmd.Args, args[0]) {
			ts.Check(cmd.Process.Signal(syscall.SIGHUP))
			found = true
		}
	}
	if !found {
		ts.Fatalf("nothing runs with argument %q", args[0])
	}
}

// scriptWaitLine waits until a file, such as the log of a background command, has a text
// so many times, at most 20 s: waitline FILE COUNT TEXT.
func scriptWaitLine(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: waitline FILE COUNT TEXT")
	}
	count, err := strconv.Atoi(args[1])
	ts.Check(err)
	var b []byte
	for range 2000 {
		if b, err = os.ReadFile(ts.MkAbs(args[0])); err == nil && strings.Count(string(b), args[2]) >= count {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("%s has not %d times %q:\n%s", args[0], count, args[2], b)
}

// scriptSink listens on a Unix socket, and holds what connects: sink SOCKET.
func scriptSink(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("unix", args[0])
	ts.Check(err)
	done := make(chan struct{})
	ts.Defer(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
}

// scriptHold connects to a Unix socket and holds the connection: hold SOCKET.
func scriptHold(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.Dial("unix", args[0])
	ts.Check(err)
	ts.Defer(func() { c.Close() })
}

// scriptNewCert waits until a TLS server shows another certificate than the one in a
// file, at most 20 s: newcert FILE ADDRESS.
func scriptNewCert(ts *testscript.TestScript, _ bool, args []string) {
	block, _ := pem.Decode([]byte(ts.ReadFile(args[0])))
	for range 60 {
		c, err := tls.Dial("tcp", args[1], &tls.Config{InsecureSkipVerify: true})
		ts.Check(err)
		shown := c.ConnectionState().PeerCertificates[0].Raw
		c.Close()
		if !bytes.Equal(shown, block.Bytes) {
			return
		}
		time.Sleep(300 * time.Millisecond) // an endpoint takes 5 a second from one address
	}
	ts.Fatalf("%s still shows the certificate in %s", args[1], args[0])
}

// scriptShorter demands that a file is at most two thirds as long as another: shorter FILE
// OTHER.
func scriptShorter(ts *testscript.TestScript, _ bool, args []string) {
	if n, m := len(ts.ReadFile(args[0])), len(ts.ReadFile(args[1])); 3*n > 2*m {
		ts.Fatalf("%s has %d bytes, %s %d", args[0], n, args[1], m)
	}
}
