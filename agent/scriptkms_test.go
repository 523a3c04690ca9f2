package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tdx-agent/agent/keys/kmstest"
	"tdx-agent/measure"
	"tdx-agent/measure/tdxsim"
)

// scriptKMS starts a key management service in a TD of its own that gives keys to the
// simulated TD of an agent: kms RUNTIME_DIR. It leaves kms-policy.toml and
// kms-collateral.json, and in variables KMS its address, KMS_ROOT its root key and KMS_MR
// its mr_aggregated. It answers from kms-serve to the script's end.
func scriptKMS(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: kms RUNTIME_DIR")
	}
	ts.Check(os.MkdirAll(args[0], 0o700))
	guest, err := tdxsim.Open(filepath.Join(args[0], "td"))
	ts.Check(err)
	ts.Defer(func() { guest.Close() })
	guests, _, _, err := makeVerifier(guest, ts.MkAbs("guests"))
	ts.Check(err)
	dir := ts.MkAbs("kms-td")
	td, err := tdxsim.New(dir, tdxsim.Config{})
	ts.Check(err)
	ts.Defer(func() { td.Close() })
	machine, err := bootKMSMachine(td)
	ts.Check(err)
	_, _, _, err = makeVerifier(td, ts.MkAbs("kms"))
	ts.Check(err)
	server, err := kmstest.New(context.Background(), kmstest.Config{Host: "localhost", Guests: guests, Attest: machine.attest, Now: time.Now})
	ts.Check(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { server.Close(); l.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	mr, err := machine.mrAggregated()
	ts.Check(err)
	ts.Setenv("KMS", "https://localhost:"+port)
	ts.Setenv("KMS_ROOT", hex.EncodeToString(server.Root()))
	ts.Setenv("KMS_MR", mr)
	start := sync.OnceFunc(func() { go server.Serve(l) })
	kmsOf.Store(ts.Getenv("WORK"), start)
}

// kmsOf holds how to start the KMS of a script, by the script's folder.
var kmsOf sync.Map

// scriptKMSServe lets the KMS answer: kms-serve.
func scriptKMSServe(ts *testscript.TestScript, _ bool, _ []string) {
	start, ok := kmsOf.LoadAndDelete(ts.Getenv("WORK"))
	if !ok {
		ts.Fatalf("there is no kms")
	}
	start.(func())()
}

// scriptWaitForRefusal asks for a key until it is refused with these words:
// waitfor-refusal SOCKET WORDS.
func scriptWaitForRefusal(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: waitfor-refusal SOCKET WORDS")
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		scriptHTTP(ts, true, []string{"POST", args[0], "/GetKey", "{}"})
		b, err := os.ReadFile(ts.MkAbs("body"))
		ts.Check(err)
		if strings.Contains(string(b), args[1]) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("the last refusal is %s", b)
		}
	}
}

// bootKMSMachine measures a KMS's boot into a simulated TD.
func bootKMSMachine(td *tdxsim.TD) (*kmsMachine, error) {
	m := &kmsMachine{td: td}
	var err error
	if m.events, err = measure.ParseCCEL(td.CCEL()); err != nil {
		return nil, err
	}
	for _, e := range []struct {
		name    string
		payload []byte
	}{{measure.EventAppID, make([]byte, 20)}, {measure.EventComposeHash, make([]byte, 32)}, {measure.EventInstanceID, nil}, {measure.EventBootMRDone, nil}, {measure.EventSystemReady, nil}} {
		event, err := measure.NewRuntimeEvent(e.name, e.payload, measure.EventV1)
		if err != nil {
			return nil, err
		}
		if err := td.Extend(measure.RTMR3, event.Digest); err != nil {
			return nil, err
		}
		m.events = append(m.events, event)
	}
	return m, nil
}

// mrAggregated is what dstack calls this machine.
func (m *kmsMachine) mrAggregated() (string, error) {
	ev, err := m.attest(context.Background(), measure.ReportData{})
	if err != nil {
		return "", err
	}
	q, err := measure.ParseQuote(ev.Quote)
	if err != nil {
		return "", fmt.Errorf("the KMS's quote: %w", err)
	}
	return hexOf(measure.MRAggregated(q.Body.Registers)), nil
}
