package rekey

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"kmsfs/volume"
)

// giveUp is how many refusals in a row end a run: one bad file never does, a
// key that was disabled half-way must.
const giveUp = 100

// A pipe carries the items of a walk to the goroutines that work on them.
type pipe struct {
	items chan *volume.Item
	shard Shard
	busy  atomic.Int64  // items sent and not yet dealt with
	idle  chan struct{} // has a token if busy may have become 0
}

func (p *pipe) send(ctx context.Context, it *volume.Item) error {
	if it.Err == nil && !p.shard.has(it.Ino) {
		return nil
	}
	it.Hold()
	p.busy.Add(1)
	select {
	case p.items <- it:
		return nil
	case <-ctx.Done():
		p.done(it)
		return ctx.Err()
	}
}

func (p *pipe) done(it *volume.Item) {
	it.Release()
	if p.busy.Add(-1) == 0 {
		select {
		case p.idle <- struct{}{}:
		default:
		}
	}
}

// rest waits until everything sent is dealt with.
func (p *pipe) rest(ctx context.Context) error {
	for p.busy.Load() > 0 {
		select {
		case <-p.idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// each has several goroutines work on what produce sends.
func (j *job) each(ctx context.Context, produce func(context.Context, *pipe) error, work func(context.Context, *volume.Item) error) error {
	g, ctx := errgroup.WithContext(ctx)
	p := &pipe{items: make(chan *volume.Item, min(4*j.o.Jobs, itemsLimit())), shard: j.o.Shard, idle: make(chan struct{}, 1)}
	for range j.o.Jobs {
		g.Go(func() error {
			for it := range p.items {
				err := work(ctx, it)
				p.done(it)
				if err == nil {
					err = ctx.Err()
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(p.items)
		return produce(ctx, p)
	})
	err := g.Wait()
	for it := range p.items { // what an early end left over
		p.done(it)
	}
	return err
}

// walk sends the whole tree.
func (j *job) walk(ctx context.Context, p *pipe) error {
	return j.tree.Walk(ctx, func(it *volume.Item) error { return p.send(ctx, it) })
}

// A pass is one time over the tree.
type pass struct {
	*job
	nr        int
	verifying bool // also what needs no change
	links     linksSeen
	t         *tally
	missed    bool        // something may have moved past it
	postponed atomic.Bool // a further link was to be changed, while somebody may be at the first
}

// work deals with one item.
func (s *pass) work(ctx context.Context, it *volume.Item) error {
	f := find(s.tree, &s.links, it, true)
	out, h, err := f.out, f.h, f.err
	switch {
	case out == "" && f.again:
		out = s.link(f)
	case out == "":
		out, h, err = s.file(ctx, it, f, s.verifying)
	}
	if crashed(err) || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	s.t.add(it, out, err, h, f.again)
	e := Event{Kind: "file", Outcome: out, Err: err, Pass: s.nr}
	if out == Bad || out == Strange || out == Failed {
		e.Path = it.Path()
	}
	s.emit(e)
	if err != nil && s.failures.Load() >= giveUp {
		return fmt.Errorf("%w; the last answer: %w", ErrGaveUp, err)
	}
	return nil
}

// link judges a further link of a file that this pass has met. It is not changed: the
// first link was, or is just now, and each call costs. If it still has to be, which
// is so if another file got the inode number meanwhile, the next pass will.
func (s *pass) link(f found) Outcome {
	_, out, _ := s.edit(f.h)
	if out == "" && !f.empty {
		s.postponed.Store(true)
		return Gone
	}
	return Already
}

// sweep is one pass.
func (j *job) sweep(ctx context.Context, r *Report, produce func(*pass) func(context.Context, *pipe) error, verifying bool) (*pass, error) {
	r.Passes++
	j.emit(Event{Kind: "pass", Pass: r.Passes})
	s := &pass{job: j, nr: r.Passes, t: newTally(), verifying: verifying}
	err := j.each(ctx, produce(s), s.work)
	t := s.t
	r.Changed += t.of(Changed)
	r.Already, r.Bad, r.Strange, r.Failed, r.Gone = t.of(Already), t.of(Bad), t.of(Strange), t.of(Failed), t.of(Gone)
	r.Now, r.Problems, r.Remaining = t.now, t.problems, j.remaining(t.now)
	s.missed = s.missed || s.postponed.Load()
	return s, err
}

// remaining counts the copies under keys that are to leave.
func (j *job) remaining(c Census) (n int) {
	for label, count := range c.Headers {
		if j.leaves(label) {
			n += count
		}
	}
	return n
}

// maxPasses ends a sweep of a tree that never rests.
const maxPasses = 100

// sweepAll is step 3: passes until one, started after the last change, finds
// nothing under the old key and misses nothing, or nothing more can be done. clean
// says which.
func (j *job) sweepAll(ctx context.Context, r *Report) (clean bool, err error) {
	verifying := j.o.Verify && j.o.Action != Remove
	for {
		if err := j.hear(ctx); err != nil {
			return false, err
		}
		s, err := j.sweep(ctx, r, func(s *pass) func(context.Context, *pipe) error { return s.everything }, verifying)
		if err != nil {
			return false, err
		}
		// Only a pass that missed nothing has verified everything, and what failed
		// then must not pass for good now.
		verifying = verifying && (s.missed || r.Failed > 0)
		j.told = j.told && !s.missed
		changed := s.t.of(Changed)
		switch {
		case j.o.Action == Refresh: // what was missed is under the same key: nothing hangs on it
			return r.Failed == 0, nil
		case j.o.Action == Add && j.tree.Settings().Keys[0] != j.o.Key && !s.missed:
			// New files are under another key: each pass would find some.
			return r.Failed == 0, nil
		case changed == 0 && (!s.missed || r.Failed > 0):
			return r.Failed == 0, nil
		case r.Passes == maxPasses:
			r.Failed++
			r.Problems = append(r.Problems, Problem{Path: ".", Outcome: Failed, Err: fmt.Errorf("after %d passes: %w", maxPasses, ErrRestless)})
			return false, nil
		}
	}
}

// sweepPart is a worker's share: passes until one finds nothing to change. What
// moves past it is for the run that comes after all workers.
func (j *job) sweepPart(ctx context.Context, r *Report) (clean bool, err error) {
	for verifying := j.o.Verify && j.o.Action != Remove; ; verifying = verifying && r.Failed > 0 {
		s, err := j.sweep(ctx, r, func(*pass) func(context.Context, *pipe) error { return j.walk }, verifying)
		if err != nil || j.o.Action == Refresh || s.t.of(Changed) == 0 && !s.missed || r.Passes == maxPasses {
			return r.Failed == 0, err
		}
	}
}

// everything sends the whole tree, and whatever a live mount moves meanwhile. If
// nobody has it mounted, whatever vanishes under the pass may have moved past it.
func (s *pass) everything(ctx context.Context, p *pipe) error {
	asked := time.Now()
	err := s.tree.Walk(ctx, func(it *volume.Item) error {
		if time.Since(asked) > followEvery {
			asked = time.Now()
			for _, m := range s.moved(ctx) {
				if _, err := s.below(ctx, p, m); err != nil {
					return err
				}
			}
		}
		return p.send(ctx, it)
	})
	if err == nil {
		err = s.catchUp(ctx, p)
	}
	s.missed = s.missed || !s.heard.Mounted() && s.t.of(Gone) > 0
	return err
}

// followEvery is how often a pass looks where things have gone: a Watch need not
// remember a whole pass.
const followEvery = 500 * time.Millisecond

// moved asks what was moved. If that is not known, the pass will not count.
func (s *pass) moved(ctx context.Context) []Spot {
	list, err := s.heard.Moved(ctx)
	s.missed = s.missed || err != nil
	return list
}

// maxRounds bounds the chase after what is moved while what was moved is swept.
const maxRounds = 1000

// catchUp sweeps what was moved, until nothing can have been missed. Whatever the
// walk did not meet was moved during it, itself or with a directory above it, and so
// was noted. What is swept here and not met has moved once more, and is noted again.
// So all was met when a round found each thing where it had been noted, with no
// directory among them; it need not be that nothing moves any more. What a directory
// holds was met when it was swept, wherever it goes then: it need not be swept twice.
func (s *pass) catchUp(ctx context.Context, p *pipe) error {
	swept := map[uint64]bool{} // directories
	for range maxRounds {
		if err := p.rest(ctx); err != nil {
			return err
		}
		list := s.moved(ctx)
		if s.missed {
			return ctx.Err()
		}
		all, err := s.round(ctx, p, list, swept)
		if all || err != nil {
			return err
		}
	}
	s.missed = true
	return nil
}

// round sweeps the places of one answer; all reports that nothing can be missing.
func (s *pass) round(ctx context.Context, p *pipe, list []Spot, swept map[uint64]bool) (all bool, err error) {
	all = true
	gone := s.t.of(Gone)
	var dirs []uint64
	for _, m := range list {
		if swept[m.Ino] {
			continue
		}
		at, err := s.below(ctx, p, m)
		if err != nil {
			return false, err
		}
		all = all && at.Ino == m.Ino && m.Ino != 0 && !at.Dir
		if at.Dir {
			dirs = append(dirs, at.Ino)
		}
	}
	if err := p.rest(ctx); err != nil {
		return false, err
	}
	if s.t.of(Gone) != gone {
		return false, nil
	}
	if len(swept) > maxSwept {
		clear(swept)
	}
	for _, ino := range dirs {
		swept[ino] = true
	}
	return all, nil
}

// maxSwept bounds what is remembered of directories that were swept.
const maxSwept = 1 << 16

// below sends what stands at the place of a move, and below.
func (s *pass) below(ctx context.Context, p *pipe, m Spot) (volume.Place, error) {
	return s.tree.WalkBelow(ctx, m.Path, func(it *volume.Item) error { return p.send(ctx, it) })
}
