package keys

import (
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// A small file costs one of these: all that a create or a first open asks of the ring
// when its key is local.
func localRing(b *testing.B) *Ring {
	l := newTestLocal(b, "local:one")
	r := NewRing(RingOptions{Provider: NewRouter(nil, l), BlockLog2: 12, Trusted: []string{"local:one"}})
	b.Cleanup(r.Close)
	return r
}

func BenchmarkFreshLocal(b *testing.B) {
	r := localRing(b)
	b.ReportAllocs()
	for b.Loop() {
		f, err := r.Fresh(b.Context())
		require.NoError(b, err)
		f.Secrets.Wipe()
	}
}

// The same with an envelope that is shared, whose intermediate key is remembered.
func BenchmarkOpenShared(b *testing.B) {
	f := newFake()
	openMany(b, NewRing(RingOptions{Volume: testVolume, Shared: true, Trusted: []string{arnA}, Provider: f}))
}

func BenchmarkOpenLocal(b *testing.B) { openMany(b, localRing(b)) }

func openMany(b *testing.B, r *Ring) {
	b.Cleanup(r.Close)
	var headers []*crypt.Header
	for range 20000 { // more than the ring remembers
		f, err := r.Fresh(b.Context())
		require.NoError(b, err)
		headers = append(headers, f.Header)
		f.Secrets.Wipe()
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		s, err := r.Open(b.Context(), headers[i%len(headers)])
		require.NoError(b, err)
		s.Wipe()
		i++
	}
}

// What a request to KMS costs, ours and the emulator's together.
func BenchmarkDecryptAWS(b *testing.B) {
	srv := kmstest.New(b, nil)
	arn := srv.CreateKey("eu-central-1")
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Credentials: srv.Admin().Credentials()})
	require.NoError(b, err)
	ec := EncryptionContext{"kmsfs:volume": "a", "kmsfs:file": "b"}
	k, blob, err := a.GenerateDataKey(b.Context(), arn, ec)
	require.NoError(b, err)
	k.Wipe()
	b.ReportAllocs()
	for b.Loop() {
		k, err := a.Decrypt(b.Context(), arn, ec, blob)
		require.NoError(b, err)
		k.Wipe()
	}
}
