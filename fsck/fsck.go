package fsck

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Keys opens the data key of a header; *keys.Ring does. It asks only keys that this
// client trusts.
type Keys interface {
	Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error)
}

// A Kind says what a finding is about.
type Kind string

// The kinds of findings.
const (
	Settings   Kind = "settings"               // kmsfs.toml or its backup
	Header     Kind = "header"                 // missing, malformed, or another volume's
	Key        Kind = "key"                    // no trusted key opens the data key that the header commits to
	End        Kind = "end"                    // the end is missing, torn, or does not authenticate
	Data       Kind = "data"                   // blocks do not authenticate
	SparseMark Kind = "sparse-mark"            // not this file's
	Name       Kind = "name"                   // not made for this directory
	Sidecar    Kind = "sidecar"                // holds a long name and has no entry
	DirID      Kind = "directory-id"           // missing, malformed or forged
	TwinFile   Kind = "duplicate-file-id"      // on another file too
	TwinDir    Kind = "duplicate-directory-id" // on another directory too
	Symlink    Kind = "symlink"                // its target does not decrypt
	Xattr      Kind = "xattr"                  // does not decrypt, or is not ours
	Access     Kind = "access"                 // could not be read, so was not checked
)

// A Level says how bad a finding is.
type Level string

// The levels.
const (
	Damage      Level = "damage"      // something is lost, altered, or not what it seems
	Untidy      Level = "untidy"      // nothing is lost, and a mount does not mind
	Unread      Level = "unread"      // not checked: the backing store refused
	Refused     Level = "refused"     // contents not checked: the key service refused
	Unavailable Level = "unavailable" // contents not checked: the key service did not answer
)

// A Span is a range of bytes of plaintext, from From up to To.
type Span struct{ From, To int64 }

// A Finding is one thing that is wrong with one entry.
type Finding struct {
	Kind   Kind
	Level  Level
	Path   string // plain as far as names can be read; "." is the root
	Stored string // the same in stored names; "" if that is not known
	Range  *Span  // the bytes that can't be read; nil if it is not about bytes
	Err    error
	Busy   bool   // on a live mount, in a file that was just written: it may be gone in a moment
	Did    string // what was done about it; "" = nothing
}

// Options say how to check.
type Options struct {
	Keys    Keys // nil: no data key is opened
	Data    bool // read every block; wants Keys
	Jobs    int
	Repair  bool // what loses nothing; the caller has the volume locked
	CutEnds bool // cut bad ends back to the last good block, which loses what is behind it; likewise
	// Quarantine takes the files whose header or contents can't be used; likewise.
	Quarantine *Quarantine
	// VolumeErr is why the volume's key did not open; nil if it did, or was not asked for.
	VolumeErr error
	// Live says whether somebody has the volume mounted, or had since the beginning.
	Live func() bool

	Finding  func(Finding)            // one at a time
	Progress func(files, bytes int64) // since the beginning; bytes of plaintext under --data
}

// A Report is what a check found and did.
type Report struct {
	Files    int64 `json:"files"` // regular files with contents; one with several links counts once
	Empty    int64 `json:"empty"`
	Dirs     int64 `json:"directories"`
	Symlinks int64 `json:"symlinks"`
	Others   int64 `json:"others"`   // devices, FIFOs, sockets
	Opened   int64 `json:"opened"`   // files whose data key was opened
	Bytes    int64 `json:"bytes"`    // of plaintext, read and authenticated
	Vanished int64 `json:"vanished"` // removed or renamed after they were listed

	// Findings that were not repaired, by level.
	Damage      int64 `json:"damage"`
	Untidy      int64 `json:"untidy"`
	Unread      int64 `json:"unread"`
	Refused     int64 `json:"refused"`
	Unavailable int64 `json:"unavailable"`
	// Findings that were dealt with.
	Repaired    int64 `json:"repaired"`
	Quarantined int64 `json:"quarantined"` // entries moved

	KeyErr error `json:"-"` // the last refusal of the key service
}

// Run checks a volume. Its error says why it could not go on; what is wrong with the
// volume is a Finding.
func Run(ctx context.Context, v *volume.Volume, o Options) (Report, error) {
	j, err := newJob(v, o)
	if err != nil {
		return Report{}, err
	}
	defer j.ids.close()
	j.settings()
	j.root()
	err = j.each(ctx, func(ctx context.Context, it *volume.Item) error { return j.item(ctx, it) })
	if err == nil {
		err = j.twins(ctx)
	}
	if err == nil {
		err = j.quarantine(ctx)
	}
	return j.summary(), err
}

// A job is one check.
type job struct {
	v     *volume.Volume
	o     Options
	links linksSeen
	ids   *idSort

	files, bytes atomic.Int64 // progress
	refusals     atomic.Int64 // of the key service, in a row

	mu     sync.Mutex
	report Report               // guarded by mu
	doomed map[uint64]condemned // guarded by mu; by inode: what goes into quarantine
}

// stopAsking is how many refusals in a row end the questions to the key service: the
// rest is checked without. One bad key never does that.
const stopAsking = 100

func newJob(v *volume.Volume, o Options) (*job, error) {
	if o.Jobs < 1 {
		o.Jobs = 1
	}
	if o.Finding == nil {
		o.Finding = func(Finding) {}
	}
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
	if o.Live == nil {
		o.Live = func() bool { return false }
	}
	if o.Data && o.Keys == nil || o.CutEnds && o.Keys == nil {
		return nil, errors.New("contents can't be checked without keys")
	}
	ids, err := newIDSort()
	return &job{v: v, o: o, ids: ids, doomed: map[uint64]condemned{}}, err
}

// each has several goroutines work on every entry of the tree.
func (j *job) each(ctx context.Context, work func(context.Context, *volume.Item) error) error {
	g, ctx := errgroup.WithContext(ctx)
	items := make(chan *volume.Item, 4*j.o.Jobs)
	for range j.o.Jobs {
		g.Go(func() error {
			for it := range items {
				err := work(ctx, it)
				it.Release()
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
		defer close(items)
		return j.v.Scan(ctx, func(it *volume.Item) error {
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

// tell reports a finding and counts it.
func (j *job) tell(f Finding) {
	j.mu.Lock()
	defer j.mu.Unlock()
	r := &j.report
	switch {
	case f.Did != "":
		r.Repaired++
	case f.Level == Damage:
		r.Damage++
	case f.Level == Untidy:
		r.Untidy++
	case f.Level == Unread:
		r.Unread++
	case f.Level == Refused:
		r.Refused++
	case f.Level == Unavailable:
		r.Unavailable++
	}
	j.o.Finding(f)
}

func (j *job) count(f func(*Report)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	f(&j.report)
}

func (j *job) summary() Report {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.report
}

func (j *job) progress(files, bytes int64) {
	j.o.Progress(j.files.Add(files), j.bytes.Add(bytes))
}

// unreachable is the level of a failure that says nothing about the file: the key
// can't be had now, by this client.
func unreachable(err error) (Level, bool) {
	for _, is := range []error{crypt.ErrKeyDenied, crypt.ErrKeyDisabled, crypt.ErrKeyNotFound} {
		if errors.Is(err, is) {
			return Refused, true
		}
	}
	for _, is := range []error{crypt.ErrKeyUnavailable, crypt.ErrKeyTimeout} {
		if errors.Is(err, is) {
			return Unavailable, true
		}
	}
	return "", false
}

// open asks for a file's data key.
func (j *job) open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	if j.refusals.Load() >= stopAsking {
		j.mu.Lock()
		defer j.mu.Unlock()
		return nil, fmt.Errorf("not asked any more after %d failures in a row, the last of which was: %w", stopAsking, j.report.KeyErr)
	}
	s, err := j.o.Keys.Open(ctx, h)
	if _, is := unreachable(err); err != nil && is {
		j.refusals.Add(1)
		j.count(func(r *Report) { r.KeyErr = err })
		return nil, err
	}
	j.refusals.Store(0)
	return s, err
}
