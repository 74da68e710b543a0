package rekey

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// tree is what rekey needs of a volume; *volume.Volume is one. Its own tests
// put failing ones in between.
type tree interface {
	Settings() volume.Settings
	Header() *crypt.Header
	Update(func(*volume.Settings) error) error
	Walk(context.Context, func(*volume.Item) error) error
	WalkBelow(context.Context, string, func(*volume.Item) error) (volume.Place, error)
	ParseHeader(raw []byte) (*crypt.Header, error)
	Reload() (changed bool, err error)
	Join(kind string) (leave func(), err error)
	OpenSync() (*volume.Syncer, error)
}

// A job is one run.
type job struct {
	tree tree
	rw   Rewrapper
	o    Options

	old      []string     // the keys that are to leave
	blobSize int          // length of a blob under the new key; set by prepare
	proven   crypt.Copy   // of the volume key: what makes up for the one that goes; set by prepare
	heard    Watch        // since the beginning of the last pass; nil before the first
	told     bool         // the mount that is heard has adopted the key list
	fitted   atomic.Int64 // size of the largest header that was set on a file without other attributes
	verified atomic.Int64
	failures atomic.Int64 // refusals of the key service since its last success

	events sync.Mutex // Event hears one thing at a time
}

func newJob(t tree, rw Rewrapper, o Options) *job {
	if o.Jobs < 1 {
		o.Jobs = 16
	}
	o.Jobs = min(o.Jobs, itemsLimit())
	return &job{tree: t, rw: rw, o: o}
}

// itemsLimit is how many files may be worked on, and as many wait for it, without
// eating all descriptors: each may keep its directory open, and its own.
func itemsLimit() int {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 1
	}
	return int(max(1, min(limit.Cur, 1<<20)/6))
}

// Run does to every header of the volume what o.Action says. The report is good
// also beside an error. A run that ended early, for whatever reason, is finished by
// running it again. err == nil and !Report.Done means that some files could not be
// dealt with, and that the old key was therefore kept.
func Run(ctx context.Context, v *volume.Volume, rw Rewrapper, o Options) (Report, error) {
	return run(ctx, v, rw, o)
}

func run(ctx context.Context, t tree, rw Rewrapper, o Options) (r Report, err error) {
	j := newJob(t, rw, o)
	before := rw.Calls()
	defer func() { r.Calls, r.Verified = rw.Calls()-before, int(j.verified.Load()) }()
	if err := j.resolve(); err != nil {
		return r, err
	}
	if !o.Shard.whole() {
		if err := j.prepared(); err != nil {
			return r, err
		}
	}
	if r.Plan, err = j.plan(ctx); err != nil {
		return r, fmt.Errorf("planning: %w", err)
	}
	if o.DryRun {
		return r, nil
	}
	if o.Confirm != nil {
		if err := o.Confirm(r.Plan); err != nil {
			return r, err
		}
	}
	if !o.apart {
		leave, err := t.Join(o.Action.String() + " " + j.o.Key)
		if err != nil {
			return r, err
		}
		defer leave()
	}
	// Opened before the first change: who opens it later may miss an error of theirs.
	sync, err := t.OpenSync()
	if err != nil {
		return r, err
	}
	defer sync.Close()
	if !o.Shard.whole() {
		return r, j.part(ctx, &r, sync)
	}
	defer j.deafen()
	return r, j.steps(ctx, &r, sync)
}

// steps are the five of the package's documentation, in their order.
func (j *job) steps(ctx context.Context, r *Report, sync *volume.Syncer) error {
	if err := j.step("prepare", func() error { return j.prepare(ctx) }); err != nil {
		return err
	}
	if j.o.Action != Remove || j.trusted(j.o.Key) != "" { // a planted key is nothing to be adopted
		if err := j.announce(ctx); err != nil {
			return err
		}
	}
	if j.o.Prepare {
		r.Done = true
		return nil
	}
	if clean, err := j.settle(ctx, r, sync); err != nil || !clean {
		return err
	}
	switch j.o.Action {
	case Move, Remove:
		if err := j.step("close", j.close); err != nil {
			return err
		}
		r.Retired = j.old
	case Add:
		if err := j.added(); err != nil {
			return err
		}
	}
	// Also if no key left: a live mount has to learn under which keys its open files
	// are now, for these decide when they are closed.
	if err := j.announce(ctx); err != nil {
		return err
	}
	r.Done = true
	return nil
}

// settle sweeps and syncs, again if a mount came or went behind the last pass: it may
// have made files, or moved some, of which nobody has heard.
func (j *job) settle(ctx context.Context, r *Report, sync *volume.Syncer) (clean bool, err error) {
	for {
		err := j.step("sweep", func() (err error) {
			clean, err = j.sweepAll(ctx, r)
			return err
		})
		if err != nil || !clean {
			return false, err
		}
		if err := j.step("sync", sync.Sync); err != nil {
			return false, err
		}
		if _, err := j.heard.Moved(ctx); err == nil || j.o.Action == Refresh {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		j.told = false
	}
}

// part is what one of many workers does: its share of the sweep, made durable.
func (j *job) part(ctx context.Context, r *Report, sync *volume.Syncer) error {
	clean := false
	err := j.step("sweep", func() (err error) {
		clean, err = j.sweepPart(ctx, r)
		return err
	})
	if err == nil {
		err = j.step("sync", sync.Sync)
	}
	r.Done = err == nil && clean
	return err
}

// announce tells the client's pin, and then live mounts, of the key list on disk.
func (j *job) announce(ctx context.Context) error {
	if j.o.Pin != nil {
		if err := j.step("pin", func() error { return j.o.Pin(j.tree.Settings().Keys) }); err != nil {
			return err
		}
	}
	if j.o.Reload == nil {
		return nil
	}
	return j.step("reload", func() error { return j.reload(ctx) })
}

func (j *job) reload(ctx context.Context) error {
	if j.o.Reload == nil {
		return nil
	}
	if err := j.o.Reload(ctx, j.old); err != nil {
		return fmt.Errorf("%w: %w", ErrReload, err)
	}
	return nil
}

// hear begins to listen to the mount, if there is one, for a pass. It is asked to
// adopt the key list after that: one that comes later is noticed, and makes the pass
// count for nothing.
func (j *job) hear(ctx context.Context) (err error) {
	j.deafen()
	j.heard = unwatched{}
	if j.o.Watch != nil {
		if j.heard, err = j.o.Watch(ctx); err != nil {
			j.heard = unwatched{}
			return fmt.Errorf("asking the live mount what it moves: %w", err)
		}
	}
	if j.told {
		return nil
	}
	j.told = true
	return j.reload(ctx)
}

func (j *job) deafen() {
	if j.heard != nil {
		j.heard.Close()
	}
}

// unwatched is the Watch of a volume that nobody has mounted.
type unwatched struct{}

func (unwatched) Mounted() bool                         { return false }
func (unwatched) Moved(context.Context) ([]Spot, error) { return nil, nil }
func (unwatched) Close()                                {}

func (j *job) step(name string, f func() error) error {
	if err := j.at("before-" + name); err != nil {
		return err
	}
	j.emit(Event{Kind: "step", Step: name})
	if err := f(); err != nil {
		return err
	}
	return j.at("after-" + name)
}

func (j *job) emit(e Event) {
	if j.o.Event != nil {
		j.events.Lock()
		defer j.events.Unlock()
		j.o.Event(e)
	}
}

// A crash is what tests inject: it ends the run where it stands.
type crash struct{ point string }

func (c crash) Error() string { return "crash at " + c.point }

func crashed(err error) bool {
	var c crash
	return errors.As(err, &c)
}

func (j *job) at(point string) error {
	if j.o.fault == nil {
		return nil
	}
	return j.o.fault(point)
}
