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
	// Prefetches reports whether Prefetch is of any use now. It asks nobody.
	Prefetches() bool
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
	// eventsMost is how many opens may wait to be looked at; more are not seen.
	eventsMost = 256
)

// ahead watches opens, foretells those to come, and has their keys opened. One
// goroutine owns all that it knows, so an open costs a message that nobody waits for;
// looking at headers and asking for keys is done by others, which hold no lock.
type ahead struct {
	fs     *fileSystem
	keys   KeyPrefetcher
	most   int // keys asked for at once
	opens  chan *node
	done   chan answer
	ctx    context.Context
	cancel context.CancelFunc
	loops  sync.WaitGroup
	jobs   sync.WaitGroup

	walks, handed, listed atomic.Int64

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

// An answer is what came of handing a file on.
type answer struct {
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
	a := &ahead{fs: fs, keys: keys, most: fs.opts.Prefetch, opens: make(chan *node, eventsMost),
		done: make(chan answer, fs.opts.Prefetch), recent: map[uint64]*recent{}}
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
		(<-a.done).file.leave()
	}
	for _, t := range a.active {
		t.end()
	}
}

// opened tells of an open of a file that has contents to be decrypted.
func (a *ahead) opened(n *node) {
	if a == nil || !a.keys.Prefetches() {
		return
	}
	select {
	case a.opens <- n:
	default: // foretelling is no reason to wait
	}
}

func (a *ahead) loop() {
	tick := time.NewTicker(walkIdle / 4)
	defer tick.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case n := <-a.opens:
			a.see(n)
		case r := <-a.done:
			a.learn(r)
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

// hand has the keys of foretold files opened, as far as the bounds allow.
func (a *ahead) hand() {
	if time.Now().Before(a.paused) {
		return
	}
	for _, t := range a.active {
		t.window = min(t.window, 2*a.most)
		t.extend()
		for _, f := range t.queue[:min(len(t.queue), t.window)] {
			if a.inflight >= a.most || f.crossed && !t.deep {
				break
			}
			if !f.handed {
				f.handed = true
				a.ask(t, f)
			}
		}
	}
}

// ask has somebody look at a file. While what is looked at is known already, few are.
func (a *ahead) ask(t *tracked, f *foretold) {
	if t.asked++; t.known >= knownRun && t.asked%knownRun != 0 {
		return
	}
	a.inflight++
	f.users++
	a.jobs.Go(func() {
		r := a.look(f)
		r.walk, r.file = t.walk, f
		a.done <- r // there is room for all that are under way
	})
}

// look reads the header and hands it on. What is not the file that was listed, or is
// not one of ours, is none of our business: an open will tell.
func (a *ahead) look(f *foretold) (r answer) {
	raw, st, err := f.dir.Peek(f.stored)
	if err != nil || st.Ino != f.ino || st.Size == 0 || len(raw) == 0 {
		return r
	}
	h, err := a.fs.vol.ParseHeader(raw)
	if err != nil {
		return r
	}
	r.asked, r.err = a.keys.Prefetch(a.ctx, h)
	r.known = !r.asked && r.err == nil
	if r.asked {
		a.handed.Add(1)
	}
	return r
}

func (a *ahead) learn(r answer) {
	a.inflight--
	r.file.leave()
	switch {
	case r.err != nil:
		a.paused = time.Now().Add(aheadPause)
		r.walk.window = firstWindow
	case r.known:
		r.walk.known++
	case r.asked:
		r.walk.known = 0
	}
}
