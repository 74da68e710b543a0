package keys

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

func TestCheckAfterARekey(t *testing.T) {
	l := NewLocal(t.TempDir())
	for _, name := range []string{"local:old", "local:new"} {
		require.NoError(t, l.Create(name))
	}
	id := crypt.VolumeID{1}
	r := NewRing(RingOptions{Volume: id, Trusted: []string{"local:old"}, Provider: l, PoolSize: -1})
	defer r.Close()
	f, err := r.Fresh(context.Background())
	require.NoError(t, err)
	defer f.Secrets.Wipe()
	require.NoError(t, r.Check(f.Header))
	r.SetTrusted([]string{"local:new", "local:old"})
	require.ErrorIs(t, r.Check(f.Header), crypt.ErrKeyRejected, "trusted still, but no longer swept")
	other := f.Header.Clone()
	other.Volume[0] ^= 1
	require.ErrorIs(t, r.Check(other), crypt.ErrForeign)
}
