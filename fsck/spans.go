package fsck

import (
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// maxSpans bounds the ranges that are kept of one file: what is damaged beyond it is
// told as one range that may hold good blocks.
const maxSpans = 4096

// spans are ranges in ascending order, neighbours joined.
type spans struct{ list []Span }

func (s *spans) add(from, to int64) {
	if n := len(s.list); n > 0 && (s.list[n-1].To == from || n >= maxSpans) {
		s.list[n-1].To = to
		return
	}
	s.list = append(s.list, Span{from, to})
}

// common are the findings of the second look that the first had too, with the ranges
// that both had.
func common(first, second []Finding) (out []Finding) {
	for _, f := range second {
		for _, e := range first {
			if e.Kind != f.Kind || f.Kind == Xattr && e.Err.Error() != f.Err.Error() {
				continue
			}
			if f.Range == nil || e.Range == nil {
				out = append(out, f)
				break
			}
			g := f
			g.Range = &Span{max(e.Range.From, f.Range.From), min(e.Range.To, f.Range.To)}
			if g.Range.From < g.Range.To || *e.Range == *f.Range {
				out = append(out, g)
			}
		}
	}
	return out
}

// linksSeen are the files with several links that were looked at, the later ones of
// them: its memory is bounded. Whoever is forgotten is looked at once more.
type linksSeen struct {
	mu          sync.Mutex
	young, aged map[link]uint64 // guarded by mu; the name's hash it was met under
}

// A link is told by file id besides, for an inode number can go to another file.
type link struct {
	ino uint64
	id  crypt.FileID
}

const maxLinks = 1 << 17

// again reports whether the file was met under another name before. Under the same
// name it is a second look.
func (l *linksSeen) again(it *volume.Item, st *unix.Stat_t, id crypt.FileID) bool {
	if st.Nlink < 2 {
		return false
	}
	key, name := link{st.Ino, id}, nameHash(it.StoredPath())
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range []map[link]uint64{l.young, l.aged} {
		if met, ok := m[key]; ok {
			return met != name
		}
	}
	if l.young == nil || len(l.young) >= maxLinks {
		l.young, l.aged = make(map[link]uint64), l.young
	}
	l.young[key] = name
	return false
}

// nameHash is FNV-1a.
func nameHash(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}
