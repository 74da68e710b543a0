package fs

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// requestLog collects the requests that reach the daemon.
type requestLog struct {
	mu  sync.Mutex
	ops []string // guarded by mu
}

func (l *requestLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *requestLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *requestLog) WithGroup(string) slog.Handler            { return l }

func (l *requestLog) Handle(_ context.Context, r slog.Record) error {
	f := strings.Fields(r.Message) // fuse: rx 12: LOOKUP n1 ...
	if len(f) > 3 && f[1] == "rx" {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.ops = append(l.ops, f[3])
	}
	return nil
}

func (l *requestLog) count() map[string]int {
	time.Sleep(100 * time.Millisecond) // RELEASE and FORGET come later
	l.mu.Lock()
	defer l.mu.Unlock()
	n := make(map[string]int)
	for _, op := range l.ops {
		if !strings.Contains(op, "FORGET") {
			n[op]++
		}
	}
	l.ops = nil
	return n
}

// Round trips decide how fast a FUSE file system is. These are the numbers of
// requests per operation that the mount options and replies were chosen for.
func TestRequestsPerOperation(t *testing.T) {
	log := new(requestLog)
	w := newWorld(t, func(s *setup) {
		s.opts.Debug = true
		s.opts.Logger = slog.New(log)
	})
	const files = 20
	require.NoError(t, os.Mkdir(w.path("d"), 0o755))
	w.write("warm", []byte("the first FLUSH is answered ENOSYS"))
	log.count()
	each := func(what string, allowed map[string]int, op func(i int)) {
		t.Helper()
		for i := range files {
			op(i)
		}
		for req, n := range log.count() {
			require.LessOrEqual(t, n, allowed[req]*files+2, "%s: %s", what, req)
		}
	}
	name := func(i int) string { return fmt.Sprintf("d/%d", i) }
	each("create", map[string]int{"LOOKUP": 1, "CREATE": 1, "WRITE": 1, "RELEASE": 1, "SETATTR": 1, "GETXATTR": 1}, func(i int) {
		w.write(name(i), bytes.Repeat([]byte("x"), 2048))
	})
	each("stat", map[string]int{"GETATTR": 1}, func(i int) { // blocks changed by the write
		_, err := os.Stat(w.path(name(i)))
		require.NoError(t, err)
	})
	each("stat again", nil, func(i int) {
		_, err := os.Stat(w.path(name(i)))
		require.NoError(t, err)
	})
	each("read again", map[string]int{"OPEN": 1, "RELEASE": 1}, func(i int) { w.read(name(i)) })
	w.remount()
	log.count()
	out, err := exec.Command("ls", "-lR", w.mnt).CombinedOutput()
	require.NoError(t, err, "%s", out)
	n := log.count()
	require.Zero(t, n["LOOKUP"]+n["GETATTR"]/4, "%v", n)
	require.LessOrEqual(t, n["GETXATTR"], 2, "%v", n)
	each("read", map[string]int{"LOOKUP": 1, "OPEN": 1, "RELEASE": 1}, func(i int) { w.read(name(i)) })
	f, err := os.OpenFile(w.path("big"), os.O_CREATE|os.O_RDWR, 0o644)
	require.NoError(t, err)
	_, err = f.Write(make([]byte, 16<<20))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.LessOrEqual(t, log.count()["WRITE"], 24, "WRITEs of 1 MiB")
	w.remount()
	log.count()
	w.read("big")
	require.LessOrEqual(t, log.count()["READ"], 40, "READs of 1 MiB, after the read-ahead has grown")
}
