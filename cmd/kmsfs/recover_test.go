package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// TestRecoveryGivesUp: with KMS away a mount does not wait for the key of each of the
// files that were changed.
func TestRecoveryGivesUp(t *testing.T) {
	asked, away := 0, errors.New("KMS is away")
	answer := func(context.Context, *crypt.Header) (*crypt.Secrets, error) { asked++; return nil, away }
	open := func(o *patientOpener) error { _, err := o.Open(t.Context(), nil); return err }

	o := &patientOpener{open: answer, limit: time.Hour, each: time.Hour, until: time.Now().Add(time.Hour)}
	for range 10 {
		require.ErrorIs(t, open(o), away)
	}
	require.Equal(t, 10, asked, "a key that is denied at once costs no patience")
	require.False(t, o.tired())

	require.Positive(t, o.vain)
	o.limit = o.vain - 1
	require.ErrorIs(t, open(o), volume.ErrLater)
	require.Equal(t, 10, asked)
	require.True(t, o.tired())

	away, asked = nil, 0
	o = &patientOpener{open: answer, limit: 0, each: time.Hour, until: time.Now().Add(time.Hour)}
	for range 10 {
		require.NoError(t, open(o))
	}
	require.Equal(t, 10, asked, "keys that are given cost no patience")
}

// TestRecoveryEnds: keys that are given, but slowly, are not asked for beyond the limit,
// and what is under way then is given up.
func TestRecoveryEnds(t *testing.T) {
	asked := 0
	slow := func(ctx context.Context, _ *crypt.Header) (*crypt.Secrets, error) {
		asked++
		select {
		case <-time.After(60 * time.Millisecond):
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	o := &patientOpener{open: slow, limit: time.Hour, each: time.Hour, until: time.Now().Add(100 * time.Millisecond)}
	_, err := o.Open(t.Context(), nil)
	require.NoError(t, err)
	_, err = o.Open(t.Context(), nil)
	require.ErrorIs(t, err, volume.ErrLater, "it would come too late")
	_, err = o.Open(t.Context(), nil)
	require.ErrorIs(t, err, volume.ErrLater)
	require.Equal(t, 2, asked)
	require.Zero(t, o.vain, "the key service did not fail")

	hang := func(ctx context.Context, _ *crypt.Header) (*crypt.Secrets, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	o = &patientOpener{open: hang, limit: time.Hour, each: time.Millisecond, until: time.Now().Add(time.Hour)}
	_, err = o.Open(t.Context(), nil)
	require.ErrorIs(t, err, context.DeadlineExceeded, "one call waits for no more than kms.deadline")
	require.Positive(t, o.vain)
}
