package keys

import (
	"container/list"
	"context"
	"strings"
	"sync"
	"time"

	"kmsfs/crypt"
)

// cache is an opener that remembers what was opened, by identity: who has a
// data key for these bytes has checked it against their commitment. It is
// bounded by count (the least recently used goes first) and by age (counted
// from the Decrypt, not from the last use). It never remembers a failure.
// Secrets are wiped the moment they leave it; callers get clones.
type cache struct {
	next opener
	max  int
	age  time.Duration
	// refused is why a data key may not be remembered now, or nil. Whoever changes that
	// calls sweepEnded afterwards.
	refused func(under []string) error

	mu      sync.Mutex
	entries map[string]*list.Element // guarded by mu; by Identity.Bytes()
	recent  *list.List               // guarded by mu; of *cached, most recently used first
	sweeper *time.Timer              // guarded by mu; nil while the cache is empty
	era     uint64                   // guarded by mu; counts drops, so that what was asked before one is not kept after it
	closed  bool                     // guarded by mu
	hits    int64                    // guarded by mu
	misses  int64                    // guarded by mu
	guessed int                      // guarded by mu; entries that nobody has asked for
	used    int64                    // guarded by mu; guesses that somebody did ask for
	wasted  int64                    // guarded by mu; guesses that nobody ever asked for
}

type cached struct {
	id string
	// guess: it was opened ahead, and nobody has asked for it yet.
	guess bool
	opened
}

func newCache(next opener, max int, age time.Duration) *cache {
	return &cache{next: next, max: max, age: age, refused: func([]string) error { return nil }, entries: map[string]*list.Element{}, recent: list.New()}
}

// peek returns a clone of what is remembered for an identity.
func (c *cache) peek(id *crypt.Identity) (opened, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[string(id.Bytes())]
	if e == nil {
		return opened{}, false
	}
	v := e.Value.(*cached)
	if time.Since(v.born) >= c.age {
		c.removeLocked(e)
		return opened{}, false
	}
	o, err := v.clone()
	if err != nil {
		return opened{}, false
	}
	c.recent.MoveToFront(e)
	c.claimLocked(v)
	c.hits++
	return o, true
}

func (c *cache) open(ctx context.Context, h *crypt.Header) (opened, error) {
	if o, ok := c.peek(&h.Identity); ok {
		return o, nil
	}
	c.mu.Lock()
	era := c.era
	if !isAhead(ctx) {
		c.misses++
	}
	c.mu.Unlock()
	o, err := c.next.open(ctx, h)
	if err == nil {
		c.put(&h.Identity, o, era, isAhead(ctx))
	}
	return o, err
}

func (c *cache) put(id *crypt.Identity, o opened, era uint64, guess bool) {
	own, err := o.clone()
	if err != nil {
		return // no memory for another key: go on without remembering
	}
	own.from.blob = nil
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || era != c.era || c.max <= 0 || c.refused(own.secrets.Under()) != nil {
		own.secrets.Wipe()
		if guess {
			c.wasted++
		}
		return
	}
	key := string(id.Bytes())
	if e := c.entries[key]; e != nil {
		c.removeLocked(e)
	}
	c.entries[key] = c.recent.PushFront(&cached{id: key, guess: guess, opened: own})
	if guess {
		c.guessed++
	}
	for len(c.entries) > c.max {
		c.removeLocked(c.recent.Back())
	}
	if c.sweeper == nil {
		c.sweeper = time.AfterFunc(c.age, c.sweep)
	}
}

func (c *cache) removeLocked(e *list.Element) {
	v := c.recent.Remove(e).(*cached)
	delete(c.entries, v.id)
	if v.guess {
		c.guessed--
		c.wasted++
	}
	v.secrets.Wipe()
}

// sweep wipes what is too old also when nobody asks for it any more.
func (c *cache) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sweeper = nil
	next := c.age
	for e := c.recent.Front(); e != nil; {
		v, following := e.Value.(*cached), e.Next()
		if left := c.age - time.Since(v.born); left <= 0 {
			c.removeLocked(e)
		} else {
			next = min(next, left)
		}
		e = following
	}
	if len(c.entries) > 0 {
		// Not sooner than a tenth of the age: entries of one burst expire together.
		c.sweeper = time.AfterFunc(max(next, c.age/10), c.sweep)
	}
}

// retain keeps what was opened under one of the keys given and wipes the rest,
// answers on their way included.
func (c *cache) retain(keys []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.era++
	for e := c.recent.Front(); e != nil; {
		v, following := e.Value.(*cached), e.Next()
		if !trusts(keys, v.from.key) {
			c.removeLocked(e)
		}
		e = following
	}
}

// drop forgets one identity.
func (c *cache) drop(id *crypt.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[string(id.Bytes())]; e != nil {
		c.removeLocked(e)
	}
}

// under is what the data keys depend on, each list once.
func (c *cache) under() (lists [][]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	seen := map[string]bool{}
	for e := c.recent.Front(); e != nil; e = e.Next() {
		list := e.Value.(*cached).secrets.Under()
		if name := strings.Join(list, " "); !seen[name] {
			seen[name] = true
			lists = append(lists, list)
		}
	}
	return lists
}

// sweepEnded wipes what may not be used any more; an answer on its way is not kept.
func (c *cache) sweepEnded(ended func(under []string) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.era++
	for e := c.recent.Front(); e != nil; {
		v, following := e.Value.(*cached), e.Next()
		if ended(v.secrets.Under()) != nil {
			c.removeLocked(e)
		}
		e = following
	}
}

func trusts(keys []string, key string) bool {
	for _, k := range keys {
		if crypt.SameKey(k, key) {
			return true
		}
	}
	return false
}

func (c *cache) close() {
	c.retain(nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.sweeper != nil {
		c.sweeper.Stop()
	}
}

func (c *cache) addTo(s *Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.CacheHits, s.CacheMisses, s.CacheKeys = c.hits, c.misses, len(c.entries)
	s.AheadUsed, s.AheadWasted, s.AheadUnused = c.used, c.wasted, c.guessed
}
