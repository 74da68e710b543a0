package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// TestRecoveryGivesUp: with KMS away a mount does not wait for the key of each of the
// files that were changed.
func TestRecoveryGivesUp(t *testing.T) {
	asked, away := 0, errors.New("KMS is away")
	answer := func(context.Context, *crypt.Header) (*crypt.Secrets, error) { asked++; return nil, away }
	open := func(o *patientOpener) error { _, err := o.Open(t.Context(), nil); return err }

	o := &patientOpener{open: answer, limit: time.Hour}
	for range 10 {
		require.ErrorIs(t, open(o), away)
	}
	require.Equal(t, 10, asked, "a key that is denied at once costs no patience")
	require.False(t, o.tired())

	require.Positive(t, o.vain)
	o.limit = o.vain - 1
	require.ErrorIs(t, open(o), errNoPatience)
	require.Equal(t, 10, asked)
	require.True(t, o.tired())

	away, asked = nil, 0
	o = &patientOpener{open: answer, limit: 0}
	for range 10 {
		require.NoError(t, open(o))
	}
	require.Equal(t, 10, asked, "keys that are given cost no patience")
}
