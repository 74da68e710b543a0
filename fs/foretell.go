package fs

import (
	"cmp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// A walk is foretold from two opens: if the second is of what follows the first, in one
// of the orders in which programs go through a directory, they are taken to go on so.
// Then the files ahead are a queue, which grows at its far end and is eaten at its near
// end. All of it is a guess about inode numbers; nothing is trusted.

// An order is one in which programs open the files of a directory.
type order uint8

const (
	listed  order = iota // as readdir(3) gives them: tar, find, grep -r
	byName               // ls, the shell, git, rsync
	byInode              // cp -r; fts(3) in large directories
)

const (
	// listStep is how much is listed at a time, and stepsMost how often at most for the
	// other orders, and to find out where a program is in a directory: 32,768 entries.
	// What lies beyond is foretold in the order of readdir only.
	listStep  = 1024
	stepsMost = 32
	// leap is how many files a program may pass over and still be on its way: it opens
	// what matches a pattern, say.
	leap = 4
	// levelsMost is how deep below where a walk was noticed it is followed.
	levelsMost = 12
	// passMost is how many entries are passed over for one file to be foretold:
	// symlinks, directories, empty directories.
	passMost = 4096
)

// An entry is an entry of a directory that a walk may come to.
type entry struct {
	name, stored string
	ino          uint64
	dir          bool
}

// A level is a directory on a walk's way, and how far the queue has got in it.
type level struct {
	fs    *fileSystem
	node  *node // nil if the kernel need not know it yet
	ino   uint64
	dir   *volume.Dir
	close func() // gives dir back
	users int    // the walk, and foretold files

	order   order
	entries []entry
	src     *volume.Entries // where more is listed from; nil if entries are all
	steps   int             // listed so far
	later   []*foretold     // come first when the walk is back here
	passed  []entry         // directories that were passed over for files first
}

// list lists the first of a directory, or, if all is wanted, as much as stepsMost allow.
func (l *level) list(all bool) error {
	src, err := l.dir.Entries()
	if err != nil {
		return err
	}
	l.src = src
	for l.may() && (len(l.entries) == 0 || all) {
		if err := l.more(); err != nil {
			return err
		}
	}
	return nil
}

// may reports whether more is to be listed in order to find out where a program is.
func (l *level) may() bool { return l.src != nil && l.steps < stepsMost }

// more lists another step, if there is one.
func (l *level) more() error {
	if l.src == nil {
		return nil
	}
	l.steps++
	var e volume.Entry
	for range listStep {
		l.fs.ahead.listed.Add(1)
		ok, err := l.src.Next(&e)
		if !ok || err != nil {
			l.src.Close()
			l.src = nil
			return err
		}
		// A backing store that does not say what an entry is foretells nothing.
		if e.Type == unix.DT_REG || e.Type == unix.DT_DIR && e.Name != "." && e.Name != ".." {
			l.entries = append(l.entries, entry{e.Name, e.Stored, e.Ino, e.Type == unix.DT_DIR})
		}
	}
	return nil
}

// arrange puts the entries into the level's order; it reports whether it could.
func (l *level) arrange(o order) bool {
	if o != listed && l.src != nil {
		return false // not all of them are known
	}
	l.order = o
	switch o {
	case byName:
		slices.SortFunc(l.entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	case byInode:
		slices.SortFunc(l.entries, func(a, b entry) int { return cmp.Compare(a.ino, b.ino) })
	}
	return true
}

// after drops the entries up to and with one.
func (l *level) after(ino uint64) bool {
	i := l.find(ino)
	if i >= 0 {
		l.entries = l.entries[i+1:]
	}
	return i >= 0
}

func (l *level) find(ino uint64) int {
	return slices.IndexFunc(l.entries, func(s entry) bool { return s.ino == ino })
}

// gap is how many files further on than another one comes, directories apart; 0 if it
// is not within a leap.
func (l *level) gap(before, ino uint64) (files int) {
	i := l.find(before)
	if i < 0 {
		return 0
	}
	for _, e := range l.entries[i+1:] {
		if e.dir {
			continue
		}
		if files++; e.ino == ino {
			return files
		}
		if files > leap {
			break
		}
	}
	return 0
}

// pull takes the next entry; false at the end.
func (l *level) pull() (s entry, ok bool) {
	if len(l.entries) == 0 && l.src != nil {
		l.entries = nil
		if err := l.more(); err != nil {
			return s, false
		}
	}
	if len(l.entries) == 0 {
		return s, false
	}
	s, l.entries = l.entries[0], l.entries[1:]
	return s, true
}

// leave ends one use of the level.
func (l *level) leave() {
	if l.users--; l.users > 0 {
		return
	}
	if l.src != nil {
		l.src.Close()
	}
	l.close()
}

// levelOf makes a level of a directory that the kernel knows.
func (fs *fileSystem) levelOf(n *node) (*level, error) {
	d, err := fs.dirs.acquire(n)
	if err != nil {
		return nil, err
	}
	return &level{fs: fs, node: n, ino: n.id.ino, dir: d.Dir, close: func() { fs.dirs.release(d) }, users: 1}, nil
}

// levelAfter is a level of which the walk has done all up to ino.
func (fs *fileSystem) levelAfter(n *node, ino uint64, o order) (*level, bool) {
	l, err := fs.levelOf(n)
	if err != nil {
		return nil, false
	}
	if l.list(o != listed) == nil && l.seek(ino) && l.arrange(o) && l.after(ino) {
		return l, true
	}
	l.leave()
	return nil, false
}

// seek lists until an entry is among the entries.
func (l *level) seek(ino uint64) bool {
	seen := 0
	for {
		if slices.ContainsFunc(l.entries[seen:], func(e entry) bool { return e.ino == ino }) {
			return true
		}
		seen = len(l.entries)
		if !l.may() || l.more() != nil {
			return false
		}
	}
}

// notice finds the order in which two opens in a directory are neighbours. It returns
// the level after the second; nil if there is none.
func (fs *fileSystem) notice(n *node, before, ino uint64) *level {
	l, err := fs.levelOf(n)
	if err != nil {
		return nil
	}
	found := l.list(false) == nil && l.seek(before) && l.seek(ino) && l.neighbours(before, ino)
	if found && l.after(ino) {
		return l
	}
	l.leave()
	return nil
}

// neighbours finds the order in which two files are closest, and leaves the level in
// it. It reports whether there is any.
func (l *level) neighbours(before, ino uint64) bool {
	best := l.gap(before, ino)
	if best == 1 {
		return true
	}
	for l.may() {
		if l.more() != nil {
			return false
		}
	}
	entries, chosen := l.entries, listed
	for _, o := range []order{byName, byInode} {
		l.entries = slices.Clone(entries)
		if !l.arrange(o) {
			break
		}
		if gap := l.gap(before, ino); gap > 0 && (best == 0 || gap < best) {
			best, chosen = gap, o
		}
	}
	l.entries = entries
	l.arrange(chosen)
	return best > 0
}

// A foretold file is expected to be opened.
type foretold struct {
	*level
	stored  string
	ino     uint64
	crossed bool // it is in another directory than the walk is known to go to
	handed  bool // its key was asked for
}

// A walk is one program on its way through directories.
type walk struct {
	fs     *fileSystem
	levels []*level    // the way down to where the queue ends; the first is of a node
	queue  []*foretold // in the order expected
	here   *level      // where the last expected file was; it may be closed
	window int         // so many may be handed on before they are opened
	deep   bool        // it goes on into other directories
	files  bool        // it opens the files of a directory before it enters the next
	over   bool        // nothing more can be foretold
	score  int         // good guesses less bad ones
	known  int         // guesses in a row whose key was there already
	did    []uint64    // directories that the queue has left behind, the last of them
}

const (
	firstWindow = 8
	topScore    = 8
	// didMost is how many directories are remembered as done.
	didMost = 256
)

func newWalk(l *level) *walk {
	return &walk{fs: l.fs, levels: []*level{l}, here: l, window: firstWindow, score: 1}
}

func (w *walk) top() *level { return w.levels[len(w.levels)-1] }

// extend foretells until the queue is as long as the window, or its end is not known.
func (w *walk) extend() {
	for len(w.queue) < w.window && !w.over && !w.unsure() {
		f := w.next()
		if f == nil {
			w.over = true
			return
		}
		w.queue = append(w.queue, f)
	}
}

// unsure: the queue ends in a directory that the walk may never come to.
func (w *walk) unsure() bool {
	return !w.deep && len(w.queue) > 0 && w.queue[len(w.queue)-1].crossed
}

// next is the next file on the way: in this directory, or, at its end, in those that it
// leads to.
func (w *walk) next() *foretold {
	crossed := false
	for range passMost {
		l := w.top()
		if len(l.later) > 0 {
			f := l.later[0]
			l.later = l.later[1:]
			return f
		}
		s, ok := l.pull()
		switch {
		case !ok && w.files && len(l.passed) > 0:
			s, l.passed = l.passed[0], l.passed[1:]
			crossed = true
			w.enter(s)
		case !ok:
			crossed = true
			if !w.climb() {
				return nil
			}
		case !s.dir:
			l.users++
			return &foretold{level: l, stored: s.stored, ino: s.ino, crossed: crossed}
		case w.files:
			l.passed = append(l.passed, s)
		case w.deep || crossed:
			crossed = true
			w.enter(s)
		}
	}
	return nil
}

// enter goes down into a directory, which the kernel may not have looked up yet. One
// that can't be entered is passed over.
func (w *walk) enter(s entry) {
	if len(w.levels) >= levelsMost {
		return
	}
	l := w.top()
	d, err := l.dir.OpenDir(s.name)
	if err != nil {
		return
	}
	below := &level{fs: w.fs, ino: d.Ino(), dir: d, close: d.Close, users: 1}
	if below.list(l.order != listed) != nil || !below.arrange(l.order) {
		below.leave()
		return
	}
	w.levels = append(w.levels, below)
}

// climb leaves a directory that is done, for the one above.
func (w *walk) climb() bool {
	l := w.top()
	if w.did = append(w.did, l.ino); len(w.did) > didMost {
		w.did = w.did[1:]
	}
	if len(w.levels) > 1 {
		w.pop()
		return true
	}
	if l.node == nil || l.node == w.fs.root {
		return false
	}
	_, parent := l.node.Parent()
	if parent == nil {
		return false
	}
	above, ok := w.fs.levelAfter(parent.Operations().(*node), l.ino, l.order)
	if ok {
		w.pop()
		w.levels = []*level{above}
	}
	return ok
}

func (w *walk) pop() {
	l := w.top()
	w.levels = w.levels[:len(w.levels)-1]
	for _, f := range l.later {
		f.leave()
	}
	l.later = nil
	l.leave()
}

// strayed tells the walk of an open that nobody expected; false if it is none of its own.
func (w *walk) strayed(n, dir *node) bool {
	if !w.related(dir) || !w.turn(n, dir) {
		return false
	}
	w.score -= 2
	return true
}

// expected finds an open in the queue, and drops what it passed over.
func (w *walk) expected(ino uint64) bool {
	i := slices.IndexFunc(w.queue, func(f *foretold) bool { return f.ino == ino })
	if i < 0 {
		return false
	}
	w.here = w.queue[i].level
	if w.queue[i].crossed {
		w.deep = true
	}
	for _, f := range w.queue[:i+1] {
		f.leave()
	}
	w.queue = w.queue[i+1:]
	if i <= leap {
		w.score = min(w.score+1, topScore)
		w.window *= 2
	} else {
		w.score--
		w.window = firstWindow
	}
	return true
}

// related reports whether a directory is on the walk's way, or leads off it.
func (w *walk) related(dir *node) bool {
	if w.at(dir) >= 0 {
		return true
	}
	_, up := dir.Parent()
	if up == nil {
		return false
	}
	parent := up.Operations().(*node)
	return w.here.is(parent) || w.at(parent) >= 0
}

// at is the level of a directory, or -1.
func (w *walk) at(dir *node) int {
	return slices.IndexFunc(w.levels, func(l *level) bool { return l.is(dir) })
}

func (l *level) is(dir *node) bool { return l.ino == dir.id.ino && l.dir.Dev() == dir.id.dev }

// turn follows the walk to where it was not expected: down into a directory, or back up
// to the files of one that it left too soon.
func (w *walk) turn(n, dir *node) bool {
	if i := w.at(dir); i >= 0 {
		if i == len(w.levels)-1 {
			return false // it jumps about
		}
		w.cut(i)
		w.drop()
		w.files, w.over = true, false
		w.extend()
		return w.expected(n.id.ino)
	}
	if len(w.levels) >= levelsMost || slices.Contains(w.did, dir.id.ino) {
		return false // or it goes through the same directory once more, as another walk
	}
	below, ok := w.fs.levelAfter(dir, n.id.ino, w.top().order)
	if !ok {
		return false
	}
	w.top().later = append(w.queue, w.top().later...)
	w.queue = nil
	w.levels, w.here = append(w.levels, below), below
	w.deep, w.over = true, false
	return true
}

// cut leaves the levels below one.
func (w *walk) cut(i int) {
	for len(w.levels) > i+1 {
		w.pop()
	}
}

// drop forgets the queue.
func (w *walk) drop() {
	for _, f := range w.queue {
		f.leave()
	}
	w.queue = nil
}

// end gives back all that the walk holds.
func (w *walk) end() {
	w.drop()
	for len(w.levels) > 0 {
		w.pop()
	}
}
