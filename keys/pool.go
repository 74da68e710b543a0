package keys

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"kmsfs/crypt"
)

const (
	// poolAge is how long a fresh key may wait for a file.
	poolAge = 5 * time.Minute
	// worthwhile is the latency below which nothing is fetched ahead: local
	// keys, and a loopback KMS, answer sooner.
	worthwhile = time.Millisecond
	// longestGap caps what one idle stretch says about demand, so that a burst
	// after it is seen within a dozen creates.
	longestGap = time.Minute
	// stocked is how many keys are kept ready, made one after another, while keys that
	// cost next to nothing (a local key's, an intermediate key's) are taken at least
	// every brisk: whoever creates files need not do that too before each.
	stocked = 32
	brisk   = 2 * time.Millisecond

	firstPenalty = 250 * time.Millisecond
	maxPenalty   = 5 * time.Second
)

// pool is a maker that fetches keys ahead of demand. It keeps as many as are
// used up while one is being fetched, twice over (Little's law): none for a
// program that creates a file now and then, up to max for a burst. Of keys that
// cost next to nothing it keeps a few during a burst. So a create costs one call,
// and at most max keys are ever fetched in vain; a workload that creates nothing
// fetches none.
//
// A failed fetch is what a waiter gets, and for a short while (doubling up to
// 5 s) what every caller gets at once: a key that was taken away is not asked
// for a thousand times a second by a program that retries.
type pool struct {
	next     maker
	current  func() string // the key that fresh keys must be under now
	deadline time.Duration
	max      int
	derived  bool // next seldom asks a key service
	age      time.Duration
	base     context.Context
	refused  func() error // why no key may be handed out now, or nil

	mu       sync.Mutex
	ready    []spare            // guarded by mu; oldest first
	waiters  []chan result      // guarded by mu; first come, first served
	inflight int                // guarded by mu; fetches of this generation
	tries    map[*attempts]bool // guarded by mu; of those fetches
	gen      uint64             // guarded by mu; what an older generation fetched is wiped
	ctx      context.Context
	cancel   context.CancelFunc // guarded by mu, like ctx: they end with the generation
	closed   bool               // guarded by mu
	sweeper  *time.Timer        // guarded by mu; nil while nothing is ready

	lastTake time.Time     // guarded by mu
	gap      time.Duration // guarded by mu; between takes, averaged; 0 = unknown
	latency  time.Duration // guarded by mu; of a fetch, averaged

	failed  error         // guarded by mu; the last fetch's failure
	penalty time.Duration // guarded by mu
	retryAt time.Time     // guarded by mu; until then, failed is the answer

	hits, waits int64         // guarded by mu
	waited      time.Duration // guarded by mu
	longest     time.Duration // guarded by mu; of those waits
}

type spare struct {
	fresh *crypt.Fresh
	born  time.Time
}

type result struct {
	fresh *crypt.Fresh
	err   error
}

var errClosed = errors.New("the key ring is closed")

func newPool(base context.Context, next maker, current func() string, max int, deadline time.Duration) *pool {
	p := &pool{next: next, current: current, deadline: deadline, max: max, age: poolAge, base: base, tries: map[*attempts]bool{},
		refused: func() error { return nil }}
	p.ctx, p.cancel = context.WithCancel(base)
	return p
}

// take returns a fresh key, waiting for one as long as ctx allows.
func (p *pool) take(ctx context.Context) (*crypt.Fresh, error) {
	start := time.Now()
	w, r := p.enter(start)
	switch {
	case w != nil:
		r = p.await(ctx, w)
	case r.fresh == nil && r.err == nil:
		r = p.makeHere(ctx)
	default:
		return r.fresh, r.err
	}
	p.noteWait(time.Since(start))
	return r.fresh, r.err
}

// makeHere makes a key under a local one: nothing is waited for, and handing it to
// another thread and back costs more than the whole of it.
func (p *pool) makeHere(ctx context.Context) result {
	for {
		p.mu.Lock()
		gen := p.gen
		p.mu.Unlock()
		f, err := p.next.make(ctx, crypt.UseFile)
		if r, final := p.made(ctx, f, err, gen); final {
			return r
		}
	}
}

// made is what the caller gets for a key made since generation gen, or for the failure;
// it is not final if the keys for new files were changed meanwhile.
func (p *pool) made(ctx context.Context, f *crypt.Fresh, err error, gen uint64) (r result, final bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	refusal := p.refused()
	switch {
	case p.closed:
		r.err = newError(KindUnavailable, opGenerate, p.current(), errClosed)
	case refusal != nil:
		r.err = refusal
	case gen != p.gen:
	case err != nil:
		if ctx.Err() == nil { // else it says nothing of the key
			p.failLocked(err)
		}
		return result{err: err}, true
	default:
		p.failed, p.penalty = nil, 0
		f.Batch = gen
		return result{fresh: f}, true
	}
	wipeFresh(f)
	return r, r.err != nil
}

func (p *pool) await(ctx context.Context, w chan result) result {
	select {
	case r := <-w:
		return r
	case <-ctx.Done():
		return p.leave(w, contextError(ctx, opGenerate, p.current()))
	}
}

func (p *pool) noteWait(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waited += d
	p.longest = max(p.longest, d)
}

// enter answers at once, or queues a waiter, or if the key is to be made here does
// neither.
func (p *pool) enter(now time.Time) (w chan result, r result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.demandLocked(now)
	p.expireLocked(now)
	refusal := p.refused()
	switch {
	case p.closed:
		return nil, result{err: newError(KindUnavailable, opGenerate, p.current(), errClosed)}
	case refusal != nil:
		return nil, result{err: refusal}
	case len(p.ready) > 0:
		f := p.ready[0].fresh
		p.ready = p.ready[1:]
		p.hits++
		p.refillLocked()
		return nil, result{fresh: f}
	case p.failed != nil && now.Before(p.retryAt):
		return nil, result{err: p.failed}
	}
	p.waits++
	if IsLocal(p.current()) {
		p.refillLocked()
		return nil, result{}
	}
	w = make(chan result, 1)
	p.waiters = append(p.waiters, w)
	p.refillLocked()
	return w, result{}
}

// leave takes a waiter out of the queue. If its key arrived meanwhile, the
// caller gets it after all.
func (p *pool) leave(w chan result, err *Error) result {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.waiters {
		if p.waiters[i] == w {
			p.waiters = append(p.waiters[:i:i], p.waiters[i+1:]...)
			return result{err: p.leftLocked(err)}
		}
	}
	return <-w
}

// leftLocked is what a waiter hears who leaves. No fetch is anybody's own: if one
// of them was answered, the key service is there, and refuses or fails.
func (p *pool) leftLocked(end *Error) *Error {
	for a := range p.tries {
		if e := a.left(end); e != end {
			return e
		}
	}
	return end
}

// demandLocked learns how fast keys are taken. It follows a rising demand
// quickly and a falling one slowly.
func (p *pool) demandLocked(now time.Time) {
	gap := min(now.Sub(p.lastTake), longestGap)
	switch {
	case p.lastTake.IsZero():
		gap = longestGap
	case gap < p.gap:
		gap = (p.gap + gap) / 2
	default:
		gap = (3*p.gap + gap) / 4
	}
	p.gap, p.lastTake = gap, now
}

// aheadLocked is how many keys should be ready or on their way.
func (p *pool) aheadLocked() int {
	if p.failed != nil || p.latency < worthwhile {
		return 0 // or a stock
	}
	want := 2 * float64(p.latency) / float64(max(p.gap, time.Microsecond))
	return min(int(math.Round(want)), p.max)
}

// refillLocked starts the fetches that waiters and demand ask for.
func (p *pool) refillLocked() {
	if p.closed {
		return
	}
	want := len(p.waiters) + p.aheadLocked() - len(p.ready)
	for p.inflight < want && p.inflight < max(p.max, 1) {
		p.fetchLocked()
	}
	if stock := p.stockLocked(); p.inflight == 0 && len(p.ready) < (stock+1)/2 {
		p.fetchLocked()
	}
}

// stockLocked is how many keys that cost next to nothing should be ready.
func (p *pool) stockLocked() int {
	cheap := p.derived || IsLocal(p.current())
	if p.failed != nil || !cheap || p.latency >= worthwhile || p.gap > brisk {
		return 0
	}
	return min(stocked, p.max)
}

// fetchLocked starts a fetch, which goes on until there is a stock.
func (p *pool) fetchLocked() {
	ctx, tries := p.beginLocked()
	go func(gen uint64) {
		for ctx != nil {
			ctx, tries = p.fetch(ctx, gen, tries)
		}
	}(p.gen)
}

func (p *pool) beginLocked() (context.Context, *attempts) {
	p.inflight++
	ctx, tries := withAttempts(p.ctx)
	p.tries[tries] = true
	return ctx, tries
}

// fetch fetches a key. It returns what the next is to be fetched with, or nil at the end.
func (p *pool) fetch(ctx context.Context, gen uint64, tries *attempts) (context.Context, *attempts) {
	ctx, cancel := context.WithTimeout(ctx, p.deadline)
	defer cancel()
	start := time.Now()
	f, err := p.next.make(ctx, crypt.UseFile)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.tries, tries)
	if p.closed || gen != p.gen {
		wipeFresh(f)
		return nil, nil
	}
	p.inflight--
	if err != nil {
		p.failLocked(err)
	} else {
		p.failed, p.penalty = nil, 0
		p.latency = (p.latency + time.Since(start)) / 2
		f.Batch = gen
		p.addLocked(f)
	}
	if p.inflight == 0 && len(p.waiters) == 0 && len(p.ready) < p.stockLocked() {
		return p.beginLocked()
	}
	p.refillLocked()
	return nil, nil
}

// failLocked gives the failure to the waiters that no fetch is under way for.
func (p *pool) failLocked(err error) {
	if now := time.Now(); !now.Before(p.retryAt) {
		p.penalty = min(max(2*p.penalty, firstPenalty), maxPenalty)
		p.retryAt = now.Add(p.penalty)
	}
	p.failed = err
	for len(p.waiters) > p.inflight {
		p.serveLocked(result{err: err})
	}
}

func (p *pool) addLocked(f *crypt.Fresh) {
	if len(p.waiters) > 0 {
		p.serveLocked(result{fresh: f})
		return
	}
	p.ready = append(p.ready, spare{f, time.Now()})
	if p.sweeper == nil {
		p.sweeper = time.AfterFunc(p.age, p.sweep)
	}
}

func (p *pool) serveLocked(r result) {
	p.waiters[0] <- r // never blocks: one result for each
	p.waiters = p.waiters[1:]
}

// putBack takes an unused key. The caller must not have given it to any file. One that
// was handed out before the last drop is no better than those that were dropped: after a
// refresh it is under the same key's old material, of which no header tells.
func (p *pool) putBack(f *crypt.Fresh) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.refused() != nil || len(p.ready) >= max(p.max, 1) || f.Batch != p.gen || len(f.Header.Copies) != 1 || f.Header.Copies[0].Key != p.current() {
		wipeFresh(f)
		return
	}
	p.addLocked(f)
}

func wipeFresh(f *crypt.Fresh) {
	if f != nil {
		f.Secrets.Wipe()
	}
}

func (p *pool) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sweeper = nil
	p.expireLocked(time.Now())
	if len(p.ready) > 0 {
		p.sweeper = time.AfterFunc(max(p.age-time.Since(p.ready[0].born), p.age/10), p.sweep)
	}
}

func (p *pool) expireLocked(now time.Time) {
	for len(p.ready) > 0 && now.Sub(p.ready[0].born) >= p.age {
		wipeFresh(p.ready[0].fresh)
		p.ready = p.ready[1:]
	}
}

// drop wipes everything fetched so far, answers on their way included: the
// trusted list changed. Waiters go on waiting, for a key of the new kind.
func (p *pool) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropLocked()
	p.ctx, p.cancel = context.WithCancel(p.base)
	p.refillLocked()
}

// refuse wipes everything, and sends the waiters away, if no key may be handed out.
func (p *pool) refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.refused()
	if err == nil || p.closed {
		return
	}
	p.dropLocked()
	p.ctx, p.cancel = context.WithCancel(p.base)
	for len(p.waiters) > 0 {
		p.serveLocked(result{err: err})
	}
}

// holds reports whether there are keys, or will be.
func (p *pool) holds() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ready)+p.inflight > 0
}

func (p *pool) dropLocked() {
	p.cancel()
	p.gen++
	clear(p.tries)
	p.inflight, p.failed, p.penalty, p.retryAt = 0, nil, 0, time.Time{}
	for _, s := range p.ready {
		wipeFresh(s.fresh)
	}
	p.ready = nil
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.dropLocked()
	for len(p.waiters) > 0 {
		p.serveLocked(result{err: newError(KindUnavailable, opGenerate, p.current(), errClosed)})
	}
	if p.sweeper != nil {
		p.sweeper.Stop()
	}
}

func (p *pool) addTo(s *Stats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.PoolHits, s.PoolWaits, s.PoolWaited, s.PoolReady = p.hits, p.waits, p.waited, len(p.ready)
	s.LongestPoolWait = p.longest
}
