package rekey

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// A Census counts the files of a tree by what their headers say.
type Census struct {
	Files   int            `json:"files"`   // regular files with contents
	Empty   int            `json:"empty"`   // regular files without
	Headers map[string]int `json:"headers"` // copies, by the key that their label names
	Bad     int            `json:"bad"`     // files with contents that no header opens, or that can't be read
}

// maxLabels bounds the memory that made-up labels can cost; what is beyond it is
// counted together.
const (
	maxLabels   = 1000
	otherLabels = "other keys"
)

func (c *Census) add(h *crypt.Header) {
	if c.Headers == nil {
		c.Headers = map[string]int{}
	}
	for _, copied := range h.Copies {
		label := copied.Key
		if _, known := c.Headers[label]; !known && len(c.Headers) >= maxLabels {
			label = otherLabels
		}
		c.Headers[label]++
	}
}

// A found is what a look at one file told. No key service was asked.
type found struct {
	raw   []byte
	h     *crypt.Header // nil unless it is a valid header of this volume
	empty bool          // stores nothing; its header counts only as long as a mount is about to write under it
	out   Outcome       // "" if there is a header
	err   error
	again bool // one more link of a file that this pass has met
}

// find looks at an item. own says that a file of ours may be made readable for it.
func find(t tree, links *linksSeen, it *volume.Item, own bool) (f found) {
	raw, st, err := it.Peek()
	if own && errors.Is(err, unix.EACCES) {
		raw, st, err = it.PeekOwn()
	}
	switch {
	case errors.Is(err, volume.ErrGone), errors.Is(err, volume.ErrMoved):
		f.out = Gone
		return f
	case err != nil && !errors.Is(err, crypt.ErrDamaged):
		f.out, f.err = Failed, err
		return f
	}
	f.again, f.empty = links.again(&st), st.Size == 0
	if err == nil {
		f.raw = raw
		f.h, err = t.ParseHeader(raw)
	}
	switch {
	case err == nil:
	case f.empty: // a file with no bytes is whole, whatever it carries
		f.h, f.out = nil, Empty
	default:
		f.h, f.out, f.err = nil, Bad, err
	}
	return f
}

// linksSeen are the files with several links met in this pass, the later ones of
// them: its memory is bounded. It keeps counts honest and calls few; every link is
// looked at all the same, for an inode number may have gone to another file.
type linksSeen struct {
	mu          sync.Mutex
	young, aged map[inode]struct{} // guarded by mu
}

type inode struct{ dev, ino uint64 }

const maxLinks = 1 << 17

// again reports whether these are the attributes of a file met before.
func (l *linksSeen) again(st *unix.Stat_t) bool {
	if st.Nlink < 2 {
		return false
	}
	id := inode{st.Dev, st.Ino}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, young := l.young[id]
	_, aged := l.aged[id]
	if young || aged {
		return true
	}
	if l.young == nil || len(l.young) >= maxLinks {
		l.young, l.aged = make(map[inode]struct{}), l.young
	}
	l.young[id] = struct{}{}
	return false
}

// A tally counts the outcomes of one pass.
type tally struct {
	mu       sync.Mutex
	now      Census          // guarded by mu
	count    map[Outcome]int // guarded by mu
	problems []Problem       // guarded by mu
}

func newTally() *tally { return &tally{count: map[Outcome]int{}} }

// add counts a file as it is left: h is its header, nil if it has none.
func (t *tally) add(it *volume.Item, out Outcome, err error, h *crypt.Header, again bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if again && out != Gone {
		return
	}
	t.count[out]++
	if (out == Bad || out == Strange || out == Failed) && len(t.problems) < maxProblems {
		t.problems = append(t.problems, Problem{Path: it.Path(), Outcome: out, Err: err})
	}
	switch {
	case out == Gone:
		return
	case out == Empty:
		t.now.Empty++
		return
	case h == nil:
		t.now.Bad++
	default:
		t.now.add(h)
	}
	t.now.Files++
}

func (t *tally) of(out Outcome) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count[out]
}

// Survey counts the headers of a volume. It needs no key and changes nothing.
func Survey(ctx context.Context, v *volume.Volume, jobs int, event func(Event)) (Census, []Problem, error) {
	j := newJob(v, nil, Options{Jobs: jobs, Event: event})
	t, links := newTally(), new(linksSeen)
	err := j.each(ctx, j.walk, func(_ context.Context, it *volume.Item) error {
		f := find(j.tree, links, it, false)
		switch {
		case f.out == "" && f.empty:
			f.out = Empty
		case f.out == "":
			f.out = Already
		}
		t.add(it, f.out, f.err, f.h, f.again)
		if j.o.Event != nil {
			j.emit(Event{Kind: "file", Path: it.Path(), Outcome: f.out, Err: f.err, Pass: 1})
		}
		return nil
	})
	return t.now, t.problems, err
}
