package fs

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"syscall"

	"kmsfs/volume"
)

// A sweep over the backing tree (a rekey's) meets every file but those that are
// renamed, or linked and then unlinked, from a place it has yet to visit to one it
// has behind it; and it gets no error. So the mount tells what it moves. Why that
// is enough: a thing that was moved stands where it was noted, unless it or a
// directory above it was moved again, and that is noted too. So whoever looks again
// at each noted place (at all below it, if it is a directory), and asks for what was
// noted meanwhile, has met everything as soon as each thing of one answer stood where
// it was noted and none was a directory. A noted place may be taken by something else
// by the time it is looked at: so the inode is noted with it.
//
// moves is what the mount does in that way, and who wants to know.
type moves struct {
	// mu is held shared from before a thing moves until that is noted, and
	// exclusively, for a moment, by who begins to watch or asks: what anybody can
	// see to have moved by then has been noted. It is taken also while nobody
	// watches: a move that began before a Watch and ends after it must not be
	// missing. That costs two atomic additions beside the system call.
	mu       sync.RWMutex
	watchers map[*Watch]struct{} // guarded by mu
}

// A Watch notes what the mount moves, from Server.Watch to Close.
type Watch struct {
	moves *moves

	mu    sync.Mutex        // among those who hold moves.mu shared
	noted map[Move]struct{} // guarded by mu, or moves.mu held exclusively; as are those below
	bytes int
	lost  bool
}

// A Move is where a thing stood right after it was moved.
type Move struct {
	Path string // of stored names, below the backing root
	Ino  uint64 // of what was moved, on the backing store; 0 = not known
}

// Bounds on what a Watch keeps until it is asked.
const (
	maxMoved      = 1 << 16
	maxMovedBytes = 8 << 20
	maxMovedPath  = 4096 + 256 // the longest there is where a page has 4 KiB
)

// Watch begins to note every rename and every new hard link that the server
// carries out.
func (s *Server) Watch() *Watch {
	m := &s.fs.moves
	w := &Watch{moves: m}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.watchers == nil {
		m.watchers = make(map[*Watch]struct{})
	}
	m.watchers[w] = struct{}{}
	return w
}

// Moved returns, once, what was moved since Watch or the last call. Lost says that
// something is missing from that, so that only a sweep of everything meets all.
// Whatever had moved when Moved was called is in its answer or in an earlier one.
func (w *Watch) Moved() (list []Move, lost bool) {
	w.moves.mu.Lock()
	noted := w.noted
	lost = w.lost
	w.noted, w.bytes, w.lost = nil, 0, false
	w.moves.mu.Unlock()
	return slices.SortedFunc(maps.Keys(noted), func(a, b Move) int { return cmp.Compare(a.Path, b.Path) }), lost
}

// Close ends the watch.
func (w *Watch) Close() {
	w.moves.mu.Lock()
	defer w.moves.mu.Unlock()
	delete(w.moves.watchers, w)
}

// A spot is an entry of a directory, and what is to stand there.
type spot struct {
	dir  *volume.Dir
	name string
	ino  uint64
}

// moving calls op, which makes things stand at the spots where they did not stand
// before, and notes it.
func (m *moves) moving(op func() error, to ...spot) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := op(); err != nil {
		return err
	}
	if len(m.watchers) > 0 {
		for _, s := range to {
			m.noteLocked(s)
		}
	}
	return nil
}

// noteLocked tells every watcher of a spot; mu is held shared.
func (m *moves) noteLocked(s spot) {
	path, err := s.dir.StoredPath(s.name)
	if err == syscall.ENOENT {
		return // it has gone on already
	}
	for w := range m.watchers {
		w.note(Move{path, s.ino}, err == nil && len(path) <= maxMovedPath)
	}
}

// note adds a move; known is false if there is something whose place is not.
func (w *Watch) note(m Move, known bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, again := w.noted[m]; again {
		return
	}
	if !known || len(w.noted) >= maxMoved || w.bytes+len(m.Path) > maxMovedBytes {
		w.lost = true
		return
	}
	if w.noted == nil {
		w.noted = make(map[Move]struct{})
	}
	w.noted[m] = struct{}{}
	w.bytes += len(m.Path)
}
