package rekey

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

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
	WalkBelow(context.Context, string, func(*volume.Item) error) (dir bool, err error)
	ParseHeader(raw []byte) (*crypt.Header, error)
	Sync() error
}

// A job is one run.
type job struct {
	tree tree
	rw   Rewrapper
	o    Options

	old      []string     // the keys that are to leave
	blobSize int          // length of a blob under the new key; set by prepare
	fitted   atomic.Int64 // size of the largest header that was set on a file without other attributes
	calls    atomic.Int64
	verified atomic.Int64
	failures atomic.Int64 // refusals of the key service since its last success

	events sync.Mutex // Event hears one thing at a time
}

func newJob(t tree, rw Rewrapper, o Options) *job {
	if o.Jobs < 1 {
		o.Jobs = 16
	}
	return &job{tree: t, rw: rw, o: o}
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
	defer func() { r.Calls, r.Verified = int(j.calls.Load()), int(j.verified.Load()) }()
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
	if !o.Shard.whole() {
		return r, j.part(ctx, &r)
	}
	return r, j.steps(ctx, &r)
}

// steps are the five of the package's documentation, in their order.
func (j *job) steps(ctx context.Context, r *Report) error {
	if err := j.step("prepare", func() error { return j.prepare(ctx) }); err != nil {
		return err
	}
	if err := j.announce(ctx); err != nil {
		return err
	}
	if j.o.Prepare {
		r.Done = true
		return nil
	}
	clean := false
	err := j.step("sweep", func() (err error) {
		clean, err = j.sweepAll(ctx, r)
		return err
	})
	if err != nil || !clean {
		return err
	}
	if err := j.step("sync", j.tree.Sync); err != nil {
		return err
	}
	if len(j.old) > 0 {
		if err := j.step("close", j.close); err != nil {
			return err
		}
		r.Retired = j.old
		if err := j.announce(ctx); err != nil {
			return err
		}
	}
	r.Done = true
	return nil
}

// part is what one of many workers does: its share of the sweep, made durable.
func (j *job) part(ctx context.Context, r *Report) error {
	clean := false
	err := j.step("sweep", func() (err error) {
		clean, err = j.sweepPart(ctx, r)
		return err
	})
	if err == nil {
		err = j.step("sync", j.tree.Sync)
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
	return j.step("reload", func() error {
		if err := j.o.Reload(ctx); err != nil {
			return fmt.Errorf("%w: %w", ErrReload, err)
		}
		return nil
	})
}

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
