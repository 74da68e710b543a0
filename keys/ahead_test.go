package keys

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

func prefetching(o *RingOptions) { o.Prefetch = 8 }

// aheadHeaders are headers whose keys nobody has opened.
func aheadHeaders(t *testing.T, f *fake, n int, keys ...string) []*crypt.Header {
	list := make([]*crypt.Header, n)
	for i := range list {
		list[i] = newHeader(t, f, keys...)
	}
	f.calls = nil
	return list
}

// A guess costs one call, the open that it was for none, and the counters tell what
// became of it.
func TestPrefetch(t *testing.T) {
	noLeaks(t)
	f := newFake()
	list := aheadHeaders(t, f, 3, arnA)
	r := newTestRing(t, f, prefetching, arnA)
	require.True(t, r.Prefetches())
	for _, h := range list {
		asked, err := r.Prefetch(t.Context(), h)
		require.NoError(t, err)
		require.True(t, asked)
	}
	require.NoError(t, open(t, r, list[0]))
	require.NoError(t, open(t, r, list[0]))
	asked, err := r.Prefetch(t.Context(), list[0])
	require.NoError(t, err)
	require.False(t, asked, "it is there already")
	require.Equal(t, 3, f.count())
	r.Forget()
	s := r.Stats()
	require.Equal(t, []int64{3, 0, 1, 2, 0}, []int64{s.Ahead, s.AheadFailed, s.AheadUsed, s.AheadWasted, int64(s.AheadUnused)})
	require.Equal(t, []int64{2, 0, 0}, []int64{s.CacheHits, s.CacheMisses, s.OpenWaits})
}

// What an open would not get, a guess does not ask for.
func TestPrefetchIsRefused(t *testing.T) {
	f := newFake()
	h := aheadHeaders(t, f, 1, arnA)[0]
	foreign := h.Clone()
	foreign.Volume[0] ^= 1
	r := newTestRing(t, f, prefetching, arnB)
	for _, h := range []*crypt.Header{h, foreign} {
		_, err := r.Prefetch(t.Context(), h)
		require.Error(t, err)
	}
	r.SetTrusted([]string{arnA})
	r.Lock()
	_, err := r.Prefetch(t.Context(), h)
	require.ErrorIs(t, err, ErrLocked)
	require.Zero(t, f.count())
	off := newTestRing(t, f, nil, arnA)
	_, err = off.Prefetch(t.Context(), h)
	require.ErrorIs(t, err, ErrNotAhead)
	require.False(t, off.Prefetches())
	require.False(t, newTestRing(t, f, prefetching, "local:a").Prefetches())
}

// A lock that comes while a guess is on its way leaves nothing behind.
func TestLockDuringPrefetch(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := aheadHeaders(t, f, 1, arnA)[0]
		before := crypt.LiveKeys()
		r := NewRing(RingOptions{Volume: testVolume, Trusted: []string{arnA}, Provider: f, Prefetch: 8})
		defer r.Close()
		f.before = slow(time.Second)
		time.AfterFunc(time.Second/2, r.Lock)
		_, _ = r.Prefetch(t.Context(), h)
		synctest.Wait()
		require.Equal(t, before, crypt.LiveKeys())
	})
}

// No more guesses are under way than asked for, and they never fill the cache.
func TestPrefetchBounds(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		list := aheadHeaders(t, f, 12, arnA)
		f.before = slow(time.Second)
		r := NewRing(RingOptions{Volume: testVolume, Trusted: []string{arnA}, Provider: f, Prefetch: 8, CacheKeys: 20})
		defer r.Close()
		for _, h := range list[:8] {
			go func() { _, _ = r.Prefetch(context.Background(), h) }()
		}
		synctest.Wait()
		_, err := r.Prefetch(t.Context(), list[8])
		require.ErrorIs(t, err, ErrNotAhead, "eight are under way")
		time.Sleep(2 * time.Second)
		for i, h := range list[8:] {
			_, err := r.Prefetch(t.Context(), h)
			if i < 2 {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, ErrNotAhead, "half of the cache holds what nobody asked for")
			}
		}
	})
}

// After KMS has throttled a guess, or anybody, there are none for a second, then one at
// a time and more with each that succeeds; each further time the rest is twice as long.
func TestPrefetchRests(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		list := aheadHeaders(t, f, 12, arnA)
		r := NewRing(RingOptions{Volume: testVolume, Trusted: []string{arnA}, Provider: f, Prefetch: 8})
		defer r.Close()
		f.before = func(_ context.Context, op, key string) error {
			return &Error{Kind: KindUnavailable, Op: op, Key: key, Code: "ThrottlingException"}
		}
		for _, rest := range []time.Duration{firstRest, 2 * firstRest, 4 * firstRest} {
			calls := f.count()
			_, err := r.Prefetch(t.Context(), list[0])
			require.Error(t, err)
			require.Equal(t, calls+1, f.count(), "one attempt")
			time.Sleep(rest - time.Millisecond)
			_, err = r.Prefetch(t.Context(), list[0])
			require.ErrorIs(t, err, ErrNotAhead)
			time.Sleep(time.Millisecond)
		}
		f.before = slow(time.Second)
		together := func(list []*crypt.Header) (refused int) {
			results := make(chan error, len(list))
			for _, h := range list {
				go func() { _, err := r.Prefetch(context.Background(), h); results <- err }()
			}
			for range list {
				if <-results != nil {
					refused++
				}
			}
			return refused
		}
		require.Equal(t, 2, together(list[:3]), "one at a time")
		require.Equal(t, 1, together(list[3:6]), "then two")
		require.Equal(t, 0, together(list[6:9]))
		r.ahead.throttled() // somebody's open was
		_, err := r.Prefetch(t.Context(), list[10])
		require.ErrorIs(t, err, ErrNotAhead)
	})
}

// A guess that KMS throttles, or whose service is silent, is one request, and does not
// turn opens away from the key; an open that meets it asks for itself.
func TestPrefetchIsOneAttempt(t *testing.T) {
	srv := kmstest.New(t, nil)
	srv.Setenv(t)
	aws, err := NewAWS(AWSOptions{})
	require.NoError(t, err)
	key := srv.CreateKey("us-east-1")
	r := newTestRing(t, aws, prefetching, key)
	fresh, err := r.NewKey(t.Context(), crypt.UseFile)
	require.NoError(t, err)
	fresh.Secrets.Wipe()
	for _, code := range []string{"ThrottlingException", "KMSInternalException", "DependencyTimeoutException"} {
		srv.Reset()
		r.ahead.until = time.Time{}
		lift := srv.Inject(kmstest.Fault{Op: opDecrypt, Code: code})
		_, err = r.Prefetch(t.Context(), fresh.Header)
		require.Error(t, err)
		require.Equal(t, 1, srv.Count())
		lift()
		require.Empty(t, r.core.outages)
	}
	require.NoError(t, open(t, r, fresh.Header))
}

// Every throttled request is heard of, whoever made it.
func TestThrottledOpensStopGuesses(t *testing.T) {
	srv := kmstest.New(t, nil)
	srv.Setenv(t)
	aws, err := NewAWS(AWSOptions{})
	require.NoError(t, err)
	r := newTestRing(t, aws, prefetching, srv.CreateKey("us-east-1"))
	srv.Inject(kmstest.Fault{Op: opGenerate, Code: "ThrottlingException", Times: 1})
	fresh, err := r.Fresh(t.Context())
	require.NoError(t, err)
	fresh.Secrets.Wipe()
	_, err = r.Prefetch(t.Context(), fresh.Header)
	require.ErrorIs(t, err, ErrNotAhead)
}
