package keys

import (
	"context"
	"crypto/fips140"
	"crypto/rand"
	"maps"
	"sync"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// fake is a Provider in memory whose calls can be held up and made to fail.
type fake struct {
	// before, if set, runs ahead of each call; its error is the call's.
	before func(ctx context.Context, op, key string) error

	mu    sync.Mutex
	blobs map[string]fakeBlob // guarded by mu
	calls []string            // guarded by mu; "op key"
}

type fakeBlob struct {
	key string
	ec  EncryptionContext
	raw []byte
}

func newFake() *fake { return &fake{blobs: map[string]fakeBlob{}} }

func (f *fake) enter(ctx context.Context, op, key string) error {
	f.mu.Lock()
	f.calls = append(f.calls, op+" "+key)
	f.mu.Unlock()
	if f.before != nil {
		return f.before(ctx, op, key)
	}
	return nil
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls)
}

func (f *fake) wrap(key string, ec EncryptionContext, k *crypt.Key) []byte {
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	_ = k.Use(func(raw []byte) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.blobs[string(id)] = fakeBlob{key, maps.Clone(ec), append([]byte(nil), raw...)}
		return nil
	})
	return id
}

func (f *fake) GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (*crypt.Key, []byte, error) {
	if err := f.enter(ctx, opGenerate, key); err != nil {
		return nil, nil, err
	}
	k, err := crypt.RandomKey()
	if err != nil {
		return nil, nil, err
	}
	return k, f.wrap(key, ec, k), nil
}

func (f *fake) Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) ([]byte, error) {
	if err := f.enter(ctx, opEncrypt, key); err != nil {
		return nil, err
	}
	return f.wrap(key, ec, k), nil
}

func (f *fake) Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error) {
	if err := f.enter(ctx, opDecrypt, key); err != nil {
		return nil, err
	}
	return f.unwrap(opDecrypt, key, ec, blob)
}

func (f *fake) unwrap(op, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.blobs[string(blob)]
	if !ok || !maps.Equal(b.ec, ec) {
		return nil, newError(KindBadBlob, op, key, nil)
	}
	if !crypt.SameKey(b.key, key) {
		return nil, newError(KindIncorrectKey, op, key, nil)
	}
	return crypt.NewKey(append([]byte(nil), b.raw...))
}

func (f *fake) ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) ([]byte, error) {
	if err := f.enter(ctx, opReEncrypt, from); err != nil {
		return nil, err
	}
	k, err := f.unwrap(opReEncrypt, from, ec, blob)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	return f.wrap(to, ec, k), nil
}

func (f *fake) Describe(ctx context.Context, key string) (Description, error) {
	return Description{Key: key, State: stateEnabled}, f.enter(ctx, opDescribe, key)
}

// failing makes every call with one of the keys fail with its kind.
func failing(kinds map[string]Kind) func(context.Context, string, string) error {
	return func(_ context.Context, op, key string) error {
		if k, ok := kinds[key]; ok {
			return newError(k, op, key, nil)
		}
		return nil
	}
}

var testVolume = crypt.VolumeID{9, 9, 9}

const (
	arnA    = "arn:aws:kms:us-east-1:111122223333:key/aaaaaaaa-1111-4111-8111-111111111111"
	arnB    = "arn:aws:kms:eu-west-1:111122223333:key/bbbbbbbb-2222-4222-8222-222222222222"
	arnC    = "arn:aws:kms:us-east-1:111122223333:key/cccccccc-3333-4333-8333-333333333333"
	arnMRK  = "arn:aws:kms:us-east-1:111122223333:key/mrk-dddddddd444444448444444444444444"
	arnMRK2 = "arn:aws:kms:eu-west-1:111122223333:key/mrk-dddddddd444444448444444444444444"
)

func newTestRing(t testing.TB, p Provider, edit func(*RingOptions), trusted ...string) *Ring {
	t.Helper()
	o := RingOptions{Volume: testVolume, Shared: shared, Trusted: trusted, Provider: p}
	if edit != nil {
		edit(&o)
	}
	r := NewRing(o)
	t.Cleanup(r.Close)
	return r
}

// shared is the envelope that the tests of this package use now (TestSharedEnvelope).
var shared bool

// newHeader makes a data key wrapped by each of the keys.
func newHeader(t testing.TB, p Provider, keys ...string) *crypt.Header {
	t.Helper()
	return newHeaders(t, p, 1, keys...)[0]
}

// newHeaders makes the headers of n files; if the envelope is shared, under one
// intermediate key.
func newHeaders(t testing.TB, p Provider, n int, keys ...string) (list []*crypt.Header) {
	t.Helper()
	ctx, w := context.Background(), newWrapper(p, testVolume, 12, keys)
	var held *crypt.Key
	var copies []crypt.Copy
	for number := uint16(1); len(list) < n; number++ {
		id, err := crypt.NewIntermediate(testVolume, 12)
		if !shared {
			id, err = crypt.NewIdentity(testVolume, crypt.UseFile, 12)
		}
		require.NoError(t, err)
		if shared && held != nil {
			id = list[0].Wrapped()
		} else {
			var c crypt.Copy
			held, c, err = w.generate(ctx, &id)
			require.NoError(t, err)
			defer held.Wipe()
			copies = []crypt.Copy{c}
			for _, key := range keys[1:] {
				blob, err := p.Encrypt(ctx, key, id.EncryptionContext(testVolume), held)
				require.NoError(t, err)
				copies = append(copies, crypt.Copy{Key: key, Blob: blob})
			}
		}
		if shared {
			id = id.Numbered(number)
		}
		f, err := newFresh(id, held, copies[0])
		require.NoError(t, err)
		f.Secrets.Wipe()
		f.Header.Copies = append([]crypt.Copy(nil), copies...)
		list = append(list, f.Header)
	}
	return list
}

// inFakeTime runs a test in a bubble where time passes at once when all wait.
func inFakeTime(t *testing.T, test func(*testing.T)) {
	t.Helper()
	if fips140.Enabled() {
		// The FIPS module gathers entropy from the jitter of the clock, which
		// stands still here, and panics.
		cryptotest.SetGlobalRandom(t, 1)
	}
	synctest.Test(t, test)
}

// noLeaks fails the test if keys are alive afterwards that were not before.
func noLeaks(t testing.TB) {
	t.Helper()
	before := crypt.LiveKeys()
	t.Cleanup(func() {
		// A call that nobody waits for any more wipes its key a moment later.
		for range 500 {
			if crypt.LiveKeys() <= before {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		require.LessOrEqual(t, crypt.LiveKeys(), before, "keys were not wiped")
	})
}
