package headers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
	"kmsfs/volume"
)

// Options say how to import.
type Options struct {
	Keys    Keys   // nil: what is written is not verified
	Require bool   // a key that can't be had fails its file
	Force   bool   // replace other valid headers and ids, after saving them
	SaveTo  string // the file that they are saved in; must not exist
	DryRun  bool   // only plan, and verify
	Lost    bool   // the volume was opened by OpenLost: kmsfs.toml is restored first
	Jobs    int    // records at a time; 0 = 16

	// Confirm sees the plan before anything is changed; an error ends the import. It
	// is not asked if there is nothing to change.
	Confirm func(Report) error
	// Event hears of every record, one at a time; planned is of the plan, and what
	// is told there is told again.
	Event func(e Event, planned bool)
}

// A Report is what an import did, or would do.
type Report struct {
	Files, Dirs Counts
	Settings    bool   // kmsfs.toml was restored
	Unverified  int    // headers written without knowing that they belong there
	Unreachable error  // why a key could not be had; the first of such failures
	Saved       string // where what was replaced is kept; "" if nothing was
	Durable     bool   // all that was written has reached the disk
	KeysChanged bool   // kmsfs.toml got another list of keys meanwhile
}

// Changes counts what is written.
func (r *Report) Changes() (n int) {
	for _, c := range []Counts{r.Files, r.Dirs} {
		for out, k := range c {
			if out.changes() {
				n += k
			}
		}
	}
	if r.Settings {
		n++
	}
	return n
}

// Problems counts the records that were not put where they belong.
func (r *Report) Problems() (n int) {
	for _, c := range []Counts{r.Files, r.Dirs} {
		for out, k := range c {
			if out.problem() {
				n += k
			}
		}
	}
	return n
}

// A job is one import.
type job struct {
	v      *volume.Volume
	src    *Source
	o      Options
	listed []string // keys of kmsfs.toml
	act    bool     // writing; else planning

	refusals   atomic.Int64 // of the key service since its last success
	unverified atomic.Int64

	mu     sync.Mutex
	report Report // guarded by mu while workers run

	saveFile *durable.File
	saves    *Writer
}

// Import puts back what src keeps into the volume v, which is of the same id. The
// report is good also beside an error. It returns nil only after what was written
// is durable; single failures are in the report.
func Import(ctx context.Context, v *volume.Volume, src *Source, o Options) (Report, error) {
	if o.Jobs < 1 {
		o.Jobs = 16
	}
	j := &job{v: v, src: src, o: o, listed: v.Settings().Keys}
	if src.Volume != v.ID() {
		return j.report, fmt.Errorf("the export is of volume %s, this is %s: %w", src.Volume, v.ID(), crypt.ErrForeign)
	}
	defer j.dropSave()
	err := j.run(ctx)
	return j.report, err
}

func (j *job) run(ctx context.Context) error {
	if err := j.plan(ctx); err != nil || j.o.DryRun {
		return err
	}
	// With nothing to change it goes on all the same: a run before this one may have
	// been killed before it synced.
	if j.o.Confirm != nil && j.report.Changes() > 0 {
		if err := j.o.Confirm(j.report); err != nil {
			return err
		}
	}
	return j.apply(ctx)
}

// plan finds out what is to be done, and saves what will be replaced.
func (j *job) plan(ctx context.Context) error {
	j.begin()
	if j.o.DryRun {
		return j.pass(ctx, j.o.Jobs, &savedReader{})
	}
	return j.pass(ctx, 1, &savedReader{}) // one at a time: saves are in the order of the source
}

// begin starts the counts of a pass.
func (j *job) begin() {
	saved := j.report.Saved
	j.report = Report{Files: Counts{}, Dirs: Counts{}, Saved: saved, Settings: j.o.Lost}
	j.unverified.Store(0)
}

// apply writes. What is written when it ends early is made durable as well.
func (j *job) apply(ctx context.Context) error {
	if err := j.commitSave(); err != nil {
		return err
	}
	saves, err := j.openSaves()
	if err != nil {
		return fmt.Errorf("reading what was saved: %w", err)
	}
	defer saves.close()
	j.begin()
	j.act = true
	if j.o.Lost {
		if err := j.v.RestoreSettings(); err != nil {
			return err
		}
	}
	err = j.pass(ctx, j.o.Jobs, saves)
	if err = errors.Join(err, j.makeDurable()); err != nil {
		return err
	}
	if _, err := j.v.Reload(); err != nil {
		return err
	}
	j.report.KeysChanged = !slices.Equal(j.listed, j.v.Settings().Keys)
	return nil
}

// pass goes through the source once.
func (j *job) pass(ctx context.Context, jobs int, saves *savedReader) error {
	g, ctx := errgroup.WithContext(ctx)
	tasks := make(chan task, jobs)
	for range jobs {
		g.Go(func() error {
			for t := range tasks {
				if err := j.do(ctx, t); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(tasks)
		return j.src.each(ctx, func(rec *Record) error {
			saved, err := saves.of(rec)
			if err != nil {
				return fmt.Errorf("reading what was saved: %w", err)
			}
			select {
			case tasks <- task{rec, saved}:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	err := g.Wait()
	j.report.Unverified = int(j.unverified.Load())
	return err
}

// do handles one record and counts it. Its error ends the pass.
func (j *job) do(ctx context.Context, t task) error {
	out, err := j.one(ctx, t)
	if ctx.Err() != nil && err != nil {
		return ctx.Err()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	counts := j.report.Files
	if t.rec.Kind == KindDir {
		counts = j.report.Dirs
	}
	counts[out]++
	if j.o.Event != nil {
		j.o.Event(Event{Kind: t.rec.Kind, Path: t.rec.Path, Outcome: out, Err: err}, !j.act)
	}
	if j.o.Require && err != nil && j.refusals.Load() >= giveUp {
		return fmt.Errorf("%w; the last answer: %w", ErrGaveUp, err)
	}
	return nil
}

// noteUnreachable remembers the first reason why a key could not be had.
func (j *job) noteUnreachable(err error) {
	j.refusals.Add(1)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.report.Unreachable == nil {
		j.report.Unreachable = err
	}
}

// makeDurable syncs every attribute that was written, in one call.
func (j *job) makeDurable() error {
	fd, err := unix.Openat(j.v.Fd(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the backing directory to sync it: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("syncing the backing store: %w", err)
	}
	j.report.Durable = true
	return nil
}
