package keys

import (
	"context"
	"errors"
	"sync"
	"time"

	"kmsfs/crypt"
)

// Whoever walks a directory opens file after file, and would wait for KMS at each. So
// package fs foretells the next ones, and their data keys are decrypted before they are
// opened. Such a Decrypt is a guess, and must harm nobody who needs a key now: it is one
// attempt, it is not made while KMS throttles anybody, is silent, or refuses, and what
// comes of it is nobody's error: an open that meets a guess under way waits for it, and
// asks for itself if it fails.
const (
	firstRest = time.Second      // without a guess, after KMS has throttled or refused one
	maxRest   = 30 * time.Second // it doubles each time
	// guessedShare of the cache may hold keys that nobody has asked for yet.
	guessedShare = 2
)

// ErrNotAhead says that nothing is decrypted ahead at the moment.
var ErrNotAhead = errors.New("data keys are not decrypted ahead now")

// ahead decides when a data key may be decrypted that nobody has asked for.
type ahead struct {
	max int // at once; 0 = none ever

	mu       sync.Mutex
	limit    int           // guarded by mu; at once now: 1 after a rest, and one more with each success
	inflight int           // guarded by mu
	rest     time.Duration // guarded by mu; the last one
	until    time.Time     // guarded by mu; no guess before

	issued, failed int64 // guarded by mu
}

func newAhead(most int) *ahead { return &ahead{max: max(most, 0), limit: max(most, 0)} }

// begin takes one of the places, if there is one.
func (a *ahead) begin() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.inflight >= a.limit || time.Now().Before(a.until) {
		return false
	}
	a.inflight++
	a.issued++
	return true
}

// none gives the place back: no guess was made.
func (a *ahead) none() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inflight--
	a.issued--
}

// end gives the place back and learns from what came of the guess.
func (a *ahead) end(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inflight--
	if err == nil {
		a.limit, a.rest = min(a.limit+1, a.max), 0
		return
	}
	a.failed++
	switch kindOf(err) {
	case KindInterrupted, KindBadBlob, KindIncorrectKey: // the file's fault, or nobody's
	default:
		a.restLocked()
	}
}

// throttled hears of every request that KMS refused for its rate, whoever made it.
func (a *ahead) throttled() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.restLocked()
}

func (a *ahead) restLocked() {
	now := time.Now()
	if now.Before(a.until) {
		return // it was sent before we knew
	}
	a.rest = min(max(2*a.rest, firstRest), maxRest)
	a.until, a.limit = now.Add(a.rest), min(1, a.max)
}

func (a *ahead) addTo(s *Stats) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Ahead, s.AheadFailed = a.issued, a.failed
}

// Prefetches reports whether Prefetch is of any use: it is asked for, and opening a data
// key can take long. A local key opens one sooner than a guess is made.
func (r *Ring) Prefetches() bool {
	if r.ahead.max == 0 {
		return false
	}
	for _, key := range r.core.keys() {
		if !IsLocal(key) {
			return true
		}
	}
	return false
}

// Prefetch opens a header's data key so that Open finds it at hand, within the bounds of
// the cache. It reports whether it had to ask for it. ErrNotAhead, or the key service's
// error, means that it is no use to go on at the moment.
func (r *Ring) Prefetch(ctx context.Context, h *crypt.Header) (asked bool, err error) {
	list, err := r.core.check(h)
	if err != nil {
		return false, err
	}
	if err := r.leases.ended(governing(list)); err != nil {
		return false, err
	}
	if r.cache.has(&h.Identity) {
		return false, nil
	}
	if IsLocal(list[0].key) || r.cache.full() || !r.ahead.begin() {
		return false, ErrNotAhead
	}
	asked, err = r.flight.prefetch(ctx, h)
	if !asked && err == nil {
		r.ahead.none()
		return false, nil
	}
	r.ahead.end(err)
	if err == nil && r.leases.ended(governing(list)) != nil {
		r.cache.drop(&h.Identity) // the lease ended while it was on its way
	}
	return asked, err
}

type aheadKey struct{}

// withAhead marks the context of a guess.
func withAhead(ctx context.Context) context.Context { return context.WithValue(ctx, aheadKey{}, true) }

// isAhead reports whether a call is a guess: one attempt, whose failure is no news.
func isAhead(ctx context.Context) bool { return ctx.Value(aheadKey{}) != nil }

type throttlingKey struct{}

// withThrottling has heard called when KMS throttles a call under this context.
func withThrottling(ctx context.Context, heard func()) context.Context {
	return context.WithValue(ctx, throttlingKey{}, heard)
}

// noteThrottling says what KMS thinks of the rate.
func noteThrottling(ctx context.Context, e *Error) {
	if heard, ok := ctx.Value(throttlingKey{}).(func()); ok && throttled(e) {
		heard()
	}
}

// errOutage: the governing key's service was silent a moment ago.
var errOutage = errors.New("its service did not answer a moment ago")

// openAhead is open for a guess: the governing copy or none.
func (w *wrapper) openAhead(ctx context.Context, h *crypt.Header, list []candidate) (opened, error) {
	first := list[0]
	w.mu.Lock()
	_, out := w.outages[first.key]
	w.mu.Unlock()
	if out {
		return opened{}, newError(KindUnavailable, opDecrypt, first.key, errOutage)
	}
	o, err := w.openCopy(ctx, h, first, 1)
	if err != nil {
		return opened{}, err
	}
	o.secrets.SetUnder(governing(list))
	return o, nil
}

// prefetch is open for a guess. It joins nobody: whose call is under way needs none.
func (f *flight) prefetch(ctx context.Context, h *crypt.Header) (asked bool, err error) {
	raw, err := h.Marshal()
	if err != nil {
		return false, err
	}
	c, mine := f.guess(string(raw), h)
	if !mine {
		return false, nil
	}
	defer f.leave(c)
	select {
	case <-c.done:
		return true, c.err
	case <-ctx.Done():
		return true, contextError(ctx, opDecrypt, h.Copies[0].Key)
	}
}

func (f *flight) guess(id string, h *crypt.Header) (c *flightCall, mine bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calls[id] != nil || f.base.Err() != nil {
		return nil, false
	}
	c = f.prepareLocked(id, h, true)
	go c.run()
	return c, true
}

// has reports whether an identity is remembered. It is not a use.
func (c *cache) has(id *crypt.Identity) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[string(id.Bytes())] != nil
}

// full reports whether there is no room for another guess.
func (c *cache) full() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.guessed >= c.max/guessedShare
}

// claim notes that somebody has asked for what was a guess: he waited for it.
func (c *cache) claim(id *crypt.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[string(id.Bytes())]; e != nil {
		c.claimLocked(e.Value.(*cached))
	}
}

func (c *cache) claimLocked(v *cached) {
	if v.guess {
		v.guess = false
		c.guessed--
		c.used++
	}
}

// waits counts what requests waited for the key service.
type waits struct {
	mu      sync.Mutex
	count   int64         // guarded by mu
	total   time.Duration // guarded by mu
	longest time.Duration // guarded by mu
}

func (w *waits) since(start time.Time) {
	d := time.Since(start)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count++
	w.total += d
	w.longest = max(w.longest, d)
}

func (w *waits) read() (count int64, total, longest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count, w.total, w.longest
}
