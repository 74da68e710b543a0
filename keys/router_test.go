package keys

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

func TestRouter(t *testing.T) {
	aws, local := newFake(), newFake()
	r := NewRouter(aws, local)
	ctx := context.Background()
	for _, key := range []string{arnA, "local:a"} {
		k, blob, err := r.GenerateDataKey(ctx, key, nil)
		require.NoError(t, err)
		again, err := r.Decrypt(ctx, key, nil, blob)
		require.NoError(t, err)
		again.Wipe()
		_, err = r.Encrypt(ctx, key, nil, k)
		require.NoError(t, err)
		k.Wipe()
		_, err = r.ReEncrypt(ctx, key, key, nil, blob)
		require.NoError(t, err)
		_, err = r.Describe(ctx, key)
		require.NoError(t, err)
		require.NoError(t, r.(Prober).Probe(ctx, key, opDecrypt), "without dry runs, a description must do")
	}
	require.Equal(t, 6, aws.count())
	require.Equal(t, 6, local.count())
	_, err := r.ReEncrypt(ctx, arnA, "local:a", nil, nil)
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
	_, err = NewRouter(aws, nil).Decrypt(ctx, "local:a", nil, nil)
	requireKind(t, err, KindRejected, opDecrypt, "local:a")
	_, _, err = NewRouter(nil, local).GenerateDataKey(ctx, arnA, nil)
	requireKind(t, err, KindRejected, opGenerate, arnA)
}

func TestProbeOfALocalKey(t *testing.T) {
	l := newTestLocal(t, "local:a")
	r := NewRouter(nil, l).(Prober)
	require.NoError(t, r.Probe(context.Background(), "local:a", opDecrypt))
	require.NoError(t, l.Disable("local:a"))
	require.ErrorIs(t, r.Probe(context.Background(), "local:a", opDecrypt), crypt.ErrKeyDisabled)
	require.ErrorIs(t, r.Probe(context.Background(), "local:b", opDecrypt), crypt.ErrKeyNotFound)
}
