package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/keys/kmstest"
)

// A scrape is what a mount said: values by series, with labels as they were written.
type scrape map[string]float64

var seriesLine = regexp.MustCompile(`^([a-z_]+)(?:\{(.*)\})? (\S+)$`)

// scrapeText reads the text format that Prometheus reads.
func scrapeText(t *testing.T, text string) (values scrape, labels map[string]string) {
	t.Helper()
	values, labels = scrape{}, map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") || !strings.HasPrefix(line, "kmsfs_") {
			continue
		}
		m := seriesLine.FindStringSubmatch(line)
		require.NotNil(t, m, "%q", line)
		v, err := strconv.ParseFloat(m[3], 64)
		require.NoError(t, err)
		name, _, _ := strings.Cut(line, " ")
		values[name] = v
		var names []string
		for _, l := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(m[2], -1) {
			names = append(names, l[1])
		}
		labels[m[1]] = strings.Join(names, " ")
	}
	return values, labels
}

// metricsOf asks a mount that logs to a file.
func metricsOf(t *testing.T, log string) string {
	t.Helper()
	m := regexp.MustCompile(`metrics can be had" address=(\S+)`).FindStringSubmatch(string(must(os.ReadFile(log))))
	require.NotNil(t, m, "the log does not say where")
	return get(t, http.DefaultClient, "http://"+m[1]+"/metrics")
}

func get(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	r, err := client.Get(url)
	require.NoError(t, err)
	defer r.Body.Close()
	require.Equal(t, http.StatusOK, r.StatusCode)
	return string(must(io.ReadAll(r.Body)))
}

// sortedLabels puts label names in the order of the text format.
func sortedLabels(s string) string {
	f := strings.Fields(s)
	slices.Sort(f)
	return strings.Join(f, " ")
}

// TestMetrics: a real mount on KMS shows everything that docs/OPERATIONS.md names, and
// the figures are those of what was done. Nothing of the tree is in them.
func TestMetrics(t *testing.T) {
	srv := kmstest.New(t, nil)
	c := newClient(t)
	c.env = append(c.env, srv.Env(srv.Admin())...)
	key := srv.CreateKey("us-east-1")
	dir, point := c.volume(key)
	c.mount(dir, point)
	c.write(filepath.Join(point, "bad"), "secret name, secret text")
	c.ok("umount", point)
	stored := storedFiles(t, dir)
	require.Len(t, stored, 1)
	flip(t, stored[0])

	c.mount(dir, point, "--metrics", "127.0.0.1:0", "--lease", "77s", "--grace", "0s", "--log-file", c.path("log"))
	for i := range 3 {
		c.write(filepath.Join(point, fmt.Sprint("name", i)), strings.Repeat("x", 1000))
	}
	c.reads(filepath.Join(point, "name1"), strings.Repeat("x", 1000))
	_, err := os.ReadFile(filepath.Join(point, "bad"))
	require.ErrorIs(t, err, unix.EBADMSG)
	_, err = unix.Getxattr(filepath.Join(point, "name1"), "user.none", nil)
	require.ErrorIs(t, err, unix.ENODATA)
	open, err := os.Open(filepath.Join(point, "name2"))
	require.NoError(t, err)
	defer open.Close()

	// RELEASE comes later than close returns.
	var text string
	var values scrape
	var labels map[string]string
	eventually(t, "closed files are counted", func() bool {
		text = metricsOf(t, c.path("log"))
		values, labels = scrapeText(t, text)
		return values["kmsfs_open_files"] == 1
	})
	for _, m := range metrics {
		name, want := "kmsfs_"+m.name, sortedLabels(m.labels)
		if m.kind == histogram {
			name, want = name+"_count", m.labels
		}
		got, ok := labels[name]
		require.True(t, ok, "%s is not shown", name)
		require.Equal(t, want, got, name)
		require.Contains(t, text, fmt.Sprintf("# TYPE kmsfs_%s %s\n", m.name, m.kind))
	}
	require.EqualValues(t, 3, values[`kmsfs_fuse_requests_total{errno="OK",op="CREATE"}`])
	require.Positive(t, values[`kmsfs_fuse_requests_total{errno="ENODATA",op="GETXATTR"}`])
	require.EqualValues(t, 3000, values["kmsfs_written_bytes_total"])
	require.Positive(t, values["kmsfs_damage_total"])
	require.EqualValues(t, 3, values["kmsfs_creates_total"])
	ok := fmt.Sprintf(`kmsfs_kms_calls_total{key="%s",op="GenerateDataKey",result="ok"}`, key)
	require.GreaterOrEqual(t, values[ok], 3.0)
	require.Equal(t, values[ok], values[`kmsfs_kms_call_seconds_count{op="GenerateDataKey"}`])
	require.Equal(t, values[ok], values[`kmsfs_kms_requests_total{op="GenerateDataKey"}`], "none was repeated")
	require.Equal(t, values[ok], values[`kmsfs_kms_call_seconds_bucket{op="GenerateDataKey",le="+Inf"}`])
	require.EqualValues(t, 77, values["kmsfs_lease_interval_seconds"])
	require.Zero(t, values["kmsfs_lease_grace_seconds"])
	require.EqualValues(t, 1, values[fmt.Sprintf(`kmsfs_lease_state{key="%s",state="valid"}`, key)])
	require.Zero(t, values[fmt.Sprintf(`kmsfs_lease_state{key="%s",state="revoked"}`, key)])
	require.Contains(t, text, "process_resident_memory_bytes ", "the process may read its own figures though it is not dumpable")
	for _, private := range []string{"name1", "none", dir, point, filepath.Base(stored[0]), "secret"} {
		require.NotContains(t, text, private)
	}

	c.ok("lock", point)
	values, _ = scrapeText(t, metricsOf(t, c.path("log")))
	require.EqualValues(t, 1, values["kmsfs_locked"])
	require.EqualValues(t, 1, values["kmsfs_keys_wiped_total"])
	require.Positive(t, values["kmsfs_invalidations_total"])
	require.NoError(t, open.Close())
	c.ok("umount", point)
}

// storedFiles are the regular files of a volume, as they are stored.
func storedFiles(t *testing.T, dir string) (paths []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.HasPrefix(d.Name(), "kmsfs.") {
			paths = append(paths, path)
		}
		return err
	}))
	return paths
}

// flip changes a byte of the first record.
func flip(t *testing.T, path string) {
	t.Helper()
	raw := must(os.ReadFile(path))
	raw[20] ^= 1
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt(raw[20:21], 20)
	require.NoError(t, err)
}

// TestMetricsAreLocal: without a host they are on loopback; another address warns; a
// unix socket is for the user alone and replaces a dead one; what can't be served keeps
// the volume from being mounted.
func TestMetricsAreLocal(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("mount", dir, point, "--metrics", ":0", "--log-file", c.path("log"))
	require.Regexp(t, `metrics can be had" address=127\.0\.0\.1:\d+`, string(must(os.ReadFile(c.path("log")))))
	c.ok("umount", point)

	r := c.ok("mount", dir, point, "-o", "metrics=0.0.0.0:0")
	require.Contains(t, r.err, "warning: whoever reaches [::]:")
	c.ok("umount", point)

	socket := c.path("metrics.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	require.NoError(t, err)
	dead.SetUnlinkOnClose(false)
	require.NoError(t, dead.Close())
	c.ok("mount", dir, point, "--metrics", "unix:"+socket)
	st, err := os.Stat(socket)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	over := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}
	require.Contains(t, get(t, over, "http://kmsfs/metrics"), "kmsfs_open_files 0\n")
	reply, err := over.Get("http://kmsfs/debug/pprof/")
	require.NoError(t, err)
	require.NoError(t, reply.Body.Close())
	require.Equal(t, http.StatusNotFound, reply.StatusCode)
	c.ok("umount", point)
	require.NoFileExists(t, socket)

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	c.bad(exitUsage, []string{"metrics", "in use", "--metrics"}, "mount", dir, point, "--metrics", taken.Addr().String())
	require.False(t, mounted(t, point))
	c.bad(exitUsage, []string{"metrics", "9100"}, "mount", dir, point, "--metrics", "9100")
}

// The table in the manual is the program's, row by row, and alerts name metrics that
// exist.
func TestManualNamesTheMetrics(t *testing.T) {
	doc := string(must(os.ReadFile("../../docs/OPERATIONS.md")))
	known := map[string]bool{}
	for _, m := range metrics {
		var labels []string
		for _, l := range strings.Fields(m.labels) {
			labels = append(labels, "`"+l+"`")
		}
		row := fmt.Sprintf("| `kmsfs_%s` | %s | %s | %s |", m.name, m.kind, strings.Join(labels, ", "), m.help)
		require.Contains(t, doc, "\n"+row+"\n")
		known["kmsfs_"+m.name] = true
	}
	require.Equal(t, len(metrics), strings.Count(doc, "\n| `kmsfs_"), "rows")
	for _, name := range regexp.MustCompile(`\bkmsfs_[a-z_]+`).FindAllString(doc, -1) {
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, suffix)
		}
		require.True(t, known[name], "the manual names %s", name)
	}
}
