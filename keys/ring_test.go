package keys

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

func open(t testing.TB, r *Ring, h *crypt.Header) error {
	t.Helper()
	s, err := r.Open(context.Background(), h)
	if err == nil {
		require.Equal(t, h.Identity, s.Identity())
		s.Wipe()
	}
	return err
}

func TestRingMakesAndOpens(t *testing.T) {
	noLeaks(t)
	f := newFake()
	r := newTestRing(t, f, nil, arnA, arnB)
	fresh, err := r.Fresh(context.Background())
	require.NoError(t, err)
	defer fresh.Secrets.Wipe()
	require.Len(t, fresh.Header.Copies, 1)
	require.Equal(t, arnA, fresh.Header.Copies[0].Key, "the first key wraps new files")
	s, err := r.Open(context.Background(), fresh.Header)
	require.NoError(t, err)
	defer s.Wipe()
	require.True(t, s.DataKey().Equal(fresh.Secrets.DataKey()))
	volume, err := r.NewKey(context.Background(), crypt.UseVolume)
	require.NoError(t, err)
	defer volume.Secrets.Wipe()
	require.Equal(t, crypt.UseVolume, volume.Header.Use)
	require.NoError(t, open(t, r, volume.Header))
	r.Return(nil)
}

// TestTrust: a header's label selects from the trusted list and does nothing else.
func TestTrust(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnC)
	r := newTestRing(t, f, nil, arnA, arnB)
	before := f.count()
	err := open(t, r, h)
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
	require.ErrorContains(t, err, arnC)
	require.Equal(t, before, f.count(), "an untrusted key is never called")

	foreign := h.Clone()
	foreign.Volume = crypt.VolumeID{1}
	require.ErrorIs(t, open(t, r, foreign), crypt.ErrForeign)
	blocks := h.Clone()
	blocks.BlockLog2 = 13
	require.ErrorIs(t, open(t, r, blocks), crypt.ErrDamaged)
	require.Equal(t, before, f.count())

	// The blob of an untrusted key under a trusted label.
	lie := h.Clone()
	lie.Copies[0].Key = arnA
	require.ErrorIs(t, open(t, r, lie), crypt.ErrKeyRejected)

	empty := newTestRing(t, f, nil)
	_, err = empty.Fresh(context.Background())
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
}

// TestGoverningCopy is the rule of DESIGN 6: the first trusted key's denial is
// final; its outage, or a blob that fails, tries the next.
func TestGoverningCopy(t *testing.T) {
	for first, c := range map[Kind]struct {
		opens bool
		calls int
	}{
		KindDenied: {false, 1}, KindDisabled: {false, 1}, KindNotFound: {false, 1}, KindRejected: {false, 1},
		KindUnavailable: {true, 2}, KindTimeout: {true, 2}, KindLimit: {true, 2}, KindCredentials: {true, 2},
		KindBadBlob: {true, 2}, KindIncorrectKey: {true, 2},
	} {
		f := newFake()
		h := newHeader(t, f, arnB, arnA) // the header's order does not matter
		r := newTestRing(t, f, nil, arnA, arnB)
		f.before = failing(map[string]Kind{arnA: first})
		f.calls = nil
		err := open(t, r, h)
		require.Equal(t, c.opens, err == nil, "%s: %v", first, err)
		require.Equal(t, c.calls, f.count(), "%s", first)
		require.Equal(t, opDecrypt+" "+arnA, f.calls[0])
		if !c.opens {
			require.ErrorIs(t, err, first.Sentinel())
		}
	}
}

// TestVerdict: which of several failures is reported.
func TestVerdict(t *testing.T) {
	for _, c := range []struct{ first, second, want Kind }{
		{KindUnavailable, KindDenied, KindUnavailable}, // another key's denial changes nothing
		{KindTimeout, KindUnavailable, KindTimeout},
		{KindBadBlob, KindUnavailable, KindUnavailable}, // may open later
		{KindBadBlob, KindDenied, KindBadBlob},
		{KindIncorrectKey, KindBadBlob, KindIncorrectKey},
	} {
		f := newFake()
		h := newHeader(t, f, arnA, arnB)
		r := newTestRing(t, f, nil, arnA, arnB)
		f.before = failing(map[string]Kind{arnA: c.first, arnB: c.second})
		require.Equal(t, c.want.String(), kindOf(open(t, r, h)).String())
	}
}

func TestCommitmentDecides(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnA)
	other, err := crypt.RandomKey()
	require.NoError(t, err)
	defer other.Wipe()
	blob, err := f.Encrypt(context.Background(), arnA, h.EncryptionContext(testVolume), other)
	require.NoError(t, err)
	good := h.Copies[0].Blob
	h.Copies[0].Blob = blob
	r := newTestRing(t, f, nil, arnA)
	require.ErrorIs(t, open(t, r, h), crypt.ErrDamaged, "it opens, but to another data key")
	h.Copies = append(h.Copies, crypt.Copy{Key: arnA, Blob: good})
	require.NoError(t, open(t, r, h), "a second copy under the same key")
}

// TestReplicas: the region called is that of the trusted list's ARN.
func TestReplicas(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnMRK)
	r := newTestRing(t, f, nil, arnMRK2)
	f.calls = nil
	require.NoError(t, open(t, r, h))
	require.Equal(t, []string{opDecrypt + " " + arnMRK2}, f.calls)
	both := newTestRing(t, f, nil, arnMRK, arnMRK2)
	f.before = failing(map[string]Kind{arnMRK: KindUnavailable})
	require.NoError(t, open(t, both, h), "a replica opens it while the first region is out")
}

func TestSetTrusted(t *testing.T) {
	noLeaks(t)
	f := newFake()
	h := newHeader(t, f, arnA)
	both := newHeader(t, f, arnA, arnB)
	r := newTestRing(t, f, nil, arnA, arnB)
	require.NoError(t, open(t, r, h))
	fresh, err := r.Fresh(context.Background())
	require.NoError(t, err)
	r.Return(fresh)
	require.Equal(t, 1, r.Stats().PoolReady)

	r.SetTrusted([]string{arnB})
	require.Equal(t, []string{arnB}, r.Trusted())
	require.Zero(t, r.Stats().PoolReady)
	require.Zero(t, r.Stats().CacheKeys)
	require.ErrorIs(t, open(t, r, h), crypt.ErrKeyRejected, "not from memory either")
	require.NoError(t, open(t, r, both))
	fresh, err = r.Fresh(context.Background())
	require.NoError(t, err)
	require.Equal(t, arnB, fresh.Header.Copies[0].Key)

	r.SetTrusted([]string{arnA})
	r.Return(fresh)
	require.Zero(t, r.Stats().PoolReady, "a key of the old list is not taken back")
}

func TestForgetAndClose(t *testing.T) {
	before := crypt.LiveKeys()
	f := newFake()
	h := newHeader(t, f, arnA)
	r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
	require.NoError(t, open(t, r, h))
	fresh, err := r.Fresh(context.Background())
	require.NoError(t, err)
	r.Return(fresh)
	require.Greater(t, crypt.LiveKeys(), before)
	r.Forget()
	require.Equal(t, before, crypt.LiveKeys())
	require.NoError(t, open(t, r, h), "it goes on")
	r.Close()
	require.Equal(t, before, crypt.LiveKeys())
	_, err = r.Fresh(context.Background())
	require.ErrorIs(t, err, errClosed)
	require.ErrorIs(t, open(t, r, h), errClosed)
	require.Equal(t, before, crypt.LiveKeys(), "nothing is remembered after Close")
}

// TestCallCounts is issue 2's promise on a real protocol: no call for what was
// opened before, one per first open and per create.
func TestCallCounts(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	r := newTestRing(t, newTestAWS(t, srv), func(o *RingOptions) { o.PoolSize = -1 }, key)
	var headers []*crypt.Header
	for range 20 {
		f, err := r.Fresh(context.Background())
		require.NoError(t, err)
		headers = append(headers, f.Header)
		f.Secrets.Wipe()
	}
	require.Equal(t, 20, srv.Count(opGenerate))
	for range 3 {
		for _, h := range headers {
			require.NoError(t, open(t, r, h))
		}
	}
	require.Equal(t, 20, srv.Count(opDecrypt))
	require.Equal(t, 40, srv.Count())
	s := r.Stats()
	require.EqualValues(t, 20, s.Calls[opGenerate])
	require.EqualValues(t, 20, s.Calls[opDecrypt])
	require.EqualValues(t, 40, s.CacheHits)
	require.EqualValues(t, 20, s.CacheMisses)
	require.Equal(t, 20, s.CacheKeys)
	require.NotZero(t, s.CallTime)
	require.Equal(t, headers[0].EncryptionContext(testVolume), srv.Calls()[0].Context)
}

func TestReadOnlyWorkMakesNoKeys(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		f := newFake()
		var headers []*crypt.Header
		for range 50 {
			headers = append(headers, newHeader(t, f, arnA))
		}
		f.calls = nil
		r := NewRing(RingOptions{Volume: testVolume, Shared: shared, Trusted: []string{arnA}, Provider: f})
		defer r.Close()
		for _, h := range headers {
			require.NoError(t, open(t, r, h))
		}
		time.Sleep(time.Hour)
		require.NotContains(t, f.calls, opGenerate+" "+arnA)
	})
}

// TestRingUnderRace uses everything at once; the race detector is the judge.
func TestRingUnderRace(t *testing.T) {
	noLeaks(t)
	f := newFake()
	var headers []*crypt.Header
	for range 8 {
		headers = append(headers, newHeader(t, f, arnA, arnB))
	}
	r := newTestRing(t, f, func(o *RingOptions) { o.CacheKeys, o.CacheAge = 4, time.Millisecond }, arnA, arnB)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 200 {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(j%5)*time.Millisecond)
				s, err := r.Open(ctx, headers[(i+j)%len(headers)])
				if err == nil {
					s.Wipe()
				}
				fresh, err := r.Fresh(ctx)
				switch {
				case err != nil:
				case j%2 == 0:
					r.Return(fresh)
				default:
					fresh.Secrets.Wipe()
				}
				if j%50 == i {
					r.SetTrusted([]string{arnB, arnA})
				}
				r.Stats()
				cancel()
			}
		})
	}
	wg.Wait()
	for _, h := range headers {
		assert.NoError(t, open(t, r, h))
	}
	r.Close()
}

func TestErrorWords(t *testing.T) {
	e := newError(KindDenied, opDecrypt, arnA, errors.New("AccessDeniedException: no"))
	require.Equal(t, "Decrypt with "+arnA+": access to the KMS key was denied: AccessDeniedException: no", e.Error())
	require.Equal(t, "us-east-1", e.Region)
	require.Equal(t, "kms:Decrypt", e.Action)
	e = newError(KindDisabled, opDecrypt, "local:a", nil)
	e.State = stateDisabled
	require.Equal(t, "Decrypt with local:a: the KMS key is disabled or pending deletion (state Disabled)", e.Error())
	require.Empty(t, e.Action)
	for k := range kinds {
		require.ErrorIs(t, newError(Kind(k), opDecrypt, arnA, nil), Kind(k).Sentinel())
		require.NotContains(t, Kind(k).String(), "kind-")
	}
	require.Equal(t, KindRejected, kindOf(errors.New("x")))
	require.Equal(t, KindBadBlob, kindOf(crypt.ErrDamaged))
}
