package keys

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// slow makes each call take as long as KMS does, or as the context allows.
func slow(d time.Duration) func(context.Context, string, string) error {
	return func(ctx context.Context, op, key string) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return contextError(ctx, op, key)
		}
	}
}

func TestConcurrentOpensAreOneCall(t *testing.T) {
	before := crypt.LiveKeys()
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h, other := newHeader(t, f, arnA), newHeader(t, f, arnA)
		f.calls, f.before = nil, slow(20*time.Millisecond)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		defer r.Close()
		done := make(chan error)
		for i := range 100 {
			go func() {
				x := h
				if i%2 == 0 {
					x = other
				}
				done <- open(t, r, x)
			}()
		}
		for range 100 {
			require.NoError(t, <-done)
		}
		require.Equal(t, 2, f.count())
		require.EqualValues(t, 98, r.Stats().Coalesced)
	})
	require.Equal(t, before, crypt.LiveKeys())
}

// TestInterruptedCaller: who is interrupted leaves at once; the call goes on,
// for the others and for the next.
func TestInterruptedCaller(t *testing.T) {
	before := crypt.LiveKeys()
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA)
		f.calls, f.before = nil, slow(5*time.Second)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		defer r.Close()
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, cancel)
		start := time.Now()
		_, err := r.Open(ctx, h)
		require.ErrorIs(t, err, crypt.ErrInterrupted)
		require.Equal(t, time.Second, time.Since(start))
		require.NoError(t, open(t, r, h), "joins the call under way")
		require.Equal(t, 5*time.Second, time.Since(start))
		require.Equal(t, 1, f.count())
	})
	require.Equal(t, before, crypt.LiveKeys())
}

// TestAbandonedCall: with no caller left, its result is remembered, not lost
// and not leaked.
func TestAbandonedCall(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA)
		f.calls, f.before = nil, slow(5*time.Second)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		defer r.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := r.Open(ctx, h)
		require.ErrorIs(t, err, crypt.ErrKeyTimeout, "the caller's own deadline")
		live := crypt.LiveKeys()
		time.Sleep(5 * time.Second)
		require.Equal(t, live+2, crypt.LiveKeys(), "the cache has one data key and its derived key")
		require.NoError(t, open(t, r, h))
		require.Equal(t, 1, f.count())
	})
}

func TestDeadlineOfACall(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA)
		f.before = slow(time.Hour)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		defer r.Close()
		start := time.Now()
		require.ErrorIs(t, open(t, r, h), crypt.ErrKeyTimeout)
		require.Equal(t, defaultDeadline, time.Since(start))
	})
}

// TestChangedHeadersFlyApart: a rekeyed header must not share the old one's fate.
func TestChangedHeadersFlyApart(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA, arnB)
		old, rekeyed := h.Clone(), h.Clone()
		old.Copies, rekeyed.Copies = old.Copies[:1], rekeyed.Copies[1:]
		f.before = func(ctx context.Context, op, key string) error {
			time.Sleep(time.Second)
			return failing(map[string]Kind{arnA: KindDisabled})(ctx, op, key)
		}
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA, arnB}, Provider: f})
		defer r.Close()
		bad := make(chan error)
		go func() { bad <- open(t, r, old) }()
		time.Sleep(time.Millisecond)
		require.NoError(t, open(t, r, rekeyed))
		require.ErrorIs(t, <-bad, crypt.ErrKeyDisabled)
	})
}

func TestCloseEndsCalls(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA)
		f.before = slow(time.Hour)
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		time.AfterFunc(time.Second, r.Close)
		start := time.Now()
		require.ErrorIs(t, open(t, r, h), crypt.ErrInterrupted)
		require.Equal(t, time.Second, time.Since(start))
	})
}
