package keys

import (
	"context"
	"errors"
	"iter"
	"slices"
	"sync"
	"time"

	"kmsfs/crypt"
)

// LeaseOptions say for how long data keys may be used on the word that the key
// service gave last.
type LeaseOptions struct {
	Interval time.Duration // a lease is renewed within it
	Grace    time.Duration // how much longer all goes on while the key service does not answer; 0 = no longer
	// Changed, if set, is told of each change. It may be called from several
	// goroutines at once, and must not call the ring's Lease methods.
	Changed func(Lease)
}

// A witness is a wrapped key that a KMS key is known to open.
type witness struct {
	ec   EncryptionContext
	blob []byte
}

// leases are the leases of a ring. They are inert until start: then one goroutine
// looks at those that are due, and each check has its own, so that a region which
// hangs keeps no other waiting.
//
// mu is taken under pool.mu, cache.mu, memo.mu and mint.mu, never the other way round, and never held
// while anybody is called.
type leases struct {
	provider Provider
	volume   crypt.VolumeID
	deadline time.Duration
	held     func() [][]string // what the ring's own data keys depend on
	wipe     func()            // wipes the ring's own data keys whose lease has ended

	kick chan struct{} // something may be due earlier than was thought

	mu        sync.Mutex
	opts      LeaseOptions           // guarded by mu
	running   bool                   // guarded by mu
	locked    bool                   // guarded by mu
	byKey     map[string]*lease      // guarded by mu
	order     []string               // guarded by mu; its keys, as they are trusted
	volumeKey *crypt.Header          // guarded by mu; every copy of it is a witness
	learned   map[string]witness     // guarded by mu; by key
	followers map[*follower]struct{} // guarded by mu
}

type follower struct {
	inUse   func() [][]string
	changed func()
}

func newLeases(p Provider, volume crypt.VolumeID, deadline time.Duration) *leases {
	return &leases{provider: p, volume: volume, deadline: deadline, kick: make(chan struct{}, 1),
		byKey: map[string]*lease{}, learned: map[string]witness{}, followers: map[*follower]struct{}{}}
}

// start begins to keep leases, of the keys given; volumeKey is the header of the
// volume's key.
func (l *leases) start(ctx context.Context, o LeaseOptions, trusted []string, volumeKey *crypt.Header) {
	l.mu.Lock()
	l.opts, l.running, l.volumeKey = o, true, volumeKey
	l.mu.Unlock()
	l.trust(trusted)
	go l.run(ctx)
}

// trust makes leases of new keys, and drops those of keys that are trusted no more.
func (l *leases) trust(keys []string) {
	l.mu.Lock()
	if !l.running {
		l.mu.Unlock()
		return
	}
	before, now := l.byKey, time.Now()
	l.byKey, l.order = map[string]*lease{}, slices.Clone(keys)
	for _, key := range keys {
		if l.byKey[key] = before[key]; before[key] == nil {
			l.byKey[key] = &lease{key: key, confirmed: now, next: renewAt(now, l.opts.Interval)}
		}
	}
	l.mu.Unlock()
	l.tell(nil) // whoever depended on one that was dropped
	l.again()
}

// setVolumeKey replaces the header whose copies are witnesses.
func (l *leases) setVolumeKey(h *crypt.Header) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.volumeKey = h
}

// again has the goroutine look once more.
func (l *leases) again() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

func (l *leases) run(ctx context.Context) {
	for {
		timer := time.NewTimer(l.step(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-l.kick:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// step does what is due and returns how long nothing will be.
func (l *leases) step(ctx context.Context) time.Duration {
	if wait := l.pause(time.Now()); wait > 0 {
		return wait
	}
	lists := l.dependents()
	l.mu.Lock()
	now, used := time.Now(), l.usedLocked(lists)
	var changes []Lease
	for _, s := range l.byKey {
		if l.tendLocked(ctx, s, used[s.key], now) {
			changes = append(changes, s.view(&l.opts))
		}
	}
	l.mu.Unlock()
	if changes != nil {
		l.tell(changes)
	}
	return max(l.pause(now), min(l.opts.Interval/50, 50*time.Millisecond))
}

// pause is how long nothing is due.
func (l *leases) pause(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	wait := time.Hour
	for _, s := range l.byKey {
		if !l.locked {
			wait = min(wait, s.wait(&l.opts, now))
		}
	}
	return wait
}

// dependents asks what data keys depend on. No lock is held.
func (l *leases) dependents() [][]string {
	lists := l.held()
	for _, f := range l.following() {
		lists = append(lists, f.inUse()...)
	}
	return lists
}

func (l *leases) follow(f *follower) (stop func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.followers[f] = struct{}{}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.followers, f)
	}
}

func (l *leases) following() (list []*follower) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for f := range l.followers {
		list = append(list, f)
	}
	return list
}

// usedLocked is which leases matter: of each list the first, and those after it while
// it is not valid, for they may have to stand in.
func (l *leases) usedLocked(lists [][]string) map[string]bool {
	used := map[string]bool{}
	for _, list := range lists {
		now := time.Now()
		granted := now
		for s := range l.leasesLocked(list) {
			// One that stands in gets no time of its own: if it does not answer either,
			// what depends on both ends as if there were but the first.
			if s.wake(&l.opts, now, granted) {
				s.hurry(now, 0) // it was not asked about for long
			}
			if used[s.key] = true; s.state == LeaseValid {
				break
			}
			if granted == now || s.confirmed.After(granted) {
				granted = s.confirmed
			}
		}
	}
	return used
}

// tendLocked does what is due of one lease, and reports whether its state changed.
func (l *leases) tendLocked(ctx context.Context, s *lease, used bool, now time.Time) (changed bool) {
	isDue := !s.checking && !now.Before(s.next)
	switch {
	case l.locked:
		return false
	case !used && s.state != LeaseRevoked:
		if isDue {
			s.sleep(&l.opts, now) // it costs nothing until somebody opens or makes a file
		}
		return false
	}
	changed = s.age(&l.opts, now)
	if isDue {
		s.checking, s.asked = true, now
		s.checks++
		go l.check(ctx, s)
	}
	return changed
}

// check renews one lease.
func (l *leases) check(ctx context.Context, s *lease) {
	ctx, cancel := context.WithTimeout(ctx, l.deadline)
	defer cancel()
	start := time.Now()
	err := l.ask(ctx, s.key)
	l.mu.Lock()
	s.checking = false
	var changes []Lease
	if l.byKey[s.key] == s && s.settle(&l.opts, start, time.Now(), err) {
		changes = append(changes, s.view(&l.opts))
	}
	l.mu.Unlock()
	if changes != nil {
		l.tell(changes)
	}
	l.again()
}

// ask decrypts a witness. A blob that turns out to be bad says nothing of the key, so
// the next one is asked about.
func (l *leases) ask(ctx context.Context, key string) error {
	var err error = newError(KindUnavailable, opDecrypt, key, errNoWitness)
	for _, w := range l.witnesses(key) {
		var k *crypt.Key
		k, err = l.provider.Decrypt(ctx, key, w.ec, w.blob)
		k.Wipe()
		if kind := kindOf(err); err == nil || kind != KindBadBlob && kind != KindIncorrectKey {
			return err
		}
	}
	return err
}

// witnesses are the blobs to ask about: the volume key's copies first, which any user
// of the volume may decrypt.
func (l *leases) witnesses(key string) (list []witness) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.volumeKey != nil {
		for _, c := range candidates([]string{key}, l.volumeKey) {
			list = append(list, witness{l.volumeKey.EncryptionContext(l.volume), c.blob})
		}
	}
	if w, ok := l.learned[key]; ok {
		list = append(list, w)
	}
	return list
}

// errNoWitness: a key that nothing was ever opened or made with.
var errNoWitness = errors.New("no wrapped key is known to ask about")

// heard learns from what an ordinary call, sent at start, came to.
func (l *leases) heard(op, key string, w witness, start time.Time, err error) {
	l.mu.Lock()
	s := l.byKey[key]
	if s == nil {
		l.mu.Unlock()
		return
	}
	news := s.wake(&l.opts, start, start) || err != nil
	var changes []Lease
	switch kindOf(err) {
	case KindDisabled, KindNotFound:
		s.hurry(time.Now(), min(triggerPause, l.opts.Interval))
	case KindDenied:
		s.hurry(time.Now(), min(denialPause, l.opts.Interval))
	}
	if err == nil {
		l.learned[key] = w
		if op == opDecrypt && s.confirm(&l.opts, start) {
			changes = append(changes, s.view(&l.opts))
		}
	}
	l.mu.Unlock()
	if changes != nil {
		l.tell(changes)
	}
	if news {
		l.again()
	}
}

// ended says why data keys that depend on a list of keys may not be used, or nil.
// The first whose lease does not merely suffer from an outage decides: so does the
// first copy of a header that does not (DESIGN 6).
func (l *leases) ended(list []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.locked {
		return ErrLocked
	}
	var silent error
	for s := range l.leasesLocked(list) {
		if s.state != LeaseRevoked {
			return nil
		}
		if !s.silent {
			return &LeaseError{s.key, s.err}
		}
		if silent == nil {
			silent = &LeaseError{s.key, s.err}
		}
	}
	return silent
}

// leasesLocked yields the leases that what depends on a list of keys is under: those of
// the keys that are trusted still. If a rekey has dropped all of them, it is all leases: what
// was opened, or closed and kept by the kernel, before it noticed is the volume's too, and is
// cut off with it.
func (l *leases) leasesLocked(list []string) iter.Seq[*lease] {
	return func(yield func(*lease) bool) {
		some := len(list) == 0
		for _, from := range [...][]string{list, l.order} {
			for _, key := range from {
				if s := l.byKey[key]; s != nil {
					if some = true; !yield(s) {
						return
					}
				}
			}
			if some {
				return
			}
		}
	}
}

// anyEnded reports whether any data key may not be used.
func (l *leases) anyEnded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.byKey {
		if s.state == LeaseRevoked {
			return true
		}
	}
	return l.locked
}

// tell acts on changes: those who hold data keys stop, then the ring's own are wiped.
func (l *leases) tell(changes []Lease) {
	for _, f := range l.following() {
		f.changed()
	}
	l.wipe()
	l.mu.Lock()
	report := l.opts.Changed
	l.mu.Unlock()
	for _, c := range changes {
		if report != nil {
			report(c)
		}
	}
}

// lock ends all leases at once, or lets them go on.
func (l *leases) lock(locked bool) {
	l.mu.Lock()
	l.locked = locked
	now := time.Now()
	for _, s := range l.byKey {
		// Nobody asks while it is locked: the time does not count.
		if s.state != LeaseRevoked {
			s.confirmed, s.next = now, now
		}
	}
	l.mu.Unlock()
	l.tell(nil)
	l.again()
}

// list is what is known of each of the keys.
func (l *leases) list(keys []string) (out []Lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range keys {
		if s := l.byKey[key]; s != nil {
			out = append(out, s.view(&l.opts))
		}
	}
	return out
}
