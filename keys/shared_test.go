package keys

import (
	"context"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// TestSharedEnvelope: the promises of a ring hold with either envelope, so the tests of
// those that matter run again with the other one.
func TestSharedEnvelope(t *testing.T) {
	asShared(t)
	for _, test := range []func(*testing.T){
		TestTrust, TestGoverningCopy, TestCommitmentDecides, TestReplicas, TestSetTrusted, TestForgetAndClose, TestRingUnderRace,
		TestCacheAge, TestFailuresAreNotRemembered, TestRetainDuringACall,
		TestConcurrentOpensAreOneCall, TestInterruptedCaller, TestDeadlineOfACall, TestCloseEndsCalls,
		TestParallelCreates, TestReturnedTooLate, TestDeniedKey, TestFailureReachesEveryWaiter, TestWaitersSurviveAChangeOfKeys, TestCloseFreesWaiters, TestThrottledCreate,
		TestDenials, TestOneAccessDenied, TestOutage, TestOutageThatEnds, TestStrict, TestHeals, TestAnswerFromBeforeTheDenial, TestOtherKeysDenial, TestLock,
		TestDeadRegionCostsNothing, TestOneOpenProbes, TestAnOutageHidesNoDenialForLong, TestNewFilesWaitForTheirKey,
		TestRewrapEveryRoute, TestRefresh, TestRewrapRefuses, TestRewrapGoesWhereItIsTold,
	} {
		name := runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()
		t.Run(name[strings.LastIndexByte(name, '.')+1:], test)
	}
}

func asShared(t *testing.T) {
	shared = true
	t.Cleanup(func() { shared = false })
}

// sharedTest runs a test on a ring of a shared volume in fake time, and checks that
// nothing is left alive.
func sharedTest(t *testing.T, test func(*testing.T, *fake, *Ring)) {
	t.Helper()
	asShared(t)
	poolTest(t, 10*time.Millisecond, test)
}

// TestSharedCalls: 9,000 files cost a handful of calls to make, and as many to open for
// the first time, by many at once.
func TestSharedCalls(t *testing.T) {
	asShared(t)
	noLeaks(t)
	f, ctx := newFake(), context.Background()
	r := newTestRing(t, f, nil, arnA)
	const files, workers = 9000, 16
	headers := make([]*crypt.Header, files)
	inParallel(workers, files, func(i int) {
		fresh, err := r.Fresh(ctx)
		require.NoError(t, err)
		headers[i] = fresh.Header
		fresh.Secrets.Wipe()
	})
	require.LessOrEqual(t, f.count(), files/mintFiles+2)
	seen, under := map[crypt.FileID]bool{}, map[crypt.FileID]int{}
	for _, h := range headers {
		require.False(t, seen[h.File], "a number was given out twice")
		seen[h.File] = true
		under[h.Wrapped().File]++
	}
	for _, n := range under {
		require.LessOrEqual(t, n, mintFiles)
	}
	reader := newTestRing(t, f, nil, arnA)
	inParallel(workers, files, func(i int) { require.NoError(t, open(t, reader, headers[i])) })
	s := reader.Stats()
	require.Equal(t, map[string]int64{opDecrypt: int64(len(under))}, s.Calls, "one Decrypt for each intermediate key")
	require.Equal(t, len(under), s.SharedKeys)
	require.Greater(t, s.SharedHits, int64(files-workers*len(under)-1))
}

// TestSharedAtHand: a file whose intermediate key is remembered is opened by whoever wants
// it, with no call to share; one whose key is not, or whose copy is another, is not.
func TestSharedAtHand(t *testing.T) {
	asShared(t)
	noLeaks(t)
	f := newFake()
	maker := newTestRing(t, f, nil, arnA)
	first, second := take(t, maker), take(t, maker)
	defer wipeFresh(first)
	defer wipeFresh(second)
	r := newTestRing(t, f, nil, arnA)
	require.False(t, r.core.atHand(first.Header), "nothing was opened")
	require.NoError(t, open(t, r, first.Header))
	require.True(t, r.core.atHand(second.Header))
	other := second.Header.Clone()
	other.Copies[0].Blob = append([]byte{1}, other.Copies[0].Blob...)
	require.False(t, r.core.atHand(other))
	foreign := second.Header.Clone()
	foreign.Volume[0] ^= 1
	require.False(t, r.core.atHand(foreign))

	before, own := f.count(), 0
	type mine struct{}
	r.flight.next = openerFunc(func(ctx context.Context, h *crypt.Header) (opened, error) {
		if ctx.Value(mine{}) != nil {
			own++
		}
		return r.cache.open(ctx, h)
	})
	s, err := r.Open(context.WithValue(t.Context(), mine{}, true), second.Header)
	require.NoError(t, err)
	s.Wipe()
	require.Equal(t, 1, own)
	require.Equal(t, before, f.count())
	r.Forget()
	require.False(t, r.core.atHand(second.Header), "it is forgotten with the rest")
}

// TestAgedIsNotAtHand: an intermediate key that is too old is asked for again, by a call
// of the ring's, though it was not swept yet.
func TestAgedIsNotAtHand(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := newKeyMemo(8, time.Minute)
		defer m.close()
		request := func() (*crypt.Key, error) { return crypt.RandomKey() }
		for _, id := range []byte{1, 2} {
			k, _, err := m.get(t.Context(), ask{blob: string(id)}, request)
			require.NoError(t, err)
			k.Wipe()
			time.Sleep(time.Second)
		}
		second := ask{blob: "\x02"}
		require.True(t, m.has(second))
		time.Sleep(time.Minute)
		m.mu.Lock()
		swept := m.entries[second] == nil
		m.mu.Unlock()
		require.False(t, swept, "the first was swept, and the sweep after it is yet to come")
		require.False(t, m.has(second))
	})
}

type openerFunc func(context.Context, *crypt.Header) (opened, error)

func (f openerFunc) open(ctx context.Context, h *crypt.Header) (opened, error) { return f(ctx, h) }

func inParallel(workers, n int, f func(i int)) {
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				f(i)
			}
		})
	}
	wg.Wait()
}

// TestNextKeyIsThere: a program that makes files without end waits for the key service
// once, at its first file.
func TestNextKeyIsThere(t *testing.T) {
	sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
		start := time.Now()
		for range 3 * mintFiles {
			wipeFresh(take(t, r))
			time.Sleep(time.Millisecond)
		}
		require.Less(t, time.Since(start), 3*mintFiles*time.Millisecond+20*time.Millisecond)
		require.LessOrEqual(t, f.count(), 4)
	})
}

// TestNextKeyWaitsLong: the next intermediate key is there also if the one in use lasts for
// long after it was fetched.
func TestNextKeyWaitsLong(t *testing.T) {
	sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
		start := time.Now()
		for range mintFiles - mintAheadFiles + 10 {
			wipeFresh(take(t, r))
		}
		for time.Since(start) < mintAge-time.Minute {
			time.Sleep(time.Minute)
			wipeFresh(take(t, r))
		}
		f.before = failing(map[string]Kind{arnA: KindUnavailable})
		time.Sleep(time.Minute)
		wipeFresh(take(t, r))
	})
}

// TestIntermediateKeysAge: an intermediate key serves new files for an hour, and is wiped
// when nobody made any for ten minutes. Nothing is fetched for nobody.
func TestIntermediateKeysAge(t *testing.T) {
	sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
		inters := map[crypt.FileID]bool{}
		for range 180 {
			k := take(t, r)
			inters[k.Header.Wrapped().File] = true
			wipeFresh(k)
			time.Sleep(time.Minute)
		}
		require.InDelta(t, 3.5, len(inters), 0.6, "in three hours, each taking over before the one before has ended")
		require.LessOrEqual(t, f.count(), len(inters)+1)
		require.Positive(t, r.Stats().SharedKeys)
		time.Sleep(mintIdle * 12 / 10)
		synctest.Wait()
		require.Zero(t, r.Stats().SharedKeys)
		f.calls = nil
		time.Sleep(24 * time.Hour)
		require.Zero(t, f.count())
		wipeFresh(take(t, r))
		require.Equal(t, 1, f.count())
	})
}

// TestRotationFails: what is left of an intermediate key lasts while the key service
// fails; then a create fails as it would without one, and all goes on when it is back.
func TestRotationFails(t *testing.T) {
	for _, kind := range []Kind{KindUnavailable, KindDenied, KindDisabled, KindNotFound} {
		sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
			wipeFresh(take(t, r))
			f.before, f.calls = failing(map[string]Kind{arnA: kind}), nil
			for range mintFiles - 1 {
				wipeFresh(take(t, r))
				time.Sleep(time.Millisecond)
			}
			require.LessOrEqual(t, f.count(), 2, "the key service is left alone for a while")
			_, err := r.Fresh(context.Background())
			requireKind(t, err, kind, opGenerate, arnA)
			f.before = nil
			time.Sleep(maxPenalty)
			wipeFresh(take(t, r))
		})
	}
}

// TestThrottledRotation: who leaves before a call ends that somebody else has begun hears
// what it came to so far: KMS answered, so it is no timeout.
func TestThrottledRotation(t *testing.T) {
	ctx, tries := withAttempts(context.Background())
	leader, other := withAttempts(context.Background())
	joinAttempts(ctx, other)
	joinAttempts(leader, tries) // each may have waited for the other
	gone := newError(KindTimeout, opGenerate, arnA, nil)
	require.Equal(t, gone, tries.left(gone))
	noteAttempt(leader, newError(KindUnavailable, opGenerate, arnA, nil))
	require.Equal(t, KindUnavailable, tries.left(gone).Kind)
}

// TestSharedKeysAreWiped: under new keys, on Forget and by the kill switch, at once, and
// what is on its way then too. Opens and creates ask again.
func TestSharedKeysAreWiped(t *testing.T) {
	for name, end := range map[string]func(r *Ring){
		"forget": (*Ring).Forget,
		"trust":  func(r *Ring) { r.SetTrusted([]string{arnC}); r.SetTrusted([]string{arnA}) },
		"lock":   lockOnce,
	} {
		t.Run(name, func(t *testing.T) {
			sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
				k := take(t, r)
				wipeFresh(k)
				live := crypt.LiveKeys() - 1 // the intermediate key
				require.NoError(t, open(t, r, k.Header))
				require.Positive(t, r.Stats().SharedKeys)
				end(r)
				require.Equal(t, live, crypt.LiveKeys())
				require.Zero(t, r.Stats().SharedKeys)
				f.calls = nil
				again := take(t, r)
				require.NotEqual(t, k.Header.Wrapped(), again.Header.Wrapped())
				wipeFresh(again)
				require.NoError(t, open(t, r, k.Header))
				require.Equal(t, []string{opGenerate + " " + arnA, opDecrypt + " " + arnA}, f.calls)

				end(r)
				go func() { _ = open(t, r, k.Header) }()
				time.Sleep(5 * time.Millisecond) // it is under way
				end(r)
				time.Sleep(time.Second)
				require.Zero(t, r.Stats().SharedKeys, "an answer from before")
			})
		})
	}
}

// TestSharedKeyUnderAnEndedLease: an intermediate key that is remembered opens nothing
// once the lease of its key has ended, and is wiped.
func TestSharedKeyUnderAnEndedLease(t *testing.T) {
	asShared(t)
	runLeases(t, testGrace, func(l *leaseTest) {
		list := newHeaders(t, l.fake, 2, arnA)
		require.NoError(t, open(t, l.ring, list[0]))
		wipeFresh(take(t, l.ring))
		require.Positive(t, l.ring.Stats().SharedKeys)
		l.fail(arnA, KindDisabled)
		l.after(2 * testInterval)
		l.is(arnA, LeaseRevoked)
		require.Zero(t, l.ring.Stats().SharedKeys)
		l.calls(arnA)
		require.ErrorIs(t, open(t, l.ring, list[1]), crypt.ErrKeyDisabled)
		_, err := l.ring.Fresh(context.Background())
		require.ErrorIs(t, err, crypt.ErrKeyDisabled)
		l.mend(arnA)
		l.after(testInterval)
		require.NoError(t, open(t, l.ring, list[1]))
	}, arnA)
}

// TestLockedRingMakesNoIntermediateKey: nor does one stay that was asked for past the pool.
func TestLockedRingMakesNoIntermediateKey(t *testing.T) {
	sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
		live := crypt.LiveKeys()
		r.Lock()
		_, err := r.NewKey(context.Background(), crypt.UseFile)
		require.ErrorIs(t, err, crypt.ErrKeyDisabled)
		require.Equal(t, live, crypt.LiveKeys())
		r.Unlock()
		k, err := r.NewKey(context.Background(), crypt.UseFile)
		require.NoError(t, err)
		wipeFresh(k)
	})
}

// TestNothingIsRememberedWhileLocked: an open that was let in just before the kill switch
// leaves no key behind, though it asks only afterwards, and though its caller is gone;
// nor does a renewal ask.
func TestNothingIsRememberedWhileLocked(t *testing.T) {
	for _, envelope := range []bool{false, true} {
		t.Run(fmt.Sprintf("shared=%v", envelope), func(t *testing.T) {
			if envelope {
				asShared(t)
			}
			noLeaks(t)
			f := newFake()
			r := newTestRing(t, f, nil, arnA)
			h := newHeader(t, f, arnA)
			s, err := r.Open(context.Background(), h)
			require.NoError(t, err)
			defer s.Wipe()
			r.Lock()
			live := crypt.LiveKeys()
			o, err := r.flight.open(context.Background(), h)
			require.NoError(t, err)
			o.secrets.Wipe()
			require.Equal(t, live, crypt.LiveKeys())
			r.core.setTrusted([]string{arnC, arnA})
			calls := f.count()
			_, err = r.Renew(context.Background(), h, s)
			require.ErrorIs(t, err, ErrLocked)
			require.Equal(t, calls, f.count())
			r.Unlock()
			require.NoError(t, open(t, r, h))
			require.Equal(t, calls+1, f.count(), "each key has to be opened again")
		})
	}
}

// TestDroppedFetchEnds: a call for an intermediate key that nobody wants any more is given
// up at once.
func TestDroppedFetchEnds(t *testing.T) {
	sharedTest(t, func(t *testing.T, f *fake, r *Ring) {
		var calls, ended atomic.Int64
		f.before = func(ctx context.Context, op, key string) error {
			if calls.Add(1) > 1 {
				return nil
			}
			<-ctx.Done()
			ended.Add(1)
			return contextError(ctx, op, key)
		}
		got := make(chan *crypt.Fresh)
		go func() {
			k, err := r.Fresh(context.Background())
			require.NoError(t, err)
			got <- k
		}()
		synctest.Wait()
		start := time.Now()
		r.Forget()
		synctest.Wait()
		require.EqualValues(t, 1, ended.Load())
		require.Equal(t, start, time.Now())
		wipeFresh(<-got)
	})
}

// TestOtherSharedKeys: the id alone opens nothing from memory. A blob of another
// intermediate key, of another volume, under another key, or of none, is sent to the key
// service, which refuses it; and a header whose id was edited asks for what it says.
func TestOtherSharedKeys(t *testing.T) {
	asShared(t)
	noLeaks(t)
	f := newFake()
	r := newTestRing(t, f, nil, arnA, arnC)
	pair := newHeaders(t, f, 2, arnA)
	other := newHeader(t, f, arnA)
	require.NoError(t, open(t, r, pair[0]))
	require.NoError(t, open(t, r, other))
	stray, err := crypt.RandomKey()
	require.NoError(t, err)
	defer stray.Wipe()
	foreign := other.Clone()
	foreign.Volume[0] ^= 1
	file := pair[1].Clone()
	file.Shared = false
	for name, edit := range map[string]func(h *crypt.Header){
		"blob of another":          func(h *crypt.Header) { h.Copies = other.Copies },
		"blob of nobody":           func(h *crypt.Header) { h.Copies = []crypt.Copy{{Key: arnA, Blob: []byte("planted")}} },
		"id of another":            func(h *crypt.Header) { h.File = other.Identity.Numbered(2).File },
		"label of another key":     func(h *crypt.Header) { h.Copies[0].Key = arnC },
		"key planted under the id": func(h *crypt.Header) { h.Copies[0].Blob = f.wrap(arnA, h.EncryptionContext(testVolume), stray) },
		"blob wrapped for a file":  func(h *crypt.Header) { h.Copies[0].Blob = f.wrap(arnA, file.EncryptionContext(testVolume), stray) },
		"blob of another volume": func(h *crypt.Header) {
			h.Copies[0].Blob = f.wrap(arnA, h.EncryptionContext(foreign.Volume), stray)
		},
	} {
		h := pair[1].Clone()
		edit(h)
		before := f.count()
		err := open(t, r, h)
		require.Error(t, err, name)
		require.True(t, kindOf(err) == KindBadBlob || kindOf(err) == KindIncorrectKey, "%s: %v", name, err)
		require.Equal(t, before+1, f.count(), "%s was not asked about", name)
	}
	for name, edit := range map[string]func(h *crypt.Header){
		"number of another file": func(h *crypt.Header) { h.File = pair[0].File },
		"number of no file":      func(h *crypt.Header) { h.File = h.Identity.Numbered(999).File },
		"commitment of another":  func(h *crypt.Header) { h.Commitment = pair[0].Commitment },
	} {
		h := pair[1].Clone()
		edit(h)
		require.ErrorIs(t, open(t, r, h), crypt.ErrDamaged, name)
	}
	calls := f.count()
	require.ErrorIs(t, open(t, r, file), crypt.ErrDamaged, "the flag is gone")
	shared = false
	plain := newTestRing(t, f, nil, arnA)
	require.ErrorIs(t, open(t, plain, pair[1]), crypt.ErrDamaged, "a shared header in an ordinary volume")
	require.Equal(t, calls, f.count(), "refused without a call")
	require.NoError(t, open(t, r, pair[1]))
}

// TestRenewShared: open files without a name that share an intermediate key cost one call.
func TestRenewShared(t *testing.T) {
	asShared(t)
	noLeaks(t)
	f, ctx := newFake(), context.Background()
	list := newHeaders(t, f, 5, arnC)
	r := newTestRing(t, f, nil, arnA, arnC)
	f.calls = nil
	for _, h := range list {
		s, err := r.Open(ctx, h)
		require.NoError(t, err)
		next, err := r.Renew(ctx, h, s)
		require.NoError(t, err)
		s.Wipe()
		require.Equal(t, h.Identity, next.Identity)
		require.Equal(t, arnA, next.Copies[0].Key)
		require.Len(t, next.Copies, 1)
		require.NoError(t, open(t, newTestRing(t, f, nil, arnA), next))
	}
	require.Equal(t, []string{opDecrypt + " " + arnC, opEncrypt + " " + arnA}, f.calls[:2])
	require.Len(t, f.calls, 2+len(list), "and a Decrypt for each ring of this test")
	gone := newTestRing(t, f, nil, arnA)
	s, err := r.Open(ctx, list[0])
	require.NoError(t, err)
	defer s.Wipe()
	_, err = gone.Renew(ctx, list[0], s)
	require.ErrorIs(t, err, crypt.ErrKeyRejected, "the intermediate key can't be had any more")
}

// TestRewrapShared: one intermediate key, one way; each file is still checked where the
// key passes through this process.
func TestRewrapShared(t *testing.T) {
	asShared(t)
	noLeaks(t)
	ctx := context.Background()
	for _, c := range []struct {
		name     string
		from, to string
		calls    []string // for each intermediate key
	}{
		{"ReEncrypt", arnA, arnC, []string{opReEncrypt + " " + arnA}},
		{"Decrypt and Encrypt", arnA, arnB, []string{opDecrypt + " " + arnA, opEncrypt + " " + arnB}},
		{"refresh", arnA, arnA, []string{opReEncrypt + " " + arnA}},
	} {
		f := newFake()
		w := NewRewrapper(f, testVolume)
		list := append(newHeaders(t, f, 30, c.from), newHeaders(t, f, 30, c.from)...)
		f.calls = nil
		var moved [60]*crypt.Header
		inParallel(8, len(list), func(i int) {
			copied, err := w.Rewrap(ctx, list[i], c.from, c.to)
			require.NoError(t, err)
			moved[i] = list[i].Clone()
			moved[i].Copies = []crypt.Copy{copied}
		})
		require.ElementsMatch(t, append(c.calls, c.calls...), f.calls, c.name)
		require.Equal(t, len(f.calls), w.Calls())
		f.calls = nil
		for _, h := range moved {
			require.NoError(t, w.Verify(ctx, h, c.to))
			require.NoError(t, w.Prove(ctx, h, c.to))
		}
		require.Len(t, f.calls, 2, "%s: one Decrypt for each to verify", c.name)

		forged := list[3].Clone()
		forged.Commitment[0] ^= 1
		require.ErrorIs(t, w.Verify(ctx, forged, c.from), crypt.ErrDamaged, "the key is remembered, the commitment is each file's own")
		_, err := w.Rewrap(ctx, forged, c.from, c.to)
		if len(c.calls) > 1 {
			require.ErrorIs(t, err, crypt.ErrDamaged)
		}
		planted := list[3].Clone()
		planted.Copies = []crypt.Copy{{Key: c.from, Blob: list[40].Copies[0].Blob}}
		_, err = w.Rewrap(ctx, planted, c.from, c.to)
		require.ErrorIs(t, err, crypt.ErrDamaged, "the blob of another intermediate key")
		w.Close()
	}
}

// TestSharedFailureIsNotRemembered: the next file asks again.
func TestSharedFailureIsNotRemembered(t *testing.T) {
	asShared(t)
	f, ctx := newFake(), context.Background()
	list := newHeaders(t, f, 2, arnA)
	w := NewRewrapper(f, testVolume)
	defer w.Close()
	r := newTestRing(t, f, nil, arnA)
	f.before = failing(map[string]Kind{arnA: KindDenied})
	_, err := w.Rewrap(ctx, list[0], arnA, arnC)
	require.ErrorIs(t, err, crypt.ErrKeyDenied)
	require.ErrorIs(t, open(t, r, list[0]), crypt.ErrKeyDenied)
	f.before = nil
	_, err = w.Rewrap(ctx, list[1], arnA, arnC)
	require.NoError(t, err)
	require.NoError(t, open(t, r, list[1]))
}

// TestLateWaiterHasItsOwnTime: who joins another's request shortly before that is given
// up has the whole deadline all the same: for the same intermediate key, or the same file.
func TestLateWaiterHasItsOwnTime(t *testing.T) {
	poolTest(t, 0, func(t *testing.T, f *fake, r *Ring) {
		h := newHeader(t, f, arnA)
		lateWaiter(t, f, r, []*crypt.Header{h, h})
	})
	sharedTest(t, func(t *testing.T, f *fake, r *Ring) { lateWaiter(t, f, r, newHeaders(t, f, 2, arnA)) })
}

func lateWaiter(t *testing.T, f *fake, r *Ring, list []*crypt.Header) {
	var calls atomic.Int64
	f.before = func(ctx context.Context, op, key string) error {
		if calls.Add(1) > 1 {
			return nil
		}
		<-ctx.Done() // KMS is silent until then
		return contextError(ctx, op, key)
	}
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- open(t, r, list[0]) }()
	time.Sleep(defaultDeadline - time.Second)
	go func() { second <- open(t, r, list[1]) }()
	require.ErrorIs(t, <-first, crypt.ErrKeyTimeout)
	require.NoError(t, <-second)
}

// TestMemoIsBounded: of more intermediate keys than there is room for, the least recently
// used goes, and is wiped.
func TestMemoIsBounded(t *testing.T) {
	live := crypt.LiveKeys()
	m := newKeyMemo(2, 0)
	asked := 0
	get := func(blob string) {
		k, _, err := m.get(context.Background(), ask{blob: blob}, func() (*crypt.Key, error) { asked++; return crypt.RandomKey() })
		require.NoError(t, err)
		k.Wipe()
	}
	for _, blob := range []string{"a", "b", "a", "c", "a"} {
		get(blob)
	}
	require.Equal(t, 3, asked)
	require.Equal(t, live+2, crypt.LiveKeys())
	get("b")
	require.Equal(t, 4, asked, "b had to go")
	m.close()
	get("a")
	require.Equal(t, live, crypt.LiveKeys())
}

// TestSharedOperatorWhoCannotRead: on a real protocol, ReEncrypt is enough, once for all.
func TestSharedOperatorWhoCannotRead(t *testing.T) {
	asShared(t)
	srv := kmstest.New(t, nil)
	admin, from, to := newTestAWS(t, srv), srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	list := newHeaders(t, admin, 10, from)
	p := srv.AddPrincipal("operator", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo"}})
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Credentials: p.Credentials()})
	require.NoError(t, err)
	w := NewRewrapper(a, testVolume)
	defer w.Close()
	srv.Reset()
	for _, h := range list {
		c, err := w.Rewrap(context.Background(), h, from, to)
		require.NoError(t, err)
		h.Copies = []crypt.Copy{c}
	}
	require.Equal(t, 1, srv.Count())
	require.Equal(t, list[0].EncryptionContext(testVolume), srv.Calls()[0].Context)
	require.ErrorIs(t, open(t, newTestRing(t, a, nil, to), list[9]), crypt.ErrKeyDenied)
	require.NoError(t, open(t, newTestRing(t, admin, nil, to), list[9]))
}
