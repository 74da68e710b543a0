package rekey

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// tree is what rekey needs of a volume; *volume.Volume is one. Its own tests
// put failing ones in between.
type tree interface {
	Settings() volume.Settings
	Update(func(*volume.Settings) error) error
	Walk(context.Context, func(*volume.Item) error) error
	ParseHeader(raw []byte) (*crypt.Header, error)
	Fd() int
}

// A job is one run.
type job struct {
	tree  tree
	rw    Rewrapper
	o     Options
	limit *rate.Limiter

	old      []string // the keys that are to leave
	blobSize int      // length of a blob under the new key; set by prepare
	calls    atomic.Int64
	failures atomic.Int64 // refusals of the key service since its last success

	events sync.Mutex // Event hears one thing at a time
}

// Run moves every header of the volume to o.To. The report is good also beside
// an error. A run that ended early, for whatever reason, is finished by running
// it again. err == nil and !Report.Done means that some files could not be moved,
// and that the old key was therefore kept.
func Run(ctx context.Context, v *volume.Volume, rw Rewrapper, o Options) (Report, error) {
	return run(ctx, v, rw, o)
}

func run(ctx context.Context, t tree, rw Rewrapper, o Options) (r Report, err error) {
	if o.Jobs < 1 {
		o.Jobs = 16
	}
	j := &job{tree: t, rw: rw, o: o, limit: rate.NewLimiter(rate.Inf, 1)}
	if o.MaxRPS > 0 {
		j.limit = rate.NewLimiter(rate.Limit(o.MaxRPS), 1)
	}
	defer func() { r.Calls = int(j.calls.Load()) }()
	if err := j.resolve(); err != nil {
		return r, err
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
	clean := false
	err := j.step("sweep", func() (err error) {
		clean, err = j.sweepAll(ctx, r)
		return err
	})
	if err != nil || !clean {
		return err
	}
	if err := j.step("sync", j.sync); err != nil {
		return err
	}
	if err := j.step("close", j.close); err != nil {
		return err
	}
	r.Retired = j.old
	if err := j.announce(ctx); err != nil {
		return err
	}
	r.Done = true
	return nil
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

// sync is step 4: every header written so far is on disk before the old key is
// dropped. (Each was synced on its own; this covers what other processes wrote.)
func (j *job) sync() error {
	fd, err := unix.Openat(j.tree.Fd(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the backing directory to sync it: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("syncing the backing store: %w", err)
	}
	return nil
}

// price fills in routes, calls and price.
func (j *job) price(p *Plan, from map[string]int) error {
	for _, key := range slices.Sorted(maps.Keys(from)) {
		route, err := j.rw.Route(key, j.o.To)
		if err != nil {
			return fmt.Errorf("moving from %s to %s: %w", key, j.o.To, err)
		}
		p.Routes = append(p.Routes, PlanRoute{From: key, Route: route, Files: from[key]})
		p.Change += from[key]
		p.Calls += from[key] * route.Calls
	}
	for _, key := range j.old { // the volume key
		if route, err := j.rw.Route(key, j.o.To); err == nil {
			p.Calls += route.Calls
		}
	}
	p.Price = float64(p.Calls) * pricePerCall
	return nil
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
