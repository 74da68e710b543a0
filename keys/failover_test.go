package keys

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// An outage is a key whose service gives no answer while it lasts, and what it
// says when it does not.
type outage struct {
	key   string
	over  atomic.Bool
	says  Kind // once it is over; KindUnavailable = it works
	tried atomic.Int64
}

func (o *outage) before(ctx context.Context, op, key string) error {
	if key != o.key {
		return nil
	}
	o.tried.Add(1)
	switch {
	case !o.over.Load():
		<-ctx.Done()
		return contextError(ctx, op, key)
	case o.says != KindUnavailable:
		return newError(o.says, op, key, nil)
	}
	return nil
}

// inOutage runs a test in fake time with headers under arnA, which governs and
// does not answer, and under arnB; one open has already met the outage.
func inOutage(t *testing.T, test func(t *testing.T, o *outage, next func() error)) {
	t.Helper()
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		headers := make(chan *crypt.Header, 200)
		for range cap(headers) {
			headers <- newHeader(t, f, arnA, arnB)
		}
		o := &outage{key: arnA}
		f.before = o.before
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA, arnB}, Provider: f})
		defer r.Close()
		next := func() error { return open(t, r, <-headers) }
		start := time.Now()
		require.NoError(t, next())
		require.Equal(t, 6*time.Second, time.Since(start), "the first open leaves time for the other copy")
		o.tried.Store(0)
		test(t, o, next)
	})
}

// together runs n opens at once and reports how many failed.
func together(n int, next func() error) (failed int64) {
	var count atomic.Int64
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if next() != nil {
				count.Add(1)
			}
		})
	}
	wg.Wait()
	return count.Load()
}

// TestDeadRegionCostsNothing: while its outage is remembered, the governing key is
// not asked, and opens take no longer than the other copy.
func TestDeadRegionCostsNothing(t *testing.T) {
	inOutage(t, func(t *testing.T, o *outage, next func() error) {
		start := time.Now()
		for range 29 {
			require.NoError(t, next())
			require.Zero(t, together(3, next))
			time.Sleep(time.Second)
		}
		require.Zero(t, o.tried.Load())
		require.Equal(t, 29*time.Second, time.Since(start))
	})
}

// TestOneOpenProbes: when the memory of an outage ends, one open asks the dead
// key, for a second at most, and the others go on past it.
func TestOneOpenProbes(t *testing.T) {
	inOutage(t, func(t *testing.T, o *outage, next func() error) {
		for round := range 3 {
			time.Sleep(outageMemory)
			start := time.Now()
			require.Zero(t, together(20, next))
			require.Equal(t, outageChance, time.Since(start))
			require.EqualValues(t, round+1, o.tried.Load())
			require.Zero(t, together(20, next))
			require.Equal(t, outageChance, time.Since(start))
			require.EqualValues(t, round+1, o.tried.Load(), "the probe's failure is remembered")
		}
		time.Sleep(outageMemory)
		o.over.Store(true)
		require.NoError(t, next())
		require.EqualValues(t, 4, o.tried.Load())
		require.Zero(t, together(10, next))
		require.EqualValues(t, 14, o.tried.Load(), "success restores its place")
	})
}

// TestAnInterruptedProbeIsReplaced: a probe that never comes back does not let the
// outage last another half minute.
func TestAnInterruptedProbeIsReplaced(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		h := newHeader(t, f, arnA, arnB)
		w := newWrapper(f, testVolume, 12, []string{arnA, arnB})
		w.remember(arnA, newError(KindTimeout, opDecrypt, arnA, nil))
		time.Sleep(outageMemory)
		ctx, cancel := context.WithCancel(context.Background())
		f.before = func(ctx context.Context, op, key string) error {
			cancel()
			return contextError(ctx, op, key)
		}
		_, err := w.open(ctx, h)
		requireKind(t, err, KindInterrupted, opDecrypt, arnA)
		f.before, f.calls = nil, nil
		for range 2 {
			o, err := w.open(context.Background(), h)
			require.NoError(t, err)
			o.secrets.Wipe()
			time.Sleep(2 * outageChance)
		}
		require.Equal(t, []string{opDecrypt + " " + arnB, opDecrypt + " " + arnA}, f.calls)
	})
}

// TestAnOutageHidesNoDenialForLong: a governing key that was disabled behind an
// outage closes what another copy opens as soon as the memory ends.
func TestAnOutageHidesNoDenialForLong(t *testing.T) {
	for _, denial := range []Kind{KindDenied, KindDisabled, KindNotFound} {
		inOutage(t, func(t *testing.T, o *outage, next func() error) {
			o.says = denial
			o.over.Store(true)
			start := time.Now()
			for time.Since(start) < outageMemory {
				require.NoError(t, next())
				time.Sleep(time.Second)
			}
			for range 3 {
				require.ErrorIs(t, next(), denial.Sentinel(), "it governs again, for all")
			}
			require.LessOrEqual(t, outageMemory, 30*time.Second)
		})
	}
}

// TestTheDeadKeyIsTriedLast: if no other copy opens, the governing key is asked
// after all, and what it says decides.
func TestTheDeadKeyIsTriedLast(t *testing.T) {
	for _, c := range []struct {
		others, governing, want Kind // KindInterrupted = it works
		opens                   bool
	}{
		{KindDenied, KindInterrupted, 0, true},
		{KindBadBlob, KindInterrupted, 0, true},
		{KindDenied, KindDisabled, KindDisabled, false},
		{KindUnavailable, KindDenied, KindDenied, false},
		{KindDenied, KindUnavailable, KindUnavailable, false},
		{KindBadBlob, KindTimeout, KindTimeout, false},
		{KindUnavailable, KindBadBlob, KindUnavailable, false},
		{KindDenied, KindBadBlob, KindBadBlob, false},
	} {
		f := newFake()
		h := newHeader(t, f, arnA, arnB, arnC)
		r := newTestRing(t, f, nil, arnA, arnB, arnC)
		r.core.remember(arnA, newError(KindTimeout, opDecrypt, arnA, nil))
		fails := map[string]Kind{arnA: c.governing, arnB: c.others, arnC: c.others}
		if c.governing == KindInterrupted {
			delete(fails, arnA)
		}
		f.before, f.calls = failing(fails), nil
		err := open(t, r, h)
		require.Equal(t, []string{opDecrypt + " " + arnB, opDecrypt + " " + arnC, opDecrypt + " " + arnA}, f.calls)
		if c.opens {
			require.NoError(t, err)
			_, out := r.core.outages[arnA]
			require.False(t, out)
			continue
		}
		require.Equal(t, c.want.String(), kindOf(err).String(), "%s, then %s", c.others, c.governing)
	}
}

// TestOutageOrder: several dead keys keep the client's order among themselves, and
// a header with no other copy is opened with its dead key as if nothing were known.
func TestOutageOrder(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnA, arnB, arnC)
	w := newWrapper(f, testVolume, 12, []string{arnA, arnB, arnC})
	list := candidates(w.keys(), h)
	fail := func(key string) { w.remember(key, newError(KindUnavailable, opDecrypt, key, nil)) }
	require.Equal(t, []int{0, 1, 2}, w.turns(list))
	fail(arnB)
	require.Equal(t, []int{0, 2, 1}, w.turns(list))
	fail(arnA)
	require.Equal(t, []int{2, 0, 1}, w.turns(list))
	fail(arnC)
	require.Equal(t, []int{0, 1, 2}, w.turns(list))
	w.remember(arnC, nil)
	require.Equal(t, []int{2, 0, 1}, w.turns(list))

	twice := h.Clone()
	twice.Copies = []crypt.Copy{h.Copies[0], h.Copies[0], h.Copies[1]}
	w.remember(arnB, nil)
	require.Equal(t, []int{2, 0, 1}, w.turns(candidates(w.keys(), twice)))
	w.outages[arnA] = time.Now()
	require.Equal(t, []int{0, 1, 2}, w.turns(candidates(w.keys(), twice)), "both copies are the probe's")

	alone := h.Clone()
	alone.Copies = h.Copies[:1]
	until := w.outages[arnA]
	require.Equal(t, []int{0}, w.turns(candidates(w.keys(), alone)))
	require.Equal(t, until, w.outages[arnA])
	require.Greater(t, w.budget(context.Background(), arnA, 1), 9*time.Second)
}

// TestNewFilesWaitForTheirKey: an outage never puts new files under another key.
func TestNewFilesWaitForTheirKey(t *testing.T) {
	f := newFake()
	r := newTestRing(t, f, nil, arnA, arnB)
	r.core.remember(arnA, newError(KindTimeout, opDecrypt, arnA, nil))
	f.before = failing(map[string]Kind{arnA: KindUnavailable})
	_, err := r.Fresh(context.Background())
	requireKind(t, err, KindUnavailable, opGenerate, arnA)
	_, err = r.NewKey(context.Background(), crypt.UseFile)
	requireKind(t, err, KindUnavailable, opGenerate, arnA)
	require.NotContains(t, f.calls, opGenerate+" "+arnB)
}

// TestRegionDown is failover on the real protocol: after the first open, a region
// whose endpoint is down sees one open's requests per memory, and all of them
// again once it is back.
func TestRegionDown(t *testing.T) {
	noLeaks(t)
	srv := kmstest.New(t, nil)
	east, west := srv.CreateKey("us-east-1"), srv.CreateKey("us-west-2")
	a := newTestAWS(t, srv)
	headers := make(chan *crypt.Header, 40)
	for range cap(headers) {
		headers <- newHeader(t, a, east, west)
	}
	r := newTestRing(t, a, func(o *RingOptions) { o.Deadline = 2 * time.Second }, east, west)
	next := func() error { return open(t, r, <-headers) }
	forget := func() {
		r.core.mu.Lock()
		defer r.core.mu.Unlock()
		require.Contains(t, r.core.outages, east)
		r.core.outages[east] = time.Now()
	}
	asked := func(region string) (files []string) {
		for _, c := range srv.Calls() {
			if c.Region == region && !slices.Contains(files, c.Context["kmsfs:file"]) {
				files = append(files, c.Context["kmsfs:file"])
			}
		}
		return files
	}
	require.NoError(t, next())
	srv.SetDown("us-east-1", true)
	require.NoError(t, next())
	srv.Reset()
	require.Zero(t, together(10, next))
	require.Empty(t, asked("us-east-1"))
	require.Len(t, asked("us-west-2"), 10)

	forget()
	srv.Reset()
	require.Zero(t, together(10, next))
	require.Len(t, asked("us-west-2"), 10)
	tries := 0
	for _, c := range srv.Calls() {
		require.Equal(t, opDecrypt, c.Op)
		if c.Region == "us-east-1" {
			tries++
		}
	}
	require.NotZero(t, tries)
	require.Less(t, tries, 12, "one open's requests")

	srv.SetDown("us-east-1", false)
	forget()
	srv.Reset()
	require.NoError(t, next())
	require.Zero(t, together(5, next))
	require.Len(t, asked("us-east-1"), 6)
	assert.Empty(t, asked("us-west-2"))

	srv.SetState(east, kmstest.Disabled)
	require.ErrorIs(t, next(), crypt.ErrKeyDisabled, "its denial is final")
}
