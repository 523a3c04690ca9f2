package status

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// MetricsType is the media type of an [Exposition]: Prometheus' text format.
const MetricsType = "text/plain; version=0.0.4; charset=utf-8"

// Exposition is a list of metrics as text. The Prometheus client library would be the
// usual way; it costs 0.8 MiB of memory before anybody asks, of the 24 that the agent
// may hold, and what is shown here is a page of counters.
type Exposition struct{ b strings.Builder }

// Sample is one value of a metric.
type Sample struct {
	Labels []string // name, value, name, value ...
	Value  float64
}

// Value is the one sample of a metric without labels.
func Value(v float64) Sample { return Sample{Value: v} }

// Flag is the sample of something that is or is not, with labels.
func Flag(is bool, labels ...string) Sample {
	if is {
		return Sample{labels, 1}
	}
	return Sample{labels, 0}
}

// Moment is the sample of a time, in seconds since 1970. The zero time is 0.
func Moment(t time.Time) Sample {
	if t.IsZero() {
		return Sample{}
	}
	return Sample{Value: float64(t.UnixMilli()) / 1000}
}

// Gauge adds a metric that goes up and down. Its name has no prefix yet.
func (e *Exposition) Gauge(name, help string, samples ...Sample) {
	e.family(name, help, "gauge")
	e.samples(name, samples)
}

// Counter adds a metric that only grows.
func (e *Exposition) Counter(name, help string, samples ...Sample) {
	e.family(name, help, "counter")
	e.samples(name, samples)
}

// Histogram adds a histogram of seconds.
func (e *Exposition) Histogram(name, help string, h *Histogram) {
	e.family(name, help, "histogram")
	h.mu.Lock()
	defer h.mu.Unlock()
	sum := uint64(0)
	for i, n := range h.counts {
		sum += n
		bound := "+Inf"
		if i < len(buckets) {
			bound = number(buckets[i])
		}
		e.sample(name+"_bucket", Sample{[]string{"le", bound}, float64(sum)})
	}
	e.sample(name+"_sum", Value(h.sum.Seconds()))
	e.sample(name+"_count", Value(float64(sum)))
}

const metricPrefix = "tdx_agent_"

func (e *Exposition) family(name, help, kind string) {
	fmt.Fprintf(&e.b, "# HELP %s%s %s\n# TYPE %s%s %s\n", metricPrefix, name, help, metricPrefix, name, kind)
}

func (e *Exposition) samples(name string, samples []Sample) {
	for _, s := range samples {
		e.sample(name, s)
	}
}

// labelText escapes what the format has a meaning for.
var labelText = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

func (e *Exposition) sample(name string, s Sample) {
	e.b.WriteString(metricPrefix + name)
	for i := 0; i+1 < len(s.Labels); i += 2 {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		e.b.WriteString(sep + s.Labels[i] + `="` + labelText.Replace(s.Labels[i+1]) + `"`)
	}
	if len(s.Labels) > 0 {
		e.b.WriteByte('}')
	}
	e.b.WriteString(" " + number(s.Value) + "\n")
}

func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

// ServeHTTP writes what was added.
func (e *Exposition) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", MetricsType)
	w.Write([]byte(e.b.String())) // an error is the reader's
}

// maxSeries bounds a Counter, should a label have more values than its author thought.
const maxSeries = 256

// Counter counts by the values of labels, which are the program's own words and never
// somebody else's. For many goroutines.
type Counter struct {
	labels []string

	mu     sync.Mutex // guards what follows
	counts map[string]uint64
}

// NewCounter takes the labels' names.
func NewCounter(labels ...string) *Counter {
	return &Counter{labels: labels, counts: map[string]uint64{}}
}

// Inc counts one. There is a value for each label.
func (c *Counter) Inc(values ...string) {
	key := strings.Join(values, "\xff")
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.counts[key]; !known && len(c.counts) >= maxSeries {
		key = strings.Repeat("other\xff", len(c.labels)-1) + "other"
	}
	c.counts[key]++
}

// Samples lists the counts in the order of the labels' values.
func (c *Counter) Samples() (all []Sample) {
	c.mu.Lock()
	defer c.mu.Unlock()
	keys := make([]string, 0, len(c.counts))
	for key := range c.counts {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		s := Sample{Value: float64(c.counts[key])}
		for i, value := range strings.Split(key, "\xff") {
			s.Labels = append(s.Labels, c.labels[i], value)
		}
		all = append(all, s)
	}
	return all
}

// buckets are upper bounds in seconds, for quotes (39 ms to 31 s) and handshakes.
var buckets = [...]float64{0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}

// Histogram counts durations. The zero value is empty. For many goroutines.
type Histogram struct {
	mu     sync.Mutex // guards what follows
	counts [len(buckets) + 1]uint64
	sum    time.Duration
}

// Observe counts a duration.
func (h *Histogram) Observe(d time.Duration) {
	i, _ := slices.BinarySearch(buckets[:], d.Seconds())
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[i]++
	h.sum += d
}
