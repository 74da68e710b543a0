package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/fs"
	"kmsfs/keys"
)

// A metricKind is how Prometheus treats a metric.
type metricKind string

const (
	counter   metricKind = "counter"
	gauge     metricKind = "gauge"
	histogram metricKind = "histogram"
)

// A metric is one row of the table in docs/OPERATIONS.md. read gives each of its series:
// the value and the values of the labels. No label holds a path or a name of the tree:
// whoever may scrape need not be trusted with them.
type metric struct {
	name   string // behind "kmsfs_"
	kind   metricKind
	labels string // separated by spaces
	help   string
	read   func(*reading, emit)
}

type emit func(v float64, labels ...string)

// A reading is what the types that count have to say at one moment.
type reading struct {
	m      *mounting
	fs     fs.Stats
	keys   keys.Stats
	leases leaseStatus
}

func one(f func(*reading) float64) func(*reading, emit) {
	return func(s *reading, e emit) { e(f(s)) }
}

func count(f func(*reading) int64) func(*reading, emit) {
	return one(func(s *reading) float64 { return float64(f(s)) })
}

// metrics is everything that is published beside Go's own process metrics.
var metrics = []metric{
	{"info", gauge, "version volume", "1; the labels tell the program's version and the volume's id", func(s *reading, e emit) {
		e(1, programVersion(), s.m.v.ID().String())
	}},
	{"fuse_requests_total", counter, "op errno", "requests of the kernel, by kind and answer; ENOENT and ENODATA are ordinary", func(s *reading, e emit) {
		for _, r := range s.fs.Requests {
			e(float64(r.N), r.Op, r.Errno)
		}
	}},
	{"read_bytes_total", counter, "", "bytes of plaintext that were read", count(func(s *reading) int64 { return s.fs.BytesRead })},
	{"written_bytes_total", counter, "", "bytes of plaintext that were written", count(func(s *reading) int64 { return s.fs.BytesWritten })},
	{"damage_total", counter, "", "requests answered EBADMSG: damage or an attack on the backing directory", count(func(s *reading) int64 { return s.fs.Damaged })},
	{"panics_total", counter, "", "requests that failed by a bug in kmsfs", count(func(s *reading) int64 { return s.fs.Panics })},
	{"opens_total", counter, "", "files opened, created ones included", count(func(s *reading) int64 { return s.fs.Opens })},
	{"creates_total", counter, "", "files created", count(func(s *reading) int64 { return s.fs.Creates })},
	{"open_files", gauge, "", "files that are open", count(func(s *reading) int64 { return s.fs.OpenFiles })},
	{"open_dirs", gauge, "", "descriptors of directories that are held", count(func(s *reading) int64 { return s.fs.OpenDirs })},
	{"key_wait_seconds_total", counter, "", "time that requests waited for data keys, summed", one(func(s *reading) float64 { return s.fs.KeyWait.Seconds() })},
	{"invalidations_total", counter, "", "times the kernel was told in the background to drop a file's pages, as leases ended or came back", count(func(s *reading) int64 { return s.fs.Invalidations })},
	{"keys_wiped_total", counter, "", "times an open file lost its keys as a lease had ended", count(func(s *reading) int64 { return s.fs.Wiped })},
	{"keys_healed_total", counter, "", "times an open file got them back", count(func(s *reading) int64 { return s.fs.Healed })},
	{"backing_syncs_total", counter, "", "times the backing store was synced without being asked to", count(func(s *reading) int64 { return s.fs.Syncs })},
	{"kms_calls_total", counter, "op key result", "calls of key services; result is ok, denied, disabled, timeout, ...", func(s *reading, e emit) {
		for _, c := range s.keys.ByKey {
			e(float64(c.N), c.Op, c.Key, c.Result)
		}
	}},
	{"kms_requests_total", counter, "op", "requests sent to AWS KMS, retries included: what is billed", func(s *reading, e emit) {
		if p, ok := s.m.provider.(interface{ Requests() map[string]int64 }); ok {
			for op, n := range p.Requests() {
				e(float64(n), op)
			}
		}
	}},
	{"kms_call_seconds", histogram, "op", "how long calls of key services took, with their retries", nil},
	{"key_cache_hits_total", counter, "", "opens that found their data key in the cache", count(func(s *reading) int64 { return s.keys.CacheHits })},
	{"key_cache_misses_total", counter, "", "opens that did not", count(func(s *reading) int64 { return s.keys.CacheMisses })},
	{"key_cache_keys", gauge, "", "data keys in the cache", count(func(s *reading) int64 { return int64(s.keys.CacheKeys) })},
	{"key_opens_coalesced_total", counter, "", "opens that joined a call under way for the same file", count(func(s *reading) int64 { return s.keys.Coalesced })},
	{"key_pool_hits_total", counter, "", "new files whose data key had been fetched ahead", count(func(s *reading) int64 { return s.keys.PoolHits })},
	{"key_pool_waits_total", counter, "", "new files that waited for one", count(func(s *reading) int64 { return s.keys.PoolWaits })},
	{"key_pool_wait_seconds_total", counter, "", "time that they waited, summed", one(func(s *reading) float64 { return s.keys.PoolWaited.Seconds() })},
	{"key_pool_keys", gauge, "", "data keys fetched ahead", count(func(s *reading) int64 { return int64(s.keys.PoolReady) })},
	{"lease_interval_seconds", gauge, "", "--lease", one(func(s *reading) float64 { return s.leases.Lease })},
	{"lease_grace_seconds", gauge, "", "--grace", one(func(s *reading) float64 { return s.leases.Grace })},
	{"lease_state", gauge, "key state", "1 for the state that a key's lease is in (valid, grace, revoked), else 0", func(s *reading, e emit) {
		for _, l := range s.leases.Leases {
			for _, state := range []keys.LeaseState{keys.LeaseValid, keys.LeaseGrace, keys.LeaseRevoked} {
				is := 0.0
				if l.State == state.String() {
					is = 1
				}
				e(is, l.Key, state.String())
			}
		}
	}},
	{"lease_idle", gauge, "key", "1 if nothing depends on a key's lease now, so that it is not renewed", func(s *reading, e emit) {
		for _, l := range s.leases.Leases {
			is := 0.0
			if l.Idle {
				is = 1
			}
			e(is, l.Key)
		}
	}},
	{"lease_confirmed_timestamp_seconds", gauge, "key", "when the request was sent that renewed a key's lease last", func(s *reading, e emit) {
		for _, l := range s.leases.Leases {
			e(float64(l.Confirmed.UnixMilli())/1e3, l.Key)
		}
	}},
	{"lease_checks_total", counter, "key", "requests made only to renew a lease", func(s *reading, e emit) {
		for _, l := range s.leases.Leases {
			e(float64(l.Checks), l.Key)
		}
	}},
	{"locked", gauge, "", "1 between kmsfs lock and kmsfs unlock", one(func(s *reading) float64 {
		if s.leases.Locked {
			return 1
		}
		return 0
	})},
	{"slots_found", gauge, "", "writes under way that a killed mount left to this one", count(func(s *reading) int64 { return int64(s.m.replay.Found) })},
	{"slots_replayed", gauge, "", "of those, the ones that this mount finished", count(func(s *reading) int64 { return int64(s.m.replay.Finished) })},
}

// mountCollector reads the counters at each scrape.
type mountCollector struct {
	m     *mounting
	descs []*prometheus.Desc // like metrics
}

func newMountCollector(m *mounting) *mountCollector {
	c := &mountCollector{m: m}
	for _, x := range metrics {
		c.descs = append(c.descs, prometheus.NewDesc("kmsfs_"+x.name, x.help, strings.Fields(x.labels), nil))
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *mountCollector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (c *mountCollector) Collect(to chan<- prometheus.Metric) {
	s := &reading{m: c.m, fs: c.m.server.Stats(), keys: c.m.ring.Stats(), leases: c.m.leases()}
	for i, x := range metrics {
		if x.kind == histogram {
			latencies(c.descs[i], s.keys.Latency, to)
			continue
		}
		kind := prometheus.GaugeValue
		if x.kind == counter {
			kind = prometheus.CounterValue
		}
		x.read(s, func(v float64, labels ...string) {
			to <- prometheus.MustNewConstMetric(c.descs[i], kind, v, labels...)
		})
	}
}

func latencies(d *prometheus.Desc, byOp map[string]keys.Latency, to chan<- prometheus.Metric) {
	for op, l := range byOp {
		buckets := map[float64]uint64{}
		for i, bound := range keys.LatencyBounds {
			buckets[bound.Seconds()] = uint64(l.Within[i])
		}
		to <- prometheus.MustNewConstHistogram(d, uint64(l.Count), l.Sum.Seconds(), buckets, op)
	}
}

// listenMetrics opens the port or socket that metrics are to be had from; nil if none
// is configured.
func (m *mounting) listenMetrics() (net.Listener, error) {
	addr := m.cfg.Mount.Metrics
	if addr == "" {
		return nil, nil
	}
	network, where, err := config.MetricsAddress(addr)
	if err != nil {
		return nil, &failure{status: exitUsage, err: err}
	}
	if network == "unix" {
		clearSocket(where)
	}
	// A socket is for this user and root; chown or an ACL lets others in.
	old := unix.Umask(0o177)
	l, err := net.Listen(network, where)
	unix.Umask(old)
	if err != nil {
		return nil, fail(exitUsage, "name another address with --metrics", "serving metrics: %w", err)
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() {
		text := fmt.Sprintf("whoever reaches %s can read this mount's metrics: the volume's id, the names of its keys, what is used how often", l.Addr())
		m.warn("%s", text)
		m.log.Warn(text)
	}
	return l, nil
}

// clearSocket removes a socket that nobody listens on any more.
func clearSocket(path string) {
	if st, err := os.Lstat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		return
	}
	c, err := net.DialTimeout("unix", path, time.Second) // one that is full keeps us waiting
	if errors.Is(err, unix.ECONNREFUSED) {
		os.Remove(path)
	}
	if err == nil {
		c.Close()
	}
}

// Limits of the metrics server: a client that is slow or talks on gets no more.
const (
	metricsWait   = 10 * time.Second
	metricsHeader = 8 << 10
	metricsAtOnce = 4
	// A connection is a descriptor, of which files need many, and who may connect is any
	// user of this machine.
	metricsConns = 32
)

// atMost closes connections beyond n as they come.
func atMost(n int64) func(net.Conn, http.ConnState) {
	var now atomic.Int64
	return func(c net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			if now.Add(1) > n {
				c.Close()
			}
		case http.StateClosed, http.StateHijacked:
			now.Add(-1)
		}
	}
}

func metricsServer(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadTimeout: metricsWait, WriteTimeout: metricsWait, IdleTimeout: time.Minute,
		MaxHeaderBytes: metricsHeader, ConnState: atMost(metricsConns)}
}

// serveMetrics answers GET /metrics until stop, and everything else with 404.
func (m *mounting) serveMetrics(l net.Listener) (stop func()) {
	if l == nil {
		return func() {}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(newMountCollector(m), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	quiet := log.New(debugLog{m.log}, "", 0)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: metricsAtOnce, ErrorLog: quiet}))
	server := metricsServer(mux)
	server.ErrorLog = quiet
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			m.log.Error("metrics can't be had any more", "err", err)
		}
	}()
	m.log.Info("metrics can be had", "address", l.Addr().String())
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
		<-done
	}
}

// debugLog takes what the server has to say of its clients.
type debugLog struct{ log *slog.Logger }

func (d debugLog) Write(p []byte) (int, error) {
	d.log.Debug("metrics: " + strings.TrimSpace(string(p)))
	return len(p), nil
}
