package fs

import (
	"cmp"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"kmsfs/volume"
)

// How long things may stay undone. sync(2) and syncfs(2) on a FUSE mount don't
// reach the daemon, so it syncs the backing store by itself.
const (
	tick       = time.Second
	syncQuiet  = 5 * time.Second  // after the last change
	syncBusy   = 30 * time.Second // while changes go on
	settleWait = 30 * time.Second // gaps that writes left become zeros after this
)

// upkeep does in the background what no request waits for.
type upkeep struct {
	fs      *fileSystem
	changes atomic.Uint64
	// disk is one descriptor for the whole mount: a new one would not hear of an error
	// that somebody else's syncfs(2) was told. nil if it could not be had yet.
	disk syncer
	// err is of the first sync that failed; of run, and then of finish. Linux takes what
	// it could not write for written, so no later sync makes good for it.
	err error
	// torn are files that finish closed though their end was in memory only.
	torn map[fileID]bool
	// since is the time that Synced was told last, or the start; of run, and then of finish.
	since   time.Time
	stop    chan struct{}
	stopped sync.WaitGroup
}

// A syncer is a descriptor of the backing store.
type syncer interface {
	Sync() error // everything that was written so far
	Close()
}

// changed notes that the backing store was changed.
func (u *upkeep) changed() { u.changes.Add(1) }

func (u *upkeep) start() {
	u.stop = make(chan struct{})
	u.since = time.Now()
	_ = u.openDisk() // the next sync tries again
	u.stopped.Add(1)
	go u.run()
}

func (u *upkeep) end() {
	close(u.stop)
	u.stopped.Wait()
}

func (u *upkeep) run() {
	defer u.stopped.Done()
	t := time.NewTicker(tick)
	defer t.Stop()
	var seen, synced uint64 // changes at the last tick, and at the last sync
	var quiet, dirty time.Duration
	looked := time.Now()
	for {
		select {
		case <-u.stop:
			return
		case <-u.fs.opts.Tails.Full():
			u.sync()
			continue
		case <-t.C:
		}
		if since, back := setBack(u.since, time.Now(), time.Since(looked)); back {
			u.synced(since)
		}
		looked = time.Now()
		now := u.changes.Load()
		quiet += tick
		dirty += tick
		if now != seen {
			quiet, seen = 0, now
		}
		if now == synced {
			dirty = 0
		} else if quiet >= syncQuiet || dirty >= syncBusy {
			u.sync()
			synced, dirty = now, 0
		}
		u.settle(time.Now())
	}
}

// sync makes everything durable.
func (u *upkeep) sync() {
	since := time.Now()
	end, whole := u.beginSync()
	err := u.openDisk()
	if err == nil {
		err = u.disk.Sync()
	}
	end(err)
	if err != nil {
		u.fs.log.trouble("syncing the backing store", u.fs.root.id.ino, err)
		u.err = cmp.Or(u.err, err)
	} else if whole && u.err == nil {
		u.synced(since)
	}
	u.fs.stats.syncs.Add(1)
}

func (u *upkeep) openDisk() (err error) {
	if u.disk == nil {
		u.disk, err = u.fs.opts.openSync()
	}
	return err
}

func (u *upkeep) synced(since time.Time) {
	u.since = since
	if u.fs.opts.Synced != nil {
		u.fs.opts.Synced(since)
	}
}

// setBack says that the clock was set back behind a time, and what is no later than the
// stamps of files since then. The clock was looked at before so long ago.
func setBack(since, now time.Time, ago time.Duration) (time.Time, bool) {
	now = now.Round(0) // without the monotonic clock, which Before would go by
	return now.Add(-ago), now.Before(since.Round(0))
}

// beginSync says of every file that it is about to be made durable; but not of those
// that are in use just now, or whose end on disk is a torn one. whole says that there is
// none of these: else the time goes on that a look after an unclean end goes by.
func (u *upkeep) beginSync() (end func(error), whole bool) {
	var ends []func(error)
	whole = len(u.torn) == 0
	for _, f := range u.fs.files.allAnd(func(inUse func(fileID) bool) {
		ends = append(ends, u.fs.opts.Tails.BeginRest(func(i volume.Inode) bool {
			id := fileID{i.Dev, i.Ino, i.Born}
			return inUse(id) || u.torn[id]
		}))
	}) {
		if v := f.view.Load(); v != nil {
			if end := v.TryBeginSync(); end != nil {
				ends = append(ends, end)
			}
			whole = whole && !v.Torn()
		}
		u.fs.files.release(f)
	}
	// The rest comes last: it wakes who waits for room.
	return func(err error) {
		for i := len(ends) - 1; i >= 0; i-- {
			ends[i](err)
		}
	}, whole
}

// settle settles files whose gaps have waited long enough.
func (u *upkeep) settle(now time.Time) {
	for _, f := range u.fs.files.all() {
		f.settleOld(now)
		u.fs.files.release(f)
	}
}

func (f *file) settleOld(now time.Time) {
	v := f.view.Load()
	if v == nil || f.sealErr() != nil {
		return
	}
	if !v.Pending() {
		if f.kept.Swap(false) {
			f.fs.files.release(f) // not the last: our caller has it
		}
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gaps.IsZero() {
		f.gaps = now
		return
	}
	if now.Sub(f.gaps) < settleWait {
		return
	}
	if err := f.settleLocked(v); err != nil {
		f.fs.log.trouble("writing the gaps of a file", f.id.ino, err)
	}
}

// finish settles, syncs and closes what is still open when the mount is gone and
// no request is left.
func (u *upkeep) finish() {
	var unsettled error
	u.torn = map[fileID]bool{}
	u.fs.files.drain(func(f *file) {
		v := f.view.Load()
		if v == nil {
			return
		}
		if v.Pending() {
			if err := f.settleNow(v); err != nil {
				u.fs.log.trouble("writing the gaps of a file", f.id.ino, err)
				unsettled = err
			}
		}
		if v.Torn() {
			u.torn[f.id] = true
		}
		if unused := v.Unprime(); unused != nil {
			u.fs.keys.Return(unused)
		}
	})
	u.fs.orphans.drain()
	if !u.fs.opts.ReadOnly {
		u.sync()
		u.err = errors.Join(u.err, unsettled)
	}
	if u.disk != nil {
		u.disk.Close()
	}
}
