package rekey

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// A tally counts the outcomes of one pass.
type tally struct {
	mu       sync.Mutex
	count    map[Outcome]int // guarded by mu
	problems []Problem       // guarded by mu
}

// giveUp is how many refusals in a row end a run: one bad file never does, a
// key that was disabled half-way must.
const giveUp = 100

// each walks the tree once and calls f for every regular file, by several
// goroutines, a file with several links once.
func (j *job) each(ctx context.Context, f func(context.Context, *volume.Item) (Outcome, error), done func(*volume.Item, Outcome, error)) error {
	g, ctx := errgroup.WithContext(ctx)
	items := make(chan *volume.Item, j.o.Jobs)
	for range j.o.Jobs {
		g.Go(func() error {
			for it := range items {
				out, err := f(ctx, it)
				it.Release()
				if crashed(err) || ctx.Err() != nil {
					return errors.Join(err, ctx.Err())
				}
				done(it, out, err)
				if j.failures.Load() >= giveUp {
					return fmt.Errorf("%w; the last answer: %w", ErrGaveUp, err)
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(items)
		links := linksSeen{}
		return j.tree.Walk(ctx, func(it *volume.Item) error {
			if it.Err != nil {
				done(it, outcomeOf(it.Err), it.Err)
				return nil
			}
			if links.again(it) {
				return nil
			}
			it.Hold()
			select {
			case items <- it:
				return nil
			case <-ctx.Done():
				it.Release()
				return ctx.Err()
			}
		})
	})
	err := g.Wait()
	for it := range items { // what an early end left over
		it.Release()
	}
	return err
}

// outcomeOf judges a place where the walk could not go on. What was renamed may be
// met by the next pass; what can't be read may not.
func outcomeOf(err error) Outcome {
	if errors.Is(err, volume.ErrGone) || errors.Is(err, volume.ErrMoved) {
		return Gone
	}
	return Failed
}

// linksSeen are the files with several links met in this pass.
type linksSeen map[inode]bool

type inode struct{ dev, ino uint64 }

// again reports whether the item is one more link of a file met before.
func (l linksSeen) again(it *volume.Item) bool {
	if it.Stat.Nlink < 2 {
		return false
	}
	id := inode{it.Stat.Dev, it.Stat.Ino}
	if l[id] {
		return true
	}
	l[id] = true
	return false
}

// sweep is one pass over the tree.
func (j *job) sweep(ctx context.Context, pass int) (*tally, error) {
	t := &tally{count: map[Outcome]int{}}
	err := j.each(ctx, j.file, func(it *volume.Item, out Outcome, err error) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.count[out]++
		if (out == Bad || out == Failed) && len(t.problems) < maxProblems {
			t.problems = append(t.problems, Problem{Path: it.Path, Outcome: out, Err: err})
		}
		j.emit(Event{Kind: "file", Path: it.Path, Outcome: out, Err: err, Pass: pass})
	})
	return t, err
}

// maxPasses ends a sweep of a tree that never rests.
const maxPasses = 100

// sweepAll is step 3: passes until one, started after the last change, finds
// nothing under the old key and misses nothing, or nothing more can be done. clean
// says which. A file that was renamed under a pass may have gone to a place which
// that pass had behind it, still under the old key: only a pass on which nothing
// vanished counts.
func (j *job) sweepAll(ctx context.Context, r *Report) (clean bool, err error) {
	for {
		before, err := j.moves(ctx)
		if err != nil {
			return false, err
		}
		r.Passes++
		j.emit(Event{Kind: "pass", Pass: r.Passes})
		t, err := j.sweep(ctx, r.Passes)
		r.Rewrapped += t.count[Rewrapped]
		r.Already, r.Bad, r.Failed, r.Gone, r.Problems = t.count[Already], t.count[Bad], t.count[Failed], t.count[Gone], t.problems
		if err != nil {
			return false, err
		}
		after, err := j.moves(ctx)
		if err != nil {
			return false, err
		}
		restless := r.Gone > 0 || before != after
		switch {
		case t.count[Rewrapped] == 0 && !(restless && r.Failed == 0):
			return r.Failed == 0, nil
		case r.Passes == maxPasses:
			r.Failed++
			r.Problems = append(r.Problems, Problem{Path: ".", Outcome: Failed, Err: fmt.Errorf("after %d passes: %w", maxPasses, ErrRestless)})
			return false, nil
		}
	}
}

func (j *job) moves(ctx context.Context) (uint64, error) {
	if j.o.Moves == nil {
		return 0, nil
	}
	return j.o.Moves(ctx)
}

// plan counts what is to be done. It changes nothing and calls no key service.
func (j *job) plan(ctx context.Context) (Plan, error) {
	p := Plan{To: j.o.To, From: j.old, Headers: map[string]int{}}
	from := map[string]int{}
	var mu sync.Mutex
	err := j.each(ctx, func(_ context.Context, it *volume.Item) (Outcome, error) {
		return j.survey(it, &mu, p.Headers, from)
	}, func(_ *volume.Item, out Outcome, _ error) {
		mu.Lock()
		defer mu.Unlock()
		switch out {
		case Empty, Gone:
			return
		case Bad, Failed:
			p.Bad++
		}
		p.Files++
	})
	if err != nil {
		return p, err
	}
	return p, j.price(&p, from)
}

func (j *job) survey(it *volume.Item, mu *sync.Mutex, headers, from map[string]int) (Outcome, error) {
	fd, out, err := open(it)
	if fd < 0 {
		return out, err
	}
	defer unix.Close(fd)
	_, h, src, out, err := j.look(fd)
	mu.Lock()
	defer mu.Unlock()
	if h != nil {
		for _, c := range h.Copies {
			headers[c.Key]++
		}
	}
	if src.label != "" {
		from[src.key]++
	}
	return out, err
}
