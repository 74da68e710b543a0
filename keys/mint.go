package keys

import (
	"context"
	"errors"
	"sync"
	"time"

	"kmsfs/crypt"
)

// Bounds on what one intermediate key is used for: whoever learns it can read all these
// files. An intermediate key serves one ring, that is one mount.
const (
	mintFiles = 4096             // data keys made from it
	mintAge   = time.Hour        // since it was made
	mintIdle  = 10 * time.Minute // since it was last used: then it is wiped
	// The next one is fetched ahead when so many files, or so much time, are left.
	mintAheadFiles = mintFiles / 8
	mintAheadTime  = mintAge / 10
	// mintPause is how long a failed fetch ahead is not repeated. One that somebody
	// waits for has the pool's pauses.
	mintPause = 5 * time.Second
)

// mint is a maker that makes data keys itself, from an intermediate key: one call to the
// key service yields thousands. The next one is fetched while the one in use still lasts,
// so a create waits for the key service when it is the first in a while, and no more.
// What fails then is the create's failure, as without a mint.
type mint struct {
	core     *wrapper
	base     context.Context
	deadline time.Duration

	mu      sync.Mutex
	now     *die        // guarded by mu; nil if there is none
	ahead   *die        // guarded by mu; the next one, if it was fetched already
	fetch   *mintFetch  // guarded by mu; under way
	gen     uint64      // guarded by mu; what an older generation fetched is wiped
	retryAt time.Time   // guarded by mu; until then nothing is fetched ahead
	sweeper *time.Timer // guarded by mu; nil while there is no key
	closed  bool        // guarded by mu
	made    int64       // guarded by mu; data keys that cost no call
}

// A die is the intermediate key that data keys are made from. All but its number is
// fixed.
type die struct {
	id   crypt.Identity
	key  *crypt.Key
	copy crypt.Copy
	born time.Time
	used time.Time // guarded by mint.mu
	next uint16    // guarded by mint.mu; the number of the next file
}

func (d *die) spent(now time.Time) bool {
	return d.next > mintFiles || elapsed(now, d.born) >= mintAge || elapsed(now, d.used) >= mintIdle
}

// ending reports whether it is time to fetch the next one.
func (d *die) ending(now time.Time) bool {
	return d.next > mintFiles-mintAheadFiles || elapsed(now, d.born) >= mintAge-mintAheadTime
}

func (d *die) wipe() {
	if d != nil {
		d.key.Wipe()
	}
}

// A mintFetch is a call for the next intermediate key. It belongs to nobody who waits
// for it, as in flight.
type mintFetch struct {
	done   chan struct{} // closed when err is set
	cancel func()
	tries  *attempts
	err    error // errDropped: it came to nothing, for a reason that is no failure
}

var errDropped = errors.New("the keys for new files were changed meanwhile")

func newMint(base context.Context, core *wrapper, deadline time.Duration) *mint {
	return &mint{core: core, base: base, deadline: deadline}
}

// make implements maker. Other keys than files' have no intermediate key.
func (m *mint) make(ctx context.Context, use crypt.Use) (*crypt.Fresh, error) {
	if use != crypt.UseFile {
		return m.core.make(ctx, use)
	}
	for {
		if ctx.Err() != nil {
			return nil, contextError(ctx, opGenerate, m.core.first())
		}
		d, number, fetch, err := m.take(time.Now())
		if err != nil {
			return nil, err
		}
		if fetch == nil {
			f, err := newFresh(d.id.Numbered(number), d.key, d.copy)
			if errors.Is(err, crypt.ErrWiped) {
				continue // dropped just now
			}
			return f, err
		}
		joinAttempts(ctx, fetch.tries)
		select {
		case <-fetch.done:
		case <-ctx.Done():
			return nil, contextError(ctx, opGenerate, m.core.first())
		}
		if fetch.err != nil && !errors.Is(fetch.err, errDropped) {
			return nil, fetch.err
		}
	}
}

// take hands out the next number of the intermediate key in use, or the fetch to wait
// for.
func (m *mint) take(now time.Time) (d *die, number uint16, fetch *mintFetch, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, 0, nil, newError(KindUnavailable, opGenerate, m.core.first(), errClosed)
	}
	m.expireLocked(now)
	if m.now == nil {
		m.fetchLocked()
		return nil, 0, m.fetch, nil
	}
	d = m.now
	number = d.next
	d.next++
	d.used = now
	m.made++
	if m.ahead == nil && d.ending(now) && !now.Before(m.retryAt) {
		m.fetchLocked()
	}
	return d, number, nil, nil
}

// expireLocked puts the next intermediate key in the place of one that is spent; the next
// one itself can have waited for too long, and another is then fetched ahead.
func (m *mint) expireLocked(now time.Time) {
	if m.ahead != nil && m.ahead.spent(now) {
		m.ahead.wipe()
		m.ahead = nil
	}
	for m.now != nil && m.now.spent(now) {
		m.now.wipe()
		m.now, m.ahead = m.ahead, nil
	}
}

func (m *mint) fetchLocked() {
	if m.fetch != nil {
		return
	}
	ctx, tries := withAttempts(m.base)
	ctx, cancel := context.WithTimeout(ctx, m.deadline)
	m.fetch = &mintFetch{done: make(chan struct{}), cancel: cancel, tries: tries}
	go m.run(ctx, m.fetch, m.gen)
}

func (m *mint) run(ctx context.Context, fetch *mintFetch, gen uint64) {
	defer fetch.cancel()
	d, err := m.core.makeDie(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	defer close(fetch.done)
	if gen != m.gen || m.closed {
		d.wipe()
		fetch.err = errDropped // who waits asks for another
		return
	}
	m.fetch = nil
	if err == nil { // what ends a lease does so first, and then drops what is here
		if err = m.core.leases.ended([]string{d.copy.Key}); err != nil {
			d.wipe()
		}
	}
	if err != nil {
		fetch.err, m.retryAt = err, time.Now().Add(mintPause)
		return
	}
	if m.now == nil {
		m.now = d
	} else {
		m.ahead = d
	}
	if m.sweeper == nil {
		m.sweeper = time.AfterFunc(mintIdle, m.sweep)
	}
}

// makeDie makes an intermediate key, under the first trusted key.
func (w *wrapper) makeDie(ctx context.Context) (*die, error) {
	id, err := crypt.NewIntermediate(w.volume, w.blockLog2)
	if err != nil {
		return nil, err
	}
	k, c, err := w.generate(ctx, &id)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &die{id: id, key: k, copy: c, born: now, used: now, next: 1}, nil
}

// sweep wipes what is spent also when nobody asks for it any more.
func (m *mint) sweep() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweeper = nil
	m.expireLocked(time.Now())
	if m.now != nil {
		m.sweeper = time.AfterFunc(mintIdle/10, m.sweep)
	}
}

// drop wipes the intermediate keys, answers on their way included. New files get new ones.
func (m *mint) drop() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gen++
	if m.fetch != nil {
		m.fetch.cancel()
	}
	m.now.wipe()
	m.ahead.wipe()
	m.now, m.ahead, m.fetch, m.retryAt = nil, nil, nil, time.Time{}
}

// holds reports whether there are intermediate keys, or will be.
func (m *mint) holds() bool {
	if m == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now != nil || m.fetch != nil
}

func (m *mint) close() {
	m.drop()
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	if m.sweeper != nil {
		m.sweeper.Stop()
	}
}

func (m *mint) addTo(s *Stats) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s.SharedHits += m.made
	for _, d := range []*die{m.now, m.ahead} {
		if d != nil {
			s.SharedKeys++
		}
	}
}
