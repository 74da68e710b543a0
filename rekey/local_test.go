package rekey

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/volume"
)

// realKeys is package keys' own rewrapper behind this package's interface.
type realKeys struct{ *keys.Rewrapper }

func (r realKeys) Route(from, to string) (Route, error) {
	way, err := r.Rewrapper.Route(from, to)
	return Route{Name: way.Method.String(), Calls: way.Calls, Plaintext: way.Plaintext}, err
}

// The same with real local keys: a ring that trusts only the new key opens what
// the old one sealed.
func TestWithLocalKeys(t *testing.T) {
	ctx := context.Background()
	local := keys.NewLocal(filepath.Join(t.TempDir(), "keyring"))
	require.NoError(t, local.Create("local:a"))
	require.NoError(t, local.Create("local:b"))
	s := newStage(t, oldKey) // for its file helpers; the volume is made anew below
	s.dir = filepath.Join(t.TempDir(), "vol")
	ring := keys.NewRing(keys.RingOptions{Volume: s.id, Trusted: []string{"local:a"}, Provider: local, PoolSize: -1})
	defer ring.Close()
	fresh, err := ring.NewKey(ctx, crypt.UseVolume)
	require.NoError(t, err)
	raw, err := fresh.Header.Marshal()
	require.NoError(t, err)
	require.NoError(t, volume.Create(s.dir, volume.Settings{
		Format: volume.Format, ID: s.id, BlockSize: crypt.DefaultBlockSize, Names: volume.NamesEncrypted, Keys: []string{"local:a"}, Header: raw,
	}, fresh.Secrets))
	names := []string{"x", "d/y", "d/e/z"}
	for _, n := range names {
		f, err := ring.NewKey(ctx, crypt.UseFile)
		require.NoError(t, err)
		raw, err := f.Header.Marshal()
		require.NoError(t, err)
		s.raw(n, raw)
	}
	v := s.open()
	r, err := Run(ctx, v, realKeys{keys.NewRewrapper(local, v.ID())}, Options{Key: "local:b", Trusted: []string{"local:a", "local:b"}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 3, r.Changed)

	require.NoError(t, local.Disable("local:a"))
	after := keys.NewRing(keys.RingOptions{Volume: s.id, Trusted: []string{"local:b"}, Provider: local, PoolSize: -1})
	defer after.Close()
	for _, n := range names {
		secrets, err := after.Open(ctx, s.read(n))
		require.NoError(t, err)
		secrets.Wipe()
	}
	secrets, err := after.Open(ctx, s.open().Header())
	require.NoError(t, err)
	require.NoError(t, s.open().Unlock(secrets))
}
