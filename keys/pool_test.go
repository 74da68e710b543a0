package keys

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// poolTest runs a test on a ring whose key service takes as long as given, in
// fake time, and checks that nothing is left alive.
func poolTest(t *testing.T, latency time.Duration, test func(*testing.T, *fake, *Ring)) {
	t.Helper()
	poolTestUnder(t, arnA, latency, test)
}

func poolTestUnder(t *testing.T, key string, latency time.Duration, test func(*testing.T, *fake, *Ring)) {
	t.Helper()
	before := crypt.LiveKeys()
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		f.before = slow(latency)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{key}, Provider: f})
		defer synctest.Wait()
		defer r.Close()
		test(t, f, r)
	})
	require.Equal(t, before, crypt.LiveKeys())
}

func take(t testing.TB, r *Ring) *crypt.Fresh {
	t.Helper()
	f, err := r.Fresh(context.Background())
	require.NoError(t, err)
	return f
}

// TestSlowDemandFetchesNothingAhead: a file now and then costs its one call.
func TestSlowDemandFetchesNothingAhead(t *testing.T) {
	poolTest(t, 10*time.Millisecond, func(t *testing.T, f *fake, r *Ring) {
		for range 30 {
			wipeFresh(take(t, r))
			time.Sleep(time.Second)
		}
		require.Equal(t, 30, f.count())
		require.Zero(t, r.Stats().PoolReady)
	})
}

// TestQuickService: nothing is gained by fetching ahead.
func TestQuickService(t *testing.T) {
	poolTest(t, worthwhile-1, func(t *testing.T, f *fake, r *Ring) {
		for range 100 {
			wipeFresh(take(t, r))
			time.Sleep(time.Millisecond)
		}
		require.Equal(t, 100, f.count())
	})
}

// TestStock: whoever creates file after file finds keys made of a local one, and whoever
// does so now and then leaves none. They end with the lease, and with their key.
func TestStock(t *testing.T) {
	const each = 40 * time.Microsecond
	poolTestUnder(t, "local:here", each, func(t *testing.T, f *fake, r *Ring) {
		var disabled atomic.Bool
		f.before = func(ctx context.Context, op, key string) error {
			if disabled.Load() {
				return newError(KindDisabled, op, key, nil)
			}
			return slow(each)(ctx, op, key)
		}
		for range 100 {
			wipeFresh(take(t, r))
			time.Sleep(2 * brisk)
		}
		require.Equal(t, int64(100), r.Stats().PoolWaits, "not brisk")
		require.Equal(t, 100, f.count())

		start := time.Now()
		for range 1000 {
			wipeFresh(take(t, r))
			time.Sleep(4 * each)
		}
		require.Less(t, time.Since(start), 1000*4*each+100*each, "few were waited for")
		s := r.Stats()
		require.Greater(t, s.PoolHits, int64(950))
		require.LessOrEqual(t, f.count(), 1100+stocked, "so many are made in vain at most")
		require.Positive(t, s.PoolReady)

		lockOnce(r)
		require.Zero(t, r.Stats().PoolReady)
		for range 50 {
			wipeFresh(take(t, r))
		}
		synctest.Wait()
		disabled.Store(true)
		failed := 0
		for range 2 * stocked {
			k, err := r.Fresh(t.Context())
			if err != nil {
				failed++
			}
			wipeFresh(k)
		}
		require.GreaterOrEqual(t, failed, stocked, "a key that is disabled makes no more")

		time.Sleep(poolAge * 12 / 10)
		require.Zero(t, r.Stats().PoolReady, "what is left is wiped when it is old")
	})
}

// TestBurst: unpacking an archive soon stops waiting for KMS, and at most the
// pool's size is fetched in vain.
func TestBurst(t *testing.T) {
	poolTest(t, 10*time.Millisecond, func(t *testing.T, f *fake, r *Ring) {
		start := time.Now()
		const creates = 5000
		for range creates {
			wipeFresh(take(t, r))
			time.Sleep(500 * time.Microsecond) // the program's own work
		}
		took := time.Since(start)
		require.Less(t, took, 3*time.Second, "one by one it would be 52 s; alone the program takes 2.5 s")
		synctest.Wait()
		time.Sleep(time.Second)
		require.LessOrEqual(t, f.count(), creates+defaultPoolSize)
		s := r.Stats()
		require.EqualValues(t, creates, s.PoolHits+s.PoolWaits)
		require.Greater(t, s.PoolHits, s.PoolWaits*10)
		require.NotZero(t, s.PoolWaited)

		time.Sleep(poolAge * 12 / 10)
		require.Zero(t, r.Stats().PoolReady, "what is left is wiped when it is old, and not fetched again")
		require.LessOrEqual(t, f.count(), creates+defaultPoolSize)
	})
}

// TestParallelCreates: many at once wait for one round trip, not in a row.
func TestParallelCreates(t *testing.T) {
	poolTest(t, 10*time.Millisecond, func(t *testing.T, f *fake, r *Ring) {
		start := time.Now()
		done := make(chan *crypt.Fresh)
		for range 200 {
			go func() { done <- take(t, r) }()
		}
		seen := map[crypt.FileID]bool{}
		for range 200 {
			k := <-done
			require.False(t, seen[k.Header.File], "no key is given out twice")
			seen[k.Header.File] = true
			wipeFresh(k)
		}
		require.LessOrEqual(t, time.Since(start), 50*time.Millisecond)
		require.LessOrEqual(t, f.count(), 200+defaultPoolSize)
	})
}

func TestReturnedKeyIsUsedAgain(t *testing.T) {
	poolTest(t, 10*time.Millisecond, func(t *testing.T, f *fake, r *Ring) {
		for range 10 {
			r.Return(take(t, r))
			time.Sleep(time.Second)
		}
		require.Equal(t, 1, f.count())
	})
}

// lockOnce is "kmsfs lock", and at once "unlock".
func lockOnce(r *Ring) {
	defer r.Unlock()
	r.Lock()
}

// TestReturnedTooLate: a key from before a change of the list, or before a refresh, which
// changes nothing in it, is not handed out again.
func TestReturnedTooLate(t *testing.T) {
	for name, change := range map[string]func(*Ring){
		"refresh": func(r *Ring) { r.SetTrusted([]string{arnA}) },
		"forget":  (*Ring).Forget,
		"lock":    lockOnce,
	} {
		t.Run(name, func(t *testing.T) {
			poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
				old := take(t, r)
				change(r)
				r.Return(old)
				next := take(t, r)
				defer wipeFresh(next)
				require.NotEqual(t, old.Header, next.Header)
				r.Return(take(t, r)) // one from after it is
				require.Equal(t, 1, r.Stats().PoolReady)
			})
		})
	}
}

// TestReturnServesAWaiter: someone may be waiting for just that.
func TestReturnServesAWaiter(t *testing.T) {
	poolTest(t, time.Minute, func(t *testing.T, f *fake, r *Ring) {
		f.before = nil
		k := take(t, r)
		f.before = slow(time.Hour)
		got := make(chan *crypt.Fresh)
		go func() { got <- take(t, r) }()
		synctest.Wait()
		r.Return(k)
		require.Equal(t, k, <-got)
		wipeFresh(k)
	})
}

// TestEmptyPoolWaitsAsLongAsTheCaller: a create waits 2 s, whatever KMS does.
func TestEmptyPoolWaitsAsLongAsTheCaller(t *testing.T) {
	poolTest(t, 5*time.Second, func(t *testing.T, f *fake, r *Ring) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		start := time.Now()
		_, err := r.Fresh(ctx)
		require.ErrorIs(t, err, crypt.ErrKeyTimeout)
		require.Equal(t, 2*time.Second, time.Since(start))
		time.Sleep(4 * time.Second)
		require.Equal(t, 1, r.Stats().PoolReady, "its key came later and waits for the next")
		wipeFresh(take(t, r))
		require.Equal(t, 1, f.count())

		gone, stop := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, stop)
		_, err = r.Fresh(gone)
		require.ErrorIs(t, err, crypt.ErrInterrupted)
	})
}

// TestDeniedKey: each waiter gets the failure, the key is not hammered, and it
// heals by itself.
func TestDeniedKey(t *testing.T) {
	poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
		f.before = failing(map[string]Kind{arnA: KindDisabled})
		start := time.Now()
		for time.Since(start) < time.Minute {
			_, err := r.Fresh(context.Background())
			require.ErrorIs(t, err, crypt.ErrKeyDisabled)
			time.Sleep(time.Millisecond)
		}
		require.LessOrEqual(t, f.count(), 20, "60,000 creates failed")
		f.before = nil
		time.Sleep(maxPenalty)
		wipeFresh(take(t, r))
		wipeFresh(take(t, r))
	})
}

func TestFailureReachesEveryWaiter(t *testing.T) {
	poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
		f.before = func(ctx context.Context, op, key string) error {
			time.Sleep(time.Second)
			return newError(KindDenied, op, key, nil)
		}
		done := make(chan error)
		for range 200 { // more than are fetched at a time
			go func() {
				_, err := r.Fresh(context.Background())
				done <- err
			}()
		}
		start := time.Now()
		for range 200 {
			require.ErrorIs(t, <-done, crypt.ErrKeyDenied)
		}
		require.LessOrEqual(t, time.Since(start), time.Second)
		require.LessOrEqual(t, f.count(), defaultPoolSize)
	})
}

// TestInheritedFetch: a fetch that an interrupted caller left behind serves the
// next one, also with its failure; nobody hangs.
func TestInheritedFetch(t *testing.T) {
	poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
		f.before = func(_ context.Context, op, key string) error {
			time.Sleep(time.Second)
			return newError(KindUnavailable, op, key, nil)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		_, err := r.Fresh(ctx)
		require.ErrorIs(t, err, crypt.ErrKeyTimeout)
		_, err = r.Fresh(context.Background())
		require.ErrorIs(t, err, crypt.ErrKeyUnavailable)
		require.Equal(t, 1, f.count())
	})
}

// TestWaitersSurviveAChangeOfKeys: they get a key of the new list.
func TestWaitersSurviveAChangeOfKeys(t *testing.T) {
	poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
		f.before = func(ctx context.Context, op, key string) error {
			if key == arnA {
				return slow(time.Hour)(ctx, op, key)
			}
			return slow(10*time.Millisecond)(ctx, op, key)
		}
		time.AfterFunc(time.Second, func() { r.SetTrusted([]string{arnB}) })
		start := time.Now()
		k := take(t, r)
		defer wipeFresh(k)
		require.Equal(t, arnB, k.Header.Copies[0].Key)
		require.Equal(t, time.Second+10*time.Millisecond, time.Since(start))
	})
}

func TestCloseFreesWaiters(t *testing.T) {
	poolTest(t, time.Hour, func(t *testing.T, f *fake, r *Ring) {
		time.AfterFunc(time.Second, r.Close)
		_, err := r.Fresh(context.Background())
		require.ErrorIs(t, err, errClosed)
	})
}

// retried is a key service that fails the first attempt after a while, as it
// does when it throttles, and is still being retried.
func retried(answer Kind) func(context.Context, string, string) error {
	return func(ctx context.Context, op, key string) error {
		time.Sleep(time.Second)
		noteAttempt(ctx, newError(answer, op, key, nil))
		return slow(time.Hour)(ctx, op, key)
	}
}

// TestThrottledCreate: ETIMEDOUT is for a service from which nothing was heard.
func TestThrottledCreate(t *testing.T) {
	for answer, want := range map[Kind]error{
		KindUnavailable: crypt.ErrKeyUnavailable,
		KindTimeout:     crypt.ErrKeyTimeout,
	} {
		poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
			h := newHeader(t, f, arnA)
			f.before = func(ctx context.Context, op, key string) error {
				if key == arnB {
					return slow(time.Hour)(ctx, op, key)
				}
				return retried(answer)(ctx, op, key)
			}
			for _, call := range []func(context.Context) error{
				func(ctx context.Context) error { _, err := r.Fresh(ctx); return err },
				func(ctx context.Context) error { _, err := r.Open(ctx, h); return err },
			} {
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				require.ErrorIs(t, call(ctx), want)
				cancel()
				ctx, cancel = context.WithCancel(context.Background())
				time.AfterFunc(2*time.Second, cancel)
				require.ErrorIs(t, call(ctx), crypt.ErrInterrupted)
			}
			r.SetTrusted([]string{arnB}) // whose service has said nothing yet
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			_, err := r.Fresh(ctx)
			require.ErrorIs(t, err, crypt.ErrKeyTimeout)
		})
	}
}
