package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"kmsfs/rekey"
	"kmsfs/volume"
)

// A mountWatch hears what the live mount of a volume moves in the backing tree while
// somebody goes over that, or makes sure that there is no mount. It asks the mount
// every second by itself, since a mount that is not asked hangs up, and keeps no end
// of paths.
type mountWatch struct {
	volume *volume.Volume
	seen   volume.Sighting // when the watch began
	conn   *net.UnixConn   // to the mount; nil if nobody had the volume mounted

	stop    context.CancelFunc // ends the asking
	polling sync.WaitGroup

	mu     sync.Mutex              // held over a request, too
	moved  map[rekey.Spot]struct{} // guarded by mu
	bytes  int                     // guarded by mu; of moved
	lost   bool                    // guarded by mu; some of what was moved is not known
	broken error                   // guarded by mu; why the watch is worth nothing any more
}

var (
	// errMountChanged: a mount came, went, or can't be heard any more.
	errMountChanged = errors.New("the volume was mounted or unmounted meanwhile, or its mount can't be heard any more")
	// errMovesLost: the mount moved more than it, or we, can remember.
	errMovesLost = errors.New("the live mount moved more than could be noted")
)

const (
	watchPoll     = time.Second
	watchMaxBytes = 128 << 20 // of paths kept
	watchPathCost = 64        // of each, besides its bytes
)

// watchMounts begins to hear what is moved in the volume id in dir: all that moves
// after it has returned.
func watchMounts(ctx context.Context, dir, id string) (*mountWatch, error) {
	v, err := volume.Open(dir)
	if err != nil {
		return nil, err
	}
	w := &mountWatch{volume: v, stop: func() {}, moved: map[rekey.Spot]struct{}{}}
	err = askMount(ctx, func() (*volume.Holder, error) {
		w.seen, err = v.Look()
		return w.seen.Holder, err
	}, func(h *volume.Holder) error {
		w.conn, err = callMount(ctx, id, h, controlRequest{Op: "moves"}, controlIdle)
		return err
	})
	if err != nil {
		v.Close()
		return nil, err
	}
	if w.conn != nil {
		var life context.Context
		life, w.stop = context.WithCancel(context.WithoutCancel(ctx))
		w.polling.Go(func() { w.poll(life) })
	}
	return w, nil
}

// Mounted reports whether a mount is being watched: then every change comes through
// it.
func (w *mountWatch) Mounted() bool { return w.conn != nil }

// Moved returns, once, where each thing that the mount moved since the last call
// stood after its move. Without a mount
// there are none. An error says that moves may have been missed since the last call.
// Unless it is errMovesLost, the watch is of no more use: it has to be closed, and
// another made.
func (w *mountWatch) Moved(ctx context.Context) ([]rekey.Spot, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refreshLocked(ctx)
	if w.broken != nil {
		return nil, w.broken
	}
	list, lost := slices.SortedFunc(maps.Keys(w.moved), func(a, b rekey.Spot) int { return cmp.Compare(a.Path, b.Path) }), w.lost
	w.moved, w.bytes, w.lost = map[rekey.Spot]struct{}{}, 0, false
	if lost {
		return nil, errMovesLost
	}
	return list, nil
}

// Close ends the watch.
func (w *mountWatch) Close() {
	w.stop()
	if w.conn != nil {
		w.conn.Close()
	}
	w.polling.Wait()
	w.volume.Close()
}

func (w *mountWatch) poll(ctx context.Context) {
	tick := time.NewTicker(watchPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.mu.Lock()
		w.refreshLocked(ctx)
		w.mu.Unlock()
	}
}

// refreshLocked brings what is known up to date.
func (w *mountWatch) refreshLocked(ctx context.Context) {
	if w.broken != nil {
		return
	}
	err := w.drainLocked(ctx)
	if w.conn == nil {
		err = w.stillUnmounted()
	}
	if err != nil {
		w.broken = err
		w.moved = nil
	}
}

// stillUnmounted makes sure that nobody has the volume mounted, nor had since the
// watch began.
func (w *mountWatch) stillUnmounted() error {
	s, err := w.volume.Look()
	if err != nil {
		return fmt.Errorf("%w: %w", errMountChanged, err)
	}
	if s.Holder != nil || s.Session != w.seen.Session {
		return errMountChanged
	}
	return nil
}

// drainLocked asks the mount for everything that it has noted.
func (w *mountWatch) drainLocked(ctx context.Context) error {
	for more := w.conn != nil; more; {
		r, err := request(ctx, w.conn, controlRequest{Op: "moves"}, controlIdle)
		if err != nil {
			return fmt.Errorf("%w: %w", errMountChanged, err)
		}
		w.lost = w.lost || r.Lost
		for _, m := range r.Moves {
			w.keepLocked(rekey.Spot{Path: string(m.Path), Ino: m.Ino})
		}
		more = r.More
	}
	return nil
}

func (w *mountWatch) keepLocked(m rekey.Spot) {
	if _, again := w.moved[m]; again {
		return
	}
	if w.bytes += len(m.Path) + watchPathCost; w.bytes > watchMaxBytes {
		w.lost = true
	}
	if w.lost { // then they are of no use to anybody
		clear(w.moved)
		return
	}
	w.moved[m] = struct{}{}
}
