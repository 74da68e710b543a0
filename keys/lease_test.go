package keys

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

const (
	testInterval = time.Minute
	testGrace    = 15 * time.Minute
)

// leaseTest is a ring that keeps leases in fake time, with one open file that
// depends on a header's keys.
type leaseTest struct {
	t    *testing.T
	fake *fake
	ring *Ring
	h    *crypt.Header // of the open file

	mu      sync.Mutex
	kinds   map[string]Kind // guarded by mu; what calls fail with, by key
	ops     map[string]Kind // guarded by mu; the same by operation
	changes []string        // guarded by mu; "key state"
	told    int             // guarded by mu; calls of the follower
	hook    func(ctx context.Context, op, key string, err error) error
	inUse   [][]string // guarded by mu, like hook; what open files depend on
}

func runLeases(t *testing.T, grace time.Duration, test func(*leaseTest), trusted ...string) {
	t.Helper()
	before := crypt.LiveKeys()
	inFakeTime(t, func(t *testing.T) {
		l := &leaseTest{t: t, fake: newFake(), kinds: map[string]Kind{}, ops: map[string]Kind{}}
		volumeKey := newHeader(t, l.fake, trusted...)
		l.h = newHeader(t, l.fake, trusted...)
		l.fake.before = l.answer
		l.ring = NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: trusted, Provider: l.fake, CacheAge: 24 * time.Hour})
		defer synctest.Wait()
		defer l.ring.Close()
		l.ring.KeepLeases(LeaseOptions{Interval: testInterval, Grace: grace, Changed: l.changed}, volumeKey)
		stop := l.ring.Follow(func() [][]string {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.inUse
		}, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.told++
		})
		defer stop()
		require.NoError(t, open(t, l.ring, l.h))
		l.fake.calls = nil
		test(l)
	})
	require.Equal(t, before, crypt.LiveKeys())
}

func (l *leaseTest) answer(ctx context.Context, op, key string) error {
	l.mu.Lock()
	hook := l.hook
	kind, fails := l.kinds[key]
	if !fails {
		kind, fails = l.ops[op]
	}
	l.mu.Unlock()
	var err error
	if fails {
		err = newError(kind, op, key, nil)
	}
	if hook != nil {
		return hook(ctx, op, key, err)
	}
	return err
}

// onCall has hook asked before each answer, err, is given.
func (l *leaseTest) onCall(hook func(ctx context.Context, op, key string, err error) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hook = hook
}

func (l *leaseTest) changed(c Lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changes = append(l.changes, c.Key+" "+c.State.String())
}

func (l *leaseTest) fail(key string, k Kind) { l.mu.Lock(); defer l.mu.Unlock(); l.kinds[key] = k }
func (l *leaseTest) mend(key string)         { l.mu.Lock(); defer l.mu.Unlock(); delete(l.kinds, key) }

// notes are the changes that were reported, and how often the follower was told.
func (l *leaseTest) notes() (changes []string, told int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.changes), l.told
}

// unchanged: no lease changed its state.
func (l *leaseTest) unchanged() {
	l.t.Helper()
	changes, _ := l.notes()
	require.Empty(l.t, changes)
}

// use opens files that depend on these keys, in place of those before.
func (l *leaseTest) use(lists ...[]string) { l.mu.Lock(); defer l.mu.Unlock(); l.inUse = lists }

// after lets time pass.
func (l *leaseTest) after(d time.Duration) { time.Sleep(d); synctest.Wait() }

// calls counts the calls since the last time, by key.
func (l *leaseTest) calls(key string) (n int) {
	l.fake.mu.Lock()
	defer l.fake.mu.Unlock()
	kept := l.fake.calls[:0]
	for _, c := range l.fake.calls {
		if strings.HasSuffix(c, " "+key) {
			n++
		} else {
			kept = append(kept, c)
		}
	}
	l.fake.calls = kept
	return n
}

func (l *leaseTest) state(key string) Lease {
	l.t.Helper()
	for _, v := range l.ring.Leases() {
		if v.Key == key {
			return v
		}
	}
	require.Fail(l.t, "no lease", key)
	return Lease{}
}

func (l *leaseTest) is(key string, want LeaseState) {
	l.t.Helper()
	require.Equal(l.t, want.String(), l.state(key).State.String(), "%v", l.state(key).Err)
}

func (l *leaseTest) ended() error { return l.ring.Ended(l.ring.Governing(l.h)) }

// TestRenewals: one call for each key and interval while data keys are in use, however
// many, and none otherwise.
func TestRenewals(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		for range 30 {
			h := newHeader(t, l.fake, arnA, arnB)
			require.NoError(t, open(t, l.ring, h))
		}
		l.calls(arnA)
		l.calls(arnB)
		l.after(100 * testInterval)
		n := l.calls(arnA)
		require.Greater(t, n, 100)
		require.Less(t, n, 130, "an interval is shortened by a fifth at most")
		require.Zero(t, l.calls(arnB), "nothing depends on the second key")
		require.True(t, l.state(arnB).Idle)
		require.EqualValues(t, n, l.state(arnA).Checks)

		l.ring.Forget()
		l.after(2 * testInterval)
		l.calls(arnA)
		l.after(100 * testInterval)
		require.Zero(t, l.calls(arnA), "nothing is cached or open")
		require.True(t, l.state(arnA).Idle)

		l.use([]string{arnA, arnB})
		l.after(2 * testInterval)
		l.calls(arnA)
		l.after(10 * testInterval)
		require.GreaterOrEqual(t, l.calls(arnA), 10, "a file is open")

		l.use()
		l.after(2 * testInterval)
		l.calls(arnA)
		f := take(t, l.ring)
		l.ring.Return(f)
		l.after(4 * testInterval) // the pool keeps it 5 minutes
		require.Greater(t, l.calls(arnA), 2, "a fresh key waits for a file")
	}, arnA, arnB)
}

// TestOpensRenew: whoever decrypts has asked; whoever only makes files has not.
func TestOpensRenew(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		for range 50 {
			l.after(testInterval / 2)
			require.NoError(t, open(t, l.ring, newHeader(t, l.fake, arnA)))
		}
		require.Zero(t, l.state(arnA).Checks)
		l.mu.Lock()
		l.ops[opDecrypt] = KindDenied
		l.mu.Unlock()
		for range 6 {
			l.after(testInterval / 2)
			f, err := l.ring.Fresh(context.Background())
			if err != nil {
				break
			}
			wipeFresh(f)
		}
		l.is(arnA, LeaseRevoked)
		_, err := l.ring.Fresh(context.Background())
		require.ErrorIs(t, err, crypt.ErrKeyDisabled, "GenerateDataKey would be allowed")
	}, arnA)
}

// TestDenials: what ends a lease, and that the caller hears of it as EKEYREVOKED
// whatever the cause, at once and without a call.
func TestDenials(t *testing.T) {
	for _, kind := range []Kind{KindDisabled, KindNotFound, KindDenied} {
		runLeases(t, testGrace, func(l *leaseTest) {
			f := take(t, l.ring)
			l.ring.Return(f)
			l.fail(arnA, kind)
			l.after(testInterval + denialPause)
			l.is(arnA, LeaseRevoked)
			changes, told := l.notes()
			require.Equal(t, []string{arnA + " revoked"}, changes)
			require.Positive(t, told)
			err := l.ended()
			require.ErrorIs(t, err, crypt.ErrKeyDisabled)
			require.NotErrorIs(t, err, crypt.ErrKeyDenied, "the errno is one, whatever the cause")
			var cause *Error
			require.ErrorAs(t, err, &cause)
			require.Equal(t, kind, cause.Kind, "advice is by the cause")
			require.Equal(t, "us-east-1", cause.Region)
			require.Zero(t, l.ring.Stats().CacheKeys, "cached keys are wiped")
			require.Zero(t, l.ring.Stats().PoolReady, "so are those fetched ahead")
			l.calls(arnA)
			_, err = l.ring.Fresh(context.Background())
			require.ErrorIs(t, err, crypt.ErrKeyDisabled)
			require.Zero(t, l.calls(arnA))
			require.ErrorIs(t, open(t, l.ring, l.h), kind.Sentinel(), "an open asks, and has its own answer")
			require.Contains(t, []int{1, 2}, l.calls(arnA), "its own call, and the check of the lease that its answer may set off")
		}, arnA)
	}
}

// TestOneAccessDenied: a denial is two, seconds apart.
func TestOneAccessDenied(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		l.fail(arnA, KindDenied)
		for l.state(arnA).Err == nil {
			l.after(time.Second)
		}
		l.mend(arnA)
		l.after(10 * testInterval)
		l.unchanged()
		require.NoError(t, l.ended())

		l.fail(arnA, KindDenied)
		for l.state(arnA).Err == nil {
			l.after(time.Second)
		}
		l.fail(arnA, KindUnavailable) // nothing better was heard in between
		l.after(denialPause)
		l.fail(arnA, KindDenied)
		l.after(retryPause)
		l.is(arnA, LeaseRevoked)
	}, arnA)
}

// TestOutage: everything that is no denial goes on for the grace period and no longer.
func TestOutage(t *testing.T) {
	for _, kind := range []Kind{KindUnavailable, KindTimeout, KindLimit, KindCredentials, KindRejected, KindIncorrectKey, KindBadBlob} {
		runLeases(t, testGrace, func(l *leaseTest) {
			l.after(testInterval / 2)
			l.fail(arnA, kind)
			start := time.Now()
			l.after(testInterval)
			l.is(arnA, LeaseGrace)
			require.NoError(t, open(t, l.ring, l.h), "cached")
			l.after(testGrace - testInterval)
			l.is(arnA, LeaseGrace)
			require.NoError(t, l.ended())
			l.after(testInterval)
			l.is(arnA, LeaseRevoked)
			require.ErrorIs(t, l.ended(), crypt.ErrKeyDisabled)
			require.LessOrEqual(t, time.Since(start), testInterval+testGrace)
			changes, _ := l.notes()
			require.Equal(t, []string{arnA + " grace", arnA + " revoked"}, changes)

			l.mend(arnA)
			l.after(retryPause)
			l.is(arnA, LeaseValid)
			require.NoError(t, l.ended())
		}, arnA)
	}
}

// TestOutageThatEnds: within the grace period nobody notices.
func TestOutageThatEnds(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		l.fail(arnA, KindCredentials)
		l.after(testGrace)
		l.mend(arnA)
		l.after(retryPause)
		changes, _ := l.notes()
		require.Equal(t, []string{arnA + " grace", arnA + " valid"}, changes)
		l.fail(arnA, KindUnavailable) // the next one has all of its own grace
		l.after(testGrace)
		require.NoError(t, l.ended())
	}, arnA)
}

// TestStrict: without grace an outage of one interval ends the lease, and a slow
// answer does not.
func TestStrict(t *testing.T) {
	runLeases(t, 0, func(l *leaseTest) {
		l.onCall(func(ctx context.Context, op, key string, err error) error {
			return cmp.Or(slow(5*time.Second)(ctx, op, key), err)
		})
		l.after(20 * testInterval)
		l.unchanged()
		l.fail(arnA, KindUnavailable)
		l.after(testInterval + time.Second)
		l.is(arnA, LeaseRevoked)
	}, arnA)
	runLeases(t, 0, func(l *leaseTest) { // a check that hangs is no answer either
		l.onCall(func(ctx context.Context, op, key string, _ error) error {
			<-ctx.Done()
			return contextError(ctx, op, key)
		})
		l.after(testInterval + time.Second)
		l.is(arnA, LeaseRevoked)
	}, arnA)
}

// TestHeals: a revoked lease is asked about until it is granted, also when nothing
// depends on it any more, by checks and by opens.
func TestHeals(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		l.fail(arnA, KindDisabled)
		l.after(testInterval)
		l.is(arnA, LeaseRevoked)
		l.after(time.Hour)
		n := l.calls(arnA)
		require.InDelta(t, float64(time.Hour/retryPause), float64(n), 20)
		l.mend(arnA)
		_, before := l.notes()
		l.after(retryPause)
		l.is(arnA, LeaseValid)
		_, told := l.notes()
		require.Greater(t, told, before)
		require.NoError(t, open(t, l.ring, l.h))
		wipeFresh(take(t, l.ring))

		l.fail(arnA, KindDisabled)
		l.after(testInterval)
		l.is(arnA, LeaseRevoked)
		l.mend(arnA)
		require.NoError(t, open(t, l.ring, l.h), "an open that is allowed renews the lease")
		l.is(arnA, LeaseValid)
	}, arnA)
}

// TestAnswerFromBeforeTheDenial: an open that was allowed before the key was disabled,
// and answered after that was known, brings nothing back.
func TestAnswerFromBeforeTheDenial(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		late, other, slow := newHeader(t, l.fake, arnA), newHeader(t, l.fake, arnA), make(chan struct{})
		var calls atomic.Int64
		l.onCall(func(_ context.Context, _, _ string, err error) error {
			if calls.Add(1) == 1 {
				<-slow
			}
			return err
		})
		opened := make(chan error)
		go func() { opened <- open(t, l.ring, late) }()
		synctest.Wait()
		l.fail(arnA, KindDisabled)
		require.ErrorIs(t, open(t, l.ring, other), crypt.ErrKeyDisabled)
		l.after(2 * triggerPause)
		l.is(arnA, LeaseRevoked) // long before the interval: the open had it checked
		close(slow)
		require.ErrorIs(t, <-opened, crypt.ErrKeyDisabled)
		l.is(arnA, LeaseRevoked)
		require.Zero(t, l.ring.Stats().CacheKeys)
	}, arnA)
}

// TestOpensOnlyHurry: one file that a policy refuses costs nobody else the lease.
func TestOpensOnlyHurry(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		denied := newHeader(t, l.fake, arnA)
		var refuse atomic.Bool
		l.onCall(func(_ context.Context, op, key string, err error) error {
			if refuse.Swap(false) {
				return newError(KindDenied, op, key, nil)
			}
			return err
		})
		for range 600 {
			refuse.Store(true)
			require.ErrorIs(t, open(t, l.ring, denied), crypt.ErrKeyDenied)
			l.after(time.Second)
		}
		l.unchanged()
		require.Less(t, l.state(arnA).Checks, int64(600/denialPause.Seconds())+20)
	}, arnA)
}

// TestOtherKeysDenial: only the governing key's counts; while that one's service does
// not answer, the next one's.
func TestOtherKeysDenial(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		l.use([]string{arnB}) // so that the second key is asked about
		l.fail(arnB, KindDisabled)
		l.after(2 * testInterval)
		l.is(arnB, LeaseRevoked)
		require.NoError(t, l.ended())
		require.NoError(t, open(t, l.ring, l.h))
		require.Equal(t, 1, l.ring.Stats().CacheKeys, "still cached")
		require.Error(t, l.ring.Ended([]string{arnB}))
	}, arnA, arnB)
	runLeases(t, testGrace, func(l *leaseTest) {
		l.fail(arnA, KindUnavailable)
		l.after(testInterval + testGrace)
		l.is(arnA, LeaseRevoked)
		require.NoError(t, l.ended(), "a dead region does not close what another one opens")
		require.Positive(t, l.state(arnB).Checks, "which is asked about")
		l.fail(arnB, KindDisabled)
		l.after(testInterval)
		require.ErrorIs(t, l.ended(), crypt.ErrKeyDisabled)
		l.mend(arnB)
		l.fail(arnA, KindDisabled)
		l.after(testInterval)
		require.ErrorIs(t, l.ended(), crypt.ErrKeyDisabled, "the governing key's denial is final")
	}, arnA, arnB)
}

// TestOutageOfAll: keys that stand in for one another and are all silent buy no time: what
// depends on them ends when it would with the first alone.
func TestOutageOfAll(t *testing.T) {
	for _, grace := range []time.Duration{0, testGrace} {
		runLeases(t, grace, func(l *leaseTest) {
			l.use([]string{arnA, arnB, arnC})
			for _, key := range []string{arnA, arnB, arnC} {
				l.fail(key, KindUnavailable)
			}
			start := time.Now()
			for l.ended() == nil && time.Since(start) < 10*(testInterval+testGrace) {
				l.after(time.Second)
			}
			require.GreaterOrEqual(t, time.Since(start), testInterval+grace)
			require.LessOrEqual(t, time.Since(start), testInterval+grace+testInterval/10)
			for _, key := range []string{arnA, arnB, arnC} {
				require.Positive(t, l.state(key).Checks, "each has its chance: %s", key)
			}
			l.mend(arnC)
			l.after(testInterval)
			require.NoError(t, l.ended(), "one answers")
		}, arnA, arnB, arnC)
		runLeases(t, grace, func(l *leaseTest) {
			l.fail(arnA, KindUnavailable)
			l.onCall(func(ctx context.Context, op, key string, err error) error {
				wait := 9 * time.Second
				if key == arnB {
					wait = 5 * time.Second
				}
				return cmp.Or(slow(wait)(ctx, op, key), err)
			})
			for range 4 * (testInterval + grace) / time.Second {
				l.after(time.Second)
				require.NoError(t, l.ended())
			}
			changes, _ := l.notes()
			require.Subset(t, []string{arnA + " grace", arnA + " revoked"}, changes, "the one that stands in is asked, and answers")
		}, arnA, arnB, arnC)
	}
}

// TestSetTrustedKeepsLeases: a key that is dropped governs nothing, a new one does.
func TestSetTrustedKeepsLeases(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		l.fail(arnA, KindDisabled)
		l.after(testInterval)
		require.Error(t, l.ended())
		_, before := l.notes()
		l.ring.SetTrusted([]string{arnB})
		_, told := l.notes()
		require.Greater(t, told, before)
		require.NoError(t, l.ended())
		require.NoError(t, open(t, l.ring, l.h))
		require.Len(t, l.ring.Leases(), 1)
		l.fail(arnB, KindDisabled)
		l.after(testInterval)
		require.Error(t, l.ended())
	}, arnA, arnB)
}

// TestDroppedKeysLease: what depends on a key that is trusted no more (a file that was
// opened while a rekey dropped it, pages that the kernel kept of one closed before) ends
// with the lease of those that are.
func TestDroppedKeysLease(t *testing.T) {
	for _, list := range [][]string{{arnA}, {arnA, arnB}} {
		runLeases(t, testGrace, func(l *leaseTest) {
			l.ring.SetTrusted([]string{arnB, arnC})
			l.ring.Forget()
			l.use(list)
			require.NoError(t, l.ring.Ended(list))
			l.after(10 * testInterval)
			l.calls(arnB)
			l.after(10 * testInterval)
			require.GreaterOrEqual(t, l.calls(arnB), 10, "nothing else is open")
			require.Zero(t, l.calls(arnA))
			l.fail(arnC, KindDisabled)
			l.after(2 * testInterval)
			require.NoError(t, l.ring.Ended(list))
			l.fail(arnB, KindDisabled)
			l.after(testInterval)
			require.ErrorIs(t, l.ring.Ended(list), crypt.ErrKeyDisabled)
			l.mend(arnB)
			l.after(testInterval)
			require.NoError(t, l.ring.Ended(list))
			require.NoError(t, l.ring.Ended(nil), "what has no keys depends on none")
		}, arnA, arnB, arnC)
	}
}

// TestLock: everything is refused, without a call, until Unlock; then it is asked for
// anew.
func TestLock(t *testing.T) {
	runLeases(t, testGrace, func(l *leaseTest) {
		l.ring.Lock()
		require.True(t, l.ring.Locked())
		require.Zero(t, l.ring.Stats().CacheKeys)
		for _, err := range []error{l.ended(), open(t, l.ring, l.h), l.ring.Ended(nil)} {
			require.ErrorIs(t, err, ErrLocked)
			require.ErrorIs(t, err, crypt.ErrKeyDisabled)
		}
		_, err := l.ring.Fresh(context.Background())
		require.ErrorIs(t, err, ErrLocked)
		l.after(24 * time.Hour)
		require.Zero(t, l.calls(arnA))
		l.ring.Unlock()
		require.False(t, l.ring.Locked())
		require.NoError(t, l.ended())
		require.NoError(t, open(t, l.ring, l.h))
		require.Positive(t, l.calls(arnA))
		l.unchanged()
	}, arnA)
}

// TestBadVolumeKeyCopy: a damaged copy of the volume key says nothing of the key while
// another blob is known.
func TestBadVolumeKeyCopy(t *testing.T) {
	runLeases(t, 0, func(l *leaseTest) {
		bad := newHeader(t, l.fake, arnA)
		bad.Copies[0].Blob = []byte("damaged")
		l.ring.SetVolumeKey(bad)
		l.after(10 * testInterval)
		l.unchanged()
		l.fail(arnA, KindDisabled)
		l.after(testInterval)
		l.is(arnA, LeaseRevoked)
	}, arnA)
}

// TestLeaseErrorsHoldTheirCause: for logs and advice.
func TestLeaseErrorsHoldTheirCause(t *testing.T) {
	e := &LeaseError{arnA, newError(KindDenied, opDecrypt, arnA, errors.New("no"))}
	require.Contains(t, e.Error(), arnA)
	require.Contains(t, e.Error(), "denied")
	require.False(t, e.As(new(error)))
}
