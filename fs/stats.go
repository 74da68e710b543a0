package fs

import (
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Stats counts what a mount did since it began.
type Stats struct {
	Opens     int64 // handles opened, creates included
	Creates   int64
	KeyOpens  int64         // times Keys.Open was asked
	KeyFresh  int64         // times Keys.Fresh was asked
	KeyRenews int64         // times KeyRenewer was
	KeyWait   time.Duration // that requests spent waiting for Keys
	OpenFiles int64         // open now
	OpenDirs  int64         // directory descriptors held now
	Settles   int64         // files whose gaps were settled
	Wiped     int64         // times an open file lost its keys, for their lease had ended
	Healed    int64         // times one was allowed to go on
	Syncs     int64         // times the backing store was synced on our own initiative
	Walks     int64         // times a program was noticed on its way through directories
	Ahead     int64         // data keys that were asked for ahead of it
	Listed    int64         // directory entries that were listed to foretell it
	Errors    map[string]int64

	Requests                []RequestCount // of the kernel, by kind and answer
	BytesRead, BytesWritten int64          // of plaintext, by READ, WRITE and COPY_FILE_RANGE
	Damaged                 int64          // requests answered EBADMSG
	Panics                  int64          // requests that failed by a bug
	Invalidations           int64          // times the kernel was told in the background to drop a file's pages
}

type stats struct {
	opens, creates, keyOpens, keyFresh, keyRenews, settles, syncs, wiped, healed atomic.Int64
	invalidations                                                                atomic.Int64
	keyWait                                                                      atomic.Int64 // ns
	answers                                                                      answers

	mu     sync.Mutex
	errors map[syscall.Errno]int64 // guarded by mu
}

// failed counts a request that ended with errno.
func (s *stats) failed(errno syscall.Errno) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.errors == nil {
		s.errors = make(map[syscall.Errno]int64)
	}
	s.errors[errno]++
}

// waited counts a call to Keys that began at start.
func (s *stats) waited(calls *atomic.Int64, start time.Time) {
	calls.Add(1)
	s.keyWait.Add(int64(time.Since(start)))
}

// Stats reports the counters.
func (s *Server) Stats() Stats {
	fs := s.fs
	st := &fs.stats
	out := Stats{
		Opens:     st.opens.Load(),
		Creates:   st.creates.Load(),
		KeyOpens:  st.keyOpens.Load(),
		KeyFresh:  st.keyFresh.Load(),
		KeyRenews: st.keyRenews.Load(),
		KeyWait:   time.Duration(st.keyWait.Load()),
		OpenFiles: int64(fs.files.len()),
		OpenDirs:  int64(fs.dirs.len()),
		Settles:   st.settles.Load(),
		Syncs:     st.syncs.Load(),
		Wiped:     st.wiped.Load(),
		Healed:    st.healed.Load(),
		Errors:    make(map[string]int64),

		Invalidations: st.invalidations.Load(),
	}
	st.answers.addTo(&out)
	if fs.ahead != nil {
		out.Walks, out.Ahead, out.Listed = fs.ahead.walks.Load(), fs.ahead.handed.Load(), fs.ahead.listed.Load()
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for errno, n := range st.errors {
		out.Errors[errno.Error()] = n
	}
	return out
}

// A limiter logs each cause at most once a minute: a disabled key fails
// thousands of opens, and says the same each time.
type limiter struct {
	log *slog.Logger

	mu   sync.Mutex
	last map[string]time.Time // guarded by mu
}

const (
	logEvery  = time.Minute
	logCauses = 256 // causes remembered
)

func newLimiter(log *slog.Logger) *limiter {
	return &limiter{log: log, last: make(map[string]time.Time)}
}

// first reports whether cause has not been logged for a minute.
func (l *limiter) first(cause string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if t, seen := l.last[cause]; seen && now.Sub(t) < logEvery {
		return false
	}
	if len(l.last) >= logCauses {
		clear(l.last)
	}
	l.last[cause] = now
	return true
}

// failed logs what went wrong with a file. It names the inode (find -inum), not
// the path: names may be encrypted on disk, and a log is not.
func (l *limiter) failed(op string, n *node, err error) {
	root := err
	for next := errors.Unwrap(root); next != nil; next = errors.Unwrap(root) {
		root = next
	}
	if l.first(op + root.Error()) {
		l.log.Warn("request failed", "op", op, "inode", n.id.ino, "err", err)
	}
}

// trouble logs what no request can report.
func (l *limiter) trouble(doing string, ino uint64, err error) {
	if l.first(doing + err.Error()) {
		l.log.Error(doing+" failed", "inode", ino, "err", err)
	}
}
