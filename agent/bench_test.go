package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tdx-agent/agent/status"
	"tdx-agent/measure"
)

// benchDaemon is an agent on a simulated TD, in this process.
func benchDaemon(b testing.TB) *daemon {
	b.Helper()
	base, err := os.MkdirTemp("", "tdx")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(base) })
	ctx, cancel := context.WithCancel(context.Background())
	cfg := newConfig()
	dir, err := serverRuntimeDir(base, true)
	check(b, err)
	back, err := openBackend(cfg, dir, true)
	check(b, err)
	l, err := openLedger(ctx, cfg, dir, back)
	check(b, err)
	files := measure.SampleApp()
	_, err = measureBoot(ctx, cfg, dir, l, files)
	check(b, err)
	d, err := newDaemon(ctx, cfg, dir, back, l, "", files, slog.New(slog.DiscardHandler))
	check(b, err)
	listeners, err := listenAll(cfg, dir, true)
	check(b, err)
	done := make(chan error, 1)
	go func() { done <- d.run(ctx, listeners, io.Discard) }()
	b.Cleanup(func() {
		cancel()
		check(b, <-done)
		l.Close()
		back.close()
	})
	var serving status.Status // only an answer says that the audit record is open
	check(b, callJSON(ctx, dir.agentSocket(), "/v1/status", &serving))
	return d
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// keptClient keeps one connection to a socket, as an SDK does.
func keptClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4, ReadBufferSize: 64 << 10, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
}

func post(b *testing.B, c *http.Client, path, body string) {
	b.Helper()
	resp, err := c.Post("http://localhost"+path, "application/json", strings.NewReader(body))
	check(b, err)
	_, err = io.Copy(io.Discard, resp.Body)
	check(b, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b.Fatal(resp.Status)
	}
}

// durations are how long calls took.
type durations []time.Duration

func (d *durations) add(f func(i int), i int) {
	start := time.Now()
	f(i)
	*d = append(*d, time.Since(start))
}

// median is in microseconds.
func (d durations) median() float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Nanoseconds()) / 1000
}

// medians runs f b.N times and reports the median as a metric of its own.
func medians(b *testing.B, f func(i int)) {
	var took durations
	for i := 0; b.Loop(); i++ {
		took.add(f, i)
	}
	b.ReportMetric(took.median(), "p50-µs")
}

// BenchmarkGetQuote has the simulated kernel alone as its floor. In turns, both meet
// the same moods of the machine, and what the agent adds is the difference.
func BenchmarkGetQuote(b *testing.B) {
	d := benchDaemon(b)
	c := keptClient(d.dir.path("dstack.sock"))
	defer c.CloseIdleConnections()
	floor := func(i int) {
		_, err := d.backend.quoter.Quote(b.Context(), measure.ReportData{byte(i), byte(i >> 8), byte(i >> 16)})
		check(b, err)
	}
	socket := func(i int) { post(b, c, "/GetQuote", fmt.Sprintf(`{"report_data":"%08x"}`, i)) }
	b.Run("floor-kernel", func(b *testing.B) { medians(b, floor) })
	b.Run("socket", func(b *testing.B) { medians(b, socket) })
	b.Run("in-turns", func(b *testing.B) {
		var floors, sockets durations
		for i := 0; b.Loop(); i++ {
			floors.add(floor, i)
			sockets.add(socket, i)
		}
		b.ReportMetric(sockets.median()-floors.median(), "added-p50-µs")
	})
}

// BenchmarkInfo answers from what is kept; its floor is an answer of the same server
// with nothing in it.
func BenchmarkInfo(b *testing.B) {
	d := benchDaemon(b)
	c := keptClient(d.dir.path("dstack.sock"))
	defer c.CloseIdleConnections()
	b.Run("floor-version", func(b *testing.B) { medians(b, func(int) { post(b, c, "/Version", "{}") }) })
	b.Run("socket", func(b *testing.B) { medians(b, func(int) { post(b, c, "/Info", "{}") }) })
}

// buildProgram builds the program as it is released, in the place of the test's own
// binary, a part of whose memory is the tests'.
func buildProgram(b *testing.B) {
	dir := b.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, "tdx-agent"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	b.Setenv("PATH", dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
}

// BenchmarkReady starts the real program: how long until it serves, and how much
// memory it holds after 10,000 requests.
func BenchmarkReady(b *testing.B) {
	buildProgram(b)
	base, err := os.MkdirTemp("", "tdx")
	check(b, err)
	defer os.RemoveAll(base)
	dir := runtimeDir(base)
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		p := startAgent(b, dir)
		p.answering()
		took = append(took, time.Since(start))
		p.kill()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "p50-ms")
	b.StopTimer()
	p := startAgent(b, dir)
	p.answering()
	c := keptClient(dir.path("dstack.sock"))
	for i := range 10000 {
		post(b, c, []string{"/Info", "/GetQuote", "/Version", "/Attest"}[i%4], "{}")
	}
	b.ReportMetric(float64(residentKiB(b, p.cmd.Process.Pid))/1024, "RSS-MiB")
	p.kill()
}

func residentKiB(b *testing.B, pid int) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(b, err)
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			n, err := strconv.Atoi(f[1])
			check(b, err)
			return n
		}
	}
	b.Fatal("no VmRSS")
	return 0
}
