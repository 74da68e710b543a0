package keys

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

func TestCacheAge(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		before := crypt.LiveKeys()
		f := newFake()
		h := newHeader(t, f, arnA)
		f.calls = nil
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f, CacheAge: time.Minute})
		defer r.Close()
		require.NoError(t, open(t, r, h))
		for range 5 {
			time.Sleep(10 * time.Second)
			require.NoError(t, open(t, r, h))
		}
		require.Equal(t, 1, f.count())
		time.Sleep(11 * time.Second)
		synctest.Wait()
		require.Equal(t, before, crypt.LiveKeys(), "wiped by itself, however recently it was used")
		require.NoError(t, open(t, r, h))
		require.Equal(t, 2, f.count())
	})
}

// TestCacheSweepsStragglers: entries of different ages all go in time.
func TestCacheSweepsStragglers(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		before := crypt.LiveKeys()
		f := newFake()
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f, CacheAge: time.Minute})
		defer r.Close()
		for range 10 {
			require.NoError(t, open(t, r, newHeader(t, f, arnA)))
			time.Sleep(7 * time.Second)
		}
		time.Sleep(66 * time.Second)
		synctest.Wait()
		require.Equal(t, before, crypt.LiveKeys())
		require.Zero(t, r.Stats().CacheKeys)
	})
}

func TestCacheCount(t *testing.T) {
	noLeaks(t)
	f := newFake()
	a, b, c := newHeader(t, f, arnA), newHeader(t, f, arnA), newHeader(t, f, arnA)
	f.calls = nil
	r := newTestRing(t, f, func(o *RingOptions) { o.CacheKeys = 2 }, arnA)
	live := crypt.LiveKeys()
	require.NoError(t, open(t, r, a))
	require.NoError(t, open(t, r, b))
	require.NoError(t, open(t, r, a)) // now b is the least recently used
	require.NoError(t, open(t, r, c))
	require.Equal(t, live+4, crypt.LiveKeys(), "two entries of two keys; the third was wiped")
	require.NoError(t, open(t, r, a))
	require.Equal(t, 3, f.count())
	require.NoError(t, open(t, r, b))
	require.Equal(t, 4, f.count())
}

func TestCacheOff(t *testing.T) {
	noLeaks(t)
	f := newFake()
	h := newHeader(t, f, arnA)
	f.calls = nil
	r := newTestRing(t, f, func(o *RingOptions) { o.CacheKeys = -1 }, arnA)
	for range 3 {
		require.NoError(t, open(t, r, h))
	}
	require.Equal(t, 3, f.count())
}

// TestFailuresAreNotRemembered: the key is back, the file opens.
func TestFailuresAreNotRemembered(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnA)
	r := newTestRing(t, f, nil, arnA)
	for k := range kinds {
		f.before = failing(map[string]Kind{arnA: Kind(k)})
		require.ErrorIs(t, open(t, r, h), Kind(k).Sentinel())
	}
	f.before = nil
	require.NoError(t, open(t, r, h))
	require.EqualValues(t, 1, r.Stats().Failures[KindDenied.String()])
}

// TestClones: a caller who wipes his secrets wipes nobody else's.
func TestClones(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnA)
	r := newTestRing(t, f, nil, arnA)
	one, err := r.Open(t.Context(), h)
	require.NoError(t, err)
	two, err := r.Open(t.Context(), h)
	require.NoError(t, err)
	one.Wipe()
	require.NoError(t, two.DataKey().Use(func([]byte) error { return nil }))
	r.Close()
	require.NoError(t, two.DataKey().Use(func([]byte) error { return nil }), "open files outlive the cache")
	two.Wipe()
}

// TestRetainDuringACall: what was asked for before the list changed is not
// remembered after it.
func TestRetainDuringACall(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA)
		f.before = slow(time.Second)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		defer r.Close()
		time.AfterFunc(time.Second/2, func() { r.SetTrusted([]string{arnB}) })
		require.NoError(t, open(t, r, h), "it was trusted when it was opened")
		require.Zero(t, r.Stats().CacheKeys)
	})
}
