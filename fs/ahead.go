package fs

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kmsfs/crypt"
)

// KeyPrefetcher is what Keys may have besides: data keys opened before they are asked
// for, so that a program that walks through a tree does not wait for the network at
// every file.
type KeyPrefetcher interface {
	// Prefetches reports whether Prefetch is of any use now, and whether it costs only
	// work, which many files at a time are worth, and no waiting. It asks nobody.
	Prefetches() (useful, cheap bool)
	// Prefetch opens a header's data key for an Open to come. It reports whether it had
	// to ask for it; an error means that it is no use to go on for the moment.
	Prefetch(ctx context.Context, h *crypt.Header) (asked bool, err error)
}

const (
	walksMost   = 4
	recentsMost = 256
	// walkIdle is how long a walk is remembered in which nothing is opened.
	walkIdle = 5 * time.Second
	// aheadPause is how long nothing is handed on after the keys said no.
	aheadPause = 200 * time.Millisecond
	// knownRun is after how many keys that were there already only every knownRun-th
	// file is looked at: a tree is being read again.
	knownRun = 8
	// eventsMost is how many messages of opens may wait to be looked at; more are not seen.
	eventsMost = 256
	// Where a key costs work alone, so many opens are told of at once, and so many files
	// looked at by one goroutine: to wake one costs as much as is gained by a few.
	cheapEvents = 8
	cheapLooks  = 32
)

// ahead watches opens, foretells those to come, and has their keys opened. One
// goroutine owns all that it knows, so an open costs a message that nobody waits for;
// looking at headers and asking for keys is done by others, which hold no lock.
type ahead struct {
	fs     *fileSystem
	keys   KeyPrefetcher
	most   int // keys asked for at once
	opens  chan []*node
	done   chan []look
	ctx    context.Context
	cancel context.CancelFunc
	loops  sync.WaitGroup
	jobs   sync.WaitGroup

	walks, handed, listed atomic.Int64

	mu    sync.Mutex
	quiet []*node // guarded by mu; opens that were not told of yet

	// The rest is the loop's.
	active   []*tracked
	recent   map[uint64]*recent // by inode number of a directory
	inflight int
	paused   time.Time
}

// tracked is a walk and when it last went on.
type tracked struct {
	*walk
	last  time.Time
	asked int // files that came up to be looked at
}

// recent is what was opened last in a directory that no walk is known to be in.
type recent struct {
	ino  uint64
	at   time.Time
	skip int // opens not to be looked at
	vain int // looks that found no walk
}

// A look is what came of handing a file on.
type look struct {
	walk  *walk
	file  *foretold
	asked bool
	known bool // its key was there already
	err   error
}

// startAhead starts it, if that is wanted and the keys can.
func (fs *fileSystem) startAhead() {
	keys, can := fs.keys.(KeyPrefetcher)
	if !can || fs.opts.Prefetch <= 0 {
		return
	}
	a := &ahead{fs: fs, keys: keys, most: fs.opts.Prefetch, opens: make(chan []*node, eventsMost),
		done: make(chan []look, fs.opts.Prefetch), recent: map[uint64]*recent{}}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.loops.Go(a.loop)
	fs.ahead = a
}

// end returns when nothing of it runs any more.
func (a *ahead) end() {
	if a == nil {
		return
	}
	a.cancel()
	a.loops.Wait()
	a.jobs.Wait()
	for len(a.done) > 0 {
		for _, l := range <-a.done {
			l.file.leave()
		}
	}
	for _, t := range a.active {
		t.end()
	}
}

// opened tells of an open of a file that has contents to be decrypted.
func (a *ahead) opened(n *node) {
	if a == nil {
		return
	}
	useful, cheap := a.keys.Prefetches()
	if !useful {
		return
	}
	told := []*node{n}
	if cheap {
		if told = a.gather(n); told == nil {
			return
		}
	}
	select {
	case a.opens <- told:
	default: // foretelling is no reason to wait
	}
}

// gather keeps an open until there are enough of them to be told of.
func (a *ahead) gather(n *node) (told []*node) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.quiet = append(a.quiet, n); len(a.quiet) < cheapEvents {
		return nil
	}
	told, a.quiet = a.quiet, make([]*node, 0, cheapEvents)
	return told
}

func (a *ahead) loop() {
	tick := time.NewTicker(walkIdle / 4)
	defer tick.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case told := <-a.opens:
			for _, n := range told {
				a.see(n)
				a.extend()
			}
		case looks := <-a.done:
			a.learn(looks)
		case now := <-tick.C:
			a.tidy(now)
		}
		a.hand()
	}
}

// see finds the walk that an open belongs to, or the beginning of one.
func (a *ahead) see(n *node) {
	_, parent := n.Parent()
	if parent == nil {
		return
	}
	dir := parent.Operations().(*node)
	t := a.walkOf(n, dir)
	if t != nil {
		t.last = time.Now()
		if t.score < 0 {
			a.stop(t)
		}
		return
	}
	if l := a.begins(dir, n.id.ino); l != nil {
		a.start(l)
	}
}

// walkOf is the walk that an open belongs to; nil if there is none.
func (a *ahead) walkOf(n, dir *node) *tracked {
	for _, t := range a.active {
		if t.expected(n.id.ino) {
			return t
		}
	}
	for _, t := range a.active {
		if t.strayed(n, dir) {
			return t
		}
	}
	return nil
}

// begins reports whether two opens in a directory are the beginning of a walk: the
// level after them, or nil. The more often it was not, the more rarely it is looked.
func (a *ahead) begins(dir *node, ino uint64) *level {
	now := time.Now()
	r := a.recent[dir.id.ino]
	if r == nil || now.Sub(r.at) > walkIdle {
		if len(a.recent) >= recentsMost {
			clear(a.recent)
		}
		a.recent[dir.id.ino] = &recent{ino: ino, at: now}
		return nil
	}
	before := r.ino
	r.ino, r.at = ino, now
	if r.skip > 0 {
		r.skip--
		return nil
	}
	if before == ino {
		return nil
	}
	l := a.fs.notice(dir, before, ino)
	if l == nil {
		r.vain++
		r.skip = 1 << min(r.vain, 10)
		return nil
	}
	delete(a.recent, dir.id.ino)
	return l
}

func (a *ahead) start(l *level) {
	if len(a.active) >= walksMost {
		oldest := slices.MinFunc(a.active, func(x, y *tracked) int { return x.last.Compare(y.last) })
		a.stop(oldest)
	}
	a.active = append(a.active, &tracked{walk: newWalk(l), last: time.Now()})
	a.walks.Add(1)
}

func (a *ahead) stop(t *tracked) {
	a.active = slices.DeleteFunc(a.active, func(x *tracked) bool { return x == t })
	t.end()
}

// tidy drops the walks that have ended.
func (a *ahead) tidy(now time.Time) {
	for _, t := range slices.Clone(a.active) {
		if now.Sub(t.last) > walkIdle {
			a.stop(t)
		}
	}
	for ino, r := range a.recent {
		if now.Sub(r.at) > walkIdle {
			delete(a.recent, ino)
		}
	}
}

// extend foretells as far as the bounds allow.
func (a *ahead) extend() {
	for _, t := range a.active {
		t.window = min(t.window, 2*a.most)
		t.extend()
	}
}

// hand has the keys of foretold files opened, as far as the bounds allow.
func (a *ahead) hand() {
	if time.Now().Before(a.paused) {
		return
	}
	a.extend()
	most, each := a.most, 1
	if _, cheap := a.keys.Prefetches(); cheap {
		most, each = 1, cheapLooks
	}
	for _, t := range a.active {
		for a.inflight < most {
			files := t.take(each)
			if len(files) == 0 {
				break
			}
			a.ask(t.walk, files)
		}
	}
}

// take is the next files of the window that were not handed on yet. While what is looked
// at is known already, few are.
func (t *tracked) take(most int) (files []*foretold) {
	for _, f := range t.queue[:min(len(t.queue), t.window)] {
		if len(files) == most || f.crossed && !t.deep {
			break
		}
		if f.handed {
			continue
		}
		f.handed = true
		if t.asked++; t.known >= knownRun && t.asked%knownRun != 0 {
			continue
		}
		files = append(files, f)
	}
	return files
}

// ask has somebody look at files.
func (a *ahead) ask(w *walk, files []*foretold) {
	a.inflight++
	looks := make([]look, len(files))
	for i, f := range files {
		f.users++
		looks[i] = look{walk: w, file: f}
	}
	a.jobs.Go(func() {
		for i := range looks {
			if looks[i].at(a); looks[i].err != nil {
				break
			}
		}
		a.done <- looks // there is room for all that are under way
	})
}

// at reads the header and hands it on. What is not the file that was listed, or is
// not one of ours, is none of our business: an open will tell.
func (l *look) at(a *ahead) {
	raw, st, err := l.file.dir.Peek(l.file.stored)
	if err != nil || st.Ino != l.file.ino || st.Size == 0 || len(raw) == 0 {
		return
	}
	h, err := a.fs.vol.ParseHeader(raw)
	if err != nil {
		return
	}
	l.asked, l.err = a.keys.Prefetch(a.ctx, h)
	l.known = !l.asked && l.err == nil
	if l.asked {
		a.handed.Add(1)
	}
}

func (a *ahead) learn(looks []look) {
	a.inflight--
	for _, l := range looks {
		l.file.leave()
		switch {
		case l.err != nil:
			a.paused = time.Now().Add(aheadPause)
			l.walk.window = firstWindow
		case l.known:
			l.walk.known++
		case l.asked:
			l.walk.known = 0
		}
	}
}
