package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kmsfs/crypt"
)

// Defaults of RingOptions.
const (
	defaultCacheKeys = 16384
	defaultCacheAge  = 10 * time.Minute
	defaultPoolSize  = 64
	defaultShared    = 1024
)

// RingOptions say which volume a ring serves, under which keys.
type RingOptions struct {
	Volume    crypt.VolumeID
	BlockLog2 uint8    // of the volume's block size; 0 = the default block size
	Trusted   []string // key names in the client's order of preference; the first wraps new keys
	Provider  Provider

	Deadline  time.Duration // of one open or fetch, retries and all copies included; 10 s
	CacheKeys int           // data keys remembered; 0 = 16,384, negative = none
	CacheAge  time.Duration // how long a data key is remembered; 10 min
	PoolSize  int           // fresh keys fetched ahead at most; 0 = 64, negative = none
	Prefetch  int           // data keys decrypted ahead at once at most (Prefetch); 0 = none

	// Shared is whether the volume's data keys are derived from intermediate keys. Then
	// 1,024 of those are remembered, for CacheAge, whatever CacheKeys says; and nothing is
	// decrypted ahead, for each of them opens thousands.
	Shared bool
}

func (o *RingOptions) setDefaults() {
	if o.BlockLog2 == 0 {
		o.BlockLog2 = 12
	}
	if o.Deadline <= 0 {
		o.Deadline = defaultDeadline
	}
	if o.CacheKeys == 0 {
		o.CacheKeys = defaultCacheKeys
	}
	if o.CacheAge <= 0 {
		o.CacheAge = defaultCacheAge
	}
	if o.Shared {
		o.Prefetch = 0
	}
	if o.PoolSize == 0 {
		o.PoolSize = defaultPoolSize
	}
}

// A Ring opens and makes the data keys of one volume, under the keys that this
// client trusts and no others. It is safe for concurrent use; none of its
// methods may be called with an inode locked, for Open and Fresh can wait for
// the network as long as their context or the deadline allows.
type Ring struct {
	core    *wrapper
	counted *counted
	cache   *cache
	flight  *flight
	mint    *mint         // nil if each file has a wrapped key of its own
	renewed *memo[[]byte] // of Renew
	pool    *pool
	leases  *leases
	ahead   *ahead
	waits   waits

	deadline time.Duration
	base     context.Context // of every call
	cancel   context.CancelFunc
}

// NewRing makes a ring. It calls nobody.
func NewRing(o RingOptions) *Ring {
	o.setDefaults()
	base, cancel := context.WithCancel(context.Background())
	r := &Ring{counted: newCounted(o.Provider), renewed: newBlobMemo(defaultShared), deadline: o.Deadline, ahead: newAhead(o.Prefetch), cancel: cancel}
	base = withThrottling(base, r.ahead.throttled)
	r.base = base
	r.core = newWrapper(r.counted, o.Volume, o.BlockLog2, o.Trusted)
	if o.Shared {
		r.core.shared, r.core.held = true, newKeyMemo(defaultShared, o.CacheAge)
		r.mint = newMint(base, r.core, o.Deadline)
	}
	r.cache = newCache(r.core, o.CacheKeys, o.CacheAge)
	r.flight = newFlight(base, r.cache, o.Deadline)
	r.flight.atHand = r.core.atHand
	r.pool = newPool(base, r.maker(), r.first, max(o.PoolSize, 0), o.Deadline)
	r.pool.derived = r.mint != nil
	r.leases = newLeases(r.counted, o.Volume, o.Deadline)
	r.leases.held, r.leases.wipe = r.held, r.wipeEnded
	r.core.leases = r.leases
	// A call can be sent just before a lease ends, and answered when all was wiped.
	r.cache.refused = r.leases.ended
	r.core.held.refused = func(key string) error { return r.leases.ended([]string{key}) }
	r.pool.refused = func() error { return r.leases.ended([]string{r.first()}) }
	return r
}

// maker makes the data keys of new files.
func (r *Ring) maker() maker {
	if r.mint != nil {
		return r.mint
	}
	return r.core
}

// first is the key for new data keys, for messages.
func (r *Ring) first() string { return r.core.first() }

// Open returns the secrets of a header, from the cache or from the key service;
// the caller wipes them. Errors are an *Error, or crypt.ErrForeign or
// crypt.ErrDamaged for a header that was never asked about.
func (r *Ring) Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	// Trust is asked before the cache: a header that lost its last trusted copy
	// is not opened from memory either.
	list, err := r.core.check(h)
	if err != nil {
		return nil, err
	}
	err = r.leases.ended(governing(list))
	if errors.Is(err, ErrLocked) {
		return nil, err
	}
	if err != nil {
		r.cache.drop(&h.Identity) // the key service may still say yes to it
	} else if o, ok := r.cache.peek(&h.Identity); ok {
		return r.checked(o)
	}
	defer r.waits.since(time.Now())
	o, err := r.flight.open(ctx, h)
	if err != nil {
		return nil, fmt.Errorf("opening a data key: %w", err)
	}
	r.cache.claim(&h.Identity)
	s, err := r.checked(o)
	if err != nil {
		r.cache.drop(&h.Identity)
	}
	return s, err
}

// checked lets a data key go only if the lease that it depends on has not ended while
// it was on its way.
func (r *Ring) checked(o opened) (*crypt.Secrets, error) {
	if err := r.leases.ended(o.secrets.Under()); err != nil {
		o.secrets.Wipe()
		return nil, err
	}
	return o.secrets, nil
}

// Fresh returns a data key that no file uses yet, from those fetched ahead if
// there is one. With none it waits as long as ctx allows. The caller gives it to
// one file, or back with Return.
func (r *Ring) Fresh(ctx context.Context) (*crypt.Fresh, error) {
	f, err := r.pool.take(ctx)
	if err != nil {
		return nil, fmt.Errorf("getting a fresh data key: %w", err)
	}
	if err := r.leases.ended(f.Secrets.Under()); err != nil {
		wipeFresh(f)
		return nil, err
	}
	return f, nil
}

// Return takes back a key from Fresh that was given to no file. It may be nil.
func (r *Ring) Return(f *crypt.Fresh) {
	if f != nil {
		r.pool.putBack(f)
	}
}

// NewKey makes one data key now, past the pool.
func (r *Ring) NewKey(ctx context.Context, use crypt.Use) (*crypt.Fresh, error) {
	ctx, cancel := context.WithTimeout(ctx, r.deadline)
	defer cancel()
	f, err := r.maker().make(ctx, use)
	if err != nil {
		return nil, fmt.Errorf("making a data key: %w", err)
	}
	return f, nil
}

// Trusted is the list of trusted keys in order.
func (r *Ring) Trusted() []string { return append([]string(nil), r.core.keys()...) }

// SetTrusted replaces the list. Fresh keys fetched under the old one are wiped,
// and so is what was opened under a key no longer listed.
func (r *Ring) SetTrusted(keys []string) {
	r.core.setTrusted(keys)
	r.cache.retain(keys)
	r.core.held.drop(func(a ask) bool { return !trusts(keys, a.key) })
	r.mint.drop()
	r.pool.drop()
	r.leases.trust(keys)
}

// Forget wipes every key that is remembered or was fetched ahead; the ring goes on.
func (r *Ring) Forget() {
	r.cache.retain(nil)
	r.core.held.drop(func(ask) bool { return true })
	r.mint.drop()
	r.pool.drop()
	forget(r.counted.next)
}

// KeepLeases begins to keep a lease of each trusted key: data keys that depend on one
// that has ended are refused and wiped. volumeKey is the header of the volume's key,
// whose copies are what the key service is asked to decrypt. It is called once.
func (r *Ring) KeepLeases(o LeaseOptions, volumeKey *crypt.Header) {
	r.leases.start(r.base, o, r.Trusted(), volumeKey)
}

// SetVolumeKey replaces the header given to KeepLeases, after a rekey.
func (r *Ring) SetVolumeKey(h *crypt.Header) { r.leases.setVolumeKey(h) }

// Leases is what is known of each trusted key's lease; none before KeepLeases.
func (r *Ring) Leases() []Lease { return r.leases.list(r.core.keys()) }

// Governing lists the trusted keys on which the use of a header's data key depends:
// a denial by the first is final, and the next counts only while the one before it
// does not answer.
func (r *Ring) Governing(h *crypt.Header) []string {
	list, err := r.core.check(h)
	if err != nil {
		return nil
	}
	return governing(list)
}

// Local reports whether all trusted keys of a header's data key are local ones, or of a
// nil header the one that makes new data keys. If the first is local and fails, the next
// may be asked over a network, and whoever waits for that can be interrupted.
func (r *Ring) Local(h *crypt.Header) bool {
	if h == nil {
		return IsLocal(r.first())
	}
	list := r.Governing(h)
	return len(list) > 0 && !slices.ContainsFunc(list, func(key string) bool { return !IsLocal(key) })
}

// Ended says why data keys that depend on a list of keys (crypt.Secrets.Under) may
// not be used any more, or nil: a *LeaseError or ErrLocked.
func (r *Ring) Ended(under []string) error { return r.leases.ended(under) }

// Follow lets whoever holds data keys take part: inUse says what those depend on, so
// that leases are renewed for them, and changed is called, in no particular
// goroutine, when Ended may answer differently. It must not wait, and stop the use of
// what has ended before it returns.
func (r *Ring) Follow(inUse func() [][]string, changed func()) (stop func()) {
	return r.leases.follow(&follower{inUse, changed})
}

// Lock ends every lease at once and refuses every data key until Unlock.
func (r *Ring) Lock() {
	r.leases.lock(true)
	forget(r.counted.next)
}

// Unlock undoes Lock; each key has to be opened again.
func (r *Ring) Unlock() { r.leases.lock(false) }

// Locked reports whether Lock was called.
func (r *Ring) Locked() bool { return errors.Is(r.leases.ended(nil), ErrLocked) }

// held is what the ring's own data keys depend on.
func (r *Ring) held() [][]string {
	lists := r.cache.under()
	for _, key := range r.core.held.keys() {
		lists = append(lists, []string{key})
	}
	if r.pool.holds() || r.mint.holds() {
		lists = append(lists, []string{r.first()})
	}
	return lists
}

// wipeEnded wipes the ring's own data keys whose lease has ended.
func (r *Ring) wipeEnded() {
	if r.leases.anyEnded() {
		r.cache.sweepEnded(r.leases.ended)
		r.core.held.drop(func(a ask) bool { return r.leases.ended([]string{a.key}) != nil })
		r.pool.refuse()
		if r.leases.ended([]string{r.first()}) != nil {
			r.mint.drop()
		}
	}
}

// Close wipes every key and ends calls under way. Clones handed out stay with
// their owners.
func (r *Ring) Close() {
	r.pool.close() // first: who waits there hears why
	r.cancel()
	r.mint.close()
	r.cache.close()
	r.core.held.close()
	forget(r.counted.next)
}

// Stats are counters since the ring was made.
type Stats struct {
	Calls    map[string]int64   // of the key service, by operation
	Failures map[string]int64   // of those, by kind of failure
	CallTime time.Duration      // spent in them, summed
	ByKey    []CallCount        // the calls by operation, key and result
	Latency  map[string]Latency // of the calls, by operation

	CacheHits, CacheMisses int64
	CacheKeys              int   // remembered now
	Coalesced              int64 // opens that joined another's call

	OpenWaits       int64         // opens that had to wait for a data key
	OpenWaited      time.Duration // what they waited, summed
	LongestOpenWait time.Duration

	// Data keys decrypted ahead: asked for, failed, wanted later, wiped without having
	// been wanted, and remembered now without having been wanted yet.
	Ahead, AheadFailed, AheadUsed, AheadWasted int64
	AheadUnused                                int

	SharedHits int64 // opens and creates served by an intermediate key that was remembered
	SharedKeys int   // intermediate keys remembered now

	PoolHits   int64         // fresh keys that were ready
	PoolWaits  int64         // fresh keys that had to be waited for
	PoolWaited time.Duration // time spent waiting for them
	PoolReady  int           // fetched ahead now

	LongestPoolWait time.Duration
}

// Stats reads the counters.
func (r *Ring) Stats() Stats {
	var s Stats
	r.counted.addTo(&s)
	r.cache.addTo(&s)
	r.flight.addTo(&s)
	s.SharedHits, s.SharedKeys = r.core.held.counts()
	r.mint.addTo(&s)
	r.pool.addTo(&s)
	r.ahead.addTo(&s)
	s.OpenWaits, s.OpenWaited, s.LongestOpenWait = r.waits.read()
	return s
}
